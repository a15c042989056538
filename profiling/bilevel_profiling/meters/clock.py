"""Time: synchronized wall time for the whole, CUDA events between phases where there is a GPU."""

import collections
import statistics
import time
from types import TracebackType
from typing import Any, Self

import torch

from bilevel_profiling.meters.base import Meter
from bilevel_profiling.meters.phases import OUTSIDE, Phases

LOW, HIGH = 0.1, 0.9
"""The quantiles reported beside the median (between the order statistics, as numpy does; with two repeats close to the extremes)."""


class Clock(Meter):
    """Each `with` block is one repeat; the figures are over all of them.

    The device is waited for at both ends of the block and never between, so that phases are timed as they overlap with the host: on CUDA by
    events in its stream.

    Args:
        device: where the work runs.

    Example:
        >>> clock = Clock()
        >>> for _ in range(3):
        ...     with clock:
        ...         _ = sum(range(100))
        >>> clock.figures()["repeats"], clock.seconds[0] > 0
        (3, True)
    """

    perturbs = False

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._cuda = self._device.type == "cuda" and torch.cuda.is_available()
        self._phases = Phases(self._ended)
        self.seconds: list[float] = []
        self._by_phase: list[dict[str, float]] = []

    def __enter__(self) -> Self:
        self._synchronize()
        self._marks: list[tuple[str, Any]] = []
        self._first = self._now()
        self._phases.__enter__()
        self._start = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._phases.__exit__(None, None, None)
        self._synchronize()
        self.seconds.append(time.perf_counter() - self._start)
        spent: dict[str, float] = collections.defaultdict(float)
        before = self._first
        for phase, mark in self._marks:
            spent[phase] += before.elapsed_time(mark) / 1000 if self._cuda else mark - before
            before = mark
        self._by_phase.append(dict(spent))

    def figures(self) -> dict[str, Any]:
        if not self.seconds:
            return {"wall_seconds": None}
        return {
            "wall_seconds": statistics.median(self.seconds),
            "wall_seconds_low": _quantile(self.seconds, LOW),
            "wall_seconds_high": _quantile(self.seconds, HIGH),
            "repeats": len(self.seconds),
        }

    def phases(self) -> dict[str, dict[str, Any]]:
        names = dict.fromkeys(name for spent in self._by_phase for name in spent if name != OUTSIDE)
        return {name: {"wall_seconds": statistics.median(spent.get(name, 0.0) for spent in self._by_phase)} for name in names}

    def _ended(self, phase: str) -> None:
        self._marks.append((phase, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._device)


def _quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
