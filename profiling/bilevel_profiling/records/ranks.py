"""The records of the ranks that ran a cell together, as one."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bilevel_profiling.records.failure import severity
from bilevel_profiling.records.record import Rank, Record

_LARGEST = (
    "kept_tensor_bytes",
    "sent_bytes",
    "collective_seconds",
    "trace_seconds",
    "compile_seconds",
    "warm_up_seconds",
    "program_relative_error",
    "solution_relative_error",
)
_SMALLEST = ("program_cosine", "solution_cosine")
_OF_A_RANK = [field.name for field in dataclasses.fields(Rank) if field.name != "rank"]


def joined(records: Sequence[Record]) -> Record:
    """One record of a cell that N ranks ran: that of the rank with the highest peak, with the times of the slowest, the
    largest errors, and all ranks beside each other.

    Example:
        >>> ranks = [Record(case="c", estimator="e", peak_tensor_bytes=size, sent_bytes=8) for size in (300, 100)]
        >>> found = joined(ranks)
        >>> found.peak_tensor_bytes, found.processes, [each.peak_tensor_bytes for each in found.ranks]
        (300, 2, [300, 100])
    """
    highest = max(records, key=lambda record: (record.cuda_allocated_bytes or 0, record.peak_tensor_bytes or 0))
    slowest = max(records, key=lambda record: record.wall_seconds or 0.0)
    worst = max(records, key=lambda record: severity(record.status))
    times = {name: getattr(slowest, name) for name in ("wall_seconds", "wall_seconds_low", "wall_seconds_high")}
    far = {name: _of(max, name, records) for name in _LARGEST} | {name: _of(min, name, records) for name in _SMALLEST}
    return dataclasses.replace(
        highest,
        **times,
        **far,
        status=worst.status,
        reason=worst.reason,
        notes=tuple(dict.fromkeys(note for record in records for note in record.notes)),
        processes=len(records),
        ranks=tuple(
            Rank(rank=rank, **{name: getattr(record, name) for name in _OF_A_RANK})
            for rank, record in enumerate(records)
        ),
    )


def with_resident(record: Record, grown: Sequence[int]) -> Record:
    """The record with the resident memory of each rank, where it was measured."""
    if len(grown) != len(record.ranks):
        return record
    pairs = zip(record.ranks, grown, strict=True)
    ranks = tuple(dataclasses.replace(rank, resident_bytes=size) for rank, size in pairs)
    return dataclasses.replace(record, ranks=ranks, resident_bytes=max(grown))


def processes(count: int | None) -> str:
    """How many there are, in words; nothing for one without a group.

    Example:
        >>> processes(1), processes(2), processes(None)
        ('1 process', '2 processes', '')
    """
    return "" if count is None else f"{count:,} process{'' if count == 1 else 'es'}"


def spread(values: Iterable[float | None]) -> tuple[float, float] | None:
    """The smallest and the largest of what is known; None where nothing is.

    Example:
        >>> spread([3, None, 1])
        (1, 3)
    """
    known = [value for value in values if value is not None]
    return (min(known), max(known)) if known else None


def _of(pick: Callable[[list[Any]], Any], name: str, records: Sequence[Record]) -> Any:
    known = [value for record in records if (value := getattr(record, name)) is not None]
    return pick(known) if known else None
