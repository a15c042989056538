"""The outer loop: what it reached, and its iterations one by one."""

from collections.abc import Sequence

from bilevel_profiling.records import units
from bilevel_profiling.records.failure import noted
from bilevel_profiling.records.record import Iteration, Record
from bilevel_profiling.report.content.groups import Group
from bilevel_profiling.report.content.text import clean, plural, without_empty

_MOST_ROWS = 200


def outcome(group: Group) -> tuple[list[str], list[list[str]]]:
    """Header and rows of what the outer loop reached; no rows where no record has an outer loop."""
    runs = [r for r in group.rows if r.iterations or r.metrics or r.metrics_before]
    names = list(dict.fromkeys(name for r in runs for name in (*r.metrics, *r.metrics_before)))
    header = [
        "estimator",
        "K",
        "outer steps" if group.bilevel else "steps",
        "outer loss",
        *(clean(name) for name in names),
    ]
    rows = [
        [clean(r.estimator), units.count(r.inner_steps), _length(r), _losses(r), *(_change(r, n) for n in names)]
        for r in runs
    ]
    return without_empty(header, rows, always=(0, 2))


def title(group: Group) -> str:
    """The heading above `outcome`."""
    return "After the outer loop" if group.bilevel else "After the loop"


def shown(group: Group) -> dict[str, Record]:
    """The run of each estimator whose iterations are told: that with the largest K."""
    runs = {record.estimator: record for record in group.rows if record.iterations}
    return {label: runs[label] for label in group.estimators if label in runs}


def iterations(record: Record) -> tuple[list[str], list[list[str]], int]:
    """Header and rows, and how many rows are left out in the middle: the first and last hundred are kept. Empty columns
    are left out.
    """
    entries = record.iterations
    hidden = max(0, len(entries) - _MOST_ROWS)
    if hidden:
        entries = (*entries[: _MOST_ROWS // 2], *entries[-(_MOST_ROWS // 2) :])
    names = logged(record)
    header = [
        "step",
        "outer loss",
        "inner loss",
        "gradient norm",
        *map(clean, names),
        "ms",
        "peak MiB",
        "CUDA MiB",
        "status",
    ]
    rows = [_iteration(entry, names) for entry in entries]
    return *without_empty(header, rows, always=(0, len(header) - 1)), hidden


def logged(record: Record) -> list[str]:
    """What the user logged in the iterations, by name."""
    return list(dict.fromkeys(name for entry in record.iterations for name in entry.metrics))


def troubles(record: Record) -> dict[str, int]:
    """How often each status other than OK ended an iteration."""
    statuses = [entry.status for entry in filter(noted, record.iterations)]
    return {status: statuses.count(status) for status in dict.fromkeys(statuses)}


def told(record: Record) -> str:
    """How many steps there were, and how many of them did not end OK."""
    bad = ", ".join(f"{number:,} {clean(status)}" for status, number in troubles(record).items())
    return plural(len(record.iterations), "step") + (f", of these {bad}" if bad else ", all OK")


def _iteration(entry: Iteration, names: Sequence[str]) -> list[str]:
    losses = (entry.outer_loss, entry.inner_loss, entry.gradient_norm, *map(entry.metrics.get, names))
    sizes = units.mebibytes(entry.peak_tensor_bytes), units.mebibytes(entry.cuda_allocated_bytes)
    return [
        units.count(entry.index),
        *map(units.significant, losses),
        units.milliseconds(entry.wall_seconds),
        *sizes,
        clean(entry.status),
    ]


def _length(record: Record) -> str:
    """Number of outer steps, and how many of them did not end as they should."""
    bad = sum(map(noted, record.iterations))
    return units.count(len(record.iterations)) + (f" ({bad:,} not OK)" if bad else "")


def _losses(record: Record) -> str:
    values = [entry.outer_loss for entry in record.iterations if entry.outer_loss is not None]
    return f"{units.significant(values[0])} → {units.significant(values[-1])}" if values else units.MISSING


def _change(record: Record, name: str) -> str:
    before, after = record.metrics_before.get(name), record.metrics.get(name)
    if before is None:
        return units.significant(after)
    return f"{units.significant(before)} → {units.significant(after)}"
