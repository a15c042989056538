"""Collectives: what this rank sends to others, and how long it waits for them."""

import collections
import contextlib
import statistics
import time
from types import TracebackType
from typing import Any, Self

import torch

from bilevel_profiling.meters.base import Meter
from bilevel_profiling.meters.operators import Operators
from bilevel_profiling.meters.phases import OUTSIDE, Phases
from bilevel_profiling.meters.traffic import POINT_TO_POINT, Collective, collective, wait


class Collectives(Meter):
    """Bytes sent, calls by operator and seconds of all collectives that reach the dispatcher: those of the library, of
    `torch.distributed`, of DTensor and of FSDP2, in forward and in backward passes. How bytes are counted: see
    `traffic`.

    Each `with` block is one repeat. Bytes and calls are those of the last, the seconds are the median.

    The time of a collective is from its call to its end on this rank. That is the time of the transfer, and before it
    the time until the slowest rank has called it. Every one is waited for at once, so collectives that a program lets
    overlap with computing count in full (those between two ranks, send and recv, are not waited for). The device is
    synchronized before and after each.

    Args:
        device: where the work runs.
        clocked: whether time is taken; without it nothing is waited for.

    Example:
        >>> import torch
        >>> with Collectives() as meter:
        ...     _ = torch.ones(3) + 1
        >>> meter.figures()["sent_bytes"], meter.figures()["collectives"]
        (0, {})
    """

    def __init__(self, device: torch.device | str = "cpu", *, clocked: bool = True) -> None:
        self._device, self._clocked = torch.device(device), clocked
        self._phases = Phases(lambda phase: None)
        self._inside = contextlib.ExitStack()
        self._seconds: list[collections.Counter[str]] = []
        self._start_anew()

    def __enter__(self) -> Self:
        self._start_anew()
        self._seconds.append(collections.Counter())
        # A function that torch.compile meets first under a dispatch mode would never be compiled afterwards.
        self._inside.enter_context(torch.compiler.set_stance("force_eager"))
        self._inside.enter_context(self._phases)
        # Backward passes on this thread, also on a GPU: a mode sees its own thread.
        self._inside.enter_context(torch.autograd.set_multithreading_enabled(False))
        self._inside.enter_context(Operators(self.run))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._inside.close()

    def figures(self) -> dict[str, Any]:
        notes = (f"The bytes sent by {' and '.join(sorted(self._unknown))} are not known.",) if self._unknown else ()
        return {
            "sent_bytes": sum(self._sent.values()),
            "collectives": dict(self._calls),
            "collective_seconds": self._median(None),
            "notes": notes,
        }

    def phases(self) -> dict[str, dict[str, Any]]:
        return {
            phase: {"sent_bytes": sent, "collective_seconds": self._median(phase)}
            for phase, sent in self._sent.items()
            if phase != OUTSIDE
        }

    def run(self, operator: Any, args: Any, kwargs: Any) -> Any:
        """Run one operator, and count it if it is a collective."""
        found = collective(operator, args, kwargs)
        if found is None:
            return operator(*args, **kwargs)
        self._count(found)
        if not self._clocked:
            return operator(*args, **kwargs)
        self._synchronize()
        started = time.perf_counter()
        output = operator(*args, **kwargs)
        if found.name not in POINT_TO_POINT:
            wait(output)
            self._synchronize()
        self._seconds[-1][self._phases.current] += time.perf_counter() - started  # type: ignore[assignment]
        return output

    def _count(self, found: Collective) -> None:
        sent = found.sent
        if sent is None:
            self._unknown.add(found.name)
        self._calls[found.name] += 1
        self._sent[self._phases.current] += sent or 0

    def _start_anew(self) -> None:
        self._sent: collections.Counter[str] = collections.Counter()
        self._calls: collections.Counter[str] = collections.Counter()
        self._unknown: set[str] = set()

    def _median(self, phase: str | None) -> float | None:
        if not self._clocked or not self._seconds:
            return None
        return statistics.median(sum(each.values()) if phase is None else each[phase] for each in self._seconds)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
