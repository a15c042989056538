"""The pieces of work of a comparison, each a frozen value that says what it is, what is to be run for it, and what is
written when the answer is there: a float64 reference, a row, the outer loop of a row.
"""

import abc
import dataclasses
import pickle
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bilevel_profiling.comparison.folder import Folder
from bilevel_profiling.comparison.plan import Cell, Settings, Settled
from bilevel_profiling.comparison.progress import Task, row_text
from bilevel_profiling.measurement import cell as cells
from bilevel_profiling.measurement.environment import environment
from bilevel_profiling.measurement.errand import Answer, Errand
from bilevel_profiling.measurement.passes import described
from bilevel_profiling.records import units
from bilevel_profiling.records.failure import ERROR, OUT_OF_MEMORY, Failure, limited, noted, unfinished
from bilevel_profiling.records.note import Note, NoteKind
from bilevel_profiling.records.record import Iteration, Record, Target
from bilevel_profiling.records.records_file import RecordsFile

Key = tuple[str, str, str, int | None, int | None]
"""Case, label, engine, K, processes."""
_BESIDE = Note(
    "Other runs of this comparison were at work on the same machine meanwhile: times may be longer than alone. Memory "
    "is that of the run's own process.",
    NoteKind.BESIDE,
)
_LATER = Note("It was not begun; --resume measures it.", NoteKind.NOT_RUN)


@dataclasses.dataclass(frozen=True)
class Site:
    """Where the work is done: the same for all pieces of it."""

    settings: Settings
    folder: Folder
    rows: RecordsFile
    date: str
    order: Mapping[Key, int] = dataclasses.field(default_factory=dict)
    """The places of the rows in the plan, which in the end are those in the file."""
    shared: set[Key] = dataclasses.field(default_factory=set)
    """Rows whose runs were not alone on their machine, as far as they do not say so yet."""
    missing: dict[Path, str] = dataclasses.field(default_factory=dict)
    """Why a reference could not be made, by its path: what a piece of work leaves for the next."""
    unmade: dict[Path, str] = dataclasses.field(default_factory=dict)
    """Why a reference was not even begun."""

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

    def tidy(self) -> None:
        """Bring the rows into the order of the plan, each that it does not ask for behind the one that it follows, and
        write the notes of those that were not alone. A row without times needs none.
        """
        records, ranks, changed = self.rows.records, [-1], {}
        for place, record in enumerate(records):
            key = key_of(record)
            ranks.append(self.order.get(key, ranks[-1]))
            if key in self.shared and record.wall_seconds is not None and _BESIDE not in record.notes:
                changed[place] = dataclasses.replace(record, notes=(*record.notes, _BESIDE))
        self.shared.clear()
        places = sorted(range(len(records)), key=lambda place: ranks[place + 1])
        if changed or places != list(range(len(records))):
            self.rows.rearrange(places, changed)


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
    def errand(self, site: Site) -> Errand | Answer | str:
        """What is to be run; an answer where that is known already; a few words where there is nothing to do."""

    @abc.abstractmethod
    def take(self, site: Site, answer: Answer) -> str:
        """Write down what came of it, and say in a few words how it went."""

    @abc.abstractmethod
    def name(self, site: Site) -> Hashable:
        """What others that need it call it."""

    def needs(self, site: Site) -> list[Hashable]:
        """The names of the pieces that must be done before, as far as they are to be done."""
        return []

    @property
    def key(self) -> Key:
        """Of the row."""
        return self.settled.case.name, self.cell.label, self.cell.engine, self.cell.steps, self.cell.processes

    def job(self, site: Site) -> cells.Job:
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
            seed=self.settled.seed,
            repeats=settings.repeats,
            threads=settings.threads,
            command=settings.command,
            split=None if self.alone else self.settled.case.parallel,
        )

    @property
    def alone(self) -> bool:
        """Whether one process does it, without a group."""
        return self.cell.processes is None

    def asked(self, site: Site, what: str, *arguments: Any, **more: Any) -> Errand:
        """The errand of a function of `cell`."""
        return Errand(
            what=what,
            job=pickle.dumps(self.job(site)),
            arguments=arguments,
            time_limit=site.settings.time_limit,
            preload=tuple(self.settled.case.preload),
            processes=None if self.alone else self.cell.processes,
            device=site.settings.device,
            **more,
        )

    def stem(self, *more: str) -> str:
        """Of the names of its files."""
        ranks = "" if self.cell.processes is None else f"{self.cell.processes}-processes"
        label = "-".join(filter(None, [self.cell.label, self.cell.engine, ranks]))
        return "-".join([self.settled.case.name, label, str(self.cell.steps), *more])


