"""Horizontal figures with one row an estimator: bars for one K, and metrics before and after the outer loop."""

from collections.abc import Mapping

from bilevel_profiling.records import units
from bilevel_profiling.report.content.groups import Group
from bilevel_profiling.report.content.text import clean
from bilevel_profiling.report.figures import scales, svg
from bilevel_profiling.report.figures.frame import Figure
from bilevel_profiling.report.figures.markup import Markup, decimal, tag
from bilevel_profiling.report.figures.palette import Style

_ROW = 25.0
_TOP, _HEAD = 30.0, 10.0
_MOST_METRICS = 4


def bars(
    group: Group, styles: Mapping[str, Style], key: str, field: str, name: str, unit: str, factor: float
) -> Figure | None:
    """One bar an estimator at the one K there is; None where nothing was measured."""
    k = group.focus
    values = {
        label: value / factor for label in group.estimators if (value := group.value(label, k, field)) is not None
    }
    lost = {r.estimator: clean(r.status) for r in group.failures if r.inner_steps == k}
    labels = [label for label in group.estimators if label in values or label in lost]
    if not values or len(labels) < 2:
        return None
    left, right = svg.label_room(labels), svg.WIDTH - 62
    x = scales.linear(values.values(), left, right)
    parts = [svg.text(0.0, 14, f"{name}, {unit}", "ax-name")]
    for row, label in enumerate(labels):
        y = _TOP + row * _ROW
        content: list[Markup] = [_name(label, styles[label], left, y)]
        if label in values:
            said = units.significant(values[label])
            tip = tag("title", f"{clean(label)}: {said} {unit}")
            content.append(
                tag("rect", tip, x=left, y=y, width=max(1.0, x(values[label]) - left), height=_ROW - 9, class_="bar")
            )
            content.append(svg.text(max(left + 1, x(values[label])) + 6, y + 12, said, "value"))
        else:
            content += [
                svg.cross(left + 8, y + 8, lost[label]),
                svg.text(left + 18, y + 12, lost[label].lower().replace("_", " "), "tick"),
            ]
        parts.append(svg.series(styles[label], *content))
    height = _TOP + len(labels) * _ROW + 4
    parts.append(tag("path", d=f"M{decimal(left)} {decimal(_TOP - 6)}V{decimal(height - 6)}", class_="axis"))
    title = f"{name[:1].upper()}{name[1:]}"
    told = svg.described(
        (clean(label), f"{units.significant(values[label])} {unit}" if label in values else lost[label])
        for label in labels
    )
    drawing = svg.figure(key, title, told, height, *parts)
    return Figure(key, title, f"K = {k:,}." if k is not None else "", drawing)


def metrics(group: Group, styles: Mapping[str, Style], key: str) -> list[Figure]:
    """For each of the first few metrics, a row an estimator: a ring before the outer loop, the marker after it."""
    runs = {r.estimator: r for r in group.rows if any(units.finite(value) for value in r.metrics.values())}
    names = list(dict.fromkeys(name for r in runs.values() for name, value in r.metrics.items() if units.finite(value)))
    figures = []
    for number, name in enumerate(names[:_MOST_METRICS]):
        after = {label: float(v) for label, r in runs.items() if units.finite(v := r.metrics.get(name))}
        before = {label: float(v) for label in after if units.finite(v := runs[label].metrics_before.get(name))}
        steps = {runs[label].inner_steps for label in after} - {None}
        figures.append(
            _change(
                f"{key}-{number}",
                clean(name),
                after,
                before,
                styles,
                f"K = {steps.pop():,}." if len(steps) == 1 else "",
            )
        )
    return figures


def _change(
    key: str, name: str, after: dict[str, float], before: dict[str, float], styles: Mapping[str, Style], note: str
) -> Figure:
    left, right = svg.label_room(after), svg.WIDTH - 58
    height = _HEAD + len(after) * _ROW + 30
    x = scales.linear([*after.values(), *before.values()], left + 8, right, ticks=4, from_zero=False)
    parts = []
    for value, label in x.ticks:
        parts.append(tag("path", d=f"M{decimal(x(value))} {decimal(_HEAD - 8)}V{decimal(height - 26)}", class_="grid"))
        parts.append(svg.text(x(value), height - 10, label, "tick", "middle"))
    for row, label in enumerate(after):
        style, y, end = styles[label], _HEAD + row * _ROW + 8, x(after[label])
        tip = f"{clean(label)}: {units.significant(after[label])}"
        content: list[Markup] = [_name(label, style, left, y - 8)]
        if label in before:
            begin = x(before[label])
            tip = f"{clean(label)}: {units.significant(before[label])} before, {units.significant(after[label])} after"
            content.append(tag("path", d=f"M{decimal(begin)} {decimal(y)}H{decimal(end)}", class_="line"))
            content.append(tag("circle", tag("title", tip), cx=begin, cy=y, r=3.6, class_="ring"))
        content.append(svg.marker(style, end, y, tip, 4.6))
        side = right + 8
        content.append(svg.text(side, y + 4, units.significant(after[label]), "value"))
        parts.append(svg.series(style, *content))
    starts = {label: f"from {units.significant(value)} to " for label, value in before.items()}
    told = svg.described(
        (clean(label), starts.get(label, "") + units.significant(value)) for label, value in after.items()
    )
    how = "Ring: before the outer loop; filled: after it. " if before else "After the outer loop. "
    drawing = svg.figure(key, f"{name} before and after the outer loop", told, height, *parts)
    return Figure(key, f"{name[:1].upper()}{name[1:]}".replace("_", " "), (how + note).strip(), drawing)


def _name(label: str, style: Style, left: float, y: float) -> Markup:
    return svg.text(left - 10, y + 12, svg.clip(label), "label", "end")
