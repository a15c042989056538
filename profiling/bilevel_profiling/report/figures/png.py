"""One PNG for a README: memory against K and error against memory, side by side, a row a case (drawn by matplotlib)."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bilevel_profiling.records.record import Record
from bilevel_profiling.report.content.groups import Group, estimators, group
from bilevel_profiling.report.content.text import shorten
from bilevel_profiling.report.figures import palette, scales, scatter, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHAPES = {
    "circle": "o",
    "square": "s",
    "triangle": "^",
    "diamond": "D",
    "wedge": "v",
    "plus": "P",
    "hexagon": "h",
    "bar": "_",
}
_DASHES: dict[str, Any] = {"": "-", "7 3": "--", "2 2.5": ":", "9 3 2 3": "-.", palette.DOTS: (0, (1, 3))}
_GREY = "#5d636b"
_LEAST = 1e-16
"""Errors of 0 are drawn here."""
_POINTS = 0.86
"""Points of print to one unit of the page's figures."""


def write_png(records: Iterable[Record], path: Path) -> None:
    """Write the figure; cases without any memory measured are left out.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no record has a memory to draw.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("write_png needs matplotlib: pip install matplotlib") from error
    groups = group(records)
    styles = palette.styles(estimators(groups))
    groups = [
        each
        for each in groups
        if any(each.value(e, k, each.measure.field) is not None for e in each.estimators for k in each.steps)
    ]
    if not groups:
        raise ValueError("write_png needs at least one record that finished with its memory measured")
    figure = Figure(figsize=(11, 4.2 * len(groups)), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    named: list[tuple[Axes, dict[str, tuple[float, float]], set[str]]] = []
    for row, each in enumerate(groups):
        left, right = (figure.add_subplot(len(groups), 2, 2 * row + place) for place in (1, 2))
        _memory(left, each, styles)
        named.append((right, *_errors(right, each, styles)))
        left.set_title(shorten(each.title, 60).replace("$", r"\$"), loc="left", fontweight="bold", fontsize=11)
    figure.draw_without_rendering()
    for axes, points, front in named:
        _name(figure, axes, points, front)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _memory(axes: "Axes", each: Group, styles: dict[str, palette.Style]) -> None:
    lines = {
        e: [(k, value / 2**20) for k, value in points]
        for e in each.estimators
        if (points := each.points(e, each.measure.field))
    }
    _dress(axes, "inner steps K", f"{each.measure.name}, MiB")
    if not lines:
        axes.text(0.5, 0.5, "K was not recorded", ha="center", va="center", transform=axes.transAxes, color=_GREY)
        return
    for label, points in lines.items():
        axes.plot(
            *zip(*points, strict=True),
            label=_text(label),
            linestyle=_DASHES[styles[label].dash],
            **_look(styles[label]),
        )
    steps = sorted({k for points in lines.values() for k, _ in points})
    _scale(axes, "x", scales.at_values(steps, 0, 400))
    _scale(axes, "y", scales.choose([value for points in lines.values() for _, value in points], 0, 200, spread=12))
    if len(steps) > 1:
        axes.margins(x=0.04)
    axes.legend(fontsize=8, frameon=False)


def _errors(
    axes: "Axes", each: Group, styles: dict[str, palette.Style]
) -> tuple[dict[str, tuple[float, float]], set[str]]:
    """Draw the points; what `_name` needs to name them once the layout is settled."""
    field, said = "program_relative_error", "K-step program"
    points = scatter.front_points(each, field, scatter.memory(each))
    if not points:
        field, said = "solution_relative_error", "converged solution"
        points = scatter.front_points(each, field, scatter.memory(each))
    at = f" at K = {each.focus:,}" if each.focus is not None else ""
    _dress(axes, f"{each.measure.name}, MiB{at}", f"relative error, {said}")
    if not points:
        axes.text(0.5, 0.5, "errors were not measured", ha="center", va="center", transform=axes.transAxes, color=_GREY)
        return {}, set()
    front = scatter.front_of(points, each.rounding)
    points = {label: (memory, max(error, _LEAST)) for label, (memory, error) in points.items()}
    for label, (memory, error) in points.items():
        style = {"fillstyle": "full" if label in front else "none", "markersize": 8, "linestyle": ""}
        axes.plot([memory], [error], **(_look(styles[label]) | style))
    axes.step(
        *zip(*(points[label] for label in front), strict=True),
        where="post",
        color=_GREY,
        linewidth=1,
        linestyle=":",
        zorder=1,
    )
    _scale(axes, "x", scales.choose([memory for memory, _ in points.values()], 0, 400, spread=8))
    _scale(axes, "y", scales.choose([error for _, error in points.values()], 0, 200, spread=12))
    axes.margins(x=0.16, y=0.14)
    return points, set(front)


def _name(figure: "Figure", axes: "Axes", points: dict[str, tuple[float, float]], front: set[str]) -> None:
    """Label the points where they cover nothing, by the same rule as the page; positions are in its units."""
    from matplotlib.patheffects import withStroke

    unit = figure.get_dpi() / 72 * _POINTS
    left, bottom, right, top = (edge / unit for edge in axes.get_window_extent().extents)
    places = {label: axes.transData.transform(point) / unit for label, point in points.items()}
    frame = svg.Frame(0.0, right - left, 0.0, top - bottom)
    placed = svg.point_labels(
        frame, [(label, x - left, top - y) for label, (x, y) in places.items()], limit=right - left + 8
    )
    for (label, point), (x, y, anchor) in zip(points.items(), placed, strict=True):
        px, py = places[label]
        offset = ((x - (px - left)) * _POINTS, ((top - py) - y) * _POINTS)
        tie = {"arrowstyle": "-", "color": _GREY, "linewidth": 0.6} if abs(offset[1]) > 14 else None
        note = axes.annotate(
            _text(label),
            point,
            offset,
            textcoords="offset points",
            fontsize=8,
            ha={"start": "left", "middle": "center", "end": "right"}[anchor],
            va="baseline",
            fontweight="bold" if label in front else "normal",
            arrowprops=tie,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )
        note.set_in_layout(False)


def _scale(axes: "Axes", name: Literal["x", "y"], scale: scales.Scale) -> None:
    """The scale and the ticks of the page; values of 0 make it linear."""
    log = scale.log and not scale.zero
    if log:
        (axes.set_xscale if name == "x" else axes.set_yscale)("log")
    if log or not scale.log:
        (axes.set_xticks if name == "x" else axes.set_yticks)(
            [value for value, _ in scale.ticks], [label for _, label in scale.ticks]
        )
        axes.minorticks_off()


def _look(style: palette.Style) -> dict[str, Any]:
    return {"color": palette.LIGHT[style.color], "marker": _SHAPES[style.shape], "markersize": 6, "linewidth": 1.8}


def _dress(axes: "Axes", x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e3e4e1", linewidth=0.8)
    axes.set_axisbelow(True)


def _text(label: str) -> str:
    """A label that matplotlib neither reads as mathematics nor hides from its legend."""
    return shorten(label, 28).replace("$", r"\$").lstrip("_") or "?"
