"""The CPU allocator's own record, which torch's profiler keeps: what was asked for and given back, whoever asked.

It sees what a dispatch mode does not: tensors that compiled code makes, scratch memory inside a kernel, random states.
An eager hypergradient weighs here what the `tensors` meter counts, and such scratch: to the byte for most estimators of
the built-in hypercleaning case, one random state (5,056 bytes of 5.9 MB) more where iterates are kept. It does not see
what code takes from the system by itself (scratch on the stack of a fused loop, oneDNN's own).

| | cost |
| --- | --- |
| time | a few microseconds an operation |
| memory | some hundred bytes of host memory an operation, until the block has been read |
"""

from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from bilevel.engine import spans
from bilevel_profiling.meters.base import Meter
from bilevel_profiling.meters.ledger import Ledger
from bilevel_profiling.meters.origin import Place
from bilevel_profiling.meters.phases import OUTSIDE
from bilevel_profiling.meters.timeline import Timeline
from bilevel_profiling.records.record import Alive

_MOST_ALIVE = 20
_OPEN, _CLOSE, _MOVE = range(3)
_MAKERS = ("aten::empty", "aten::resize_")
"""Operators that allocate on behalf of the one that called them."""


class _Event(NamedTuple):
    """A phase that began or ended, or bytes that were given out (or, negative, given back)."""

    time: int
    kind: int
    name: str = ""
    span: str = ""
    address: int = 0
    size: int = 0


class Allocator(Meter):
    """Peak of the bytes that the CPU allocator gave out inside the block, in total and by phase, with a timeline and
    who asked for them. Memory that was there before is not counted, nor is its return.

    Drop the result inside the block, and `kept_tensor_bytes` is what leaked.

    Raises:
        RuntimeError: torch's profiler is at work already.

    Example:
        >>> import torch
        >>> x = torch.ones(256)
        >>> with Allocator() as meter:
        ...     y = x[:128].exp()
        ...     y = y.tanh()
        >>> meter.peak_bytes, meter.live_bytes
        (1024, 512)
        >>> [(entry.bytes, entry.operator) for entry in meter.alive()]
        [(512, 'aten.exp'), (512, 'aten.tanh')]
    """

    def __init__(self) -> None:
        self._live = self._peak = 0
        self._peaks: dict[str, int] = {}
        self._timeline, self._ledger = Timeline(), Ledger()

    def __enter__(self) -> Self:
        self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profiler.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._profiler.__exit__(None, None, None)
        inner: Any = self._profiler.profiler
        self._follow(sorted(_events(inner.kineto_results.experimental_event_tree()), key=lambda event: event.time))
        del self._profiler

    @property
    def peak_bytes(self) -> int:
        """Most bytes alive at once inside the block."""
        return self._peak

    @property
    def live_bytes(self) -> int:
        """Bytes alive at its end."""
        return self._live

    def alive(self, most: int = _MOST_ALIVE) -> tuple[Alive, ...]:
        """What was alive at the peak, by phase, span and operator; compiled code has no operator."""
        return self._ledger.alive(most)

    def figures(self) -> dict[str, Any]:
        return {
            "peak_tensor_bytes": self.peak_bytes,
            "kept_tensor_bytes": self.live_bytes,
            "peak_meter": "allocator",
            "timeline": self._timeline.points(),
            "alive": self.alive(),
        }

    def phases(self) -> dict[str, dict[str, Any]]:
        return {phase: {"peak_tensor_bytes": peak} for phase, peak in self._peaks.items() if phase != OUTSIDE}

    def _follow(self, events: list[_Event]) -> None:
        held: dict[int, tuple[int, int]] = {}  # by address: bytes, and the number of their origin
        phases = [OUTSIDE]
        for event in events:
            if event.kind == _OPEN:
                phases.append(event.name)
            elif event.kind == _CLOSE:
                phases.pop()
            elif event.size > 0:
                label = (phases[-1], event.span, event.name)
                held[event.address] = event.size, self._ledger.number((*label, Place("", "")))
                self._book(*held[event.address], label)
            elif event.address in held:
                size, number = held.pop(event.address)
                self._book(-size, number, (phases[-1], event.span, event.name))
            self._note(phases[-1])

    def _book(self, size: int, number: int, label: tuple[str, str, str]) -> None:
        self._live += size
        self._ledger.add(number, size)
        self._timeline.add(self._live, label)

    def _note(self, phase: str) -> None:
        if self._live > self._peaks.get(phase, -1):
            self._peaks[phase] = self._live
            if self._live > self._peak:
                self._peak = self._live
                self._ledger.mark()


def _events(roots: list[Any]) -> Iterator[_Event]:
    """Everything of account, in no order."""
    waiting = [(root, "", "") for root in roots]
    while waiting:
        event, span, operator = waiting.pop()
        if event.tag == _EventType.Allocation:
            found = event.extra_fields
            if torch.device(found.device).type == "cpu":
                yield _Event(event.start_time_ns, _MOVE, operator, span, found.ptr, found.alloc_size)
        elif event.tag == _EventType.TorchOp:
            name = event.name
            if name in spans.PHASES:
                yield _Event(event.start_time_ns, _OPEN, name.removeprefix("bilevel."))
                yield _Event(event.end_time_ns, _CLOSE)
            elif name.startswith("bilevel."):
                span, operator = name.removeprefix("bilevel."), ""
            elif name.startswith("aten::") and not (operator and name.startswith(_MAKERS)):
                operator = name.replace("::", ".", 1)
        waiting += [(child, span, operator) for child in event.children]
