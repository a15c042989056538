"""Records as one self-contained index.html: no network, no other file, readable without JavaScript, on a phone, in the
dark and on paper. What it says is in `report.content`; how it is laid out, in page.html.j2.
"""

import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bilevel_profiling.records import units
from bilevel_profiling.records.failure import Severity, failed, noted, severity
from bilevel_profiling.records.growth import Verdict
from bilevel_profiling.records.record import Record
from bilevel_profiling.report.content import alive, columns, footnotes, laws, loops, ranks, summary
from bilevel_profiling.report.content.groups import EXACT, Group, environment, estimators, group, settings
from bilevel_profiling.report.content.text import at_k, clean, listing, plural, slug
from bilevel_profiling.report.figures import case_figures, styles, stylesheet
from bilevel_profiling.report.figures.markup import Markup, spaced
from bilevel_profiling.report.figures.palette import outline
from bilevel_profiling.report.figures.timeline import PHASES

if TYPE_CHECKING:
    from jinja2.environment import TemplateModule

TITLE = "Hypergradient estimators compared"
_HERE = Path(__file__).parent
_STATUS = {Severity.OK: "", Severity.NOTE: " status note", Severity.FAILED: " status bad"}
_MOST_ALIVE = 8
"""Rows of what was alive that are shown at once."""
_WIDTHS = {"MiB": 5, "of peak": 7.5, "storages": 6, "phase": 10.5, "span": 9.5, "operator": 10}
"""Columns of what was alive, in em, so that folded rows stand below the others."""
_GAUGES = {"peak MiB": "peak_tensor_bytes", "ms": "wall_seconds"}
"""Columns with a bar behind the number, and its field."""


def render(records: Iterable[Record], command: str = "") -> str:
    """The whole page.

    Args:
        records: what was measured.
        command: the command line that made the records, shown as it is.

    Raises:
        ImportError: jinja2 is not installed.
    """
    records = list(records)
    groups = group(records)
    bilevel = not groups or any(each.bilevel for each in groups)
    return fragment(
        "page",
        groups=groups,
        lede=_lede(records, groups, "estimator" if bilevel else "label"),
        keys=unique_keys(groups),
        looks=styles(estimators(groups)),
        environment=environment(records),
        command=command,
        title=TITLE if bilevel else summary.PLAIN_TITLE,
        reading=_reading(groups),
        css=Markup(stylesheet() + _asset("page.css")),
        js=Markup(_asset("page.js")),
    )


def fragment(name: str, *arguments: object, **named: object) -> str:
    """A part of the page: the macro of this name in the template."""
    return str(getattr(_templates(), name)(*arguments, **named))


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


@functools.cache
def _templates() -> "TemplateModule":
    try:
        from jinja2 import Environment, FunctionLoader, StrictUndefined
    except ImportError as error:
        raise ImportError('the page needs jinja2: pip install "bilevel[profiling]"') from error

    loader = FunctionLoader(lambda name: re.sub(r"\n\s*", "", _asset(name)))
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, finalize=_finalized)
    made.filters["clean"] = clean
    made.tests["name"] = lambda part: isinstance(part, summary.Name)
    made.globals |= {
        **{each.__name__.rpartition(".")[2]: each for each in (alive, columns, footnotes, laws, loops, ranks, summary)},
        **{f.__name__: f for f in (at_k, case_figures, failed, noted, outline, plural, severity)},
        **{"classes": _classes, "gauge": _gauge, "references": _references, "settings": _settings},
        **{"sizes": _sizes, "BROKEN": Verdict.BROKEN.upper(), "EXACT": f"{EXACT:g}", "MISSING": units.MISSING},
        **{"MOST_ALIVE": _MOST_ALIVE, "PHASES": PHASES, "STATUS": _STATUS, "WIDTHS": _WIDTHS},
    }
    return made.get_template("page.html.j2").module


def _finalized(value: object) -> object:
    """Whatever came from outside is made fit to print; what is markup already stays as it is."""
    return value if hasattr(value, "__html__") else "" if value is None else spaced(str(value))


def _classes(**on: object) -> str | None:
    return " ".join(name for name, value in on.items() if value) or None


def _gauge(each: Group, header: str, record: Record) -> str | None:
    """The length of the bar behind a number, as style."""
    if (field := _GAUGES.get(header)) is None or not units.finite(value := getattr(record, field)):
        return None
    longest = max(float(v) for r in each.rows if units.finite(v := getattr(r, field)))
    return f"--w:{value / longest:.3f}" if longest > 0 else None


def _references(each: Group) -> str:
    notes = dict.fromkeys(clean(record.reference_note) for record in each.records)
    base = f"x base: relative to {clean(each.baseline)} at the same K." if each.baseline is not None else ""
    return " ".join([base, *(f"References: {note}" for note in notes if note)]).strip()


def _settings(each: Group) -> list[tuple[str, str]]:
    return settings(each.records)


def _sizes(each: Group) -> str:
    first = each.records[0]
    sizes = (("P", first.inner_size, "inner"), ("Q", first.outer_size, "outer"), ("T", first.tasks, "tasks"))
    more = (("N", each.processes, "processes"),)
    known = [f"{name} = {size:,} {what}" for name, size, what in (*sizes, *more) if size is not None]
    return "  ·  ".join([clean(first.device), clean(first.dtype), *known])


def _lede(records: Sequence[Record], groups: Sequence[Group], noun: str) -> str:
    if not records:
        return "No records."
    steps = sorted({record.inner_steps for record in records if record.inner_steps is not None})
    labels = plural(len({record.estimator for record in records}), noun)
    lede = f"{plural(len(records), 'run')}: {labels} on {plural(len(groups), 'case')}"
    lede += f", K = {listing([f'{k:,}' for k in steps])}" if 0 < len(steps) <= 8 else ""
    lost = sum(map(failed, records))
    return lede + (f"; {lost:,} of them failed." if lost else ".")


def _reading(groups: Sequence[Group]) -> dict[str, str]:
    """What each column means, over all cases."""
    lines: dict[str, str] = {}
    for each in groups:
        for column in columns.columns(each):
            name = f"{column.section}: {column.header}" if column.section else column.header
            lines.setdefault("x base" if column.header == "x base" else name, column.explanation)
    if "x base" in lines:
        lines["x base"] = "memory or time over that of the case's baseline (named below its table) at the same K"
    return lines


def _asset(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
