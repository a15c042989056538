"""Records as one self-contained index.html: no network, no other file, readable without JavaScript, on a phone, in the
dark and on paper.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bilevel_profiling.records.failure import failed
from bilevel_profiling.records.record import Record
from bilevel_profiling.report.content import columns
from bilevel_profiling.report.content.groups import EXACT, Group, environment, estimators, group
from bilevel_profiling.report.content.laws import GROWTH, broken
from bilevel_profiling.report.content.summary import PLAIN_TITLE, Fact, Name, facts, sentences
from bilevel_profiling.report.content.text import clean, listing, plural, slug
from bilevel_profiling.report.figures import Figure, case_figures, styles, stylesheet
from bilevel_profiling.report.figures.frame import Panel
from bilevel_profiling.report.figures.markup import Markup, join, tag
from bilevel_profiling.report.figures.palette import Style
from bilevel_profiling.report.figures.timeline import PHASES
from bilevel_profiling.report.html import tables

TITLE = "Hypergradient estimators compared"


def render(records: Iterable[Record], command: str = "") -> str:
    """The whole page.

    Args:
        records: what was measured.
        command: the command line that made the records, shown as it is.
    """
    records = list(records)
    groups = group(records)
    looks = styles(estimators(groups))
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
        tag("title", _title(groups)),
        tag("style", Markup(stylesheet()), _asset("page.css")),
    ]
    return "<!doctype html>\n" + tag("html", tag("head", *head), tag("body", *body), lang="en") + "\n"


def _title(groups: Sequence[Group]) -> str:
    return TITLE if not groups or any(each.bilevel for each in groups) else PLAIN_TITLE


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
    labels = plural(len({record.estimator for record in records}), "estimator" if _title(groups) == TITLE else "label")
    lede = f"{plural(len(records), 'run')}: {labels} on {plural(len(groups), 'case')}"
    lede += f", K = {listing([f'{k:,}' for k in steps])}" if 0 < len(steps) <= 8 else ""
    lede += f"; {lost:,} of them failed." if lost else "."
    links = [tag("a", each.title, href=f"#{key}") for each, key in zip(groups, keys, strict=True)]
    nav = tag("nav", *links, aria_label="Cases") if len(links) > 1 else ""
    return join(
        tag("p", "bilevel", class_="kicker"),
        tag("h1", _title(groups)),
        tag("p", lede if records else "No records.", class_="lede"),
        nav,
    )


def _case(each: Group, looks: Mapping[str, Style], key: str) -> Markup:
    first = each.records[0]
    sizes = (("P", first.inner_size, "inner"), ("Q", first.outer_size, "outer"), ("T", first.tasks, "tasks"))
    known = [f"{name} = {size:,} {what}" for name, size, what in sizes if size is not None]
    paragraph = [
        tag("strong", part) if isinstance(part, Name) else part
        for sentence in sentences(each)
        for part in (*sentence, " ")
    ]
    figures = case_figures(each, looks, key)
    parts = [
        tag("h2", each.title),
        tag("p", "  ·  ".join([clean(first.device), clean(first.dtype), *known]), class_="sizes"),
        tag("p", *paragraph, class_="summary"),
        *(
            tag("p", tag("strong", "Contract broken: ", label), " ", rest, class_="alert", role="alert")
            for label, rest in broken(each)
        ),
        tag("dl", *(_fact(fact, looks) for fact in facts(each)), class_="facts"),
        _legend(each, looks) if figures and len(each.estimators) > 1 else "",
        tag("div", *(_figure(figure) for figure in figures if not figure.panels), class_="figures"),
        *(_panels(figure) for figure in figures if figure.panels),
        *tables.sections(each, looks, key),
    ]
    return tag("section", *parts, id=key, class_="case")


def _fact(fact: Fact, looks: Mapping[str, Style]) -> Markup:
    detail = tag("span", fact.detail, class_="detail") if fact.detail else ""
    who = tag("span", tables.glyph(looks[fact.estimator]), fact.estimator, class_="who")
    return tag("div", tag("dt", fact.title), tag("dd", tag("span", fact.value, class_="big"), who, detail))


def _legend(each: Group, looks: Mapping[str, Style]) -> Markup:
    settings = {record.estimator: clean(record.settings) for record in each.records}
    items = [
        tag("li", tables.glyph(looks[e]), e, data_for=looks[e].place, title=settings[e] or None, tabindex=0)
        for e in each.estimators
    ]
    return tag("ul", *items, class_="legend", aria_label="Estimators")


def _figure(figure: Figure) -> Markup:
    return tag(
        "figure", tag("h3", figure.title), figure.drawing or "", tag("figcaption", figure.note) if figure.note else ""
    )


def _panels(figure: Figure) -> Markup:
    panels = [
        tag("div", tag("h4", panel.name), panel.drawing, _readout(panel), class_="timeline", data_points=panel.data)
        for panel in figure.panels
    ]
    phases = [
        tag("li", tag("span", class_=f"swatch {phase}" if phase in PHASES else "swatch"), phase)
        for phase in figure.legend
    ]
    legend = tag("ul", *phases, class_="legend phases", aria_label="Phases") if phases else ""
    hint = tag("span", " Point at a panel, or focus it and use the arrow keys, to read it.", class_="hint")
    few = "panels few" if len(panels) <= 2 else "panels"
    return tag(
        "figure",
        tag("h3", figure.title),
        legend,
        tag("div", *panels, class_=few),
        tag("figcaption", figure.note, hint),
        class_="wide",
    )


def _readout(panel: Panel) -> Markup:
    return tag(
        "p", tag("b", panel.value), tag("span", panel.place), tag("span", panel.where, class_="where"), class_="readout"
    )


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
        f"An estimator is called exact here if its relative error against the K-step program is at most {EXACT:g}. The "
        f"two references are different quantities: the gradient of the program that takes K inner steps, and the "
        f"hypergradient at a converged inner solution. An exact unroll has no error against the first and, at small K, "
        f"a large one against the second. {GROWTH}"
    )
    return tag(
        "section",
        tag("h2", "How to read this"),
        tag("p", notes, class_="summary") if any(each.bilevel for each in groups) else "",
        tag("dl", *pairs, class_="reading"),
        id="reading",
    )


def _environment(records: Sequence[Record], command: str) -> Markup:
    pairs = [part for name, value in environment(records).items() for part in (tag("dt", name), tag("dd", value))]
    parts = [tag("h2", "How this was made")]
    parts += [tag("pre", tag("code", command), tabindex=0)] if command else []
    parts += [tag("dl", *pairs, class_="reading")] if pairs else []
    return tag("section", *parts, id="environment") if len(parts) > 1 else Markup()


def _asset(name: str) -> Markup:
    return Markup((Path(__file__).parent / name).read_text(encoding="utf-8"))
