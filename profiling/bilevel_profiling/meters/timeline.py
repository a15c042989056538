"""Live bytes over operations, thinned for a figure."""

import array
from collections.abc import Sequence

Point = tuple[int, int, str]
"""(operation index, live bytes, phase)."""

_MOST_POINTS = 400


class Timeline:
    """Live bytes after each operation: 8 bytes of host memory an operation, however long the run."""

    def __init__(self) -> None:
        self._bytes = array.array("q")
        self._changes: list[tuple[int, str]] = []

    def add(self, live: int, phase: str) -> None:
        """One operation more."""
        if not self._changes or self._changes[-1][1] != phase:
            self._changes.append((len(self._bytes), phase))
        self._bytes.append(live)

    def points(self, most: int = _MOST_POINTS) -> tuple[Point, ...]:
        """At most `most` points: the ends, the peak of every phase, the changes of phase while they fit, and between these the lowest and the
        highest operation of equal stretches, so that no spike is lost.
        """
        count = len(self._bytes)
        kept = range(count) if count <= most else sorted(self._chosen(count, most))
        phases = self._phases(kept)
        return tuple((place, self._bytes[place], phase) for place, phase in zip(kept, phases, strict=True))

    def _chosen(self, count: int, most: int) -> set[int]:
        kept = {0, count - 1, *self._peaks().values()}
        starts = {start for start, _ in self._changes}
        if len(starts) <= most // 4:
            kept |= starts
        stretches = (most - len(kept)) // 2
        for number in range(stretches):
            places = range(number * count // stretches, (number + 1) * count // stretches)
            kept |= {min(places, key=self._bytes.__getitem__), max(places, key=self._bytes.__getitem__)}
        return kept

    def _peaks(self) -> dict[str, int]:
        """Where each phase has its highest operation."""
        found: dict[str, int] = {}
        ends = [start for start, _ in self._changes[1:]] + [len(self._bytes)]
        for (start, phase), end in zip(self._changes, ends, strict=True):
            place = max(range(start, end), key=self._bytes.__getitem__)
            if phase not in found or self._bytes[place] > self._bytes[found[phase]]:
                found[phase] = place
        return found

    def _phases(self, places: Sequence[int]) -> list[str]:
        names, change = [], 0
        for place in places:
            while change + 1 < len(self._changes) and self._changes[change + 1][0] <= place:
                change += 1
            names.append(self._changes[change][1])
        return names
