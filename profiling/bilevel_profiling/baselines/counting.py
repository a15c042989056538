"""Oracle calls of somebody else's code, counted from the passes of autograd through the two losses.

Each call of a loss is given views of its variables whose hooks see a backward pass arrive; a pass with a graph hands on
a view of the gradient whose hook sees that gradient differentiated in turn. A pass through a call is a gradient, unless
it comes from the gradient of the same call: then it is a product. Views hold no memory of their own and change nothing
but the order in which autograd adds; they take time (6% of 20 steps on a perceptron), so the passes that measure time
and memory do without.

| pass | counted as |
| --- | --- |
| back through a call of the inner loss | inner_gradient |
| back through a call of the outer loss | outer_gradient |
| back through a gradient of the inner loss, to y, or in one sweep from the outer loss | hvp |
| the same, to x alone | mixed |

What torch.func computes is not seen, and neither are forward mode and compiled code: then nothing is counted, and
`blind` says why.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from bilevel.engine import spans
from bilevel.space import tree

_Pass = tuple[int, int]
"""A call of a loss, and the backward pass (of autograd's own number) that went through it."""
_counting: contextvars.ContextVar[bool] = contextvars.ContextVar("bilevel_counting", default=True)


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Count nothing in this block."""
    token = _counting.set(False)
    try:
        yield
    finally:
        _counting.reset(token)


def counting() -> bool:
    """Whether calls are to be counted."""
    return _counting.get()


class Counter:
    """Counts the passes through the losses of the problem that `watched` returns.

    Attributes:
        blind: why the counts would be wrong; "" where they are right.

    Example:
        >>> import torch, bilevel as bl
        >>> counter, x = Counter(), torch.tensor(1.0)
        >>> problem = counter.watched(bl.Problem(lambda y, x, b: (y - x) ** 2, lambda y, x, b: y**2))
        >>> y = torch.tensor(0.0, requires_grad=True)
        >>> (g,) = torch.autograd.grad(problem.inner(y, x, None), y, create_graph=True)
        >>> product = torch.autograd.grad(g, y)
        >>> counter.calls
        {'inner_gradient': 1, 'outer_gradient': 0, 'hvp': 1, 'mixed': 0}
    """

    def __init__(self) -> None:
        self.blind = ""
        self._calls = 0
        self._inner: set[_Pass] = set()
        self._outer: set[_Pass] = set()
        self._products: set[_Pass] = set()
        self._to_inner: set[int] = set()
        """Passes in which a product reached y."""

    def watched(self, problem: bl.Problem) -> bl.Problem:
        """The same problem, its losses watched."""
        return dataclasses.replace(
            problem,
            inner_loss=self._watched(problem.inner_loss, self._inner),
            outer_loss=self._watched(problem.outer_loss, self._outer),
        )

    @property
    def calls(self) -> dict[str, int]:
        """How many of each, by the names of the library's spans."""
        sweeps = self._to_inner | {sweep for _, sweep in self._outer}
        mixed = sum(sweep not in sweeps for _, sweep in self._products)
        return {
            "inner_gradient": len(self._inner - self._products),
            "outer_gradient": len(self._outer),
            "hvp": len(self._products) - mixed,
            "mixed": mixed,
        }

    def announce(self) -> None:
        """Say the counts as the library's own spans, to whoever listens."""
        for name, count in ({} if self.blind else self.calls).items():
            if count:
                with spans.span(f"bilevel.{name}", count):
                    pass

    def _watched(self, loss: Callable[..., Tensor], passes: set[_Pass]) -> Callable[..., Tensor]:
        if dataclasses.is_dataclass(loss) and hasattr(loss, "inner_loss"):  # what bl.proximal makes stays of its kind
            return dataclasses.replace(loss, inner_loss=self._watched(loss.inner_loss, passes))

        @functools.wraps(loss, updated=())
        def watched(inner: Any, outer: Any, batch: Any) -> Tensor:
            self._calls += 1
            see = functools.partial(self._see, self._calls, passes)
            return loss(tree.tree_map(see(True), inner), tree.tree_map(see(False), outer), batch)

        return watched

    def _see(self, call: int, passes: set[_Pass], to_inner: bool) -> Callable[[Any], Any]:
        def see(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if why := _unseen(leaf):
                self.blind = why
                return leaf
            if not (leaf.requires_grad and torch.is_grad_enabled()):
                return leaf
            view = leaf.view_as(leaf)
            view.register_hook(functools.partial(self._passed, call, passes, to_inner))
            return view

        return see

    def _passed(self, call: int, passes: set[_Pass], to_inner: bool, gradient: Tensor) -> Tensor | None:
        """A backward pass arrives at a variable of a call."""
        sweep = torch._C._current_graph_task_id()
        passes.add((call, sweep))
        if (call, sweep) in self._products:
            if to_inner:
                self._to_inner.add(sweep)
            return None
        if passes is self._outer or not gradient.requires_grad:
            return None
        view = gradient.view_as(gradient)
        view.register_hook(functools.partial(self._differentiated, call))
        return view

    def _differentiated(self, call: int, _: Tensor) -> None:
        """A backward pass arrives at the gradient of a call."""
        self._products.add((call, torch._C._current_graph_task_id()))


def _unseen(leaf: Tensor) -> str:
    if torch._C._functorch.is_functorch_wrapped_tensor(leaf):
        return "it differentiates with torch.func"
    if torch.compiler.is_compiling():
        return "it compiles"
    if torch.autograd.forward_ad._current_level >= 0:
        return "it differentiates in forward mode"
    return ""
