"""The pieces of work of a comparison, each a frozen value that says what it is and does it: a float64 reference, a
row, the outer loop of a row.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bilevel_profiling.comparison.folder import Folder
from bilevel_profiling.comparison.plan import Cell, Settings, Settled
from bilevel_profiling.comparison.progress import Task, row_text
from bilevel_profiling.measurement import cell as cells
from bilevel_profiling.measurement import isolate
from bilevel_profiling.measurement.environment import environment
from bilevel_profiling.measurement.passes import described
from bilevel_profiling.meters.resident import Resident
from bilevel_profiling.records import units
from bilevel_profiling.records.failure import OUT_OF_MEMORY, Failure, limited, noted, unfinished
from bilevel_profiling.records.note import Note, NoteKind
from bilevel_profiling.records.record import Iteration, Record, Target
from bilevel_profiling.records.records_file import RecordsFile

Key = tuple[str, str, str, int | None]
"""Case, label, engine, K."""


@dataclasses.dataclass(frozen=True)
class Site:
    """Where the work is done: the same for all pieces of it."""

    settings: Settings
    folder: Folder
    rows: RecordsFile
    date: str
    missing: dict[Path, str] = dataclasses.field(default_factory=dict)
    """Why a reference could not be made, by its path: what a piece of work leaves for the next."""

    @property
    def limits(self) -> dict[str, Any]:
        """Of each process that runs an estimator."""
        return {"time_limit": self.settings.time_limit, "memory_limit": self.settings.memory_limit}

    def place(self, key: Key) -> int | None:
        """Where the row is in the file; None where it is not."""
        found = (
            place
            for place, record in enumerate(self.rows.records)
            if key_of(record) == key and record.source == "measured"
        )
        return next(found, None)

    def put(self, record: Record) -> None:
        """Write a row, in the place of the one that is there."""
        place = self.place(key_of(record))
        if place is None:
            self.rows.append(record)
        else:
            self.rows.replace(place, record)


@dataclasses.dataclass(frozen=True)
class Piece(abc.ABC):
    """A piece of work on one cell of a case."""

    settled: Settled
    cell: Cell

    @property
    @abc.abstractmethod
    def task(self) -> Task:
        """What it is, for those who wait."""

    @abc.abstractmethod
    def do(self, site: Site) -> str:
        """Do it, and say in a few words how it went."""

    @property
    def key(self) -> Key:
        """Of the row."""
        return self.settled.case.name, self.cell.label, self.cell.engine, self.cell.steps

    def job(self, site: Site, **more: Path | None) -> cells.Job:
        """The cell, in a form that another process can make its case from."""
        plan, settings = self.settled.plan, site.settings
        return cells.Job(
            plan.source,
            plan.overrides,
            self.cell.estimator,
            self.cell.solver,
            row=self.cell.label,
            engine=self.cell.engine,
            labels=self.settled.labels,
            device=settings.device,
            seed=settings.seed,
            repeats=settings.repeats,
            threads=settings.threads,
            command=settings.command,
            **more,
        )

    def stem(self, *more: str) -> str:
        """Of the names of its files."""
        label = "-".join(filter(None, [self.cell.label, self.cell.engine]))
        return "-".join([self.settled.case.name, label, str(self.cell.steps), *more])


@dataclasses.dataclass(frozen=True)
class Reference(Piece):
    """Make a float64 hypergradient, of the program of the cell's solver or of the solution."""

    target: Target

    @property
    def task(self) -> Task:
        what = self.cell.solver_name or f"K = {self.cell.steps}"
        said = "converged solution" if self.target is Target.SOLUTION else what
        return Task(self.settled.case.name, f"float64 reference, {said}", 5 + self.cell.steps / 4)

    def path(self, site: Site) -> Path:
        """Where it is kept: estimators share it, but means over tasks have one for each weighting."""
        parts = [self.settled.case.name, self.target.value]
        if self.target is Target.PROGRAM:
            parts += filter(None, [self.cell.solver_name, str(self.cell.steps)])
        parts += [*filter(None, [self.cell.tasks]), site.settings.device, str(site.settings.seed)]
        return site.folder.reference("-".join(parts))

    def do(self, site: Site) -> str:
        path, limit = self.path(site), site.settings.time_limit
        outcome = isolate.run(cells.reference, self.job(site), self.target.value, path, time_limit=limit)
        if (failure := outcome.failure) is None:
            return str(outcome.value)
        site.missing[path] = f"none, because making it ended with {failure.status}: {failure.reason}"
        site.folder.keep_log(outcome.log, path.stem)
        return failure.status


