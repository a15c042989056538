"""What processes that ran a cell together found, beside each other."""

from collections.abc import Callable, Sequence

from bilevel_profiling.records import units
from bilevel_profiling.records.ranks import spread
from bilevel_profiling.records.record import Record
from bilevel_profiling.report.content.groups import Group
from bilevel_profiling.report.content.text import clean, without_empty

PEAKS = "peak MiB of the rank that needs least, and of the one that needs most, which stands for all"
SENT = "sent_bytes: what the rank that sends most sends to others in one hypergradient, if they stand in a ring"
WAITED = (
    "collective_seconds: time in collectives, of the rank with the least and of the one with the most; waiting for "
    "slower ranks is in it. From runs of their own, in which each collective is waited for at once"
)


def peaks(record: Record) -> str:
    """The lowest and the highest peak."""
    return _range(units.mebibytes, [each.peak_tensor_bytes for each in record.ranks])


def waited(record: Record) -> str:
    """The least and the most time in collectives."""
    if not record.ranks:
        return units.milliseconds(record.collective_seconds)
    return _range(units.milliseconds, [each.collective_seconds for each in record.ranks])


def table(group: Group) -> tuple[list[str], list[list[str]]]:
    """Header and rows of each rank at the group's focus K; no rows where there is one process."""
    header = ["estimator", "rank", "peak MiB", "CUDA MiB", "RSS MiB", "sent MiB", "waited ms", "ms"]
    rows = [
        [
            clean(record.estimator),
            str(each.rank),
            *map(units.mebibytes, (each.peak_tensor_bytes, each.cuda_allocated_bytes, each.resident_bytes)),
            units.mebibytes(each.sent_bytes),
            *map(units.milliseconds, (each.collective_seconds, each.wall_seconds)),
        ]
        for record in group.rows
        if record.inner_steps == group.focus
        for each in record.ranks
    ]
    return without_empty(header, rows, always=(0, 1))


def _range(said: Callable[[float | None], str], values: Sequence[float | None]) -> str:
    """The smallest and the largest value; one where they are written alike."""
    found = spread(values)
    return units.MISSING if found is None else "-".join(dict.fromkeys(map(said, found)))
