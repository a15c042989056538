"""Figures against K: one line an estimator, named at its end, with the law that was fitted to it; bars where there is
one K only.
"""

from collections.abc import Mapping

from bilevel_profiling.records import units
from bilevel_profiling.records.growth import Law
from bilevel_profiling.records.record import Record
from bilevel_profiling.report.content.groups import Group
from bilevel_profiling.report.content.text import clean, listing
from bilevel_profiling.report.figures import scales, svg
from bilevel_profiling.report.figures.bars import bars
from bilevel_profiling.report.figures.frame import Figure
from bilevel_profiling.report.figures.markup import Markup, decimal, tag
from bilevel_profiling.report.figures.palette import Style

_CURVE = 48
"""Straight pieces that a fitted law is drawn with."""


def against_k(
    group: Group,
    styles: Mapping[str, Style],
    key: str,
    field: str,
    name: str,
    unit: str,
    factor: float,
    laws: Mapping[str, Law] | None = None,
) -> Figure | None:
    """`field` / `factor`, in `unit`, against K, with thin curves for `laws`; None where it was never measured."""
    lines = {
        label: points
        for label in group.estimators
        if (points := [(k, v / factor) for k, v in group.points(label, field)])
    }
    steps = sorted({k for points in lines.values() for k, _ in points})
    if len(steps) < 2:
        return bars(group, styles, key, field, name, unit, factor)
    lost = [r for r in group.failures if r.inner_steps is not None]
    frame = svg.Frame(46, svg.WIDTH - svg.label_room(lines), 34, 258)
    x = scales.at_values(
        sorted({*steps, *(r.inner_steps for r in lost if r.inner_steps is not None)}), frame.left + 8, frame.right - 4
    )
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
    curves = [
        svg.series(styles[label], _curve(law, factor, x, y, f"{clean(label)}: {law.said(units.size)}"))
        for label, law in (laws or {}).items()
        if label in lines and (law.kind == "sqrt" or (law.kind == "linear" and (x.log or y.log)))
    ]
    title = f"{name[:1].upper()}{name[1:]} against inner steps"
    told = svg.described(
        (clean(label), ", ".join(f"{units.significant(v)} at K = {k:,}" for k, v in points))
        for label, points in lines.items()
    )
    drawing = svg.figure(
        key,
        title,
        f"{name}, {unit}. {told}",
        306,
        svg.axes(frame, x, y, "inner steps K", f"{name}, {unit}"),
        *curves,
        *parts,
        _lost(lost, styles, x, frame.top - 2),
        svg.end_labels(frame, ends),
    )
    logs = [axis for axis, scale in (("K", x), (name, y)) if scale.log]
    note = f"Logarithmic in {' and '.join(logs)}." if logs else ""
    thin = "Thin curves: the fitted laws." if curves else ""
    return Figure(key, title, " ".join(filter(None, (note, thin, _told(lost)))), drawing)


def _curve(law: Law, factor: float, x: scales.Scale, y: scales.Scale, tip: str) -> Markup:
    """The law between the K that it was fitted to."""
    ratio = law.last / law.first if x.log else 0.0
    shares = [place / _CURVE for place in range(_CURVE + 1)]
    steps = [law.first * ratio**share if x.log else law.first + (law.last - law.first) * share for share in shares]
    path = "L".join(f"{decimal(x(k))} {decimal(y(law(k) / factor))}" for k in steps)
    return tag("path", tag("title", tip), d=Markup(f"M{path}"), class_="law")


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
