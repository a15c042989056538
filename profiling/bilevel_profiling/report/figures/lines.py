"""Figures against K and against the outer iteration: one line an estimator, named at its end; bars where there is one K only."""

from collections.abc import Callable, Mapping

from ...record import Iteration, Record
from .. import units
from ..groups import Group
from ..markup import Markup, tag
from ..text import clean, listing
from . import scales, svg
from .bars import bars
from .frame import Figure
from .palette import Style

_MOST_POINTS = 150
"""An outer loop of more steps is drawn through the lowest and highest value of each of half as many stretches."""


def against_k(group: Group, styles: Mapping[str, Style], key: str, field: str, name: str, unit: str, factor: float) -> Figure | None:
    """`field` / `factor`, in `unit`, against K; None where it was never measured."""
    lines = {label: points for label in group.estimators if (points := [(k, v / factor) for k, v in group.points(label, field)])}
    steps = sorted({k for points in lines.values() for k, _ in points})
    if len(steps) < 2:
        return bars(group, styles, key, field, name, unit, factor)
    lost = [r for r in group.failures if r.inner_steps is not None]
    frame = svg.Frame(46, svg.WIDTH - svg.label_room(lines), 34, 258)
    x = scales.at_values(sorted({*steps, *(r.inner_steps for r in lost if r.inner_steps is not None)}), frame.left + 8, frame.right - 4)
    y = scales.choose([v for points in lines.values() for _, v in points], frame.bottom, frame.top, spread=12)
    parts: list[Markup] = []
    ends = []
    for label, points in lines.items():
        style = styles[label]
        placed = [(x(float(k)), y(v)) for k, v in points]
        marks = [
            svg.marker(style, px, py, f"{clean(label)}, K = {k:,}: {units.significant(v)} {unit}")
            for (k, v), (px, py) in zip(points, placed, strict=True)
        ]
        parts.append(svg.series(style, svg.line(placed, style), *marks))
        ends.append((label, style, *placed[-1]))
    title = f"{name.capitalize() if name.islower() else name} against inner steps"
    told = svg.described((clean(label), ", ".join(f"{units.significant(v)} at K = {k:,}" for k, v in points)) for label, points in lines.items())
    drawing = svg.figure(
        key,
        title,
        f"{name}, {unit}. {told}",
        306,
        svg.axes(frame, x, y, "inner steps K", f"{name}, {unit}"),
        *parts,
        _lost(lost, styles, x, frame.top - 2),
        svg.end_labels(frame, ends),
    )
    logs = [axis for axis, scale in (("K", x), (name, y)) if scale.log]
    note = f"Logarithmic in {' and '.join(logs)}." if logs else ""
    return Figure(key, title, f"{note} {_told(lost)}".strip(), drawing)


def outer_loss(group: Group, styles: Mapping[str, Style], key: str) -> Figure | None:
    """The outer loss over the outer loop, each estimator at the largest K at which it ran one."""
    runs: dict[str, Record] = {}
    for record in group.rows:
        if any(units.finite(entry.outer_loss) for entry in record.iterations):
            runs[record.estimator] = record
    if not runs:
        return None
    steps = {record.inner_steps for record in runs.values()}
    names = {label: label if len(steps) == 1 else f"{label}, K={record.inner_steps}" for label, record in runs.items()}
    frame = svg.Frame(46, svg.WIDTH - svg.label_room(names.values()), 34, 258)
    values = [float(e.outer_loss) for r in runs.values() for e in r.iterations if units.finite(e.outer_loss)]
    last = max(max(entry.index for entry in record.iterations) for record in runs.values())
    x = scales.linear([0.0, float(last)], frame.left + 4, frame.right - 4, ticks=5, tight=True)
    y = scales.choose(values, frame.bottom, frame.top, spread=100, from_zero=False)
    parts, ends = [], []
    for label, record in runs.items():
        style = styles[label]
        placed = [(x(float(n)), y(v)) if v is not None else None for n, v in thinned(record.iterations, lambda e: e.outer_loss)]
        known = [point for point in placed if point is not None]
        tip = f"{clean(label)}: {_range(record)}"
        middle = known[:: max(1, len(known) // 4)][1:4]
        marks = [svg.marker(style, px, py, tip, 3.4) for px, py in ([known[-1]] if len(known) < 8 else [*middle, known[-1]])]
        parts.append(svg.series(style, svg.line(placed, style), *marks))
        ends.append((names[label], style, *known[-1]))
    title = "Outer loss over the outer loop"
    told = svg.described((clean(label), _range(record)) for label, record in runs.items())
    drawing = svg.figure(key, title, told, 306, svg.axes(frame, x, y, "outer iteration", "outer loss"), *parts, svg.end_labels(frame, ends))
    shared = steps.pop() if len(steps) == 1 else None
    note = (f"K = {shared:,}." if shared is not None else "") + (" Logarithmic scale." if y.log else "")
    return Figure(key, title, note.strip(), drawing)


def thinned(iterations: tuple[Iteration, ...], value: Callable[[Iteration], float | None]) -> list[tuple[int, float | None]]:
    """(index, value) in order, not more than about 150, the lowest and highest of every stretch kept; None where it is not finite."""
    pairs = [(entry.index, float(v) if units.finite(v := value(entry)) else None) for entry in iterations]
    if len(pairs) <= _MOST_POINTS:
        return pairs
    stretch = -(-len(pairs) // (_MOST_POINTS // 2))
    kept = {0, len(pairs) - 1}
    for start in range(0, len(pairs), stretch):
        places = range(start, min(start + stretch, len(pairs)))
        known = [(v, place) for place in places if (v := pairs[place][1]) is not None]
        kept |= {min(known)[1], max(known)[1]} if known else {start}
    return [pairs[place] for place in sorted(kept)]


def _range(record: Record) -> str:
    values = [entry.outer_loss for entry in record.iterations if units.finite(entry.outer_loss)]
    return f"{units.significant(values[0])} to {units.significant(values[-1])} in {len(record.iterations):,} steps"


def _told(lost: list[Record]) -> str:
    """Which runs the crosses stand for."""
    steps: dict[int | None, list[str]] = {}
    for record in lost:
        steps.setdefault(record.inner_steps, []).append(clean(record.estimator))
    names = [f"{listing(list(dict.fromkeys(labels)))} at K = {k:,}" for k, labels in steps.items()]
    return f"Crosses: failed, {'; '.join(names)}." if names else ""


def _lost(records: list[Record], styles: Mapping[str, Style], x: scales.Scale, y: float) -> Markup:
    """Crosses of failed runs on the upper edge, side by side where they share a K."""
    parts = []
    for place, record in enumerate(records):
        same = [n for n, other in enumerate(records) if other.inner_steps == record.inner_steps]
        shift = (same.index(place) - (len(same) - 1) / 2) * 12
        tip = f"{clean(record.estimator)}, K = {record.inner_steps:,}: {clean(record.status)}"
        parts.append(svg.series(styles[record.estimator], svg.cross(x(float(record.inner_steps or 0)) + shift, y, tip)))
    return tag("g", *parts) if parts else Markup()
