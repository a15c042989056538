"""What all views share: records grouped by case, measured ones apart from forecasts, the baseline row, ratios, and the
Pareto front.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterable, Sequence

from bilevel_profiling.records.failure import failed
from bilevel_profiling.records.ranks import processes
from bilevel_profiling.records.record import Record, Target
from bilevel_profiling.records.units import finite, rounding

EXACT = 1e-3
"""Largest relative error at which an estimate counts as the gradient of the K-step program (it leaves room for float32
rounding)."""

MEASURED = "measured"


@dataclasses.dataclass(frozen=True)
class Measure:
    """The kind of memory that a group is compared by."""

    field: str
    name: str
    explanation: str


MEASURES = (
    Measure(
        "peak_tensor_bytes",
        "peak memory",
        "the most bytes of tensors made by the call and alive at once (base memory not included)",
    ),
    Measure("cuda_allocated_bytes", "peak CUDA memory", "the peak of the CUDA allocator during the call"),
    Measure(
        "resident_bytes",
        "peak RSS",
        "the peak growth of the process, heap fragmentation included: not the cost of the algorithm alone",
    ),
)


@dataclasses.dataclass(frozen=True)
class Group:
    """The records of one case on one device in one dtype."""

    title: str
    records: tuple[Record, ...]

    @property
    def case(self) -> str:
        return self.records[0].case

    @functools.cached_property
    def estimators(self) -> tuple[str, ...]:
        """Labels in order of first appearance."""
        return tuple(dict.fromkeys(record.estimator for record in self.records))

    @functools.cached_property
    def rows(self) -> tuple[Record, ...]:
        """Records by K, then in the order of the estimators."""
        order = {label: place for place, label in enumerate(self.estimators)}
        return tuple(
            sorted(
                self.records, key=lambda r: (-1 if r.inner_steps is None else r.inner_steps, order[r.estimator], r.seed)
            )
        )

    @functools.cached_property
    def steps(self) -> tuple[int | None, ...]:
        """Every K, ascending; None first where a record has none."""
        return tuple(dict.fromkeys(record.inner_steps for record in self.rows))

    @functools.cached_property
    def processes(self) -> int | None:
        """Ranks that ran each cell together, where they were as many for all."""
        found = {record.processes for record in self.records}
        return found.pop() if len(found) == 1 else None

    @property
    def bilevel(self) -> bool:
        """Whether inner steps are known: a plain call or training run has none."""
        return self.steps != (None,)

    @functools.cached_property
    def failures(self) -> tuple[Record, ...]:
        return tuple(record for record in self.rows if failed(record))

    @functools.cached_property
    def measure(self) -> Measure:
        """The first kind of memory that any record has."""
        found = (measure for measure in MEASURES if any(finite(getattr(r, measure.field)) for r in self.records))
        return next(found, MEASURES[0])

    @functools.cached_property
    def focus(self) -> int | None:
        """The K that one-K views show: where most estimators finished, measured ones first, the largest such."""
        done = {(r.inner_steps, r.estimator, r.source) for r in self.records if not failed(r)}

        def weight(k: int | None) -> tuple[int, int, int]:
            sources = [source for steps, _, source in done if steps == k]
            return sources.count(MEASURED), len(sources), -1 if k is None else k

        return max(self.steps, key=weight)

    def chosen(self, has: Callable[[Record], object]) -> dict[str, Record]:
        """For each estimator the first record that `has` accepts at the focus K, or else at the largest K that has
        one.
        """
        found: dict[str, Record] = {}
        for record in self.rows:
            held = found.get(record.estimator)
            if has(record) and (
                held is None or (held.inner_steps != self.focus and held.inner_steps != record.inner_steps)
            ):
                found[record.estimator] = record
        return {label: found[label] for label in self.estimators if label in found}

    def value(self, estimator: str, k: int | None, field: str) -> float | None:
        """Median of a field over the runs (seeds) of an estimator at K that did not fail; None if there is no finite
        one.
        """
        found = (
            getattr(r, field) for r in self.records if r.estimator == estimator and r.inner_steps == k and not failed(r)
        )
        values = [float(value) for value in found if finite(value)]
        return statistics.median(values) if values else None

    def points(self, estimator: str, field: str) -> list[tuple[int, float]]:
        """(K, value) where both are known, by K."""
        pairs = ((k, self.value(estimator, k, field)) for k in self.steps if k is not None)
        return [(k, value) for k, value in pairs if value is not None]

    def exact(self, estimator: str, k: int | None) -> bool:
        """Whether the estimator was measured to give the gradient of the K-step program at this K."""
        error = self.value(estimator, k, "program_relative_error")
        return error is not None and error <= EXACT

    @functools.cached_property
    def baseline(self) -> str | None:
        """The estimator that ratios refer to: the first whose target is the program and that was not measured to
        miss it, else the first that was measured to give it.
        """
        programs = {r.estimator for r in self.records if r.target is Target.PROGRAM}
        seen = [e for e in self.estimators if self._exact_everywhere(e)]
        candidates = [e for e in self.estimators if e in programs and (e in seen or not self._errors(e))] or seen
        return candidates[0] if candidates else None

    def ratio(self, record: Record, field: str) -> float | None:
        """The record's value over the baseline's at the same K; None where either is missing or the baseline is 0."""
        value = getattr(record, field)
        base = None if self.baseline is None else self.value(self.baseline, record.inner_steps, field)
        return value / base if finite(value) and base else None

    @property
    def rounding(self) -> float:
        """Errors below this are rounding in the group's dtype, and count as equal."""
        return rounding(self.records[0].dtype)

    def _errors(self, estimator: str) -> list[float]:
        return [value for k in self.steps if (value := self.value(estimator, k, "program_relative_error")) is not None]

    def _exact_everywhere(self, estimator: str) -> bool:
        errors = self._errors(estimator)
        return bool(errors) and max(errors) <= EXACT


