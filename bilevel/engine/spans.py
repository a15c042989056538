"""Named spans: the one seam at which a profiler listens.

Every phase of a hypergradient and every oracle call (a gradient, a Hessian-vector product, ...) runs inside
`span(name)`. A span is a `torch.profiler.record_function` range, so it shows in any torch trace, and it is announced to
the listeners of the current context. With nobody listening a span costs a few microseconds and the library learns
nothing about who measures it.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Protocol

import torch
from torch._C._autograd import _profiler_enabled
from torch.profiler import record_function

INNER = "bilevel.inner"
HYPERGRADIENT = "bilevel.hypergradient"
OUTER = "bilevel.outer"
PHASES = (INNER, HYPERGRADIENT, OUTER)

INNER_GRADIENT = "bilevel.inner_gradient"
OUTER_GRADIENT = "bilevel.outer_gradient"
HVP = "bilevel.hvp"
MIXED = "bilevel.mixed"
ORACLES = (INNER_GRADIENT, OUTER_GRADIENT, HVP, MIXED)

COLLECTIVE = "bilevel.collective"
"""Numbers go between processes."""
ASIDE = "bilevel.aside"
"""What is done in it is about processes, such as telling others an object: its tensors have data, also where those of
the problem have none."""
UNREAD = "bilevel.unread"
"""A test for convergence on tensors without data, which cannot be read: the loop goes on to its step limit."""
HOST = "bilevel.host"
"""What is made in it lies on the host, beside a device whose memory is looked at (see engine.offload)."""

HIDDEN = "bilevel.hidden"
"""Said once by each call whose engine is not eager: operators inside its functions may be seen by nobody."""


class Listener(Protocol):
    """What a meter implements to hear spans. `count` is the number of oracle calls the span stands for."""

    def enter(self, name: str, count: int) -> None: ...

    def exit(self, name: str) -> None: ...


_listeners: contextvars.ContextVar[tuple[Listener, ...]] = contextvars.ContextVar("bilevel_listeners", default=())


@contextlib.contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Announce every span opened inside this block to `listener`."""
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Announce nothing inside this block: what runs there is a rehearsal."""
    token = _listeners.set(())
    try:
        yield
    finally:
        _listeners.reset(token)


class span:
    """A named range, as a context manager.

    Args:
        name: one of the names above.
        count: more than 1 stands for that many oracle calls made in one sweep (a backward through K steps).
    """

    __slots__ = ("_count", "_listeners", "_name", "_range")

    def __init__(self, name: str, count: int = 1) -> None:
        self._name, self._count = name, count

    def __enter__(self) -> None:
        self._listeners = _listeners.get()
        for listener in self._listeners:
            listener.enter(self._name, self._count)
        self._range = record_function(self._name) if _recorded() else None
        if self._range is not None:
            self._range.__enter__()

    def __exit__(self, *error: object) -> None:
        try:
            if self._range is not None:
                self._range.__exit__(*error)
        finally:
            for listener in reversed(self._listeners):
                listener.exit(self._name)


def _recorded() -> bool:
    """Whether somebody sees a range: a profiler of torch, or a dispatch mode. Opening one costs as much as ten small
    operators, and those inside of it are slower.
    """
    return _profiler_enabled() or torch._C._len_torch_dispatch_stack() > 0


class Calls:
    """A listener that counts oracle calls by their short names: inner_gradient, outer_gradient, hvp, mixed."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {name.removeprefix("bilevel."): 0 for name in ORACLES}

    def enter(self, name: str, count: int) -> None:
        if name in ORACLES:
            self.calls[name.removeprefix("bilevel.")] += count

    def exit(self, name: str) -> None:
        pass
