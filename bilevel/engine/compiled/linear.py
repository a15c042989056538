"""A compiled gradient as a differentiable function, and a linearized condition made of such.

The derivative of a compiled gradient is the compiled products; that of a product in its weights is a product again,
since the second derivative of a loss is symmetric. No function is differentiated by torch.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bilevel.engine import autodiff
from bilevel.engine.compiled.functions import Functions
from bilevel.engine.eager import Graph
from bilevel.engine.evaluation import Pure
from bilevel.engine.replay import Generators, State
from bilevel.space.tree import Leaves, PartialLeaves


class Bound(NamedTuple):
    """Compiled functions and the loss that they are held against. (They hold no loss: it holds the problem.)"""

    functions: Functions
    loss: Pure


class Session(Protocol):
    """What runs compiled functions."""

    turns: bool
    """Whether products are to be differentiated in their weights."""

    def run(self, bound: Bound, name: str, given: Sequence[Tensor]) -> list[Tensor | None]:
        """A function at tensors."""

    def prepare(self, bound: Bound, given: Sequence[Tensor]) -> tuple[list[Tensor | None], list[Tensor]]:
        """The loss and dg/dy, and what products need of them."""

    def pull(
        self, bound: Bound, kept: list[Tensor], given: Sequence[Tensor], weights: Sequence[Tensor], before: State
    ) -> list[Tensor | None]:
        """Products from what was kept."""

    def inner_only(self) -> AbstractContextManager[None]:
        """Within it products in y are wanted, and no others."""

    def turned(self) -> AbstractContextManager[None]:
        """Within it products in y are wanted, and theirs."""


class Linear:
    """A linearized condition: between its products what they need of the compiled gradient is kept."""

    def __init__(self, session: Session, graph: Graph) -> None:
        self._session, self._graph, self.loss = session, graph, graph.loss

    def transposed(self, v: Leaves) -> Leaves:
        """(d condition / d inner)' v."""
        with self._session.inner_only():
            return self._graph.transposed(v)

    def product(self, v: Leaves) -> Leaves:
        """(d condition / d inner) v."""
        with self._session.turned():
            return self._graph.product(v)

    def last(self, v: Leaves) -> tuple[Leaves, PartialLeaves, PartialLeaves]:
        """The transposed products with v in inner, in outer and in the batch, in one sweep that frees the graph."""
        return self._graph.last(v)

    def outside(self, v: Leaves) -> tuple[PartialLeaves, PartialLeaves]:
        """The same without that in inner."""
        return self._graph.outside(v)


class Use:
    """One gradient with a graph: what its backward needs besides tensors."""

    def __init__(self, session: Session, bound: Bound, *, numbers: bool, repeated: bool) -> None:
        self._session, self._bound, self._repeated = session, bound, repeated
        known = bound.functions.pieces.get("gradient")
        self.there: list[bool] = [] if known is None else list(known.there[1:])
        # Where the numbers of the gradient are not asked for, its place in the graph is enough.
        self._drawn = numbers or repeated or known is None
        self._kept: list[Tensor] = []
        self._before: State | None = None

    def forward(self, given: tuple[Tensor, ...]) -> list[Tensor]:
        """The loss, and the gradients that there are."""
        before, pieces = Generators(given[0].device).peek(), self._bound.functions.pieces
        if self._repeated:
            found, self._kept = self._session.prepare(self._bound, given)
        elif self._drawn:
            found = self._session.run(self._bound, "gradient", given)
        if pieces["prepared" if self._repeated else "gradient"].draws:
            self._before = before
        if not self._repeated and not self._drawn:
            nowhere = given[0].new_zeros(())
            leaves = zip(given[: len(self.there)], self.there, strict=True)
            return [nowhere, *(nowhere.expand(leaf.shape) for leaf, there in leaves if there)]
        self.there = [each is not None for each in found[1:]]
        return [each for each in found if each is not None]

    @property
    def turns(self) -> bool:
        """Whether the products are to be differentiated in their weights."""
        return self._session.turns

    def pull(self, given: tuple[Tensor, ...], weights: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The products with weights, in y, x and z; random numbers are those of the forward."""
        rest = iter(weights)
        leaves = zip(given[: len(self.there)], self.there, strict=True)
        every = [next(rest) if there else None for _, there in leaves]
        full = [torch.zeros_like(y) if w is None else w for y, w in zip(given, every, strict=False)]
        generators = Generators(given[0].device)
        now = generators.peek()
        if self._repeated:
            return self._session.pull(self._bound, self._kept, given, full, self._before or now)
        if self._before is not None:
            generators.set(self._before)
        found = self._session.run(self._bound, "products", [*given, *full])[1:]
        if self._before is not None and self._drawn:
            generators.set(now)
        return found


class Gradient(torch.autograd.Function):
    """(y, x, z, other tensors) -> the loss and dg/dy, whose derivative is the compiled products."""

    @staticmethod
    def forward(ctx: Any, use: Use, *given: Tensor) -> tuple[Tensor, ...]:
        found = use.forward(given)
        ctx.use = use
        ctx.save_for_backward(*given)
        ctx.mark_non_differentiable(found[0])
        ctx.set_materialize_grads(False)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, _: Tensor | None, *weights: Tensor | None) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        if torch.is_grad_enabled():
            if not ctx.use.turns:
                raise autodiff.not_twice_differentiable("of a compiled gradient", compiled=True)
            turned = Turned.apply(ctx.use, len(given), *given, *weights)
            return None, *turned, *[None] * (len(given) - len(turned))
        found = ctx.use.pull(given, weights)
        return None, *found, *[None] * (len(given) - len(found))


class Turned(torch.autograd.Function):
    """Weights -> products in y, and so back: the second derivative of a loss is symmetric."""

    @staticmethod
    def forward(ctx: Any, use: Use, count: int, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.use, ctx.count, ctx.there = use, count, [w is not None for w in given[count:]]
        ctx.save_for_backward(*given[:count])
        ctx.set_materialize_grads(False)
        return tuple(use.pull(given[:count], given[count:])[: len(use.there)])  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *weights: Tensor | None) -> tuple[Tensor | None, ...]:
        use: Use = ctx.use
        present = [w for w, there in zip(weights, use.there, strict=True) if there]
        found = use.pull(ctx.saved_tensors, present)
        moved = [g for g, there in zip(found, use.there, strict=False) if there]
        return None, None, *[None] * ctx.count, *moved
