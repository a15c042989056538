"""Records as one self-contained index.html: no network, no other file, readable without JavaScript, on a phone, in the dark and on paper."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..record import Record
from . import columns, units
from .figures import Figure, case_figures, styles, stylesheet
from .figures.palette import Style, outline
from .figures.timeline import PHASES
from .groups import EXACT, Group, environment, estimators, failed, group
from .markup import Markup, join, tag
from .summary import Fact, Name, at, facts, sentences
from .text import clean, listing, plural, slug

TITLE = "Hypergradient estimators compared"


def render(records: Iterable[Record], command: str = "") -> str:
    """The whole page.

    Args:
        records: what was measured.
        command: the command line that made the records, shown as it is.
    """
    records = list(records)
    groups = group(records)
    looks = styles(estimators(records))
    keys = unique_keys(groups)
    sections = [_case(each, looks, key) for each, key in zip(groups, keys, strict=True)]
    body = [
        tag("header", _head(records, groups, keys), class_="wrap"),
        tag("main", *sections, _reading(groups) if groups else "", _environment(records, command), class_="wrap"),
        tag("script", _asset("page.js")),
    ]
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", TITLE),
        tag("style", Markup(stylesheet()), _asset("page.css")),
    ]
    return "<!doctype html>\n" + tag("html", tag("head", *head), tag("body", *body), lang="en") + "\n"


def unique_keys(groups: Sequence[Group]) -> list[str]:
    """A name fit for ids and files for each group, no two the same."""
    found: list[str] = []
    for each in groups:
        name = slug(each.title)
        number = 2
        while name in found:
            name = f"{slug(each.title)}-{number}"
            number += 1
        found.append(name)
    return found


def _head(records: Sequence[Record], groups: Sequence[Group], keys: Sequence[str]) -> Markup:
    steps = sorted({record.inner_steps for record in records if record.inner_steps is not None})
    lost = sum(failed(record) for record in records)
    lede = f"{plural(len(records), 'run')}: {plural(len(estimators(records)), 'estimator')} on {plural(len(groups), 'case')}"
    lede += f", K = {listing([f'{k:,}' for k in steps])}" if 0 < len(steps) <= 8 else ""
    lede += f"; {lost:,} of them failed." if lost else "."
    links = [tag("a", each.title, href=f"#{key}") for each, key in zip(groups, keys, strict=True)]
    nav = tag("nav", *links, aria_label="Cases") if len(links) > 1 else ""
    return join(tag("p", "bilevel", class_="kicker"), tag("h1", TITLE), tag("p", lede if records else "No records.", class_="lede"), nav)


def _case(each: Group, looks: Mapping[str, Style], key: str) -> Markup:
    first = each.records[0]
    sizes = (("P", first.inner_size, "inner"), ("Q", first.outer_size, "outer"), ("T", first.tasks, "tasks"))
    known = [f"{name} = {size:,} {what}" for name, size, what in sizes if size is not None]
    paragraph = [tag("strong", part) if isinstance(part, Name) else part for sentence in sentences(each) for part in (*sentence, " ")]
    figures = case_figures(each, looks, key)
    parts = [
        tag("h2", each.title),
        tag("p", "  ·  ".join([clean(first.device), clean(first.dtype), *known]), class_="sizes"),
        tag("p", *paragraph, class_="summary"),
        tag("dl", *(_fact(fact, looks) for fact in facts(each)), class_="facts"),
        _legend(each, looks) if figures else "",
        tag("div", *(_figure(figure) for figure in figures if not figure.panels), class_="figures"),
        *(_panels(figure) for figure in figures if figure.panels),
        tag("h3", "All runs"),
        _rows(each, looks, key),
        _reasons(each, key),
        _notes(each),
    ]
    for title, (header, rows) in (
        ("After the outer loop", columns.outer_loop(each)),
        ("Growth of memory per inner step", columns.growth(each)),
        (f"By phase, {at(each)}" if at(each) else "By phase", columns.phases(each)),
    ):
        if rows:
            parts.append(tag("details", tag("summary", title), _table(title, header, rows), open=title.startswith("After")))
    settings = list(dict.fromkeys((record.estimator, record.settings) for record in each.records if record.settings))
    if settings:
        rows = [[label, tag("code", text)] for label, text in settings]
        parts.append(tag("details", tag("summary", "Settings"), _table("Settings", ["estimator", "how it was made"], rows, class_="words")))
    return tag("section", *parts, id=key, class_="case")


def _fact(fact: Fact, looks: Mapping[str, Style]) -> Markup:
    detail = tag("span", fact.detail, class_="detail") if fact.detail else ""
    who = tag("span", _glyph(looks[fact.estimator]), fact.estimator, class_="who")
    return tag("div", tag("dt", fact.title), tag("dd", tag("span", fact.value, class_="big"), who, detail))


def _glyph(style: Style) -> Markup:
    """The estimator's marker on a stretch of its line, for legends and tables."""
    stroke = tag("path", d="M1 7H25", class_="line", stroke_dasharray=style.dash or None)
    mark = tag("path", d=Markup(outline(style.shape, 13, 7, 4.2)), class_="mark")
    return tag("svg", stroke, mark, class_=f"glyph s{style.color}", viewBox="0 0 26 14", aria_hidden="true")


def _legend(each: Group, looks: Mapping[str, Style]) -> Markup:
    settings = {record.estimator: clean(record.settings) for record in each.records}
    items = [tag("li", _glyph(looks[e]), e, data_for=looks[e].place, title=settings[e] or None, tabindex=0) for e in each.estimators]
    return tag("ul", *items, class_="legend", aria_label="Estimators")


