"""What runs in the processes of a comparison: one function a kind of work, each given a Job."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import bilevel as bl
from bilevel.distributed import Ranks
from bilevel_profiling.baselines.counting import uncounted
from bilevel_profiling.cases.case import Case
from bilevel_profiling.cases.case_file import Definition, given
from bilevel_profiling.cases.parallel import Parallel
from bilevel_profiling.measurement import engines, references
from bilevel_profiling.measurement.inside import Gate
from bilevel_profiling.measurement.loop import outer_loop
from bilevel_profiling.measurement.passes import measure
from bilevel_profiling.measurement.references import Reference, References
from bilevel_profiling.measurement.trial import Trial
from bilevel_profiling.meters.resident import trim
from bilevel_profiling.records.failure import unfinished
from bilevel_profiling.records.record import Loop, Record

_WATCHED = 0.15
"""Seconds for which a call is repeated while its process is watched: a single short one would fall between two
samples."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One cell of a comparison, in a form that another process can make its case from."""

    source: Any
    """Name, path, or a function; see `case_file.given`."""
    overrides: Mapping[str, Any]
    label: str
    """Of the estimator, or the baseline, in the case."""
    solver: bl.InnerSolver
    row: str = ""
    """Label of the record, if it is another."""
    engine: str = ""
    """Label of the engine in the case; empty for the default."""
    labels: tuple[str, ...] = ()
    """Of all that take part; none for all of the case."""
    device: str = "cpu"
    seed: int = 0
    repeats: int = 5
    command: str = ""
    threads: int = 1
    trace: Path | None = None
    """Where a trace of a call goes."""
    snapshot: Path | None = None
    """Where, on CUDA, a snapshot of the allocator goes."""
    split: Parallel | None = None
    """How the work is split over the ranks that this process is one of; None for a process alone."""

    def definition(self) -> Definition:
        """The case's definition, loaded in this process, which takes its number of threads."""
        torch.set_num_threads(self.threads)
        return given(self.source, **self.overrides)

    def case(self, definition: Definition) -> Case:
        """The case itself."""
        return Case(
            definition.setup,
            solver=self.solver,
            estimator=definition.among(self.labels)[self.label],
            device=self.device,
            seed=self.seed,
            name=definition.name,
            label=self.row or self.label,
            solution=definition.solution,
            outer_optimizer=definition.outer_optimizer,
            engine=definition.engines[self.engine] if self.engine else None,
            engine_name=self.engine,
            parallel=self.split,
            ranks=None if self.split is None else Ranks(),
        )


def cost(job: Job, program: Path | str, solution: Path | str) -> Record:
    """Everything but resident memory. A reference is the path of its file, or a sentence on why there is none."""
    known = References(_reference(program), _reference(solution))
    case = job.case(job.definition())
    first = case.ranks is None or case.ranks.rank == 0
    record = measure(
        case,
        repeats=job.repeats,
        errors=known,
        trace=job.trace if first else None,
        snapshot=job.snapshot if first else None,
        command=job.command,
    )
    if case.ranks is not None and unfinished(record):
        raise MemoryError(record.reason)  # the others wait for this rank, and must hear that it has ended
    return record


def resident(job: Job, gate: Gate) -> None:
    """The case's call, before that as often as it takes to load what first calls load, then watched."""
    case = job.case(job.definition())
    trial = Trial(case)
    for _ in range(1 if engines.sees_operators(case.engine) else engines.WARM_UP):
        trial.hypergradient()
        trial.tidy()
    trim()
    gate()
    started = time.perf_counter()
    while True:
        with uncounted():
            trial.hypergradient()
        trial.tidy()
        enough = time.perf_counter() - started > _WATCHED
        if enough if case.ranks is None else any(case.ranks.gathered(enough)):  # all make as many calls
            return


def reference(job: Job, kind: str, path: Path) -> str:
    """Make a reference, or find it made; returns its note."""
    return references.cached(job.case(job.definition()), kind, path).note


def loop(job: Job, steps: int, before: Mapping[str, float] | None) -> Loop:
    """The outer loop, with its metrics before the first step if they are known."""
    definition = job.definition()
    return outer_loop(job.case(definition), definition, steps, before)


def _reference(source: Path | str) -> Reference:
    if isinstance(source, str):
        return Reference(None, source)
    found = references.load(source)
    return found[1] if found is not None else Reference(None, "none, because its file could not be read.")
