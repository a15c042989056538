"""Bytes alive over the operations of one step, colored by phase: a small panel an estimator, all on one scale of memory."""

from collections.abc import Sequence

from ...record import Record
from .. import units
from ..groups import Group
from ..markup import Markup, decimal, tag
from ..text import clean
from . import scales, svg
from .frame import Figure

PHASES = ("inner", "hypergradient", "outer")

_WIDTH, _HEIGHT = 230.0, 150.0
_FRAME = svg.Frame(34, 226, 20, 124)
_MOST_POINTS = 200

Point = tuple[int, int, str]


def timelines(group: Group, key: str) -> Figure | None:
    """One panel an estimator at the group's focus K, or at the largest at which it has a timeline; None where no record has one."""
    chosen: dict[str, Record] = {}
    for record in group.rows:
        if record.timeline and not (record.estimator in chosen and chosen[record.estimator].inner_steps == group.focus):
            chosen[record.estimator] = record
    if not chosen:
        return None
    runs = {label: chosen[label] for label in group.estimators if label in chosen}
    steps = {record.inner_steps for record in runs.values()}
    top = max(level for record in runs.values() for _, level, _ in record.timeline) / 2**20
    y = scales.linear([0.0, top], _FRAME.bottom, _FRAME.top, ticks=3)
    panels = []
    for number, (label, record) in enumerate(runs.items()):
        name = clean(label) if len(steps) == 1 or record.inner_steps is None else f"{clean(label)}, K = {record.inner_steps:,}"
        panels.append((name, _panel(record, y, f"{key}-{number}", name)))
    first = next(iter(steps))
    note = (f"K = {first:,}. " if len(steps) == 1 and first is not None else "") + "MiB of tensors made by the call and alive, against operations."
    return Figure(key, "Memory over one step", f"{note} All panels share one scale of memory; each has its own of operations.", panels=tuple(panels))


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


def _panel(record: Record, y: scales.Scale, key: str, name: str) -> Markup:
    peak = max(record.timeline, key=lambda point: point[1])
    first, last = record.timeline[0][0], record.timeline[-1][0]
    x = scales.Scale(float(first), float(max(last, first + 1)), _FRAME.left, _FRAME.right)
    parts = []
    for value, label in y.ticks:
        parts.append(tag("path", d=f"M{decimal(_FRAME.left)} {decimal(y(value))}H{decimal(_FRAME.right)}", class_="grid"))
        parts.append(svg.text(_FRAME.left - 6, y(value) + 4, label, "tick", "end"))
    parts += _areas(thinned(record.timeline), x, y)
    parts.append(tag("path", d=f"M{decimal(_FRAME.left)} {decimal(_FRAME.bottom)}H{decimal(_FRAME.right)}", class_="axis"))
    px, py = x(float(peak[0])), y(peak[1] / 2**20)
    said = units.size(peak[1])
    parts.append(tag("circle", tag("title", f"peak {said} at operation {peak[0]:,}, {clean(peak[2])}"), cx=px, cy=py, r=3.0, class_="peak"))
    middle = (_FRAME.left + _FRAME.right) / 2
    parts.append(svg.text(px + (-7 if px > middle else 7), max(12.0, py - 6), said, "label strong", "end" if px > middle else "start"))
    parts.append(svg.text(_FRAME.right, _FRAME.bottom + 17, f"{last - first:,} operations", "tick", "end"))
    return svg.figure(key, name, f"Peak {said} in the {clean(peak[2])} phase.", _HEIGHT, *parts, width=_WIDTH)


def _areas(points: Sequence[Point], x: scales.Scale, y: scales.Scale) -> list[Markup]:
    """One filled area for each stretch of a phase; it reaches to the next stretch's first point, so that there are no gaps."""
    areas, start = [], 0
    for end in range(1, len(points) + 1):
        if end < len(points) and points[end][2] == points[start][2]:
            continue
        stretch = points[start : min(end + 1, len(points))]
        path = "L".join(f"{decimal(x(float(n)))} {decimal(y(level / 2**20))}" for n, level, _ in stretch)
        floor = decimal(y(0.0))
        shape = f"M{decimal(x(float(stretch[0][0])))} {floor}L{path}L{decimal(x(float(stretch[-1][0])))} {floor}z"
        phase = points[start][2]
        class_ = f"phase {phase}" if phase in PHASES else "phase"
        areas.append(tag("path", tag("title", clean(phase)), d=Markup(shape), class_=class_))
        areas.append(tag("path", d=Markup(f"M{path}"), class_=class_.replace("phase", "crest", 1)))
        start = end
    return areas
