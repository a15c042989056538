"""The contract of an engine: how an oracle is computed.

An engine gets pure functions of (inner, outer, batch) and returns numbers with the same meaning as any other engine's.
`bilevel.engine.eager` is the reference that every other one is checked against.
"""

import abc
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from bilevel._strategy import Strategy
from bilevel.space.tree import Leaves, PartialLeaves, Tree

Losses = Callable[[Tree, Tree, Any], Tensor]
"""(inner, outer, embedded batch) -> the loss: 0-dim, or of shape (tasks,)."""
Condition = Callable[[Tree, Tree, Any], tuple[Tensor | None, Tree]]
"""(inner, outer, embedded batch) -> the loss if it is known, and a tree like inner, differentiable in all three."""


class Linearized(Protocol):
    """A condition at one point, with its graph, so that each product costs one backward."""

    loss: Tensor | None

    def transposed(self, v: Leaves) -> Leaves:
        """(d condition / d inner)' v."""

    def product(self, v: Leaves) -> Leaves:
        """(d condition / d inner) v."""

    def last(self, v: Leaves) -> tuple[Leaves, PartialLeaves, PartialLeaves]:
        """The transposed products with v in inner, in outer and in the batch, in one sweep that frees the graph."""

    def outside(self, v: Leaves) -> tuple[PartialLeaves, PartialLeaves]:
        """The same without that in inner, which is most of the work."""


class Derivatives(abc.ABC):
    """The derivatives of one hypergradient, as an engine computes them."""

    @property
    def pure(self) -> bool:
        """Whether it must be given functions of (inner, outer, batch) that depend on nothing else of this call, because
        what it makes of them outlives the call.
        """
        return False

    @abc.abstractmethod
    def gradient(self, loss: Losses, inner: Tree, outer: Tree, batch: Any) -> tuple[Tensor, PartialLeaves]:
        """The loss and its gradient in inner, both without a graph."""

    @abc.abstractmethod
    def differentiable_gradient(
        self, loss: Losses, inner: Tree, outer: Tree, batch: Any, *, numbers: bool = True
    ) -> tuple[Tensor, PartialLeaves]:
        """The same of arguments as they come, with a graph. Without `numbers` the graph alone is wanted."""

    @abc.abstractmethod
    def gradients(
        self, loss: Losses, inner: Tree, outer: Tree, batch: Any, *, in_inner: bool, in_outer: bool
    ) -> tuple[Tensor, PartialLeaves, PartialLeaves]:
        """The loss and its gradients in inner and in outer (all None where not asked for).

        `outer` is taken as it comes: attached where its gradient is wanted, detached where not.
        """

    @abc.abstractmethod
    def linearize(
        self, condition: Condition, inner: Tree, outer: Tree, batch: Any, batch_leaves: Sequence[Tensor]
    ) -> Linearized:
        """The condition at a point, with an attached `outer`; in the tensors `batch_leaves` products are wanted too."""

    def report(self) -> dict[str, Any]:
        """What was run, and what it cost to make; empty where there is nothing to say."""
        return {}


class Engine(Strategy):
    """How derivatives of pure functions are computed."""

    @abc.abstractmethod
    def open(self) -> Derivatives:
        """The derivatives of one hypergradient."""
