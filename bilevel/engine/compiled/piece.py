"""One compiled function: its graph, the random numbers drawn for it, what it cost, and how it is held against eager."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from bilevel.engine.compiled import graphs


class Made(NamedTuple):
    """A function made of a graph, and what is to be said of it."""

    run: Callable[..., Any]
    note: str | None = None


Compile = Callable[[fx.GraphModule, Sequence[Tensor]], Made]
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Piece:
    """A graph that is compiled when it is first run.

    Args:
        name: for messages and figures.
        graph: its placeholders are the inputs, the constants, and the random numbers of `draw`.
        constants: tensors that are read anew at every call.
        there: which outputs are tensors.
        draw: draws random numbers as the traced function does; None where it draws none.
        make: compiles a graph.
        trace_seconds: what its trace took.
        as_given: how many inputs, the first ones, have the same strides at every call; the others are made contiguous.
        ordered: how many inputs, the first ones, keep the order of their dimensions in memory, in which a random
            operator would draw for them.
    """

    def __init__(
        self,
        name: str,
        graph: fx.GraphModule,
        constants: Sequence[Tensor],
        there: Sequence[bool],
        draw: fx.GraphModule | None,
        make: Compile,
        trace_seconds: float = 0.0,
        *,
        as_given: int = 0,
        ordered: int = 0,
    ) -> None:
        self.name, self.there, self.calls = name, tuple(there), 0
        self.trace_seconds, self.compile_seconds = trace_seconds, 0.0
        self.nodes = len(graph.graph.nodes)
        self.flops, self.bytes = graphs.costs(graph)
        self.narrowest = narrowest(graph)
        self._graph, self._constants, self._draw, self._make = graph, list(constants), draw, make
        self._run: Callable[..., Any] | None = None
        self.note: str | None = None
        self._as_given, self._ordered = as_given, ordered

    @property
    def draws(self) -> bool:
        """Whether it draws random numbers."""
        return self._draw is not None

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """The outputs, None where there is nothing; inputs are not changed."""
        # (The casts of an open autocast are in the graph.)
        with torch.no_grad(), torch._C._DisableAutocast():
            drawn = () if self._draw is None else self._draw()
            same, rest = inputs[: self._as_given], map(resolved, (*inputs[self._as_given :], *self._constants))
            moved = (in_order(each) if i < self._ordered else each.detach().contiguous() for i, each in enumerate(rest))
            given = [*same, *moved, *drawn]
            if self._run is None:
                start = time.perf_counter()
                self._run, self.note = self._make(self._graph, given)
                found = iter(self._run(*given))
                self.compile_seconds = time.perf_counter() - start
            else:
                found = iter(self._run(*given))
            self.calls += 1
            return [next(found) if there else None for there in self.there]


def resolved(tensor: Tensor) -> Tensor:
    """The tensor with its numbers as they stand in memory: a conjugate or a negative may be a view that is yet to be
    computed, which is another graph, and which compiled code does not see.
    """
    return tensor.resolve_conj().resolve_neg() if tensor.is_conj() or tensor.is_neg() else tensor


def order(tensor: Tensor) -> tuple[int, ...] | None:
    """The strides that a result like `tensor` would have; None where it is contiguous."""
    return None if tensor.is_contiguous() else torch.empty_like(tensor, device="meta").stride()


def in_order(tensor: Tensor) -> Tensor:
    """The tensor without a graph, dense, with its dimensions in their order in memory."""
    strides = order(tensor)
    return tensor.detach() if strides in (None, tensor.stride()) else tensor.detach().clone()


def narrowest(graph: fx.GraphModule) -> torch.dtype:
    """The floating dtype with the fewest digits in a graph."""
    leaves = torch.utils._pytree.tree_leaves([node.meta.get("val") for node in graph.graph.nodes])
    dtypes = {each.dtype for each in leaves if isinstance(each, Tensor) and each.dtype in _FLOATING}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
