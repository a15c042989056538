"""What was alive at the peak: every storage made and freed is booked on its origin, and the books are added up to the
moment of the peak.
"""

import array
import collections
import re

from bilevel_profiling.meters.origin import Place
from bilevel_profiling.records.record import Alive

_NUMBER = re.compile(r"\.\d+(?=\.|$)")
Origin = tuple[str, str, str, Place]
"""(phase, span, operator, place)."""


class Ledger:
    """12 bytes of host memory an entry, and nothing is added up until it is asked for.

    Example:
        >>> ledger = Ledger()
        >>> number = ledger.number(("inner", "", "aten.mm", Place("Net.0", "model.py:3")))
        >>> ledger.add(number, 512); ledger.mark(); ledger.add(number, -512)
        >>> [(entry.bytes, entry.count, entry.line) for entry in ledger.alive(5)]
        [(512, 1, 'model.py:3')]
    """

    def __init__(self) -> None:
        self._numbers: dict[Origin, int] = {}
        self._of = array.array("i")
        self._bytes = array.array("q")
        self._marked = 0

    def number(self, origin: Origin) -> int:
        """The number under which an origin is booked."""
        return self._numbers.setdefault(origin, len(self._numbers))

    def add(self, number: int, size: int) -> None:
        """Book bytes that came to be, or, negative, that are gone."""
        self._of.append(number)
        self._bytes.append(size)

    def mark(self) -> None:
        """Now is the peak."""
        self._marked = len(self._of)

    def alive(self, most: int) -> tuple[Alive, ...]:
        """What was alive at the mark, by origin, the largest first; what exceeds `most` entries is added up in a last
        one.

        The same place in modules that differ by their numbers only, such as the layers of a net, is one entry:
            Net.layers.*.
        """
        sizes: collections.Counter[int] = collections.Counter()
        counts: collections.Counter[int] = collections.Counter()
        for number, size in zip(self._of[: self._marked], self._bytes[: self._marked], strict=True):
            sizes[number] += size
            counts[number] += 1 if size > 0 else -1 if size < 0 else 0
        found: dict[Origin, Alive] = {}
        for number, (phase, span, operator, place) in enumerate(self._numbers):
            if sizes[number] > 0:
                key = (phase, span, operator, place._replace(module=_NUMBER.sub(".*", place.module)))
                known = found.get(key)
                size, count = sizes[number], counts[number]
                module = place.module if known is None or known.module == place.module else key[3].module
                if known is not None:
                    size, count = size + known.bytes, count + known.count
                found[key] = Alive(
                    bytes=size,
                    count=count,
                    phase=phase,
                    span=span,
                    operator=operator,
                    module=module,
                    line=place.line,
                    backward=place.backward,
                )
        ordered = sorted(found.values(), key=lambda entry: -entry.bytes)
        rest = ordered[most:]
        if rest:
            ordered[most:] = [Alive(bytes=sum(entry.bytes for entry in rest), count=sum(entry.count for entry in rest))]
        return tuple(ordered)
