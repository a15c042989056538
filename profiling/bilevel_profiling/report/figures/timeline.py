"""Bytes alive over the operations of one call, colored by phase: a panel an estimator, all on one scale of memory.

A panel is a static picture that tells its peak. What a script needs to tell any other point lies beside it as JSON: see
`_data` and page.js.
"""

import json
from collections.abc import Sequence

from bilevel_profiling.records import units
from bilevel_profiling.records.record import Point, Record
from bilevel_profiling.report.content.groups import Group
from bilevel_profiling.report.content.text import clean
from bilevel_profiling.report.figures import scales, svg
from bilevel_profiling.report.figures.frame import Figure, Panel
from bilevel_profiling.report.figures.markup import Markup, decimal, tag

PHASES = ("inner", "hypergradient", "outer")

_SMALL = 230.0, 150.0
_LARGE = svg.WIDTH, 250.0
"""Of up to two panels."""
_MOST_POINTS = 200


def timelines(group: Group, key: str) -> Figure | None:
    """One panel an estimator at the group's focus K, or at the largest at which it has a timeline; None where no record
    has one.
    """
    runs = group.chosen(lambda record: record.timeline)
    if not runs:
        return None
    steps = {record.inner_steps for record in runs.values()}
    width, height = _LARGE if len(runs) <= 2 else _SMALL
    frame = svg.Frame(34, width - 4, 20, height - 26)
    top = max(point[1] for record in runs.values() for point in record.timeline) / 2**20
    y = scales.linear([0.0, top], frame.bottom, frame.top, ticks=3 if len(runs) > 2 else 5)
    panels = []
    for number, (label, record) in enumerate(runs.items()):
        name = (
            clean(label)
            if len(steps) == 1 or record.inner_steps is None
            else f"{clean(label)}, K = {record.inner_steps:,}"
        )
        panels.append(_panel(record, frame, y, f"{key}-{number}", name, (width, height)))
    first = next(iter(steps))
    note = (
        f"K = {first:,}. " if len(steps) == 1 and first is not None else ""
    ) + "MiB of tensors made by the call and alive, against operations."
    note += " All panels share one scale of memory; each has its own of operations." if len(runs) > 1 else ""
    seen = {point[2] for record in runs.values() for point in record.timeline}
    legend = tuple(phase for phase in PHASES if phase in seen)
    title = "Memory over one step" if legend else "Memory over one call"
    return Figure(
        key,
        title,
        note,
        panels=tuple(panels),
        legend=legend + (("outside of the phases",) if legend and seen - set(PHASES) else ()),
    )


def thinned(timeline: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """At most about `most` points: the lowest and the highest of each stretch, the ends, and every change of phase."""
    if len(timeline) <= most:
        return list(timeline)
    stretch = -(-len(timeline) // (most // 2))
    kept = {0, len(timeline) - 1}
    for start in range(0, len(timeline), stretch):
        places = range(start, min(start + stretch, len(timeline)))
        kept |= {min(places, key=lambda n: timeline[n][1]), max(places, key=lambda n: timeline[n][1])}
    changes = [n for n in range(1, len(timeline)) if timeline[n][2] != timeline[n - 1][2]]
    if len(changes) <= most // 2:
        kept |= set(changes)
    return [timeline[n] for n in sorted(kept)]


def where(point: Point) -> str:
    """Phase, span and operator of a point, those that are known."""
    return " · ".join(filter(None, map(clean, point[2:])))


def _panel(record: Record, frame: svg.Frame, y: scales.Scale, key: str, name: str, size: tuple[float, float]) -> Panel:
    points = thinned(record.timeline)
    peak = max(points, key=lambda point: point[1])
    first, last = points[0][0], max(points[-1][0], points[0][0] + 1)
    x = scales.Scale(float(first), float(last), frame.left, frame.right)
    parts = []
    for value, label in y.ticks:
        parts.append(tag("path", d=f"M{decimal(frame.left)} {decimal(y(value))}H{decimal(frame.right)}", class_="grid"))
        parts.append(svg.text(frame.left - 6, y(value) + 4, label, "tick", "end"))
    parts += _areas(points, x, y)
    parts.append(tag("path", d=f"M{decimal(frame.left)} {decimal(frame.bottom)}H{decimal(frame.right)}", class_="axis"))
    px, py = x(float(peak[0])), y(peak[1] / 2**20)
    said, at = units.size(peak[1]), where(peak)
    tip = f"peak {said} at operation {peak[0]:,}" + (f": {at}" if at else "")
    parts.append(tag("circle", tag("title", tip), cx=px, cy=py, r=3.0, class_="peak"))
    right = px > (frame.left + frame.right) / 2
    parts.append(
        svg.text(px + (-7 if right else 7), max(12.0, py - 6), said, "label strong", "end" if right else "start")
    )
    parts.append(svg.text(frame.right, frame.bottom + 17, f"{last - first:,} operations", "tick", "end"))
    line = tag("path", d=f"M0 {decimal(frame.top)}V{decimal(frame.bottom)}")
    parts.append(tag("g", line, tag("circle", cx=0.0, cy=0.0, r=3.6), class_="cursor"))
    drawing = svg.figure(key, name, f"{tip[0].upper()}{tip[1:]}.", size[1], *parts, width=size[0])
    data = _data(points, [x.start, x.end, x.low, x.high], [y.start, y.end, y.low * 2**20, y.high * 2**20])
    return Panel(name, drawing, f"{units.mebibytes(peak[1])} MiB", f"operation {peak[0]:,}, peak", at, data)


def _data(points: Sequence[Point], x: Sequence[float], y: Sequence[float]) -> str:
    """The drawn points as JSON: the axes (start, end, low, high), operations, bytes, and for each point its place in
    the list of names.
    """
    names = list(dict.fromkeys(where(point) for point in points))
    place = {name: number for number, name in enumerate(names)}
    content = {
        "x": x,
        "y": y,
        "at": [point[0] for point in points],
        "bytes": [point[1] for point in points],
        "name": [place[where(point)] for point in points],
        "names": names,
    }
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False)


def _areas(points: Sequence[Point], x: scales.Scale, y: scales.Scale) -> list[Markup]:
    """One filled area for each stretch of a phase; it reaches to the next stretch's first point, so that there are no
    gaps.
    """
    areas, start = [], 0
    for end in range(1, len(points) + 1):
        if end < len(points) and points[end][2] == points[start][2]:
            continue
        stretch = points[start : min(end + 1, len(points))]
        path = "L".join(f"{decimal(x(float(point[0])))} {decimal(y(point[1] / 2**20))}" for point in stretch)
        floor = decimal(y(0.0))
        shape = f"M{decimal(x(float(stretch[0][0])))} {floor}L{path}L{decimal(x(float(stretch[-1][0])))} {floor}z"
        phase = points[start][2]
        class_ = f"phase {phase}" if phase in PHASES else "phase"
        tip = tag("title", clean(phase)) if clean(phase) else ""
        areas.append(tag("path", tip, d=Markup(shape), class_=class_))
        areas.append(tag("path", d=Markup(f"M{path}"), class_=class_.replace("phase", "crest", 1)))
        start = end
    return areas