def group(records: Iterable[Record]) -> list[Group]:
    """Records by case, device and dtype, in order of first appearance; the title says more than the case only where it
    must.

    Figures that were not measured never share a label with those that were: beside measured records of the case, the
        estimator's label says
    what they are; where all of a case are of one kind, its title does. Likewise the label says the engine, and the
    number of processes, where a case was measured with several.
    """
    found: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        found.setdefault((record.case, record.device, record.dtype), []).append(record)
    cases = [case for case, _, _ in found]
    groups = []
    for (case, device, dtype), members in found.items():
        title = case if cases.count(case) == 1 else f"{case} ({device}, {dtype})"
        sources, engines = {record.source for record in members}, {record.engine for record in members}
        counts = {record.processes for record in members}
        if len(sources) == 1:
            title += "" if sources == {MEASURED} else f": {members[0].source}"
        several = len(engines) > 1, len(counts) > 1, len(sources) > 1
        members = [_told_apart(record, *several) for record in members]
        groups.append(Group(title, tuple(members)))
    return groups


def _told_apart(record: Record, by_engine: bool, by_processes: bool, by_source: bool) -> Record:
    """The record with what it is in its label."""
    said = [
        record.engine if by_engine else "",
        processes(record.processes) if by_processes else "",
        record.source if by_source and record.source != MEASURED else "",
    ]
    more = ", ".join(filter(None, said))
    return dataclasses.replace(record, estimator=f"{record.estimator} ({more})") if more else record


def settings(records: Iterable[Record]) -> list[tuple[str, str]]:
    """(label, repr) of the estimators, then of the engines, each once."""
    records = list(records)
    found = [(record.estimator, record.settings) for record in records if record.settings]
    made = [(f"engine {record.engine}", record.engine_settings) for record in records if record.engine_settings]
    return list(dict.fromkeys([*found, *made]))


def estimators(groups: Iterable[Group]) -> tuple[str, ...]:
    """Labels over all cases, in order of first appearance: the order of colors."""
    return tuple(dict.fromkeys(record.estimator for each in groups for record in each.records))


def environment(records: Iterable[Record]) -> dict[str, str]:
    """The environments of all records as one; where they differ, every value."""
    merged: dict[str, dict[str, None]] = {}
    for record in records:
        for key, value in record.environment.items():
            merged.setdefault(str(key), {})[str(value)] = None
    return {key: "; ".join(values) for key, values in merged.items()}


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points that no other point beats (less or equal in both, less in one), by the first coordinate."""
    front = [
        place
        for place, (x, y) in enumerate(points)
        if not any(u <= x and v <= y and (u < x or v < y) for other, (u, v) in enumerate(points) if other != place)
    ]
    return sorted(front, key=lambda place: points[place])
