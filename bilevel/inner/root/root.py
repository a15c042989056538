"""A user's optimality condition as the inner problem: y with F(y, x, batch) = 0.

    dy*/dx = -(dF/dy)^{-1} dF/dx        which is what Implicit solves with

| | calls of F | memory |
| --- | --- | --- |
| step | the method's | the method's |

Wins: KKT conditions, stationarity of something else than a loss, discretised equations.
Fails: at roots where dF/dy is singular: the linear solver says so.
Reference: Blondel et al. 2022, arXiv 2105.15183 (implicit differentiation of a condition that the user writes).
Differences from peers: the forward is an argument of the same object, so that the condition that is solved is the one
that is differentiated; steps may be unrolled instead.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from bilevel.inner.closed_form.base import check_function
from bilevel.inner.dynamics import Dynamics, Point
from bilevel.inner.root.base import Method, check_method, residual_of
from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class Root(Dynamics):
    """Steps to a root of a function.

    The Jacobian need not be symmetric: estimators take linear solvers for such systems. The problem's inner loss is
    reported and nothing descends it; `half_square(root.residual)` is one that says how far the root is.

    Args:
        residual: F, called as `residual(inner, outer, batch)` for one task; returns a tree like inner.
        method: `NewtonRoot`, `Broyden`, `Anderson` or `Plain` of `bilevel.inner.root`.

    `Converge` looks at |F|.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind; (when used) F returned something that is not
            like inner.

    Example:
        >>> import torch, bilevel as bl
        >>> root = bl.inner.Root(lambda y, x, b: y**3 - x, bl.inner.root.NewtonRoot(bl.Dense()))
        >>> problem = bl.Problem(bl.inner.half_square(root.residual), lambda y, x, b: y)
        >>> hg = bl.hypergradient(problem, torch.tensor(8.0), torch.tensor(1.0), bl.Batches(None, None),
        ...     solver=bl.Converge(root, tol=1e-5), estimator=bl.Implicit(bl.Dense()))
        >>> hg.inner, hg.grad  # 2 and 1 / 12
        (tensor(2.), tensor(0.0833))
    """

    residual: Callable[[Tree, Tree, Any], Tree]
    method: Method

    def __post_init__(self) -> None:
        check_function("Root", "residual", self.residual)
        check_method("Root", self.method, jacobian=True)

    @property
    def autonomous(self) -> bool:
        return True

    def init(self, inner: Tree, outer: Tree) -> Any:
        return self.method.init(tuple(tree.tensors(inner)))

    def step(self, inner: Tree, state: Any, outer: Tree, at: Point) -> tuple[Tree, Any]:
        found, size = residual_of("Root", self.residual, inner, at)
        at.report(size, vanishing=True)
        y = tuple(tree.tensors(inner))
        moved, state = self.method.step(y, found, state, at.space, lambda: at.jacobian(self.residual, inner))
        return tree.like(inner, moved), state

    def stationarity(self, inner: Tree, outer: Tree, at: Point) -> Tree | None:
        found, size = residual_of("Root", self.residual, inner, at)
        at.report(size, vanishing=True)
        return tree.like(inner, found)
