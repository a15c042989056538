"""The tables of a case in HTML: all runs with their footnotes, and what folds away below them."""

from collections.abc import Mapping, Sequence

from bilevel_profiling.records import units
from bilevel_profiling.records.failure import Severity, failed, noted, severity
from bilevel_profiling.records.growth import Verdict
from bilevel_profiling.records.record import Record
from bilevel_profiling.report.content import alive, columns, footnotes, laws, loops
from bilevel_profiling.report.content.groups import Group
from bilevel_profiling.report.content.summary import at
from bilevel_profiling.report.content.text import clean, plural
from bilevel_profiling.report.figures.markup import Markup, tag
from bilevel_profiling.report.figures.palette import Style, outline

_MOST_ALIVE = 8
"""Rows of what was alive that are shown at once."""
_STATUS = {Severity.OK: "text", Severity.NOTE: "text status note", Severity.FAILED: "text status bad"}
_WIDTHS = {"MiB": 5, "of peak": 7.5, "storages": 6, "phase": 10.5, "span": 9.5, "operator": 10}
"""Columns of what was alive, in em, so that folded rows stand below the others."""


def sections(each: Group, looks: Mapping[str, Style], key: str) -> list[Markup]:
    """Everything below the figures of a case."""
    parts = [tag("h3", "All runs"), _runs(each, looks, key), _reasons(each, key), _notes(each)]
    header, rows = loops.outcome(each)
    if rows:
        title = loops.title(each)
        parts.append(_fold(title, plain(title, header, rows), opened=True))
    parts += [growth(each), _alive_of_all(each, looks), _loops_of_all(each, looks)]
    phases = f"By phase, {at(each)}" if at(each) else "By phase"
    header, rows = columns.phases(each)
    if rows:
        parts.append(_fold(phases, plain(phases, header, rows)))
    settings = list(dict.fromkeys((record.estimator, record.settings) for record in each.records if record.settings))
    if settings:
        lines = [[label, tag("code", text)] for label, text in settings]
        parts.append(_fold("Settings", plain("Settings", ["estimator", "how it was made"], lines, class_="words")))
    return parts


def growth(each: Group) -> Markup:
    """Fitted laws, contracts and verdicts; nothing where there is one K only."""
    header, rows = laws.table(each)
    if not rows:
        return Markup()
    shown = [
        [tag("span", cell, class_="status bad") if cell == Verdict.BROKEN.upper() else cell for cell in row]
        for row in rows
    ]
    return _fold("Growth with K", plain("Growth with K", header, shown, class_="laws"), opened=True)


def alive_table(record: Record) -> Markup:
    """What was alive at the record's peak, the largest first; rows beyond the first few fold away."""
    header, rows = alive.table(record)
    shares = [f"--w:{alive.share(entry, record):.3f}" for entry in record.alive]
    numbers = header.index("storages") + 1
    lines = []
    for row, share in zip(rows, shares, strict=True):
        cells = [tag("td", row[0]), tag("td", row[1], class_="gauge", style=share)]
        cells += [
            tag("td", cell, class_=_class(cell, text=place >= numbers)) for place, cell in enumerate(row[2:], start=2)
        ]
        lines.append(tag("tr", *cells))
    names = [
        tag(
            "th",
            name,
            scope="col",
            class_="text" if place >= numbers else None,
            style=f"width:{_WIDTHS[name]}em" if name in _WIDTHS else None,
        )
        for place, name in enumerate(header)
    ]
    head = tag("thead", tag("tr", *names))
    label = f"What was alive at the peak of {clean(record.estimator)}"
    shown = _scroll(label, tag("table", head, tag("tbody", *lines[:_MOST_ALIVE]), class_="alive"))
    if len(lines) <= _MOST_ALIVE:
        return shown
    rest = _scroll(f"{label}, the rest", tag("table", head, tag("tbody", *lines[_MOST_ALIVE:]), class_="alive"))
    return tag("div", shown, _fold(f"{plural(len(lines) - _MOST_ALIVE, 'more row')}", rest))


def iterations_table(record: Record) -> Markup:
    """The outer iterations of a run one by one."""
    header, rows, hidden = loops.iterations(record)
    lines = []
    for place, row in enumerate(rows):
        if hidden and place == len(rows) // 2:
            said = f"{plural(hidden, 'step')} left out; records.jsonl has them all"
            lines.append(tag("tr", tag("td", said, colspan=len(header), class_="text none")))
        lines.append(
            tag(
                "tr",
                *(tag("td", cell) for cell in row[:-1]),
                tag("td", row[-1], class_=_STATUS[severity(row[-1])]),
            )
        )
    names = [tag("th", name, scope="col", class_="text" if name == "status" else None) for name in header]
    table = tag("table", tag("thead", tag("tr", *names)), tag("tbody", *lines))
    return tag(
        "div",
        table,
        class_="scroll tall",
        tabindex=0,
        role="region",
        aria_label=f"Outer steps of {clean(record.estimator)}",
    )


def glyph(style: Style) -> Markup:
    """The estimator's marker on a stretch of its line, for legends and tables."""
    stroke = tag("path", d="M1 7H25", class_="line", stroke_dasharray=style.dash or None)
    mark = tag("path", d=Markup(outline(style.shape, 13, 7, 4.2)), class_="mark")
    return tag("svg", stroke, mark, class_=f"glyph s{style.color}", viewBox="0 0 26 14", aria_hidden="true")


