"""Error against memory or time at one K, with the Pareto front: the estimators that no other one beats in both."""

import dataclasses
import itertools
from collections.abc import Mapping

from bilevel_profiling.records import units
from bilevel_profiling.report.content.footnotes import QUANTILES
from bilevel_profiling.report.content.groups import Group, pareto
from bilevel_profiling.report.content.text import clean
from bilevel_profiling.report.figures import scales, svg
from bilevel_profiling.report.figures.frame import Figure
from bilevel_profiling.report.figures.markup import Markup, decimal, tag
from bilevel_profiling.report.figures.palette import Style

_FRAME = svg.Frame(46, svg.WIDTH - 14, 34, 258)


@dataclasses.dataclass(frozen=True)
class Axis:
    """What the error is set against. `spread` are the fields of the 10% and 90% quantile, where there are such."""

    key: str
    name: str
    field: str
    unit: str
    factor: float
    spread: tuple[str, str] | None = None


TIME = Axis("-time", "time", "wall_seconds", "ms", 1e-3, ("wall_seconds_low", "wall_seconds_high"))


def memory(group: Group) -> Axis:
    """The kind of memory that the group is compared by."""
    return Axis("", group.measure.name, group.measure.field, "MiB", 2.0**20)


def error_against(
    group: Group, styles: Mapping[str, Style], key: str, field: str, reference: str, axis: Axis
) -> Figure | None:
    """`field` (an error) against memory or time at the group's focus K; None where no estimator has both."""
    points = front_points(group, field, axis)
    if not points:
        return None
    ranges = _ranges(group, axis, points)
    x = scales.choose(
        [*(m for m, _ in points.values()), *(edge for pair in ranges.values() for edge in pair)],
        _FRAME.left + 14,
        _FRAME.right - 40,
        spread=8,
    )
    y = scales.choose([e for _, e in points.values()], _FRAME.bottom - 6, _FRAME.top + 6, spread=12)
    front = front_of(points, group.rounding)
    corners = _steps([(x(points[label][0]), y(points[label][1])) for label in front])
    blocked = [
        (min(a, c) - 1, min(b, d) - 1, max(a, c) + 1, max(b, d) + 1) for (a, b), (c, d) in itertools.pairwise(corners)
    ]
    band = _rounding(group.rounding, y)
    if band:
        blocked.append((_FRAME.left, _FRAME.bottom - 16, _FRAME.left + 66, _FRAME.bottom))
    labels = svg.point_labels(_FRAME, [(label, x(m), y(e)) for label, (m, e) in points.items()], blocked)
    parts = [band, _front(corners)]
    for (label, (cost, error)), (tx, ty, anchor) in zip(points.items(), labels, strict=True):
        tip = f"{clean(label)}: {units.significant(cost)} {axis.unit}, relative error {units.significant(error)}"
        on_front = label in front
        mark = svg.marker(
            styles[label], x(cost), y(error), tip, 5.2 if on_front else 4.4, "mark" if on_front else "mark hollow"
        )
        far = abs(ty - 4 - y(error)) > 11 and anchor != "middle"
        tie = (
            tag("path", d=f"M{decimal(x(cost))} {decimal(y(error))}L{decimal(tx)} {decimal(ty - 4)}", class_="leader")
            if far
            else ""
        )
        low, high = ranges.get(label, (cost, cost))
        whisker = (
            tag("path", d=f"M{decimal(x(low))} {decimal(y(error))}H{decimal(x(high))}", class_="whisker")
            if low < high
            else ""
        )
        parts.append(
            svg.series(
                styles[label],
                whisker,
                tie,
                mark,
                svg.text(tx, ty, svg.clip(label), "label strong" if on_front else "label", anchor),
            )
        )
    title = f"Error against {'time' if axis is TIME else 'memory'}, {reference}"
    told = svg.described(
        (clean(label), f"{units.significant(m)} {axis.unit}, {units.significant(e)}")
        for label, (m, e) in points.items()
    )
    drawing = svg.figure(
        key,
        title,
        told,
        306,
        svg.axes(_FRAME, x, y, f"{axis.name}, {axis.unit}", f"relative error against the {reference}"),
        *parts,
    )
    k = f"K = {group.focus:,}. " if group.focus is not None else ""
    dtype = clean(group.records[0].dtype).removeprefix("torch.")
    equal = f" Errors below {units.tick(group.rounding)} are {dtype} rounding and count as equal."
    note = f"{k}Lower left is better. Filled, on the line: the Pareto front, which nothing beats in both."
    note += f" Thin bars: {QUANTILES} of the calls; where they overlap, the order means nothing." if ranges else ""
    return Figure(key, title, note + (equal if min(e for _, e in points.values()) < group.rounding else ""), drawing)


def front_points(group: Group, field: str, axis: Axis) -> dict[str, tuple[float, float]]:
    """(cost, error) of each estimator that has both at the group's focus K."""
    found = {}
    for label in group.estimators:
        cost, error = group.value(label, group.focus, axis.field), group.value(label, group.focus, field)
        if cost is not None and error is not None:
            found[label] = (cost / axis.factor, error)
    return found


def _ranges(group: Group, axis: Axis, points: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """The 10% and 90% quantile of the cost of each point, where both are known and differ."""
    found = {}
    for label in points:
        edges = [group.value(label, group.focus, field) for field in axis.spread or ()]
        low, high = edges if edges else (None, None)
        if low is not None and high is not None and low < high:
            found[label] = (low / axis.factor, high / axis.factor)
    return found


def front_of(points: Mapping[str, tuple[float, float]], rounding: float) -> list[str]:
    """The labels on the Pareto front, by cost; errors within rounding are equal."""
    labels = list(points)
    return [labels[n] for n in pareto([(cost, max(error, rounding)) for cost, error in points.values()])]


def _steps(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of the front, from the upper edge through its points to the right edge."""
    corners = [(points[0][0], _FRAME.top)]
    for px, py in points:
        corners += [(px, corners[-1][1]), (px, py)]
    return [*corners[1:], (_FRAME.right, corners[-1][1])]


def _front(corners: list[tuple[float, float]]) -> Markup:
    """The front as steps: whatever lies above and to the right of it is beaten."""
    path = "M" + "L".join(f"{decimal(px)} {decimal(py)}" for px, py in corners)
    area = f"{path}V{decimal(_FRAME.top)}z"
    return tag("g", tag("path", d=Markup(area), class_="beaten"), tag("path", d=Markup(path), class_="front"))


def _rounding(limit: float, y: scales.Scale) -> Markup:
    """A band over the errors that are rounding, where the axis reaches that low."""
    if not y.log or y.low >= limit:
        return Markup()
    top = y(limit)
    band = tag(
        "rect", x=_FRAME.left, y=top, width=_FRAME.right - _FRAME.left, height=_FRAME.bottom - top, class_="band"
    )
    return tag("g", band, svg.text(_FRAME.left + 6, _FRAME.bottom - 6, "rounding", "tick"))