@dataclasses.dataclass(frozen=True)
class Reference(Piece):
    """Make a float64 hypergradient, of the program of the cell's solver or of the solution."""

    target: Target

    @property
    def alone(self) -> bool:
        return True  # that of the whole problem: what ranks find together is compared with it

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
        parts += [*filter(None, [self.cell.tasks]), site.settings.device, str(self.settled.seed)]
        return site.folder.reference("-".join(parts))

    def name(self, site: Site) -> Hashable:
        return self.path(site)

    def errand(self, site: Site) -> Errand | Answer | str:
        path = self.path(site)
        return self.asked(site, "reference", self.target.value, path, reads=(path,), writes=(path,))

    def take(self, site: Site, answer: Answer) -> str:
        path = self.path(site)
        if (failure := answer.failure) is None:
            return str(answer.value)
        site.missing[path] = f"none, because making it ended with {failure.status}: {failure.reason}"
        if not answer.begun:
            site.unmade[path] = failure.reason
        site.folder.keep_log(answer.log, path.stem)
        return failure.status


@dataclasses.dataclass(frozen=True)
class Row(Piece):
    """Measure a cell: one process for time, live bytes, FLOPs and error, another for resident memory."""

    @property
    def task(self) -> Task:
        return Task(self.settled.case.name, f"{self.cell.title}, K = {self.cell.steps}", 15 + self.cell.steps)

    def name(self, site: Site) -> Hashable:
        return self.key

    def needs(self, site: Site) -> list[Hashable]:
        return [each.path(site) for each in self.references]

    @property
    def references(self) -> list[Reference]:
        """What its errors are measured against."""
        targets = [Target.PROGRAM] if self.settled.case.solution is None else [Target.PROGRAM, Target.SOLUTION]
        return [Reference(self.settled, self.cell, target) for target in targets]

    def errand(self, site: Site) -> Errand | Answer | str:
        settings, folder = site.settings, site.folder
        paths = [each.path(site) for each in self.references]
        for path in paths:
            if (why := site.unmade.get(path)) is not None:
                reason = f"Not run, because its float64 reference was not made: {why}"
                return Answer(failure=Failure(ERROR, reason), begun=False)
        sources: list[Path | str] = [site.missing.get(path, path) for path in paths]
        if len(sources) == 1:
            sources.append("the case declares no solver for it.")
        files: dict[str, Path] = {}
        if settings.trace:
            files["trace"] = folder.trace(self.stem())
        if settings.snapshot and settings.device == "cuda":
            files["snapshot"] = folder.snapshot(self.stem())
        return self.asked(
            site,
            "cost",
            *sources,
            changes=files,
            reads=tuple(each for each in sources if isinstance(each, Path)),
            writes=tuple(files.values()),
            watched=True,
            memory_limit=settings.memory_limit,
        )

    def take(self, site: Site, answer: Answer) -> str:
        settings, folder = site.settings, site.folder
        if answer.failure is None and key_of(answer.value) != self.key:
            said = f"The answer is that of another row: {key_of(answer.value)} for {self.key}"
            answer = dataclasses.replace(answer, failure=Failure(ERROR, said))
        if answer.failure is not None:
            record = self._blank(site, answer.failure)
            record = record if answer.begun else dataclasses.replace(record, notes=(*record.notes, _LATER))
            folder.keep_log(answer.log, self.stem())
        else:
            record = answer.value
            if record.status == OUT_OF_MEMORY and settings.memory_limit is not None:
                record = dataclasses.replace(record, reason=limited(record.reason, settings.memory_limit))
            record = self._on_another_machine(site, dataclasses.replace(record, resident_bytes=answer.resident_bytes))
            folder.keep_log(answer.resident_log, self.stem("resident"))
        made = {**record.environment, "date": site.date, **answer.place}
        site.put(record := dataclasses.replace(record, environment=made))
        return row_text(record)

    def _on_another_machine(self, site: Site, record: Record) -> Record:
        """With a note where the processor or the GPU is not that of the first row of the case."""
        others = (dict(r.environment) for r in site.rows.records if r.case == record.case and not unfinished(r))
        first = next(others, {})
        for kind in ("cpu", "gpu"):
            here, there = record.environment.get(kind), first.get(kind)
            if here and there and here != there:
                said = f"Measured on {here}, and the first row of this case on {there}: their times cannot be compared."
                record = dataclasses.replace(record, notes=(*record.notes, Note(said)))
        return record

    def _blank(self, site: Site, failure: Failure) -> Record:
        """A row without figures, as far as it is known without having run anything."""
        job, others = self.job(site), site.rows.records
        dtypes = (r.dtype for r in others if r.case == self.settled.case.name)
        environments = (
            {name: value for name, value in r.environment.items() if name not in ("host", "worker")}
            for r in others
            if r.device == job.device
        )
        split = self.settled.case.parallel
        return dataclasses.replace(
            described(dataclasses.replace(job, split=None).case(self.settled.case), site.settings.command),
            processes=self.cell.processes,
            split="" if self.alone or split is None else split.name,
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

    def name(self, site: Site) -> Hashable:
        return "outer loop", self.key

    def needs(self, site: Site) -> list[Hashable]:
        return [self.key]

    def errand(self, site: Site) -> Errand | Answer | str:
        records, place = site.rows.records, site.place(self.key)
        if place is None or unfinished(records[place]):
            return "left out: its single hypergradient failed"
        if any(note.kind is NoteKind.WITHOUT_INNER for note in records[place].notes):
            return "left out: it returns no inner variable"
        case = self.settled.case
        before = next((dict(r.metrics_before) for r in records if r.case == case.name and r.metrics_before), None)
        return self.asked(site, "loop", case.outer_steps, before, memory_limit=site.settings.memory_limit)

    def take(self, site: Site, answer: Answer) -> str:
        place = site.place(self.key)
        assert place is not None, "an outer loop is run where there is a row"
        row = site.rows.records[place]
        notes = tuple(note for note in row.notes if note.kind is not NoteKind.OUTER_LOOP)
        if (failure := answer.failure) is not None:
            said = f"{failure.status}: {failure.reason}"
            how = f"ended with {said}" if answer.begun else f"was not begun ({said}); --resume runs it."
            lost = Note(f"The outer loop {how}", NoteKind.OUTER_LOOP)
            ended = (Iteration(index=0, status=failure.status),) if answer.begun else ()
            found = dataclasses.replace(row, iterations=ended, notes=(*notes, lost))
            site.folder.keep_log(answer.log, self.stem("loop"))
        else:
            loop = answer.value
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
    return record.case, record.estimator, record.engine, record.inner_steps, record.processes


def _loop_text(iterations: Sequence[Iteration], metrics: Mapping[str, float]) -> str:
    losses = [iteration.outer_loss for iteration in iterations if iteration.outer_loss is not None]
    parts = [f"outer loss {units.significant(losses[0])} to {units.significant(losses[-1])}"] if losses else []
    parts += [f"{name} {units.significant(value)}" for name, value in list(metrics.items())[:2]]
    last = iterations[-1] if iterations else None
    return ", ".join([*parts, *([last.status] if last is not None and noted(last) else [])])