def plain(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], class_: str | None = None) -> Markup:
    """A table whose first column names the rows."""
    head = tag("tr", *(tag("th", name, scope="col") for name in header))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    return _scroll(title, tag("table", tag("thead", head), tag("tbody", *body), class_=class_))


def _fold(title: object, *content: object, opened: bool = False) -> Markup:
    return tag("details", tag("summary", title), *content, open=opened)


def _scroll(label: str, table: Markup) -> Markup:
    return tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=label)


def _class(cell: str, *, text: bool) -> str | None:
    return " ".join(name for name, on in (("text", text), ("none", cell == units.MISSING)) if on) or None


def _alive_of_all(each: Group, looks: Mapping[str, Style]) -> Markup:
    runs = alive.shown(each)
    if not runs:
        return Markup()
    steps = {record.inner_steps for record in runs.values()}
    parts = []
    for label, record in runs.items():
        at_k = f", K = {record.inner_steps:,}" if record.inner_steps is not None and len(steps) > 1 else ""
        head = tag("span", glyph(looks[label]), label, at_k, class_="who")
        parts.append(
            _fold(
                tag("span", head, tag("span", alive.headline(record), class_="detail")),
                alive_table(record),
                opened=len(runs) == 1,
            )
        )
    title = "What was alive at the peak" + (f", K = {steps.pop():,}" if len(steps) == 1 and None not in steps else "")
    return tag("div", tag("h3", title), *parts, class_="folds")


def _loops_of_all(each: Group, looks: Mapping[str, Style]) -> Markup:
    runs = loops.shown(each)
    parts = []
    for label, record in runs.items():
        at_k = "" if record.inner_steps is None else f", K = {record.inner_steps:,}"
        bad = ", ".join(f"{number:,} {clean(status)}" for status, number in loops.troubles(record).items())
        told = plural(len(record.iterations), "step") + (f", of these {bad}" if bad else ", all OK")
        head = tag("span", glyph(looks[label]), label, at_k, class_="who")
        parts.append(_fold(tag("span", head, tag("span", told, class_="detail")), iterations_table(record)))
    return tag("div", tag("h3", "Iteration by iteration"), *parts, class_="folds") if parts else Markup()


def _runs(each: Group, looks: Mapping[str, Style], key: str) -> Markup:
    shown = columns.columns(each)
    top = [
        tag("th", section, colspan=width, scope="colgroup" if section else None)
        for section, width in columns.sections(shown)
    ]
    names = [
        tag("th", column.header, scope="col", title=column.explanation, class_="text" if column.text else None)
        for column in shown
    ]
    longest = {column.header: _longest(each, column.header) for column in shown}
    bodies, rows = [], []
    for place, record in enumerate(each.rows):
        rows.append(
            tag(
                "tr",
                *(_cell(column, record, each, looks, key, longest) for column in shown),
                class_="lost" if failed(record) else None,
            )
        )
        if place + 1 == len(each.rows) or each.rows[place + 1].inner_steps != record.inner_steps:
            bodies.append(tag("tbody", *rows))
            rows = []
    table = tag("table", tag("thead", tag("tr", *top, class_="sections"), tag("tr", *names)), *bodies)
    return _scroll(f"All runs of {clean(each.title)}", table)


def _longest(each: Group, header: str) -> float:
    field = {"peak MiB": "peak_tensor_bytes", "ms": "wall_seconds"}.get(header)
    return max((float(value) for r in each.rows if field and units.finite(value := getattr(r, field))), default=0.0)


def _cell(
    column: columns.Column,
    record: Record,
    each: Group,
    looks: Mapping[str, Style],
    key: str,
    longest: Mapping[str, float],
) -> Markup:
    text = column.cell(record)
    if column.header == "estimator":
        return tag("th", glyph(looks[record.estimator]), text, scope="row", title=clean(record.settings) or None)
    if column.header == "status" and noted(record):
        number = text[text.index("[") + 1 : text.index("]")]
        return tag(
            "td",
            tag("a", text, href=f"#{key}-reason-{number}"),
            class_=_STATUS[severity(record.status)],
        )
    value = {"peak MiB": record.peak_tensor_bytes, "ms": record.wall_seconds}.get(column.header)
    share = value / longest[column.header] if units.finite(value) and longest[column.header] > 0 else None
    style = f"--w:{share:.3f}" if share is not None else None
    classes = " ".join(
        name for name, on in (("text", column.text), ("gauge", style), ("none", text == units.MISSING)) if on
    )
    return tag("td", text, class_=classes or None, style=style)


def _reasons(each: Group, key: str) -> Markup:
    items = []
    for number, (word, record) in enumerate(footnotes.reasons(each), start=1):
        steps = "" if record.inner_steps is None else f", K = {record.inner_steps:,}"
        head = tag("span", word, class_=_STATUS[severity(record.status)].removeprefix("text "))
        items.append(
            tag(
                "li",
                head,
                " ",
                tag("strong", record.estimator),
                steps,
                ": ",
                footnotes.reason(record),
                id=f"{key}-reason-{number}",
            )
        )
    for mark, text in footnotes.lines(each):
        items.append(tag("li", tag("strong", f"({mark})" if mark.isalpha() else mark or "All rows:"), " ", text))
    return tag("ul", *items, class_="reasons") if items else Markup()


def _notes(each: Group) -> Markup:
    notes = dict.fromkeys(clean(record.reference_note) for record in each.records)
    base = f"x base: relative to {clean(each.baseline)} at the same K." if each.baseline is not None else ""
    references = [f"References: {note}" for note in notes if note]
    return tag("p", " ".join([base, *references]).strip(), class_="fine") if base or references else Markup()
