"""What got better or worse between two sets of records, with the noise of time taken into account.

Rows are matched by case, label, engine, K, device, seed, dtype and source (measured or forecast). What is compared, and
when it counts:

| figure | counts when |
| --- | --- |
| status, and how the outer loop ended | the severity changes: OK, an unmet tolerance, a failure |
| peak_tensor_bytes; on a GPU cuda_allocated_bytes | it changes by more than 0.1 % (torch's versions differ by less) |
| kept_tensor_bytes | it changes at all: it is a leak |
| oracle calls, matmul_flops | they change at all: they repeat exactly |
| program_relative_error, solution_relative_error | more than twofold, the larger above `units.rounding` |
| wall_seconds | the 10% to 90% quantiles of the repeats do not overlap and the medians differ by more than 10 % |

Times are compared only where processor, GPU and threads are the same, and both were repeated. Another problem behind
the same name (sizes, settings) is said, and judged no further. Resident memory, phases, metrics and losses are not
compared: whether they are better is for a person to say.
"""

import dataclasses
import enum
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bilevel_profiling.records.failure import failed, severity
from bilevel_profiling.records.record import Record
from bilevel_profiling.records.units import rounding

_MACHINE = ("cpu", "gpu", "threads")
_TWOFOLD = 2.0


class Verdict(enum.StrEnum):
    """How a figure of the new records compares with the old one; the order is that of a list."""

    WORSE = "worse"
    MISSING = "missing"
    CHANGED = "changed"
    BETTER = "better"
    NEW = "new"
    NOISE = "within noise"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tolerances:
    """Relative changes that do not count."""

    memory: float = 0.001
    time: float = 0.1


@dataclasses.dataclass(frozen=True)
class Key:
    """What makes a row the same row in two files."""

    case: str
    estimator: str
    inner_steps: int | None
    device: str
    seed: int
    dtype: str
    source: str
    engine: str = ""
    processes: int | None = None


@dataclasses.dataclass(frozen=True)
class Difference:
    """One figure that is not the same."""

    key: Key
    figure: str
    old: float | str | None
    new: float | str | None
    verdict: Verdict

    @property
    def ratio(self) -> float | None:
        """New over old, for numbers."""
        if isinstance(self.old, str) or isinstance(self.new, str) or not self.old or self.new is None:
            return None
        return self.new / self.old


@dataclasses.dataclass(frozen=True)
class Diff:
    """All that is not the same."""

    differences: tuple[Difference, ...]
    matched: int
    """Rows in both."""
    notes: tuple[str, ...]
    """What was not compared, and why."""

    def rows(self, *verdicts: Verdict) -> int:
        """How many rows have a figure of one of these verdicts."""
        return len({difference.key for difference in self.differences if difference.verdict in verdicts})

    def sentence(self) -> str:
        """The result in words.

        Example:
            >>> old, new = Record(case="c", estimator="e"), Record(case="c", estimator="e", status="DIVERGED")
            >>> compare_records([old], [new]).sentence()
            '1 row in both: 1 worse.'
        """
        worst = {
            difference.key: difference.verdict for difference in reversed(self.differences)
        }  # the differences are sorted
        counts = [
            (sum(each is verdict for each in worst.values()), verdict.value)
            for verdict in (Verdict.WORSE, Verdict.CHANGED, Verdict.BETTER)
        ]
        counts.append((self.matched - sum(count for count, _ in counts), "the same"))
        said = [f"{count} {word}" for count, word in counts if count]
        noise, missing, new = (self.rows(verdict) for verdict in (Verdict.NOISE, Verdict.MISSING, Verdict.NEW))
        said += [f"the time of {noise} within noise"] if noise else []
        outside = [f"{missing} only in the old"] if missing else []
        outside += [f"{new} only in the new"] if new else []
        inside = f"{self.matched} row{'' if self.matched == 1 else 's'} in both" + (
            f": {', '.join(said)}" if said else ""
        )
        return "; ".join([inside, *outside]) + "."


