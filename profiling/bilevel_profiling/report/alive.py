"""What was alive at the peak, tensors of one origin a row."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..record import Alive, Record
from . import units
from .groups import Group
from .text import clean, plural

if TYPE_CHECKING:
    from rich.console import Console

REST = "all others"
_GIVEN_UP = ("phase", "storages", "span", "module")
"""Columns that a narrow terminal goes without."""
_TEXTS = ("phase", "span", "operator", "module", "line")


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
    header = ["MiB", "of peak", "storages", *_TEXTS]
    kept = [place for place in range(len(header)) if place < 3 or any(row[place] != units.MISSING for row in rows)]
    return [header[place] for place in kept], [[row[place] for place in kept] for row in rows]


def headline(record: Record) -> str:
    """The peak and what holds most of it, in a few words."""
    first = max(record.alive, key=lambda entry: entry.bytes)
    made = " ".join(part for part in (clean(first.operator) or REST, _line(first)) if part)
    return f"{units.size(total(record))} at the peak; {share(first, record):.0%} of it {made} ({plural(first.count, 'storage')})"


def print_alive(record: Record, console: "Console | None" = None) -> None:
    """Print what was alive at the record's peak on `console` (by default a new one on standard output), at most as wide
    as it is.

    Raises:
        ImportError: rich is not installed.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    steps = "" if record.inner_steps is None else f", K = {record.inner_steps:,}"
    name = ", ".join(filter(None, (clean(record.case), clean(record.estimator))))
    console.print(Text(f"{name}{steps}", style="bold"))
    if not record.alive:
        console.print(Text("What was alive at the peak was not recorded."))
        return
    console.print(Text(f"{headline(record)}."))
    header, rows = _fitting(*table(record), console.width)
    made = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        collapse_padding=True,
        header_style="bold",
    )
    for name in header:
        made.add_column(
            Text(name), justify="left" if name in _TEXTS else "right", no_wrap=name not in _TEXTS, overflow="fold"
        )
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    console.print(made)


def _fitting(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> tuple[list[str], list[list[str]]]:
    """The columns that fit, those of `_GIVEN_UP` leaving first."""
    kept = list(range(len(header)))
    for name in _GIVEN_UP:
        if sum(max(len(row[place]) for row in (header, *rows)) + 1 for place in kept) > width:
            kept = [place for place in kept if header[place] != name]
    return [header[place] for place in kept], [[row[place] for place in kept] for row in rows]


def _texts(entry: Alive, last: bool) -> Sequence[str]:
    operator = clean(entry.operator) or (REST if last else units.MISSING)
    words = (entry.phase, entry.span, operator, entry.module, _line(entry))
    return [clean(word) or units.MISSING for word in words]


def _line(entry: Alive) -> str:
    """The line of the user's code that made the tensors, or whose gradient they belong to."""
    line = clean(entry.line)
    return (f"gradient of {line}" if line else "backward") if entry.backward else line