@dataclasses.dataclass(frozen=True)
class Row(Piece):
    """Measure a cell: one process for time, live bytes, FLOPs and error, another for resident memory."""

    @property
    def task(self) -> Task:
        return Task(self.settled.case.name, f"{self.cell.title}, K = {self.cell.steps}", 15 + self.cell.steps)

    def do(self, site: Site) -> str:
        settings, folder = site.settings, site.folder
        job = self.job(
            site,
            trace=folder.trace(self.stem()) if settings.trace else None,
            snapshot=folder.snapshot(self.stem()) if settings.snapshot and settings.device == "cuda" else None,
        )
        sources = [self._reference(site, target) for target in (Target.PROGRAM, Target.SOLUTION)]
        outcome = isolate.run(cells.cost, job, *sources, **site.limits)
        if outcome.failure is not None:
            record = self._blank(site, job, outcome.failure)
            folder.keep_log(outcome.log, self.stem())
        else:
            record = outcome.value
            if record.status == OUT_OF_MEMORY and settings.memory_limit is not None:
                record = dataclasses.replace(record, reason=limited(record.reason, settings.memory_limit))
            if record.wall_seconds is not None:
                record = dataclasses.replace(record, resident_bytes=self._resident(site, job))
        record = dataclasses.replace(record, environment={**record.environment, "date": site.date})
        site.put(record)
        return row_text(record)

    def _reference(self, site: Site, target: Target) -> Path | str:
        if target is Target.SOLUTION and self.settled.case.solution is None:
            return "the case declares no solver for it."
        path = Reference(self.settled, self.cell, target).path(site)
        return site.missing.get(path, path)

    def _resident(self, site: Site, job: cells.Job) -> int | None:
        meters: list[Resident] = []

        def around(pid: int) -> Resident:
            meters.append(Resident(pid))
            return meters[-1]

        try:
            outcome = isolate.run(cells.resident, job, around=around, **site.limits)
        except ImportError:  # memory-profiler is optional
            return None
        if outcome.failure is not None:
            said = f"{outcome.failure.status}: {outcome.failure.reason}"
            site.folder.keep_log(f"{said}\n{outcome.log}", self.stem("resident"))
            return None
        return meters[-1].figures()["resident_bytes"]

    def _blank(self, site: Site, job: cells.Job, failure: Failure) -> Record:
        """A row without figures, as far as it is known without having run anything."""
        others = site.rows.records
        dtypes = (r.dtype for r in others if r.case == self.settled.case.name)
        environments = (r.environment for r in others if r.device == job.device)
        return dataclasses.replace(
            described(job.case(self.settled.case), site.settings.command),
            dtype=next(dtypes, "float32"),
            status=failure.status,
            reason=failure.reason,
            environment=next(environments, environment(site.settings.command)),
        )


@dataclasses.dataclass(frozen=True)
class OuterLoop(Piece):
    """Run the outer loop of a cell, and join it to its row."""

    @property
    def task(self) -> Task:
        steps = self.settled.case.outer_steps
        weight = (15 + self.cell.steps) * (0.5 + steps / 12)
        return Task(self.settled.case.name, f"{self.cell.title}, outer loop of {steps}", weight)

    def do(self, site: Site) -> str:
        records, place = site.rows.records, site.place(self.key)
        if place is None or unfinished(records[place]):
            return "left out: its single hypergradient failed"
        row = records[place]
        if any(note.kind is NoteKind.WITHOUT_INNER for note in row.notes):
            return "left out: it returns no inner variable"
        before = next((r.metrics_before for r in records if r.case == row.case and r.metrics_before), None)
        outcome = isolate.run(cells.loop, self.job(site), self.settled.case.outer_steps, before, **site.limits)
        notes = tuple(note for note in row.notes if note.kind is not NoteKind.OUTER_LOOP)
        if (failure := outcome.failure) is not None:
            said = f"{failure.status}: {failure.reason}"
            lost = Note(f"The outer loop ended with {said}", NoteKind.OUTER_LOOP)
            ended = Iteration(index=0, status=failure.status)
            found = dataclasses.replace(row, iterations=(ended,), notes=(*notes, lost))
            site.folder.keep_log(outcome.log, self.stem("loop"))
        else:
            loop = outcome.value
            said = _loop_text(loop.iterations, loop.metrics)
            found = dataclasses.replace(
                row,
                iterations=loop.iterations,
                metrics_before=loop.metrics_before,
                metrics=loop.metrics,
                notes=notes,
            )
        site.rows.replace(place, found)
        return said


def key_of(record: Record) -> Key:
    """What makes a row the same row."""
    return record.case, record.estimator, record.engine, record.inner_steps


def _loop_text(iterations: Sequence[Iteration], metrics: Mapping[str, float]) -> str:
    losses = [iteration.outer_loss for iteration in iterations if iteration.outer_loss is not None]
    parts = [f"outer loss {units.significant(losses[0])} to {units.significant(losses[-1])}"] if losses else []
    parts += [f"{name} {units.significant(value)}" for name, value in list(metrics.items())[:2]]
    last = iterations[-1] if iterations else None
    return ", ".join([*parts, *([last.status] if last is not None and noted(last) else [])])
