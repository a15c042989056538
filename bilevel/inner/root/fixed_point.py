"""A user's map as the inner problem: y with y = T(y, x, batch).

    F = y - T(y)        dy*/dx = (I - dT/dy)^{-1} dT/dx

| | calls of T | memory |
| --- | --- | --- |
| step | the method's | the method's |

`Implicit(bilevel.Neumann(steps=J, step_size=1))` is backpropagation through the map's last J + 1 iterations at y*.

Wins: any iteration that comes to rest. Fails: where I - dT/dy is singular.
Reference: Blondel et al. 2022, arXiv 2105.15183; Grazzini et al. 2020, arXiv 2006.16218 (its error, recalled).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from bilevel.inner.closed_form.base import check_function
from bilevel.inner.dynamics import Dynamics, Point
from bilevel.inner.root.base import Method, check_method, difference, residual_of
from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class FixedPoint(Dynamics):
    """Steps to a fixed point of a map.

    Args:
        map: T, called as `map(inner, outer, batch)` for one task; returns a tree like inner.
        method: `Plain`, `Anderson`, `Broyden` or `NewtonRoot` of `bilevel.inner.root`.

    `Converge` looks at |y - T(y)|. See `Root` for what estimators need.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind; (when used) T returned something that is not
            like inner.

    Example:
        >>> import torch, bilevel as bl
        >>> cosine = bl.inner.FixedPoint(lambda y, x, b: torch.cos(x * y), bl.inner.root.Anderson())
        >>> problem = bl.Problem(bl.inner.half_square(cosine.residual), lambda y, x, b: y)
        >>> hg = bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Converge(cosine, tol=1e-5), estimator=bl.Implicit(bl.Dense()))
        >>> hg.inner, hg.grad
        (tensor(0.7391), tensor(-0.2975))
    """

    map: Callable[[Tree, Tree, Any], Tree]
    method: Method

    def __post_init__(self) -> None:
        check_function("FixedPoint", "map", self.map)
        check_method("FixedPoint", self.method, jacobian=True)

    @property
    def autonomous(self) -> bool:
        return True

    def residual(self, inner: Tree, outer: Tree, batch: Any) -> Tree:
        """y - T(y), for one task: `half_square` of it is an inner loss to report."""
        return difference(self.map)(inner, outer, batch)

    def init(self, inner: Tree, outer: Tree) -> Any:
        return self.method.init(tuple(tree.tensors(inner)))

    def step(self, inner: Tree, state: Any, outer: Tree, at: Point) -> tuple[Tree, Any]:
        found, size = residual_of("FixedPoint", self.residual, inner, at)
        at.report(size, vanishing=True)
        y = tuple(tree.tensors(inner))
        moved, state = self.method.step(y, found, state, at.space, lambda: at.jacobian(self.residual, inner))
        return tree.like(inner, moved), state

    def stationarity(self, inner: Tree, outer: Tree, at: Point) -> Tree | None:
        found, size = residual_of("FixedPoint", self.residual, inner, at)
        at.report(size, vanishing=True)
        return tree.like(inner, found)