def compare_records(old: Sequence[Record], new: Sequence[Record], tolerances: Tolerances | None = None) -> Diff:
    """Compare two sets of records, row by row.

    Example:
        >>> old = Record(case="c", estimator="e", peak_tensor_bytes=1000, repeats=5,
        ...     wall_seconds=1.0, wall_seconds_low=0.9, wall_seconds_high=1.3)
        >>> new = dataclasses.replace(old, peak_tensor_bytes=1100, wall_seconds=1.25)
        >>> [(each.figure, each.verdict.value) for each in compare_records([old], [new]).differences]
        [('peak_tensor_bytes', 'worse'), ('wall_seconds', 'within noise')]
    """
    allowed = tolerances or Tolerances()
    befores, afters = _by_key(old), _by_key(new)
    pairs = [(key, key) for key in befores if key in afters]
    # A run that failed before it knew its dtype has only a guess at it.
    lost, found = [key for key in befores if key not in afters], [key for key in afters if key not in befores]
    for before in list(lost):
        after = next(
            (
                key
                for key in found
                if dataclasses.replace(key[0], dtype=before[0].dtype) == before[0] and key[1] == before[1]
            ),
            None,
        )
        if after is not None and any(
            rows[key].inner_size is None for rows, key in ((befores, before), (afters, after))
        ):
            pairs.append((before, after))
            lost.remove(before)
            found.remove(after)
    differences: list[Difference] = []
    machines: dict[str, int] = {}
    for before, after in pairs:
        one, other = befores[before], afters[after]
        differences += [
            Difference(before[0], figure, was, now, verdict)
            for figure, was, now, verdict in _judged(one, other, allowed)
            if verdict is not None
        ]
        machine = _other_machine(one, other)
        if machine and one.wall_seconds is not None and other.wall_seconds is not None:
            machines[machine] = machines.get(machine, 0) + 1
    differences += [Difference(key[0], "row", befores[key].status, None, Verdict.MISSING) for key in lost]
    differences += [Difference(key[0], "row", None, afters[key].status, Verdict.NEW) for key in found]
    order = {verdict: place for place, verdict in enumerate(Verdict)}
    notes = [
        f"the times of {count} row{'' if count == 1 else 's'} are not compared: {machine}"
        for machine, count in machines.items()
    ]
    return Diff(tuple(sorted(differences, key=lambda each: order[each.verdict])), len(pairs), tuple(notes))


def as_dict(diff: Diff) -> dict[str, Any]:
    """For JSON: numbers that are not finite become text."""
    entries = [
        {
            **dataclasses.asdict(each.key),
            "figure": each.figure,
            "old": _plain(each.old),
            "new": _plain(each.new),
            "verdict": each.verdict.value,
        }
        for each in diff.differences
    ]
    return {"matched": diff.matched, "summary": diff.sentence(), "notes": list(diff.notes), "differences": entries}


def _by_key(records: Sequence[Record]) -> dict[tuple[Key, int], Record]:
    """Records by what they are; a second row of the same kind is matched with the second one of the other file."""
    found: dict[tuple[Key, int], Record] = {}
    for record in records:
        what = record.case, record.estimator, record.inner_steps
        key = Key(*what, record.device, record.seed, record.dtype, record.source, record.engine, record.processes)
        found[key, sum(known == key for known, _ in found)] = record
    return found


Judged = tuple[str, float | str | None, float | str | None, Verdict | None]
"""A figure, its old and its new value, and what that means; None for nothing."""


