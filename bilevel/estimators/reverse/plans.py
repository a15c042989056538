"""Which iterates are kept, to run the others again from: segments, or snapshots placed by the binomial rule.

    t(l, c) = min over m of  m + t(l - m, c - 1) + t(m, c)
            = r l - C(c + r, c + 1),    r the least number with C(c + r, c) >= l

t counts the steps that are only moved through on the way to the tape of each of l steps, with c snapshots of which the
first is the start. Reference: Griewank and Walther 2000, algorithm 799 (revolve), and Griewank 1992; the formula was
recalled, and is held against the recursion by a test.
"""

import dataclasses
import itertools
import math
from typing import Protocol


class Plan(Protocol):
    """Which iterates to keep. Steps are counted from the start of the inner loop."""

    @property
    def first(self) -> int:
        """Steps before this one are not followed."""

    def at_first(self, steps: int) -> frozenset[int]:
        """The iterates to keep while the loop runs for the first time."""

    def again(self, begin: int, step: int, kept: int) -> frozenset[int]:
        """The iterates to keep, besides that of `step`, while the loop runs again from `begin` up to `step`; `kept`
        others are there, that of `begin` among them.
        """


@dataclasses.dataclass(frozen=True)
class Segments:
    """The first iterate of each segment, and all of the segment that is gone back through.

    Args:
        starts: the steps at which a segment begins; those before the first are not followed.
    """

    starts: tuple[int, ...]

    @property
    def first(self) -> int:
        return self.starts[0]

    def at_first(self, steps: int) -> frozenset[int]:
        return frozenset(self.starts) | frozenset(range(self.starts[-1], steps))

    def again(self, begin: int, step: int, kept: int) -> frozenset[int]:
        return frozenset(range(begin + 1, step))


@dataclasses.dataclass(frozen=True)
class Binomial:
    """A number of snapshots, placed so that the fewest steps are run again.

    Args:
        snapshots: c; the start is one of them.

    Example:
        >>> plan = Binomial(3)
        >>> sorted(plan.at_first(10)), advances(10, 3)
        ([0, 4, 7, 9], 15)
    """

    snapshots: int
    first = 0

    def at_first(self, steps: int) -> frozenset[int]:
        # (That of the last step is in hand when the loop ends.)
        return frozenset({0, steps - 1}) | self.again(0, steps - 1, 1) if steps else frozenset()

    def again(self, begin: int, step: int, kept: int) -> frozenset[int]:
        placed, free = set[int](), self.snapshots - kept + 1
        while free > 1 and begin < step:
            begin += split(step - begin + 1, free)
            placed.add(begin)
            free -= 1
        return frozenset(placed - {step})


def split(steps: int, snapshots: int) -> int:
    """m, the steps to move on before the next snapshot, for l > 1 steps and c > 1 snapshots."""
    r = _repetitions(steps, snapshots)
    return min(_reach(snapshots, r - 1), steps - _reach(snapshots - 1, r - 1))


def advances(steps: int, snapshots: int) -> int:
    """t(l, c).

    Example:
        >>> advances(10, 3), advances(20, 3), advances(1000, 10)
        (15, 45, 3636)
    """
    r = _repetitions(steps, snapshots)
    return r * steps - math.comb(snapshots + r, snapshots + 1)


def _reach(snapshots: int, repetitions: int) -> int:
    """C(c + r, c): the most steps that c snapshots reach if each is moved through r times at most."""
    return math.comb(snapshots + repetitions, snapshots)


def _repetitions(steps: int, snapshots: int) -> int:
    return next(r for r in itertools.count() if _reach(snapshots, r) >= steps)


def shrinking(count: int) -> list[int]:
    """Segment lengths M, M-1, ... that add up to `count`, with M as small as possible.

    When segment j is recomputed, j + 1 snapshots and its own iterates are alive: j + (M - j) = M throughout, with M =
    sqrt(2 count).

    Example:
        >>> shrinking(10), shrinking(12)
        ([4, 3, 2, 1], [5, 4, 3])
    """
    longest = math.ceil((math.sqrt(8 * count + 1) - 1) / 2)
    lengths: list[int] = []
    while count > 0:
        lengths.append(min(longest - len(lengths), count))
        count -= lengths[-1]
    return lengths