def _figure(figure: Figure) -> Markup:
    return tag("figure", tag("h3", figure.title), figure.drawing or "", tag("figcaption", figure.note) if figure.note else "")


def _panels(figure: Figure) -> Markup:
    panels = [tag("div", tag("h4", name), drawing) for name, drawing in figure.panels]
    phases = [tag("li", tag("span", class_=f"swatch {phase}"), phase) for phase in PHASES]
    legend = tag("ul", *phases, class_="legend phases", aria_label="Phases")
    return tag("figure", tag("h3", figure.title), legend, tag("div", *panels, class_="panels"), tag("figcaption", figure.note), class_="wide")


def _rows(each: Group, looks: Mapping[str, Style], key: str) -> Markup:
    shown = columns.columns(each)
    top = [tag("th", section, colspan=width, scope="colgroup" if section else None) for section, width in columns.sections(shown)]
    names = [tag("th", column.header, scope="col", title=column.explanation, class_="text" if column.text else None) for column in shown]
    longest = {column.header: _longest(each, column.header) for column in shown}
    bodies, rows = [], []
    for place, record in enumerate(each.rows):
        rows.append(tag("tr", *(_cell(column, record, each, looks, key, longest) for column in shown), class_="lost" if failed(record) else None))
        if place + 1 == len(each.rows) or each.rows[place + 1].inner_steps != record.inner_steps:
            bodies.append(tag("tbody", *rows))
            rows = []
    table = tag("table", tag("thead", tag("tr", *top, class_="sections"), tag("tr", *names)), *bodies)
    return tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=f"All runs of {clean(each.title)}")


def _longest(each: Group, header: str) -> float:
    field = {"peak MiB": "peak_tensor_bytes", "ms": "wall_seconds"}.get(header)
    return max((float(value) for r in each.rows if field and units.finite(value := getattr(r, field))), default=0.0)


def _cell(column: columns.Column, record: Record, each: Group, looks: Mapping[str, Style], key: str, longest: Mapping[str, float]) -> Markup:
    text = column.cell(record)
    if column.header == "estimator":
        return tag("th", _glyph(looks[record.estimator]), text, scope="row", title=clean(record.settings) or None)
    if column.header == "status" and record.status != "OK":
        number = text[text.index("[") + 1 : -1]
        return tag("td", tag("a", text, href=f"#{key}-reason-{number}"), class_="text status " + ("bad" if failed(record) else "note"))
    value = {"peak MiB": record.peak_tensor_bytes, "ms": record.wall_seconds}.get(column.header)
    share = value / longest[column.header] if units.finite(value) and longest[column.header] > 0 else None
    style = f"--w:{share:.3f}" if share is not None else None
    classes = " ".join(name for name, on in (("text", column.text), ("gauge", style), ("none", text == units.MISSING)) if on)
    return tag("td", text, class_=classes or None, style=style)


def _reasons(each: Group, key: str) -> Markup:
    items = []
    for number, (word, record) in enumerate(columns.reasons(each), start=1):
        steps = "" if record.inner_steps is None else f", K = {record.inner_steps:,}"
        kind = "bad" if failed(record) else "note"
        head = tag("span", word, class_=f"status {kind}")
        items.append(tag("li", head, " ", tag("strong", record.estimator), steps, ": ", columns.reason(record), id=f"{key}-reason-{number}"))
    return tag("ul", *items, class_="reasons") if items else Markup()


def _notes(each: Group) -> Markup:
    notes = dict.fromkeys(clean(record.reference_note) for record in each.records)
    base = f"x base: relative to {clean(each.baseline)} at the same K." if each.baseline is not None else ""
    references = [f"References: {note}" for note in notes if note]
    return tag("p", " ".join([base, *references]).strip(), class_="fine") if base or references else Markup()


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], class_: str | None = None) -> Markup:
    head = tag("tr", *(tag("th", name, scope="col") for name in header))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    table = tag("table", tag("thead", head), tag("tbody", *body), class_=class_)
    return tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=title)


def _reading(groups: Sequence[Group]) -> Markup:
    lines: dict[str, str] = {}
    for each in groups:
        for column in columns.columns(each):
            name = f"{column.section}: {column.header}" if column.section else column.header
            lines.setdefault("x base" if column.header == "x base" else name, column.explanation)
    if "x base" in lines:
        lines["x base"] = "memory or time over that of the case's baseline (named below its table) at the same K"
    pairs = [part for name, text in lines.items() for part in (tag("dt", name), tag("dd", text))]
    notes = (
        f"An estimator is called exact here if its relative error against the K-step program is at most {EXACT:g}. The two references are different "
        "quantities: the gradient of the program that takes K inner steps, and the hypergradient at a converged inner solution. An exact unroll "
        "has no error against the first and, at small K, a large one against the second. Growth is a least-squares line through peak memory "
        "against K; a low R² says that growth is not linear, as with segments, which grow as the root of K."
    )
    return tag("section", tag("h2", "How to read this"), tag("p", notes, class_="summary"), tag("dl", *pairs, class_="reading"), id="reading")


def _environment(records: Sequence[Record], command: str) -> Markup:
    pairs = [part for name, value in environment(records).items() for part in (tag("dt", name), tag("dd", value))]
    parts = [tag("h2", "How this was made")]
    parts += [tag("pre", tag("code", command), tabindex=0)] if command else []
    parts += [tag("dl", *pairs, class_="reading")] if pairs else []
    return tag("section", *parts, id="environment") if len(parts) > 1 else Markup()


def _asset(name: str) -> Markup:
    return Markup((Path(__file__).parent / name).read_text(encoding="utf-8"))
