"""Axes as numbers: from data to coordinates, and the ticks to print."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from bilevel_profiling.records import units


@dataclasses.dataclass(frozen=True)
class Scale:
    """Maps [low, high] onto [start, end], linearly or by logarithm; values outside land on the nearest end.

    With `zero`, values of 0 and below stand at the very start of a logarithmic scale, and the scale proper begins a
    little further on.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    zero: bool = False
    ticks: tuple[tuple[float, str], ...] = ()

    def __call__(self, value: float) -> float:
        start = self.start + (self.end - self.start) * 0.09 if self.zero else self.start
        if self.log and value <= 0:
            return self.start
        low, high, value = (
            (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        share = (value - low) / (high - low)
        return start + (self.end - start) * min(1.0, max(0.0, share))


def choose(
    values: Iterable[float], start: float, end: float, *, spread: float = 20.0, ticks: int = 5, from_zero: bool = True
) -> Scale:
    """A logarithmic scale where positive values differ by more than the factor `spread`, else a linear one."""
    values = list(values)
    positive = [value for value in values if value > 0]
    if positive and max(positive) / min(positive) > spread:
        return logarithmic(values, start, end)
    return linear(values, start, end, ticks=ticks, from_zero=from_zero)


def linear(
    values: Iterable[float], start: float, end: float, *, ticks: int = 5, from_zero: bool = True, tight: bool = False
) -> Scale:
    """A linear scale with ticks at multiples of 1, 2, 2.5 or 5; it ends on ticks, or, if `tight`, on the lowest and
    highest value.
    """
    values = list(values) or [0.0]
    low, high = min(values), max(values)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high <= low:
        low, high = (low - abs(low) / 2, low + abs(low) / 2) if low and not from_zero else (low, low + 1.0)
    step = _nice((high - low) / max(1, ticks - 1))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    marks = tuple((n * step, units.tick(0.0 if n == 0 else round(n * step, 12))) for n in range(first, last + 1))
    if tight:
        return Scale(low, high, start, end, ticks=tuple(mark for mark in marks if low <= mark[0] <= high))
    return Scale(first * step, last * step, start, end, ticks=marks)


def logarithmic(values: Iterable[float], start: float, end: float, *, most: int = 6) -> Scale:
    """A logarithmic scale; ticks at powers of ten, or at 1, 2 and 5 times them where the range is short."""
    values = list(values)
    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive), max(positive)
    margin = max(1.15, (high / low) ** 0.05)
    low, high = low / margin, high * margin
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    fine = [factor * 10.0**n for n in range(first, last + 1) for factor in (1, 2, 5)]
    marks = [mark for mark in fine if low <= mark <= high]
    if len(marks) > most:
        decades = [10.0**n for n in range(first, last + 1) if low <= 10.0**n <= high]
        every = math.ceil(len(decades) / most)
        marks = (
            [mark for mark in decades if round(math.log10(mark)) % every == 0]
            if len(decades) > 1
            else marks[:: math.ceil(len(marks) / most)]
        )
    zero = any(value <= 0 for value in values)
    powers = any("⁻" in units.tick(mark) for mark in marks)
    labels = ([(0.0, "0")] if zero else []) + [
        (mark, units.power_of_ten(mark) if powers else units.tick(mark)) for mark in marks
    ]
    return Scale(low, high, start, end, log=True, zero=zero, ticks=tuple(labels))


def at_values(values: Sequence[int], start: float, end: float, *, room: float = 26.0) -> Scale:
    """A scale for K, with ticks at the measured values as far as there is room for them."""
    low, high = min(values), max(values)
    log = low > 0 and high / low >= 8
    scale = Scale(float(low), float(high if high > low else low + 1), start, end, log=log)
    chosen: list[int] = []
    for value in sorted(values, reverse=True):
        if not chosen or abs(scale(chosen[-1]) - scale(value)) >= room:
            chosen.append(value)
    return dataclasses.replace(scale, ticks=tuple((float(value), f"{value:,}") for value in reversed(chosen)))


def _nice(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= step * 0.999)
