"""Ridge regression: linear least squares with a pull to zero, in one step.

    g = |r(y)|^2 / 2 + sum of penalty y^2 / 2        y <- y - (J'J + D)^{-1} (J' r(y) + D y),    D = diag(penalty)

| | products J d | other | memory |
| --- | --- | --- | --- |
| step | P (of one task) | P^3 / 3, in float64; 2 inner gradients for the check | n P + P^2 per task |

Wins: few unknowns; penalties that are outer variables, one for all or one for each.
Fails: residuals that are not linear in y, which the check refuses. With more unknowns than data see KernelRidge.
Reference: Hoerl and Kennard 1970; as an inner loop Bertinetto et al. 2019, arXiv 1805.08136.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from bilevel.inner.closed_form.base import check_flag, check_function, check_landed, least_squares
from bilevel.inner.dynamics import Dynamics, Point
from bilevel.optim.base import Hyper, check_hyper
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class Ridge(Dynamics):
    """Solve a ridge regression, per task.

    Args:
        residuals: as for `LeastSquares`.
        penalty: at least 0: a number, a tree like the inner variable, or a function of outer that returns one of both,
            a 0-dim tensor, or tensors that broadcast. The inner loss holds half of penalty times the squares of y: the
            dynamics does not add it. A negative one that a function returns is refused by the check, or gives NaN.
        check: hold every step against the inner loss.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range; (when used) the inner loss is another.

    Example:
        >>> import torch, bilevel as bl
        >>> def residuals(w, x, batch):
        ...     return w - batch
        >>> def inner_loss(w, x, batch):
        ...     return bl.inner.half_square(residuals)(w, x, batch) + x.exp() * w.square().sum() / 2
        >>> problem = bl.Problem(inner_loss, lambda w, x, batch: w.sum())
        >>> hg = bl.hypergradient(problem, torch.tensor(0.0), torch.zeros(2), bl.Batches(torch.ones(2), None),
        ...     solver=bl.Descent(bl.inner.Ridge(residuals, penalty=lambda x: x.exp()), steps=1),
        ...     estimator=bl.Implicit(bl.CG(5)))
        >>> hg.inner, hg.grad  # w = 1 / (1 + e^x)
        (tensor([0.5000, 0.5000]), tensor(-0.5000))
    """

    residuals: Callable[[Tree, Tree, Any], Tree]
    penalty: Hyper
    check: bool = True

    def __post_init__(self) -> None:
        check_function("Ridge", "residuals", self.residuals)
        check_hyper("Ridge", "penalty", self.penalty, 0.0)
        check_flag("Ridge", self.check)

    @property
    def symmetric(self) -> bool:
        return True

    @property
    def autonomous(self) -> bool:
        return True

    def step(self, inner: Tree, state: Any, outer: Tree, at: Point) -> tuple[Tree, Any]:
        moved = least_squares("Ridge", self.residuals, self.penalty, inner, outer, at)
        if self.check:
            check_landed("Ridge", moved, at)
        return moved, state

    def stationarity(self, inner: Tree, outer: Tree, at: Point) -> Tree | None:
        return at.gradient(inner)
