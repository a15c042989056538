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

UNREAD = "bilevel.unread"
"""A test for convergence on tensors without data, which cannot be read: the loop goes on to its step limit."""
HOST = "bilevel.host"
"""What is made in it lies on the host, beside a device whose memory is looked at (see engine.offload)."""


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


@contextlib.contextmanager
def span(name: str, count: int = 1) -> Iterator[None]:
    """Open a named range. `count` > 1 stands for that many oracle calls made in one sweep (a backward through K
    steps).
    """
    listeners = _listeners.get()
    for listener in listeners:
        listener.enter(name, count)
    try:
        with record_function(name):
            yield
    finally:
        for listener in reversed(listeners):
            listener.exit(name)


class Calls:
    """A listener that counts oracle calls by their short names: inner_gradient, outer_gradient, hvp, mixed."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {name.removeprefix("bilevel."): 0 for name in ORACLES}

    def enter(self, name: str, count: int) -> None:
        if name in ORACLES:
            self.calls[name.removeprefix("bilevel.")] += count

    def exit(self, name: str) -> None:
        pass
