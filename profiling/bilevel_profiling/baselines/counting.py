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

The features of a problem and the pull of a proximal term belong to the call of the loss that they are made for. What
the library computes inside says its own calls, which are added.

What torch.func computes is not seen, and neither are forward mode, compiled code, and features that are called by
themselves or used in several calls: then nothing is counted, and `blind` says why.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import bilevel as bl
from bilevel.engine import spans
from bilevel.space import tree

_Pass = tuple[int, int]
"""A call of a loss, and the backward pass (of autograd's own number) that went through it."""


@dataclasses.dataclass
class _Call:
    """A call of a loss."""

    number: int
    passes: set[_Pass] | None = None
    """Through the inner or the outer loss; None while it is not known which."""
    seen: bool = False
    """Whether it has variables to be differentiated in."""


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

    Args:
        of_library: also those that the library itself makes, which says them by itself.

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

    def __init__(self, *, of_library: bool = False) -> None:
        self.blind = ""
        self._all = of_library
        self._calls = 0
        self._inner: set[_Pass] = set()
        self._outer: set[_Pass] = set()
        self._products: set[_Pass] = set()
        self._to_inner: set[int] = set()
        """Passes in which a product reached y."""
        self._listeners = len(spans._listeners.get())
        self._within = False
        """Whether a loss is running."""
        self._features: tuple[Any, _Call] | None = None
        """What the features returned last, and the call that they are for."""

    def watched(self, problem: bl.Problem) -> bl.Problem:
        """The same problem, its losses watched."""
        return dataclasses.replace(
            problem,
            inner_loss=self._watched(problem.inner_loss, self._inner),
            outer_loss=self._watched(problem.outer_loss, self._outer),
            features=None if problem.features is None else self._watched_features(problem.features),
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

    @property
    def _aside(self) -> bool:
        """Whether the library is at work, which listens to itself, or a loss that is watched already."""
        if torch.compiler.is_compiling():
            self.blind = "it compiles"
            return True
        return self._within or (not self._all and len(spans._listeners.get()) > self._listeners)

    def _watched(self, loss: Callable[..., Tensor], passes: set[_Pass]) -> Callable[..., Tensor]:
        if isinstance(loss, _Pulled):  # it stays of its kind, which the library knows
            pulled: Any = loss
            inside = self._watched(pulled.inner_loss, passes)
            return _WatchedPull(inside, pulled.init, pulled.strength, functools.partial(self._run, passes))
        return functools.wraps(loss, updated=())(functools.partial(self._run, passes, loss))

    def _run(self, passes: set[_Pass], loss: Callable[..., Tensor], inner: Any, outer: Any, batch: Any) -> Tensor:
        """A loss at views of its variables."""
        if self._aside:
            return loss(inner, outer, batch)
        call = self._begun(batch)
        call.passes = passes
        self._within = True
        try:
            return loss(
                *(tree.tree_map(self._see(call, to), part) for to, part in ((True, inner), (False, outer))), batch
            )
        finally:
            self._within = False

    def _begun(self, batch: Any) -> _Call:
        """A new call, or that of the features that it is given."""
        if self._features is not None and self._features[0] is batch:
            call = self._features[1]
            if call.passes is None or not call.seen:
                return call
            self.blind = "it uses the features of one call in several"
        self._calls += 1
        return _Call(self._calls)

    def _watched_features(self, features: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(features, updated=())
        def watched(outer: Any, batch: Any) -> Any:
            if self._aside:
                return features(outer, batch)
            self._calls += 1
            call = _Call(self._calls)
            found = features(tree.tree_map(self._see(call, False), outer), batch)
            self._features = found, call
            return found

        return watched

    def _see(self, call: _Call, to_inner: bool) -> Callable[[Any], Any]:
        def see(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or isinstance(leaf, FakeTensor):  # a look of the library, without numbers
                return leaf
            if why := _unseen(leaf):
                self.blind = why
                return leaf
            if not (leaf.requires_grad and torch.is_grad_enabled()):
                return leaf
            call.seen = True
            view = leaf.view_as(leaf)
            view.register_hook(functools.partial(self._passed, call, to_inner))
            return view

        return see

    def _passed(self, call: _Call, to_inner: bool, gradient: Tensor) -> Tensor | None:
        """A backward pass arrives at a variable of a call."""
        if call.passes is None:
            self.blind = "it differentiates the features by themselves"
            return None
        at = (call.number, torch._C._current_graph_task_id())
        call.passes.add(at)
        if at in self._products:
            if to_inner:
                self._to_inner.add(at[1])
            return None
        if call.passes is self._outer or not gradient.requires_grad:
            return None
        view = gradient.view_as(gradient)
        view.register_hook(functools.partial(self._differentiated, call.number))
        return view

    def _differentiated(self, call: int, _: Tensor) -> None:
        """A backward pass arrives at the gradient of a call."""
        self._products.add((call, torch._C._current_graph_task_id()))


def _none(*_: Any) -> Any:
    return None


_Pulled: Any = type(bl.proximal(bl.Problem(_none, _none, init=_none), 1.0).inner_loss)
"""What the inner loss of a proximal problem is."""


@dataclasses.dataclass(frozen=True)
class _WatchedPull(_Pulled):
    """A proximal term whose pull is watched with its loss."""

    run: Callable[..., Tensor]

    def __call__(self, inner: Any, outer: Any, batch: Any) -> Tensor:
        return self.run(super().__call__, inner, outer, batch)


def _unseen(leaf: Tensor) -> str:
    if torch._C._functorch.is_functorch_wrapped_tensor(leaf):
        return "it differentiates with torch.func"
    if torch.autograd.forward_ad._current_level >= 0:
        return "it differentiates in forward mode"
    return ""
