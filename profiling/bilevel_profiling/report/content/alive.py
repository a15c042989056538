"""What was alive at the peak, tensors of one origin a row."""

from collections.abc import Sequence

from bilevel_profiling.records import units
from bilevel_profiling.records.record import Alive, Record
from bilevel_profiling.report.content.groups import Group
from bilevel_profiling.report.content.text import clean, plural, without_empty

REST = "all others"
TEXTS = ("phase", "span", "operator", "module", "line")
"""Columns of words; the others are numbers."""


def shown(group: Group) -> dict[str, Record]:
    """The record of each estimator whose peak is told."""
    return group.chosen(lambda record: record.alive)


def total(record: Record) -> int:
    """The bytes that shares refer to: the peak, or the sum where the peak was not recorded."""
    listed = sum(entry.bytes for entry in record.alive)
    return max(record.peak_tensor_bytes or 0, listed)


def share(entry: Alive, record: Record) -> float:
    """Share of the peak, between 0 and 1."""
    return entry.bytes / whole if (whole := total(record)) > 0 else 0.0


def table(record: Record) -> tuple[list[str], list[list[str]]]:
    """Header and rows; columns of text that are empty throughout are left out."""
    rows = [
        [units.mebibytes(e.bytes), f"{share(e, record):.1%}", units.count(e.count), *_texts(e, e is record.alive[-1])]
        for e in record.alive
    ]
    header = ["MiB", "of peak", "storages", *TEXTS]
    return without_empty(header, rows, always=range(3))


def headline(record: Record) -> str:
    """The peak and what holds most of it, in a few words."""
    first = max(record.alive, key=lambda entry: entry.bytes)
    made = " ".join(part for part in (clean(first.operator) or REST, _line(first)) if part)
    most = f"{share(first, record):.0%} of it {made} ({plural(first.count, 'storage')})"
    return f"{units.size(total(record))} at the peak; {most}"


def _texts(entry: Alive, last: bool) -> Sequence[str]:
    operator = clean(entry.operator) or (REST if last else units.MISSING)
    words = (entry.phase, entry.span, operator, entry.module, _line(entry))
    return [clean(word) or units.MISSING for word in words]


def _line(entry: Alive) -> str:
    """The line of the user's code that made the tensors, or whose gradient they belong to."""
    line = clean(entry.line)
    return (f"gradient of {line}" if line else "backward") if entry.backward else line
