"""How memory grows with the inner steps K: the law behind measured points, and whether an estimator keeps what it
promised.

| law | points | of |
|---|---|---|
| constant | m(K) = a | implicit, first-order |
| sqrt | m(K) = a + b sqrt(K), to a few per cent: in truth a whole number of iterates | recomputing in segments |
| linear | m(K) = a + b K, nearly to the byte | unrolling |

Tensor bytes are exact, so a law is chosen by whether it holds, not by a score: a line through an unroll leaves no
    residual, and through the
root of K a large one. Two points lie on any law that rises, and nothing is claimed from them. A contract is an upper
bound: memory that does not grow keeps every contract. Pure functions, no torch.
"""

import bisect
import dataclasses
import enum
import itertools
import math
import statistics
from collections.abc import Callable, Iterable

from bilevel_profiling.records import units

Points = Iterable[tuple[int, float]]
"""(K, value) pairs of one estimator, in any order."""

CONTRACTS = ("constant", "sqrt", "linear")

_FLAT = 1e-3
"""Growth by this share of the peak is none: a counter, the loss of every step."""
_LINE, _ROOT = 0.02, 0.05
"""Largest distance of a point from a law that holds, as a share of the whole growth."""
_APART = 1.6
"""Between K and this multiple of it, a whole number of iterates that grows as the root of K changes at least once."""


class Verdict(enum.StrEnum):
    """What the points say about a contract."""

    HELD = "held"
    BROKEN = "broken"
    TOO_FEW = "cannot be told: too few K"
    UNCLEAR = "cannot be told from these K"


@dataclasses.dataclass(frozen=True)
class Law:
    """value(K) = at_zero + per_step * K, or * sqrt(K); `trend` is no law, only the mean slope between the first and the
    last point.
    """

    kind: str
    """constant, sqrt, linear, or trend."""
    per_step: float
    """Value per inner step; per root of K where the kind is sqrt."""
    at_zero: float
    worst_residual: float
    """Largest distance of a point from the law, in the unit of the values."""
    first: int
    """The smallest K that it holds for: a first step may be special."""
    last: int

    def __call__(self, k: float) -> float:
        """The value of the law at K."""
        return self.at_zero + self.per_step * (math.sqrt(k) if self.kind == "sqrt" else k)

    @property
    def text(self) -> str:
        """The law of a memory in words: "696 KiB per inner step + 3.10 MiB"."""
        return self.said(units.size)

    def said(self, write: Callable[[float], str]) -> str:
        """The law in words, with values written by `write`.

        Example:
            >>> fit([(5, 12.0), (10, 22.0), (20, 42.0)]).said("{:.0f} ms".format)
            '2 ms per inner step + 2 ms'
        """
        if self.kind == "constant":
            return f"constant, {write(self.at_zero)}"
        if self.kind == "trend":
            return f"{write(self.per_step)} per inner step on average from K = {self.first:,} to {self.last:,}"
        unit = "per inner step" if self.kind == "linear" else "per root of K"
        sign = "+" if self.at_zero >= 0 else "-"
        return f"{write(self.per_step)} {unit} {sign} {write(abs(self.at_zero))}"


def fit(points: Points) -> Law | None:
    """The law that the points follow; None with fewer than two K.

    With two points that differ it is always a `trend`. Where the first steps stand apart (the first has no predecessor,
    a truncated sweep is not yet cut) and enough larger K remain, the law is that of the larger K.

    Example:
        >>> fit([(5, 5557112), (20, 15733772), (50, 36087092)]).text
        '663 KiB per inner step + 2.06 MiB'
        >>> fit([(5, 2889776), (20, 3005096), (50, 3158856)]).kind
        'sqrt'
        >>> fit([(5, 5557112), (20, 5595552), (50, 5595552)]).text
        'constant, 5.34 MiB'
        >>> fit([(5, 3.0), (20, 9.0)]).kind
        'trend'
    """
    pairs = _sorted(points)
    if len(pairs) < 2:
        return None
    if level := _level(pairs):
        return _law("constant", level, 0.0, statistics.median(value for _, value in level))
    held, line, root = _fitting(pairs)
    if line <= _LINE and (line <= root or _residual(held, math.sqrt) > _ROOT):
        return _law("linear", held, *_least_squares(held, float))
    if root <= _ROOT:
        return _law("sqrt", held, *_least_squares(held, math.sqrt))
    return _law("trend", pairs, *_least_squares([pairs[0], pairs[-1]], float))


