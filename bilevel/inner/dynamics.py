"""The contract of a dynamics: how y moves, and what it means that it rests.

    y_{k+1}, s_{k+1} = step(y_k, s_k, x)   at the inner problem of step k;      stationarity(y, x) = 0 at a solution

Nothing else moves y. Estimators of the steps taken differentiate `step`, estimators at the solution differentiate
`stationarity`; the two agree at a fixed point. With tasks, y and s have a leading task dimension and every task must
move by itself.
"""

import abc
from collections.abc import Callable
from typing import Any, Protocol, Self

from torch import Tensor

from bilevel._strategy import Strategy
from bilevel.optim.base import Optimizer, over_held
from bilevel.space.inner_product import Space
from bilevel.space.tree import Tree


class Products(Protocol):
    """A linear map by its products; vectors are tuples of tensors, like the inner variable's."""

    def matvec(self, v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A v."""

    def rmatvec(self, v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A' v."""


class Solved(Protocol):
    """What a linear solver answers."""

    @property
    def value(self) -> tuple[Tensor, ...]:
        """v with A v = b, as far as it got."""

    @property
    def residual(self) -> Tensor:
        """|b - A v| / |b|, per task."""

    @property
    def code(self) -> Tensor | int:
        """The code of its status."""


class Bound(Protocol):
    """A linear solver bound to one map."""

    def found(self, b: tuple[Tensor, ...]) -> Solved:
        """Solve A v = b."""


class Solves(Protocol):
    """What a dynamics asks of a linear solver: those of `bilevel.linear` have it."""

    def prepare(self, operator: Any, space: Space) -> Bound:
        """Bind to a linear map."""


class Point(Protocol):
    """The inner problem at one step, as a dynamics sees it."""

    @property
    def step(self) -> int:
        """The number of the step, from 0."""

    @property
    def batch(self) -> Any:
        """The step's batch, as the losses receive it."""

    def gradient(self, inner: Tree) -> Tree:
        """dg/dy at `inner`; None for tensors that the loss does not use. Differentiable where `step` is."""

    def value(self, inner: Tree) -> Tensor:
        """The inner loss at `inner`: 0-dim, or of shape (tasks,). Differentiable likewise."""

    @property
    def space(self) -> Space:
        """Dot products and norms of trees like `inner`, per task where there are tasks."""

    def apply(self, function: Callable[..., Any], *trees: Tree) -> Any:
        """function(*trees, outer, batch), written for one task, for each task. Differentiable likewise."""

    def pushforward(self, function: Callable[..., Any], inner: Tree, direction: Tree) -> list[Tensor]:
        """How the floating tensors that function(inner, outer, batch) returns change along a direction of `inner`: J d,
        for each task. Costs one call and two backwards. Differentiable likewise.
        """

    def hessian(self, inner: Tree) -> Products:
        """d2g/dy2 at `inner`, as what `bilevel.linear` solvers take. Costs one gradient, which a `gradient(inner)` that
        follows does not cost again, and each product one backward. Differentiable likewise.
        """

    def jacobian(self, function: Callable[..., Any], inner: Tree) -> Products:
        """The derivative in inner of function(inner, outer, batch), written for one task, which returns a tree like
        inner. Costs one call and one backward, and each product one backward. Differentiable likewise.
        """

    def outer_gradient(self, inner: Tree) -> Tree:
        """df/dy at `inner` on the outer batch; None for tensors that f does not use. Differentiable likewise."""

    @property
    def loss(self) -> Tensor | None:
        """g at the first gradient taken, per task and without a graph; None before."""

    def report(self, shown: Tensor | None, *, vanishing: bool = False) -> None:
        """What the loop is to be judged by at this step in the place of g, per task: a number that a sound loop makes
        smaller, and, if `vanishing`, half the square of a residual that is zero where it rests. None for nothing.
        """

    def fail(self, code: Tensor) -> None:
        """The code of a status (see `bilevel.Status`) that the loop has if this step is its last; 0 for none."""


class Dynamics(Strategy):
    """How the inner variable moves. A frozen dataclass with `step`, and with `stationarity` where there is one.

    Example:
        A fixed-point map of the user's own, y <- T(y, x):

        >>> import dataclasses, torch, bilevel as bl
        >>> @dataclasses.dataclass(frozen=True)
        ... class Babylonian(bl.inner.Dynamics):
        ...     def step(self, inner, state, outer, at):
        ...         return (inner + outer / inner) / 2, state
        ...     def stationarity(self, inner, outer, at):
        ...         return inner - (inner + outer / inner) / 2
        >>> problem = bl.Problem(lambda y, x, b: (y**2 - x) ** 2, lambda y, x, b: y)
        >>> hg = bl.hypergradient(problem, torch.tensor(4.0), torch.tensor(1.0), bl.Batches(None, None),
        ...     solver=bl.Descent(Babylonian(), steps=6), estimator=bl.Implicit(bl.Dense()))
        >>> hg.inner, hg.grad
        (tensor(2.), tensor(0.2500))
    """

    @property
    def symmetric(self) -> bool:
        """Whether d stationarity / dy is symmetric, as the Hessian of a loss is; conjugate gradients need it."""
        return False

    @property
    def update(self) -> Optimizer | None:
        """The optimizer, when a step is `optimizer.step(dg/dy, s, y, x)` and nothing else; else None."""
        return None

    @property
    def autonomous(self) -> bool:
        """Whether a step's number changes nothing but through the state: two steps then show how x acts."""
        return False

    @property
    def reads_outer(self) -> bool:
        """Whether x enters the step or the stationarity otherwise than by the inner loss."""
        return True

    def over(self, tasks: int) -> Self:
        """The same dynamics for y with a leading dimension of tasks: with the optimizers it holds made for that."""
        return over_held(self, tasks)

    def init(self, inner: Tree, outer: Tree) -> Any:
        """The state before the first step: a pytree of tensors and plain numbers."""
        return None

    @abc.abstractmethod
    def step(self, inner: Tree, state: Any, outer: Tree, at: Point) -> tuple[Tree, Any]:
        """One step: pure, out of place, differentiable in inner, state, outer and the batch."""

    def stationarity(self, inner: Tree, outer: Tree, at: Point) -> Tree | None:
        """A tree like `inner` that is zero where the dynamics rests; None if it does not say."""
        return None
