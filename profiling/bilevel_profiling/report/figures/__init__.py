"""The figures of a report, written as SVG by hand: small, without a plotting library, and following the reader's light
or dark scheme.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from bilevel_profiling.report.content import laws
from bilevel_profiling.report.content.groups import Group
from bilevel_profiling.report.figures import bars, lines, loop, scatter, timeline
from bilevel_profiling.report.figures.frame import Figure
from bilevel_profiling.report.figures.markup import Markup, decimal, tag
from bilevel_profiling.report.figures.palette import DARK, LIGHT, Style, styles

__all__ = ["Figure", "case_figures", "standalone", "styles", "stylesheet"]

_MARGIN = 14.0
_ERRORS = (
    ("program", "program_relative_error", "K-step program"),
    ("solution", "solution_relative_error", "converged solution"),
)


def case_figures(group: Group, styles: Mapping[str, Style], key: str) -> list[Figure]:
    """The figures of one case, those that its records can fill; `key` starts every id inside them."""
    memory = group.measure
    fitted = {label: law for label in group.estimators if (law := laws.law(group, label)) is not None}
    main = [
        lines.against_k(group, styles, f"{key}-memory", memory.field, memory.name, "MiB", 2.0**20, fitted),
        lines.against_k(group, styles, f"{key}-time", "wall_seconds", "time", "ms", 1e-3),
        *(
            scatter.error_against(group, styles, f"{key}-{name}{axis.key}", field, reference, axis)
            for name, field, reference in _ERRORS
            for axis in (scatter.memory(group), scatter.TIME)
        ),
        loop.outer_loss(group, styles, key),
    ]
    more = [
        *loop.logged(group, styles, key),
        *loop.costs(group, styles, key),
        *bars.metrics(group, styles, f"{key}-metric"),
        timeline.timelines(group, f"{key}-timeline"),
    ]
    shown = [dataclasses.replace(figure, main=True) for figure in main if figure is not None]
    return [*shown, *(figure for figure in more if figure is not None)]


def stylesheet() -> str:
    """Colors and strokes that the drawings refer to, for light and for dark pages."""
    light = "".join(f"--s{n}:{color};" for n, color in enumerate(LIGHT))
    dark = "".join(f"--s{n}:{color};" for n, color in enumerate(DARK))
    classes = "".join(f".s{n}{{--c:var(--s{n})}}" for n in range(len(LIGHT)))
    rules = (Path(__file__).parent / "figure.css").read_text(encoding="utf-8")
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}{classes}\n{rules}"


def standalone(drawing: Markup) -> str:
    """A drawing as a file of its own, with its colors, a margin and a background."""
    opening, rest = drawing.split(">", 1)
    width, height = (float(number) for number in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', opening)[0])
    box = {"x": -_MARGIN, "y": -_MARGIN, "width": width + 2 * _MARGIN, "height": height + 2 * _MARGIN}
    opening = re.sub(r'viewBox="[^"]*"', f'viewBox="{" ".join(decimal(edge) for edge in box.values())}"', opening)
    opening = opening.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return f"{opening}>{tag('style', Markup(stylesheet()))}{tag('rect', class_='paper', **box)}{rest}\n"
