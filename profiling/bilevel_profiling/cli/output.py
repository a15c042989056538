"""What the verbs say, and the exit statuses they end with."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bilevel_profiling.comparison import progress
from bilevel_profiling.records.record import Record

DONE, NOTHING, WRONG, INTERRUPTED = 0, 1, 2, 130
WORSE = 1
"""Of `diff`."""


def wrong(message: str) -> int:
    """Say what the user can put right."""
    say(message)
    return WRONG


def say(message: str) -> None:
    """A line on standard error."""
    print(f"bilevel: {message}", file=sys.stderr)


def unwritable(folder: Path | str, error: OSError) -> int:
    """Say that a folder cannot be written to."""
    return wrong(f"cannot write to {folder}: {error.strerror or error}")


def print_rows(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    stderr: bool = False,
    right: Sequence[str] = (),
    styles: Mapping[str, str] | None = None,
) -> None:
    """A table of words, columns in `right` set to the right; with `styles`, the first cell is styled by what it says.
    Plain lines where rich is missing.
    """
    try:
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        say('rich would set this better: pip install "bilevel[profiling]"')
        stream = sys.stderr if stderr else sys.stdout
        print(*filter(None, [title]), *("  ".join(row) for row in (header, *rows)), sep="\n", file=stream)
        return
    table = Table(title=Text(title) if title else None, title_justify="left", box=None, pad_edge=False)
    for name in header:
        table.add_column(Text(name), overflow="fold", justify="right" if name in right else "left")
    for first, *others in rows:
        style = "" if styles is None else styles.get(first, "dim")
        table.add_row(Text(first, style=style), *map(Text, others))
    console = progress.terminal(stderr=stderr)
    console.print(table)
    if title:
        console.print()


def print_records(records: Sequence[Record], *, as_json: bool) -> None:
    """The tables on standard output; or the records there, a JSON line each, and the tables on standard error."""
    from bilevel_profiling import report

    if as_json:
        for record in records:
            print(record.to_json())
    try:
        report.print_table(records, progress.terminal(stderr=as_json))
    except ImportError:
        say('the tables need rich: pip install "bilevel[profiling]"')
