"""Live bytes over operations, thinned for a figure."""

import array
from collections.abc import Sequence

from bilevel_profiling.records.record import Point

_MOST_POINTS = 400
Label = tuple[str, str, str]
"""(phase, span, operator)."""


class Timeline:
    """Live bytes after each operation: 12 bytes of host memory an operation, however long the run."""

    def __init__(self) -> None:
        self._bytes = array.array("q")
        self._labels = array.array("i")
        self._numbers: dict[Label, int] = {}

    def add(self, live: int, label: Label) -> None:
        """One operation more."""
        self._bytes.append(live)
        self._labels.append(self._numbers.setdefault(label, len(self._numbers)))

    def end(self, live: int, label: Label) -> None:
        """What is alive after the last operation, unless that has been said."""
        if self._bytes and self._bytes[-1] != live:
            self.add(live, label)

    def __len__(self) -> int:
        return len(self._bytes)

    def points(self, most: int = _MOST_POINTS) -> tuple[Point, ...]:
        """At most `most` points: the ends, the peak of every phase, the changes of phase while they fit, and between
        these the lowest and the highest operation of equal stretches, so that no spike is lost.
        """
        count = len(self._bytes)
        kept = range(count) if count <= most else sorted(self._chosen(count, most))
        names = list(self._numbers)
        return tuple((place, self._bytes[place], *names[self._labels[place]]) for place in kept)

    def _chosen(self, count: int, most: int) -> set[int]:
        starts = self._starts()
        kept = {0, count - 1, *self._peaks(starts).values()}
        if len(starts) <= most // 4:
            kept |= {start for start, _ in starts}
        stretches = (most - len(kept)) // 2
        for number in range(stretches):
            places = range(number * count // stretches, (number + 1) * count // stretches)
            kept |= {min(places, key=self._bytes.__getitem__), max(places, key=self._bytes.__getitem__)}
        return kept

    def _starts(self) -> list[tuple[int, str]]:
        """Where the phase changes, and into which."""
        phases = [phase for phase, _, _ in self._numbers]
        found: list[tuple[int, str]] = []
        for place, label in enumerate(self._labels):
            if not found or found[-1][1] != phases[label]:
                found.append((place, phases[label]))
        return found

    def _peaks(self, starts: Sequence[tuple[int, str]]) -> dict[str, int]:
        """Where each phase has its highest operation."""
        found: dict[str, int] = {}
        ends = [start for start, _ in starts[1:]] + [len(self._bytes)]
        for (start, phase), end in zip(starts, ends, strict=True):
            place = max(range(start, end), key=self._bytes.__getitem__)
            if phase not in found or self._bytes[place] > self._bytes[found[phase]]:
                found[phase] = place
        return found
