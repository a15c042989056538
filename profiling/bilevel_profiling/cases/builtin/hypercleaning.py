"""Data hyper-cleaning: a weight for each of 1000 digits, 40 % of them mislabelled; K steps on a perceptron 64-128-10.

    inner   weighted cross-entropy on the mislabelled training set        outer   cross-entropy on a clean validation
    set

The loop should leave the mislabelled examples with lower weights (`corruption_auc`), so that a net trained with them
does better than one trained without (`test_accuracy` against `baseline_test_accuracy`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from bilevel.problems import hypercleaning
from bilevel_profiling.cases.parallel import DATA

HIDDEN = 128
OPTIMIZER = bl.SGD(lr=hypercleaning.INNER_LR)
PARALLEL = DATA
INNER_STEPS = [5, 20, 50]
OUTER_STEPS = 15
PRELOAD = ("sklearn.datasets", "sklearn.model_selection", "sklearn.metrics")

# The net is not converged after K steps and its Hessian is indefinite: undamped, CG stops at once (NEGATIVE_CURVATURE)
# and Neumann's series grows.
DAMPING = 0.2

ESTIMATORS = {
    "unrolled": bl.Unrolled(),
    "unrolled iterates": bl.Unrolled(keep="iterates"),
    "unrolled segments": bl.Unrolled(keep="segments"),
    "unrolled last 5": bl.Unrolled(last=5),
    "implicit CG": bl.Implicit(bl.CG(max_steps=10, tol=1e-3, damping=DAMPING)),
    "implicit Neumann": bl.Implicit(bl.Neumann(steps=20, step_size=0.3, damping=DAMPING)),
    "memory-reduced": bl.MemoryReduced(tol=1e-3, damping=DAMPING),
    "first-order corrected": bl.FirstOrderCorrected(),
    # No FirstOrder: the weights act through the inner loss alone, which it does not differentiate, so it refuses the
    # problem.
}


def setup(device: str, seed: int = 0, *, hidden: int = HIDDEN) -> Any:
    """The problem, with the whole training set as the inner batch."""
    return hypercleaning.setup(device, seed, hidden=hidden)


def outer_optimizer(tensors: Sequence[Tensor]) -> torch.optim.Optimizer:
    """Adam on the logits of the weights."""
    return torch.optim.Adam(tensors, lr=hypercleaning.OUTER_LR)


def evaluate(outer: Mapping[str, Tensor], device: str, seed: int = 0) -> dict[str, float]:
    """What the weights are worth to a fresh net. `baseline_` is the same net with equal weights."""
    found = hypercleaning.evaluate(outer, seed=seed, hidden=HIDDEN)
    return {name: value for name, value in found.items() if not name.startswith("ideal_")}