def verdict(contract: str, points: Points) -> Verdict:
    """Whether memory grows no faster than `contract` (constant, sqrt or linear) allows.

    Broken is said only of three or more K, and only where growth goes on although none was promised, where it is a line
    although a root was promised, or where it bends upwards and is faster than in proportion to the bound.

    Raises:
        ValueError: the contract is none of the three.

    Example:
        >>> verdict("constant", [(5, 100.0), (20, 100.0)]).value
        'held'
        >>> verdict("constant", [(5, 100.0), (20, 115.0), (50, 145.0)]).value
        'broken'
        >>> verdict("sqrt", [(5, 100.0), (20, 115.0)]).value
        'cannot be told: too few K'
        >>> verdict("linear", [(5, 2889776), (20, 3005096), (50, 3158856)]).value
        'held'
    """
    if contract not in CONTRACTS:
        raise ValueError(f"the contract was {contract!r}; constant, sqrt or linear was needed")
    pairs = _sorted(points)
    if len(pairs) < 2:
        return Verdict.TOO_FEW
    if _level(pairs) or (pairs[-1][0] >= _APART * pairs[0][0] and max(pairs, key=lambda pair: pair[1]) == pairs[0]):
        return Verdict.HELD
    if len(pairs) == 2:
        return Verdict.TOO_FEW
    if contract == "constant":
        return Verdict.BROKEN if pairs[-1][1] > pairs[-2][1] * (1 + _FLAT) else Verdict.UNCLEAR
    bound: Callable[[int], float] = float if contract == "linear" else math.sqrt
    held, to_line, to_root = _fitting(pairs)
    line, slow = to_line <= _LINE, to_root <= _ROOT or _concave(held, bound)
    if slow:
        return Verdict.UNCLEAR if line and contract == "sqrt" else Verdict.HELD
    if line:
        return Verdict.BROKEN if contract == "sqrt" else Verdict.HELD
    return Verdict.BROKEN if _superproportional(held, bound) else Verdict.UNCLEAR


def slope(points: Points) -> float | None:
    """Least-squares slope against K, for noisy values such as times; None with fewer than two K.

    Example:
        >>> slope([(0, 1.0), (10, 21.0)])
        2.0
    """
    pairs = _sorted(points)
    return _least_squares(pairs, float)[0] if len(pairs) > 1 else None


def _sorted(points: Points) -> list[tuple[int, float]]:
    """By K; of several values at one K the largest counts; what is not finite is left out."""
    found: dict[int, float] = {}
    for k, value in points:
        if math.isfinite(value):
            found[k] = max(float(value), found.get(k, -math.inf))
    return sorted(found.items())


def _level(pairs: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The points from the smallest K on from which nothing grows, over K far enough apart for growth to show; empty
    where there are none.
    """
    for place in range(len(pairs) - 1):
        values = [value for _, value in pairs[place:]]
        if pairs[-1][0] >= _APART * pairs[place][0] and max(values) - min(values) <= _FLAT * max(map(abs, values)):
            return pairs[place:]
    return []


def _fitting(pairs: list[tuple[int, float]]) -> tuple[list[tuple[int, float]], float, float]:
    """The points without the first where only the others lie on a line or a root, and how far they lie from either;
    infinite with two.
    """
    for held in (pairs, pairs[1:]):
        if len(held) > 2:
            line, root = _residual(held, float), min(_residual(held, math.sqrt), _residual(held, _whole))
            if line <= _LINE or root <= _ROOT:
                return held, line, root
    return pairs, math.inf, math.inf


def _least_squares(pairs: list[tuple[int, float]], x: Callable[[int], float]) -> tuple[float, float]:
    """(slope, start) of the line through the values against x(K)."""
    found, start = statistics.linear_regression([x(k) for k, _ in pairs], [value for _, value in pairs])
    return found, start


def _residual(pairs: list[tuple[int, float]], x: Callable[[int], float]) -> float:
    """Largest distance from the line through the values against x(K), as a share of the growth; infinite where that
    line does not rise.
    """
    if len({x(k) for k, _ in pairs}) < 2:
        return math.inf
    rise, start = _least_squares(pairs, x)
    values = [value for _, value in pairs]
    return (
        max(abs(value - start - rise * x(k)) for k, value in pairs) / (max(values) - min(values))
        if rise > 0
        else math.inf
    )


def _whole(k: int) -> float:
    """Iterates that segments keep: the smallest whole m with m (m + 1) / 2 >= K."""
    return float(bisect.bisect_left(range(k + 1), k, key=lambda m: m * (m + 1) // 2))


def _concave(pairs: list[tuple[int, float]], x: Callable[[int], float]) -> bool:
    """Whether growth per unit of x(K) falls, or nearly stays, from each interval to the next."""
    rates = [(b - a) / (x(l) - x(k)) for (k, a), (l, b) in itertools.pairwise(pairs)]
    return all(later <= earlier + _LINE * abs(earlier) for earlier, later in itertools.pairwise(rates))


def _superproportional(pairs: list[tuple[int, float]], bound: Callable[[int], float]) -> bool:
    """Whether some value grew by a larger factor than the bound itself, which a + b * bound(K) with a, b >= 0
    cannot.
    """
    return any(
        b > a * (1 + _LINE) * bound(l) / bound(k)
        for (k, a), (l, b) in itertools.combinations(pairs, 2)
        if k > 0 and a > 0
    )


def _law(kind: str, pairs: list[tuple[int, float]], per_step: float, at_zero: float) -> Law:
    law = Law(kind, per_step, at_zero, 0.0, pairs[0][0], pairs[-1][0])
    return dataclasses.replace(law, worst_residual=max(abs(value - law(k)) for k, value in pairs))
