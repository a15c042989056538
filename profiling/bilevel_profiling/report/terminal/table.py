"""Records as tables in the terminal, one per case, that fold or give up their least needed columns before they grow
wider than the terminal.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from bilevel_profiling.records.failure import Severity, severity
from bilevel_profiling.records.growth import Verdict
from bilevel_profiling.records.record import Record
from bilevel_profiling.report.content import footnotes, laws, loops, ranks
from bilevel_profiling.report.content.columns import Column, columns, folded_calls
from bilevel_profiling.report.content.groups import Group, group
from bilevel_profiling.report.content.summary import Name, sentences
from bilevel_profiling.report.content.text import at_k, clean, shorten
from bilevel_profiling.report.terminal.alive import bare

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

_LABEL = 24
"""Longer labels of estimators fold."""
_ROOMY = 120
"""From this width on, columns stand two spaces apart."""
BROKEN = Verdict.BROKEN.value.upper()
_COLORS = {Severity.OK: "green", Severity.NOTE: "yellow", Severity.FAILED: "red"}
_SECTIONS = {"vs K-step program": "program", "vs converged solution": "solution", "": ""}
_HEADERS = {"peak MiB": "MiB", "x base": "x", "rel. error": "error"}


def render(records: Iterable[Record], width: int = 100) -> "RenderableType":
    """Everything the terminal shows, at most `width` columns wide: tables, reasons of failures, the outer loop, a
    summary.
    """
    from rich.console import Group as Stack
    from rich.text import Text

    parts: list[RenderableType] = []
    for each in group(records):
        parts += [Text()] * (2 if parts else 0) + _case(each, width)
    return Stack(*parts) if parts else Text("No records.")


def print_table(records: Iterable[Record], console: "Console | None" = None) -> None:
    """Print the tables on `console` (by default a new one on standard output), as wide as it is."""
    from rich.console import Console

    console = console or Console()
    console.print(render(list(records), width=console.width))


def _case(each: Group, width: int) -> "list[RenderableType]":
    from rich.text import Text

    every, fold = columns(each), folded_calls(each)
    shown = _fitting(every, fold, each, width)
    parts: list[RenderableType] = [Text(clean(each.title), style="bold"), Text(_sizes(each), style="dim"), Text()]
    made = _frame([column.text for column in shown], _headings(shown), width)
    _fill(made, each, shown)
    parts.append(made)
    for word, record in footnotes.reasons(each):
        label = f"{word[word.index('[') :]} {clean(record.estimator)}{at_k(record)}: "
        parts.append(Text.assemble((label, _COLORS[severity(record.status)]), footnotes.reason(record)))
    parts += [
        Text(f"{f'({mark}) ' if mark.isalpha() else f'{mark} ' if mark else 'All rows: '}{text}", "dim")
        for mark, text in footnotes.lines(each)
    ]
    for header, rows in (ranks.table(each), loops.outcome(each), laws.table(each)):
        if rows:
            parts += [Text(), _plain(header, rows, width)]
    parts += [
        Text.assemble(("CONTRACT BROKEN ", "bold red"), (clean(label), "bold"), f" {rest}")
        for label, rest in laws.broken(each)
    ]
    parts.append(Text())
    parts += [_sentence(sentence) for sentence in sentences(each)]
    if each.baseline is not None:
        parts.append(Text(f"x is relative to {clean(each.baseline)} at the same K.", style="dim"))
    if fold is not None and fold in shown:
        parts.append(
            Text(
                f"{fold.header}: calls of {', '.join(column.header for column in every if column.folds)}.", style="dim"
            )
        )
    hidden = [_full(column) for column in every if column not in shown and not (column.folds and fold in shown)]
    if hidden:
        parts.append(Text(f"Left out at this width: {', '.join(hidden)}.", style="dim"))
    return parts


def _sizes(each: Group) -> str:
    first = each.records[0]
    known = [
        f"{name} = {size:,}"
        for name, size in (
            *(("P", first.inner_size), ("Q", first.outer_size), ("T", first.tasks)),
            ("processes", each.processes),
        )
        if size is not None
    ]
    return ", ".join([clean(first.device), clean(first.dtype), *known])


def _full(column: Column) -> str:
    return f"{column.header} ({column.section})" if column.header in ("x base", "cosine") else column.header


def _frame(is_text: Sequence[bool], headings: Sequence[str], width: int) -> "Table":
    from rich.text import Text

    made = bare(gap=1 if width >= _ROOMY else 0)
    for place, (left, heading) in enumerate(zip(is_text, headings, strict=True)):
        longest = _LABEL if place == 0 else None
        made.add_column(
            Text(heading),
            justify="left" if left else "right",
            no_wrap=place > 0,
            overflow="fold",
            max_width=longest,
            vertical="bottom",
        )
    return made


def _fill(made: "Table", each: Group, shown: Sequence[Column]) -> None:
    from rich.text import Text

    status = [column.header for column in shown].index("status")
    for place, record in enumerate(each.rows):
        cells = [Text(column.cell(record)) for column in shown]
        cells[status].stylize(_COLORS[severity(record.status)])
        last = place + 1 < len(each.rows) and each.rows[place + 1].inner_steps != record.inner_steps
        made.add_row(*cells, end_section=last)


def _headings(shown: Sequence[Column]) -> list[str]:
    """Two lines a heading: the section above the first of its columns."""
    names, before = [], ""
    for column in shown:
        section = (
            _SECTIONS.get(column.section, column.section)
            if column.section != before and column.header != "calls"
            else ""
        )
        names.append(f"{section}\n{_HEADERS.get(column.header, column.brief)}")
        before = column.section
    return names


def _fitting(every: Sequence[Column], fold: Column | None, each: Group, width: int) -> list[Column]:
    """The columns that fit: call counts fold into one column first; then, while needed, those of the highest rank go
    together.
    """
    if _width(every, each, width) <= width:
        return list(every)
    shown = [column for column in every if not column.folds]
    if fold is not None:
        place = next((p for p, column in enumerate(shown) if column.section not in ("", "memory", "time")), len(shown))
        shown.insert(place, fold)
    while _width(shown, each, width) > width and any(column.rank for column in shown):
        worst = max(column.rank for column in shown)
        shown = [column for column in shown if column.rank < worst]
    return shown


def _width(shown: Sequence[Column], each: Group, width: int) -> int:
    total = 0
    for column, heading in zip(shown, _headings(shown), strict=True):
        widest = max(len(text) for text in (*heading.split("\n"), *(column.cell(record) for record in each.rows)))
        total += min(widest, _LABEL) if column.header == "estimator" else widest
    return total + (len(shown) - 1) * (2 if width >= _ROOMY else 1)


def _plain(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> "Table":
    """A table of as many columns as fit."""
    from rich.text import Text

    header = [shorten(name, _LABEL) for name in header]
    widths = [max(len(row[place]) for row in (header, *rows)) + 2 for place in range(len(header))]
    widths[0] = min(widths[0], _LABEL)
    fit = max((place for place in range(1, len(header) + 1) if sum(widths[:place]) <= width), default=1)
    made = _frame([True] + [False] * (fit - 1), header[:fit], _ROOMY)
    for row in rows:
        made.add_row(*(Text(cell, "bold red" if cell == BROKEN else "") for cell in row[:fit]))
    return made


def _sentence(fragments: Sequence[str]) -> "Text":
    from rich.text import Text

    return Text.assemble(*((clean(part), "bold") if isinstance(part, Name) else part for part in fragments))
