"""Figures over the outer loop: one line an estimator, at the largest K at which it ran one; steps that did not end OK
are crossed out.
"""

from collections.abc import Callable, Mapping

from bilevel_profiling.records import units
from bilevel_profiling.records.failure import noted
from bilevel_profiling.records.record import Iteration, Record
from bilevel_profiling.report.content import loops
from bilevel_profiling.report.content.groups import Group
from bilevel_profiling.report.content.text import clean
from bilevel_profiling.report.figures import scales, svg
from bilevel_profiling.report.figures.frame import Figure
from bilevel_profiling.report.figures.markup import Markup, join
from bilevel_profiling.report.figures.palette import Style

_MOST_POINTS = 150
"""An outer loop of more steps is drawn through the lowest and highest value of each of half as many stretches."""
_MOST_CROSSES = 30
_MOST_LOGGED = 4


def outer_loss(group: Group, styles: Mapping[str, Style], key: str) -> Figure | None:
    """The outer loss over the outer loop."""
    return over_iterations(group, styles, f"{key}-loss", lambda entry: entry.outer_loss, "outer loss")


def logged(group: Group, styles: Mapping[str, Style], key: str) -> list[Figure]:
    """The first few of the numbers that the user logged, over the outer loop."""
    names = list(dict.fromkeys(name for record in loops.shown(group).values() for name in loops.logged(record)))[
        :_MOST_LOGGED
    ]
    found = []
    for number, name in enumerate(names):
        found.append(
            over_iterations(group, styles, f"{key}-logged-{number}", _logged(name), clean(name).replace("_", " "))
        )
    return [figure for figure in found if figure is not None]


def costs(group: Group, styles: Mapping[str, Style], key: str) -> list[Figure]:
    """Time and peak memory of the steps over the outer loop."""
    entries = [entry for record in group.records for entry in record.iterations]
    cuda = all(entry.peak_tensor_bytes is None for entry in entries)
    found = [
        over_iterations(
            group, styles, f"{key}-steptime", lambda entry: entry.wall_seconds, "time of a step", "ms", 1e-3
        ),
        over_iterations(
            group,
            styles,
            f"{key}-steppeak",
            (lambda entry: entry.cuda_allocated_bytes) if cuda else (lambda entry: entry.peak_tensor_bytes),
            "peak CUDA memory of a step" if cuda else "peak memory of a step",
            "MiB",
            2.0**20,
        ),
    ]
    return [figure for figure in found if figure is not None]


def _logged(name: str) -> Callable[[Iteration], float | None]:
    return lambda entry: entry.metrics.get(name)


def over_iterations(
    group: Group,
    styles: Mapping[str, Style],
    key: str,
    measured: Callable[[Iteration], float | None],
    name: str,
    unit: str = "",
    factor: float = 1.0,
) -> Figure | None:
    """What was `measured` in the iterations / `factor`, in `unit`, over the outer loop; a cost where it has a unit.
    None where it never was.
    """

    def value(entry: Iteration) -> float | None:
        found = measured(entry)
        return float(found) / factor if units.finite(found) else None

    runs = {
        label: r for label, r in loops.shown(group).items() if any(value(entry) is not None for entry in r.iterations)
    }
    if not runs:
        return None
    steps = {record.inner_steps for record in runs.values()}
    names = {label: label if len(steps) == 1 else f"{label}, K={record.inner_steps}" for label, record in runs.items()}
    frame = svg.Frame(46, svg.WIDTH - svg.label_room(names.values()), 34, 258)
    values = [v for r in runs.values() for entry in r.iterations if (v := value(entry)) is not None]
    last = max(max(entry.index for entry in record.iterations) for record in runs.values())
    x = scales.linear([0.0, float(last)], frame.left + 4, frame.right - 4, ticks=5, tight=True)
    y = scales.choose(values, frame.bottom, frame.top, spread=12 if unit else 100, from_zero=bool(unit))
    parts, ends = [], []
    for label, record in runs.items():
        style, tip = styles[label], f"{clean(label)}: {_range(record, value, unit)}"
        placed = [(x(float(n)), y(v)) if v is not None else None for n, v in thinned(record.iterations, value)]
        known = [point for point in placed if point is not None]
        middle = known[:: max(1, len(known) // 4)][1:4]
        marks = [
            svg.marker(style, px, py, tip, 3.4) for px, py in ([known[-1]] if len(known) < 8 else [*middle, known[-1]])
        ]
        parts.append(svg.series(style, svg.line(placed, style), *marks, _crosses(record, value, x, y, frame)))
        ends.append((names[label], style, *known[-1]))
    title = f"{name[:1].upper()}{name[1:]} over the {'outer loop' if group.bilevel else 'loop'}"
    told = svg.described((clean(label), _range(record, value, unit)) for label, record in runs.items())
    axes = svg.axes(
        frame, x, y, "outer iteration" if group.bilevel else "iteration", f"{name}, {unit}" if unit else name
    )
    drawing = svg.figure(key, title, told, 306, axes, *parts, svg.end_labels(frame, ends))
    shared = next(iter(steps)) if len(steps) == 1 else None
    note = [f"K = {shared:,}." if shared is not None else "", "Logarithmic scale." if y.log else "", _told(runs)]
    return Figure(key, title, " ".join(filter(None, note)), drawing)


def thinned(
    iterations: tuple[Iteration, ...], value: Callable[[Iteration], float | None]
) -> list[tuple[int, float | None]]:
    """(index, value) in order, not more than about 150, the lowest and highest of every stretch kept; None where it is
    not finite.
    """
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


def _crosses(
    record: Record, value: Callable[[Iteration], float | None], x: scales.Scale, y: scales.Scale, frame: svg.Frame
) -> Markup:
    """On the line, or on the upper edge where there is no value; of very many, evenly spaced ones."""
    bad = list(filter(noted, record.iterations))
    bad = bad[:: -(-len(bad) // _MOST_CROSSES)] if bad else []
    crosses = []
    for entry in bad:
        tip = f"{clean(record.estimator)}, step {entry.index:,}: {clean(entry.status)}"
        level = value(entry)
        crosses.append(svg.cross(x(float(entry.index)), frame.top - 2 if level is None else y(level), tip))
    return join(*crosses)


def _told(runs: Mapping[str, Record]) -> str:
    """Which steps the crosses stand for."""
    found = []
    for label, record in runs.items():
        if bad := loops.troubles(record):
            found.append(
                f"{clean(label)} ({', '.join(f'{number:,} {clean(status)}' for status, number in bad.items())})"
            )
    return f"Crosses: steps that did not end OK, {'; '.join(found)}." if found else ""


def _range(record: Record, value: Callable[[Iteration], float | None], unit: str) -> str:
    values = [v for entry in record.iterations if (v := value(entry)) is not None]
    span = f"{units.significant(values[0])} to {units.significant(values[-1])}{f' {unit}' if unit else ''}"
    return f"{span} in {len(record.iterations):,} steps"
