"""Records as report.md: the tables, how to read them, growth of memory, what was alive at the peak, failures,
environment and the exact command.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from bilevel_profiling.records.record import Record
from bilevel_profiling.report.content import alive, columns, footnotes, laws, loops, ranks
from bilevel_profiling.report.content.groups import EXACT, Group, environment, group, settings
from bilevel_profiling.report.content.laws import GROWTH
from bilevel_profiling.report.content.summary import PLAIN_TITLE, Name, Sentence, at, sentences
from bilevel_profiling.report.content.text import at_k, clean, plural

_MOST_ALIVE = 8
TITLE = "Hypergradient estimators: memory, time and error"


def render(
    records: Iterable[Record], command: str = "", figures: Mapping[str, Sequence[tuple[str, str]]] | None = None
) -> str:
    """The whole document.

    Args:
        records: what was measured.
        command: the command line that made the records, shown as it is.
        figures: for each title of a case, (alternative text, address) of the images to show with it.
    """
    records = list(records)
    groups = group(records)
    count = f"{plural(len(records), 'record')} of {plural(len(groups), 'case')}." if records else "No records."
    bilevel = not groups or any(each.bilevel for each in groups)
    parts = [f"# {TITLE if bilevel else PLAIN_TITLE}", count, *(_fence(command) if command else [])]
    for each in groups:
        parts += _case(each, (figures or {}).get(each.title, ()))
    if groups:
        parts += ["## How to read the columns", _reading(groups), "## How the rows were made", _settings(records)]
    found = environment(records)
    if found:
        parts += ["## Environment", _table(["", ""], [[key, value] for key, value in found.items()], left=2)]
    return "\n\n".join(part for part in parts if part) + "\n"


def escape(text: str) -> str:
    """`text` as plain text of a Markdown table or paragraph: nothing in it is markup, HTML or a cell border."""
    signs = r"([\\`*|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|\](?=[(\[:])|^[#+-](?=\s))"
    return re.sub(signs, r"\\\1", clean(text)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _case(each: Group, figures: Sequence[tuple[str, str]]) -> list[str]:
    first = each.records[0]
    sizes = (
        ("P", first.inner_size, "numbers in the inner variable"),
        ("Q", first.outer_size, "in the outer variable"),
        ("T", first.tasks, "tasks"),
        ("N", each.processes, "processes"),
    )
    known = [f"{name} = {size:,} {what}" for name, size, what in sizes if size is not None]
    parts = [
        f"## {escape(each.title)}",
        escape(", ".join([first.device, first.dtype, *known])) + ".",
        " ".join(_sentence(sentence) for sentence in sentences(each)),
        "\n".join(f"![{escape(text)}]({address})" for text, address in figures),
        _rows(each),
        _reasons(each),
    ]
    notes = dict.fromkeys(clean(record.reference_note) for record in each.records)
    parts += [f"References: {escape(note)}" for note in notes if note]
    for title, (header, rows), below in (
        (loops.title(each), loops.outcome(each), ""),
        ("Growth with K", laws.table(each), _broken(each)),
        (f"By phase, {at(each)}" if at(each) else "By phase", columns.phases(each), ""),
        (f"By rank, {at(each)}" if at(each) else "By rank", ranks.table(each), ""),
    ):
        if rows:
            parts += [f"### {title}", _table(header, rows), below]
    return [*parts, *_alive(each)]


def _rows(each: Group) -> str:
    shown = columns.columns(each)
    header, before = [], ""
    for column in shown:
        new = column.section and column.section != before
        header.append(f"{column.section}: {column.header}" if new else column.header)
        before = column.section
    left = sum(column.text for column in shown[:1])
    return _table(header, [[column.cell(record) for column in shown] for record in each.rows], left=left)


def _reasons(each: Group) -> str:
    lines = []
    for word, record in footnotes.reasons(each):
        lines.append(f"- {escape(word)} {escape(record.estimator)}{at_k(record)}: {escape(footnotes.reason(record))}")
    for mark, text in footnotes.lines(each):
        lines.append(f"- {escape(f'({mark})' if mark.isalpha() else mark or 'All rows:')} {escape(text)}")
    return "\n".join(lines)


def _broken(each: Group) -> str:
    return "\n\n".join(f"**CONTRACT BROKEN: {escape(label)}** {escape(rest)}" for label, rest in laws.broken(each))


def _alive(each: Group) -> list[str]:
    parts = []
    for label, record in alive.shown(each).items():
        header, rows = alive.table(record)
        more = f"{plural(len(rows) - _MOST_ALIVE, 'more row')} in index.html." if len(rows) > _MOST_ALIVE else ""
        parts += [
            f"#### {escape(label)}{at_k(record)}",
            f"{escape(alive.headline(record))}.",
            _table(header, rows[:_MOST_ALIVE], left=0),
            more,
        ]
    return ["### What was alive at the peak", *parts] if parts else []


def _reading(groups: Sequence[Group]) -> str:
    """One line a column, over all cases; the baseline differs by case and is named for each."""
    lines = {
        "estimator": "label in the comparison",
        "K": "number of inner steps",
        "status": columns.STATUS,
    }
    for each in groups:
        for column in columns.columns(each):
            if column.section and column.header != "x base":
                lines.setdefault(f"{column.section}: {column.header}", column.explanation)
    bases = [f"{escape(each.baseline)} in {escape(each.title)}" for each in groups if each.baseline is not None]
    if bases:
        lines["x base"] = "memory or time over that of the baseline at the same K; the baseline is " + ", ".join(bases)
    reading = [f"- **{escape(name)}**: {text if name == 'x base' else escape(text)}" for name, text in lines.items()]
    notes = [
        f"An estimator is called exact here if its relative error against the K-step program is at most {EXACT:g}.",
        "The two references are different quantities: the gradient of the program that takes K inner steps, and the "
        "hypergradient at a converged inner solution. An exact unroll has no error against the first and, at small K, "
        "a large one against the second.",
        GROWTH,
    ]
    return "\n".join([*reading, "", *notes] if any(each.bilevel for each in groups) else reading)


def _settings(records: Sequence[Record]) -> str:
    said = "\n".join(f"- {escape(label)}: {_code(text)}" for label, text in settings(records))
    return said or "The records do not say."


def _sentence(sentence: Sentence) -> str:
    return "".join(f"**{escape(part)}**" if isinstance(part, Name) else part for part in sentence)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A pipe table; all but the first `left` columns are aligned to the right."""
    lines = [[escape(cell) for cell in row] for row in (header, *rows)]
    lines.insert(1, [":--" if place < left else "--:" for place in range(len(header))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _code(text: str) -> str:
    """An inline code span around any text, backticks included."""
    text = clean(text)
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if len(ticks) > 1 else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def _fence(text: str) -> list[str]:
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return [f"{ticks}sh\n{clean(text)}\n{ticks}"]
