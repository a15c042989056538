"""Linear least squares: the minimizer of half the sum of squared residuals, in one step.

    g = |r(y)|^2 / 2,    r linear in y        y <- y - (J'J)^{-1} J' r(y)

| | products J d | other | memory |
| --- | --- | --- | --- |
| step | P (of one task) | P^3 / 3, in float64; 2 inner gradients for the check | n P + P^2 per task |

Wins: few unknowns (P up to some hundreds), any shape of residuals.
Fails: residuals that are not linear in y, which the check refuses (SteepestDescent and LBFGS take them); unknowns that
the residuals do not determine, which are refused.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from bilevel.inner.closed_form.base import check_flag, check_function, check_landed, least_squares
from bilevel.inner.dynamics import Dynamics, Point
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class LeastSquares(Dynamics):
    """Solve residuals that are linear in the inner variable, per task.

    Args:
        residuals: r, called as `residuals(inner, outer, batch)` for one task; returns floating tensors (a pytree).
            The inner loss is half the sum of their squares (`half_square` writes that), or a multiple of it.
        check: hold every step against the inner loss.

    Raises:
        TypeError: residuals is no function.
        ValueError: (when used) the inner loss is another, or not quadratic; the unknowns are not determined.

    Example:
        >>> import torch, bilevel as bl
        >>> def residuals(w, x, batch):
        ...     return batch[0] @ w - x * batch[1]
        >>> problem = bl.Problem(bl.inner.half_square(residuals), lambda w, x, batch: w.sum())
        >>> batch = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), torch.tensor([1.0, 2.0, 9.0])
        >>> hg = bl.hypergradient(problem, torch.tensor(3.0), torch.zeros(2), bl.Batches(batch, None),
        ...     solver=bl.Descent(bl.inner.LeastSquares(residuals), steps=1), estimator=bl.Unrolled())
        >>> hg.inner, hg.grad
        (tensor([3., 3.]), tensor(2.))
    """

    residuals: Callable[[Tree, Tree, Any], Tree]
    check: bool = True

    def __post_init__(self) -> None:
        check_function("LeastSquares", "residuals", self.residuals)
        check_flag("LeastSquares", self.check)

    @property
    def symmetric(self) -> bool:
        return True

    @property
    def autonomous(self) -> bool:
        return True

    def step(self, inner: Tree, state: Any, outer: Tree, at: Point) -> tuple[Tree, Any]:
        moved = least_squares("LeastSquares", self.residuals, None, inner, outer, at)
        if self.check:
            check_landed("LeastSquares", moved, at)
        return moved, state

    def stationarity(self, inner: Tree, outer: Tree, at: Point) -> Tree | None:
        return at.gradient(inner)
