"""Few-shot learning: an initialization from which K steps on a few images each of 5 characters tell them apart (MAML, 2
tasks at a time).

    inner   cross-entropy on the support images + strength/2 |y - x|^2        outer   cross-entropy on the query images
          x = the start of y

The proximal term makes the initialization part of the inner loss, so that implicit and corrected estimators see it too
(iMAML). `accuracy` is that on characters never seen in the loop, after plain gradient descent from x.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from bilevel.problems import fewshot
from bilevel_profiling.cases import parallel

TASKS, SHOT, QUERY, WIDTH, STRENGTH = 2, 5, 5, 16, 0.5
# Half the usual step: batch normalization gives an untrained net a Hessian with eigenvalues from -40 to 30, and with
# steps of 0.1 (and more of them) its inner loop is chaotic at first, so that float32 loses digits and no estimator but
# unrolling points anywhere near the gradient.
LR = fewshot.INNER_LR / 2
OPTIMIZER = bl.SGD(lr=LR)
PARALLEL = parallel.TASKS
INNER_STEPS = [1, 3, 5]
OUTER_STEPS = 15

# So few steps leave the Hessian indefinite. With less damping conjugate gradients meet negative curvature; with this
# much the direction is fair (a cosine of 0.6 to 0.9) and the length is not, which Adam makes up for.
DAMPING = 30.0


def _mean(estimator: bl.Estimator) -> bl.Estimator:
    """One task after another: the memory of one."""
    return bl.TaskMean(estimator, chunk=1)


ESTIMATORS = {
    "unrolled": _mean(bl.Unrolled()),
    "unrolled iterates": _mean(bl.Unrolled(keep="iterates")),
    "unrolled segments": _mean(bl.Unrolled(keep="segments")),
    "implicit CG": _mean(bl.Implicit(bl.CG(max_steps=5, tol=1e-1, damping=DAMPING))),
    "memory-reduced": _mean(bl.MemoryReduced(steps=5, tol=1e-1, damping=DAMPING)),
    "first-order corrected": _mean(bl.FirstOrderCorrected(nu=0.1)),
    "first-order": _mean(bl.FirstOrder()),
}


def setup(
    device: str, seed: int = 0, *, tasks: int = TASKS, shot: int = SHOT, query: int = QUERY, width: int = WIDTH
) -> Any:
    """The problem, with the tasks of the first outer step."""
    problem, outer, inner, batches = fewshot.setup(device, seed, tasks=tasks, shot=shot, query=query, width=width)
    return bl.proximal(problem, STRENGTH), outer, inner, batches


def outer_optimizer(tensors: Sequence[Tensor]) -> torch.optim.Optimizer:
    """Adam on the initialization."""
    return torch.optim.Adam(tensors, lr=5e-3)


def batches(step: int, device: str, seed: int = 0) -> bl.Batches:
    """The tasks of an outer step: fresh ones for each."""
    data = _characters(seed)
    return next(
        fewshot.stream(data, steps=1, tasks=TASKS, shot=SHOT, query=QUERY, seed=seed + 1_000_003 * step, device=device)
    )


@functools.cache
def _characters(seed: int) -> Any:
    return fewshot.load("train", seed)


def evaluate(outer: Mapping[str, Tensor], device: str, seed: int = 0) -> dict[str, float]:
    """Accuracy on 20 tasks of characters held out."""
    return fewshot.evaluate(outer, seed=seed, tasks=20, shot=SHOT, query=10, lr=LR, steps=5, chunk=1)
