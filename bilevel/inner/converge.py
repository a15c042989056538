"""Steps until the dynamics rests.

| | inner gradients | memory |
| --- | --- | --- |
| steps taken | steps + 1 | 2 P + optimizer state + one graph, independent of the number of steps |

Tasks stop independently: a task that rests is frozen by a mask while the others go on.
"""

import dataclasses

from torch import Tensor

from bilevel.inner.base import InnerSolver, as_dynamics, check_limit
from bilevel.inner.dynamics import Dynamics
from bilevel.optim.base import Optimizer


@dataclasses.dataclass(frozen=True)
class Converge(InnerSolver):
    """Steps until |stationarity| <= tol, for every task.

    Args:
        optimizer: how y moves: an inner optimizer, or a `Dynamics` that says when it rests.
        tol: on the Euclidean norm of the stationarity (the inner gradient, and what weight decay adds to it), absolute.
            By strong convexity |y - y*| <= tol / mu.
        max_steps: the most steps; running out is reported as Status.INNER_MAX_STEPS.

    Raises:
        TypeError, ValueError: the arguments are of the wrong kind, or (when used) the optimizer does not say where it
            rests (AdamW with weight decay).

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: (y**2).sum(), lambda y, x, b: y.sum())
        >>> found = bl.adapt(problem, torch.ones(1, dtype=torch.float64), torch.ones(2, dtype=torch.float64),
        ...     bl.Batches(None, None), solver=bl.Converge(bl.SGD(lr=0.25), tol=1e-6, max_steps=100))
        >>> found.status, found.stats["inner_steps"]
        (<Status.OK: 'Computed as asked.'>, 22)
    """

    sharded = True

    optimizer: Optimizer | Dynamics
    tol: float = 1e-6
    max_steps: int = 1000

    def __post_init__(self) -> None:
        as_dynamics("Converge", self.optimizer)
        if not isinstance(self.tol, (int, float)) or not self.tol > 0:
            raise ValueError(f"Converge was given tol={self.tol!r}; a positive number was needed")
        if not isinstance(self.max_steps, int) or isinstance(self.max_steps, bool) or self.max_steps < 1:
            raise ValueError(f"Converge was given max_steps={self.max_steps!r}; an integer of at least 1 was needed")
        check_limit("Converge", self.dynamics, self.max_steps)

    @property
    def dynamics(self) -> Dynamics:
        return as_dynamics("Converge", self.optimizer)

    @property
    def fixed(self) -> bool:
        return False

    def solved(self, residual: Tensor) -> Tensor:
        return residual <= self.tol

    def tightened(self, factor: float, floor: float) -> "Converge":
        return dataclasses.replace(self, tol=max(self.tol * factor, min(self.tol, floor)))
