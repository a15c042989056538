"""What was alive at the peak, as a table in the terminal that gives up columns before it is wider than that."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bilevel_profiling.records.record import Record
from bilevel_profiling.report.content.alive import TEXTS, headline, table
from bilevel_profiling.report.content.text import at_k, clean

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_GIVEN_UP = ("phase", "storages", "span", "module")
"""Columns that a narrow terminal goes without."""


def print_alive(record: Record, console: "Console | None" = None) -> None:
    """Print what was alive at the record's peak on `console` (by default a new one on standard output), at most as wide
    as it is.

    Raises:
        ImportError: rich is not installed.
    """
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    name = ", ".join(filter(None, (clean(record.case), clean(record.estimator))))
    console.print(Text(f"{name}{at_k(record)}", style="bold"))
    if not record.alive:
        console.print(Text("What was alive at the peak was not recorded."))
        return
    console.print(Text(f"{headline(record)}."))
    header, rows = _fitting(*table(record), console.width)
    made = bare(gap=1)
    for name in header:
        made.add_column(
            Text(name), justify="left" if name in TEXTS else "right", no_wrap=name not in TEXTS, overflow="fold"
        )
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    console.print(made)


def bare(gap: int) -> "Table":
    """A table with one rule, below its header."""
    from rich import box
    from rich.table import Table

    return Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, gap, 0, 0),
        collapse_padding=True,
        header_style="bold",
    )


def _fitting(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> tuple[list[str], list[list[str]]]:
    """The columns that fit, those of `_GIVEN_UP` leaving first."""
    kept = list(range(len(header)))
    for name in _GIVEN_UP:
        if sum(max(len(row[place]) for row in (header, *rows)) + 1 for place in kept) > width:
            kept = [place for place in kept if header[place] != name]
    return [header[place] for place in kept], [[row[place] for place in kept] for row in rows]
