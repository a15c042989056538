"""Time: synchronized wall time for the whole, CUDA events between phases where there is a GPU."""

import collections
import statistics
import time
from types import TracebackType
from typing import Any, Self

import torch

from bilevel_profiling.meters.base import Meter
from bilevel_profiling.meters.phases import OUTSIDE, Phases
from bilevel_profiling.records.note import Note, NoteKind

LOW, HIGH = 0.1, 0.9
"""The quantiles reported beside the median (between the order statistics, as numpy does; with two repeats close to the
extremes)."""
WIDE = 0.25
"""A spread above which two medians cannot be told apart by looking at them; on a quiet machine it is a few percent."""
FEW = 3
"""Repeats below which nothing is known about the spread."""


class Clock(Meter):
    """Each `with` block is one repeat; the figures are over all of them.

    The device is waited for at both ends of the block and never between, so that phases are timed as they overlap with
    the host: on CUDA by events in its stream.

    When a comparison of times would mean little, because the repeats are few or spread widely, a sentence in
    `figures()["notes"]` says so.

    Args:
        device: where the work runs.

    Attributes:
        seconds: of each repeat, in order.

    Example:
        >>> clock = Clock()
        >>> for _ in range(3):
        ...     with clock:
        ...         _ = sum(range(100))
        >>> clock.figures()["repeats"], clock.seconds[0] > 0
        (3, True)
    """

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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
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
            return {"wall_seconds": None, "notes": ()}
        return {
            "wall_seconds": statistics.median(self.seconds),
            "wall_seconds_low": _quantile(self.seconds, LOW),
            "wall_seconds_high": _quantile(self.seconds, HIGH),
            "repeats": len(self.seconds),
            "notes": self._notes(),
        }

    @property
    def spread(self) -> float | None:
        """(90 % quantile - 10 % quantile) / median of the repeats, without a unit; None for fewer than two repeats.

        Example:
            >>> clock = Clock()
            >>> clock.seconds = [1.0, 2.0, 3.0]
            >>> round(clock.spread, 3)
            0.8
        """
        if len(self.seconds) < 2:
            return None
        return (_quantile(self.seconds, HIGH) - _quantile(self.seconds, LOW)) / statistics.median(self.seconds)

    def _notes(self) -> tuple[Note, ...]:
        count, spread = len(self.seconds), self.spread
        if count < FEW:
            repeats = "1 repeat" if count == 1 else f"{count} repeats"
            return (Note(f"wall_seconds is of {repeats}, too few to know its spread: do not rank by it."),)
        if spread is None or spread <= WIDE:
            return ()
        width = spread * statistics.median(self.seconds)
        return (
            Note(
                f"wall_seconds spreads by {spread:.0%} of the median ({count} repeats): time differences below "
                f"{width:.2g} s mean nothing.",
                NoteKind.SPREAD,
            ),
        )

    def phases(self) -> dict[str, dict[str, Any]]:
        names = dict.fromkeys(name for spent in self._by_phase for name in spent if name != OUTSIDE)
        return {
            name: {"wall_seconds": statistics.median(spent.get(name, 0.0) for spent in self._by_phase)}
            for name in names
        }

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
