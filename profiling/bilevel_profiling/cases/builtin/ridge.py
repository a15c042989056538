"""Ridge regression on the diabetes data in float64: one penalty for each of ten features, learned on validation data;
exact hypergradient known.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from bilevel.problems import ridge
from bilevel_profiling.cases.parallel import DATA

OPTIMIZER = bl.SGD(lr=0.4)
PARALLEL = DATA
INNER_STEPS = [5, 20, 80]
SOLUTION = bl.Converge(bl.SGD(lr=0.4), tol=1e-12, max_steps=5000)
OUTER_STEPS = 30
PRELOAD = ("sklearn.datasets",)

ESTIMATORS = {
    "unrolled": bl.Unrolled(),
    "unrolled iterates": bl.Unrolled(keep="iterates"),
    "unrolled segments": bl.Unrolled(keep="segments"),
    "unrolled last 5": bl.Unrolled(last=5),
    "implicit dense": bl.Implicit(bl.Dense()),
    "implicit CG": bl.Implicit(bl.CG(max_steps=10)),
    "implicit Neumann": bl.Implicit(bl.Neumann(steps=20, step_size=0.4)),
    "memory-reduced": bl.MemoryReduced(warm_inner=True, warm_adjoint=True),
    "first-order corrected": bl.FirstOrderCorrected(),
    # No FirstOrder: the penalties act through the inner loss alone.
}


def setup(device: str, seed: int = 0) -> Any:
    """The problem on the full training and validation parts."""
    return ridge.setup(device, seed)


def outer_optimizer(tensors: Sequence[Tensor]) -> torch.optim.Optimizer:
    """Adam on the log-penalties."""
    return torch.optim.Adam(tensors, lr=0.1)


def evaluate(outer: Mapping[str, Tensor], device: str, seed: int = 0) -> dict[str, float]:
    """Losses of the exact ridge solution at these penalties."""
    data = ridge.load(seed, device=device)
    with torch.no_grad():
        weights = ridge.solution(dict(outer), data.train)
        parts = {"validation_loss": data.valid, "test_loss": data.test}
        return {name: ridge.outer_loss(weights, dict(outer), part).item() for name, part in parts.items()}