def _judged(old: Record, new: Record, allowed: Tolerances) -> Iterator[Judged]:
    yield "status", old.status, new.status, _by_severity(old.status, new.status)
    yield _loop(old, new)
    if old.status != new.status and (failed(old) or failed(new)):
        return  # what a run took until it failed is no figure
    other = [
        name
        for name in ("settings", "engine_settings", "inner_size", "outer_size", "tasks", "base_tensor_bytes")
        if _known_apart(old, new, name)
    ]
    for name in other:
        yield name, getattr(old, name), getattr(new, name), Verdict.CHANGED
    if other:
        return
    for name, tolerance in (
        ("peak_tensor_bytes", allowed.memory),
        ("cuda_allocated_bytes", allowed.memory),
        ("kept_tensor_bytes", 0.0),
    ):
        before, after = getattr(old, name), getattr(new, name)
        yield name, before, after, _by_size(before, after, tolerance)
    for name in {**old.calls, **new.calls} if old.calls and new.calls else ():
        before, after = old.calls.get(name, 0), new.calls.get(name, 0)
        yield f"calls {name}", before, after, _by_size(before, after, 0.0)
    yield "matmul_flops", old.matmul_flops, new.matmul_flops, _by_size(old.matmul_flops, new.matmul_flops, 0.0)
    for name in ("program_relative_error", "solution_relative_error"):
        before, after = getattr(old, name), getattr(new, name)
        yield name, before, after, _by_error(before, after, rounding(new.dtype))
    if not _other_machine(old, new):
        yield "wall_seconds", old.wall_seconds, new.wall_seconds, _by_time(old, new, allowed.time)


def _loop(old: Record, new: Record) -> Judged:
    """How the outer loops ended."""
    before, after = (record.iterations[-1].status if record.iterations else None for record in (old, new))
    if before is None or after is None:
        left_out = failed(old) or failed(new)  # a run that fails has no loop
        return "outer loop", before, after, Verdict.CHANGED if before != after and not left_out else None
    return "outer loop", before, after, _by_severity(before, after)


def _by_severity(old: str, new: str) -> Verdict | None:
    if severity(old) == severity(new):
        return Verdict.CHANGED if old != new else None
    return Verdict.WORSE if severity(new) > severity(old) else Verdict.BETTER


def _by_size(old: int | None, new: int | None, tolerance: float) -> Verdict | None:
    if old is None or new is None or abs(new - old) <= tolerance * old:
        return None
    return Verdict.WORSE if new > old else Verdict.BETTER


def _by_error(old: float | None, new: float | None, resolved: float) -> Verdict | None:
    if old is None or new is None:
        return None if old is new else Verdict.CHANGED
    before, after = (math.inf if math.isnan(value) else max(value, resolved) for value in (old, new))
    if before == after or 1 / _TWOFOLD <= after / before <= _TWOFOLD:
        return None
    return Verdict.WORSE if after > before else Verdict.BETTER


def _by_time(old: Record, new: Record, tolerance: float) -> Verdict | None:
    if not old.wall_seconds or not new.wall_seconds or abs(new.wall_seconds / old.wall_seconds - 1) <= tolerance:
        return None
    ranges = [
        record.wall_seconds_low is not None and record.wall_seconds_high is not None and (record.repeats or 0) > 1
        for record in (old, new)
    ]
    slower, faster = (new, old) if new.wall_seconds > old.wall_seconds else (old, new)
    if not all(ranges) or (slower.wall_seconds_low or 0) <= (faster.wall_seconds_high or 0):
        return Verdict.NOISE
    return Verdict.WORSE if slower is new else Verdict.BETTER


def _known_apart(old: Record, new: Record, name: str) -> bool:
    before, after = getattr(old, name), getattr(new, name)
    return before != after and before not in (None, "") and after not in (None, "")


def _other_machine(old: Record, new: Record) -> str:
    """What differs between the machines, in words."""
    environments: tuple[Mapping[str, str], Mapping[str, str]] = old.environment, new.environment
    pairs = [(name, *(environment.get(name, "unknown") for environment in environments)) for name in _MACHINE]
    return "; ".join(f"{name} {before} and {after}" for name, before, after in pairs if before != after)


def _plain(value: float | str | None) -> float | str | None:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
