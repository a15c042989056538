"""measure(): one record of one case, or of any callable.

Passes, each over the same call: twice to warm up, for the status, the oracle calls and the error, and so that an engine
has traced, compiled and checked what it runs; the clock, repeated; the CUDA allocator; live tensor bytes; FLOPs. The
last two slow the call down and are therefore not timed. In a group of processes, of which every rank must make the same
measurement at the same time, also what goes between them. Under an engine that hides its operators from them, the
allocator's own record takes their place (see `engines`). Resident memory needs a process of its own and is left to
`compare`.
"""

import contextlib
import dataclasses
import gc
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import bilevel as bl
from bilevel.space import tree
from bilevel_profiling.baselines.baseline import UNCOUNTED, WITHOUT_INNER, baseline_of
from bilevel_profiling.baselines.counting import uncounted
from bilevel_profiling.cases.case import Case, name_of
from bilevel_profiling.cases.target import target_of
from bilevel_profiling.measurement import engines, references
from bilevel_profiling.measurement.environment import environment
from bilevel_profiling.measurement.surroundings import frozen_heap, own_random_state, without_warnings
from bilevel_profiling.measurement.trial import Trial
from bilevel_profiling.meters.allocator import Allocator
from bilevel_profiling.meters.base import Meter, observe
from bilevel_profiling.meters.clock import Clock
from bilevel_profiling.meters.collectives import Collectives
from bilevel_profiling.meters.cuda import Cuda
from bilevel_profiling.meters.oracles import Oracles
from bilevel_profiling.meters.tensors import Tensors
from bilevel_profiling.meters.trace import trace as traced
from bilevel_profiling.meters.work import Work
from bilevel_profiling.records.failure import of_error, out_of_memory
from bilevel_profiling.records.note import Note, NoteKind
from bilevel_profiling.records.record import Phase, Record

COMPILED = (
    "torch.compile was at work in this process: functions that it compiled ran uncompiled while bytes and FLOPs "
    "were counted."
)
NO_LOOP = "It returned no inner variable, so there is no outer loop of it: return a bl.Hypergradient for one."
_LONG = 1.5
"""Seconds after which the clock has seen enough: slow calls are repeated twice at least, not `repeats` times."""


def measure(
    what: Case | Callable[[], object],
    *,
    name: str = "",
    repeats: int = 5,
    errors: bool | references.References = True,
    trace: str | Path | None = None,
    snapshot: str | Path | None = None,
    command: str = "",
) -> Record:
    """Run something and say what it cost.

    A case is measured as one outer step: the hypergradient, and the outer optimizer's step, so that all three phases
    are seen. The outer variable is put back after each pass, and the global random state at the end.

    Args:
        what: a `Case`, or any function without arguments, which need not have to do with bilevel problems.
        name: of a function in the record.
        repeats: how often the clock runs; a slow call (1.5 s in all) fewer times, but at least twice.
        errors: whether to compute the float64 references of a case and the errors against them; or references that are
            there already.
        trace: a file for a torch.profiler trace of one more call, which https://ui.perfetto.dev opens, with the
            library's spans in it.
        snapshot: on CUDA, a file for what https://pytorch.org/memory_viz opens.
        command: kept in the record's environment.

    Returns:
        The record. A hypergradient that failed, and memory that ran out, are records with that status.

    Raises:
        ValueError: `snapshot` without a CUDA device.
        Exception: whatever `setup`, a loss or the function raises, running out of memory apart.

    Example:
        >>> import torch
        >>> record = measure(lambda: torch.ones(1024) @ torch.ones(1024), name="dot", repeats=2)
        >>> record.estimator, record.peak_tensor_bytes, record.kept_tensor_bytes, record.repeats
        ('dot', 8196, 0, 2)
    """
    if not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"measure() was given repeats={repeats!r}; a positive integer was needed")
    if not isinstance(what, Case) and not callable(what):
        raise TypeError(
            f"measure() was given a {type(what).__name__}; a Case or a function without arguments was needed"
        )
    with own_random_state(), frozen_heap(), without_warnings():
        passes = _Passes(repeats, trace, snapshot)
        return (
            _measured_case(what, passes, errors, command)
            if isinstance(what, Case)
            else _measured_call(what, name, passes, command)
        )


@dataclasses.dataclass(frozen=True)
class _Passes:
    """What is asked of the passes."""

    repeats: int
    trace: str | Path | None
    snapshot: str | Path | None


def _measured_call(call: Callable[[], object], name: str, passes: _Passes, command: str) -> Record:
    record = Record(case="functions", estimator=name or name_of(call), environment=environment(command))
    figures = Figures()
    try:
        oracles = Oracles()
        with figures.of(oracles):
            observe(oracles, call)
        device = "cuda" if torch.cuda.is_available() and torch.cuda.is_initialized() else "cpu"
        record = dataclasses.replace(record, device=device, environment=environment(command, device))
        figures.take(call, device, passes)
    except Exception as error:
        return figures.failed(record, error)
    return figures.record(record)


def _measured_case(case: Case, passes: _Passes, errors: bool | references.References, command: str) -> Record:
    record = described(case, command)
    figures = Figures()
    figures.fields["notes"] = record.notes
    try:
        trial = Trial(case)
        record = dataclasses.replace(record, dtype=str(trial.posed.dtype).removeprefix("torch."))
        grad, facts = _first(trial, figures)
        record = dataclasses.replace(record, **facts, base_tensor_bytes=sum(trial.base_sizes()))
        with uncounted():
            figures.take(trial, case.device, passes)
        del trial
        if errors is not False and grad is not None:
            known = references.of_case(dataclasses.replace(case, ranks=None)) if errors is True else errors
            known = known.of_compiled() if _compiled() else known
            program, solution = references.errors(grad, known.program), references.errors(grad, known.solution)
            record = dataclasses.replace(
                record,
                program_relative_error=program[0],
                program_cosine=program[1],
                solution_relative_error=solution[0],
                solution_cosine=solution[1],
                reference_note=known.note,
            )
    except Exception as error:
        return figures.failed(record, error)
    return figures.record(record)


def described(case: Case, command: str = "") -> Record:
    """A record of a case with nothing measured."""
    baseline = baseline_of(case.estimator)
    return Record(
        case=case.name,
        estimator=case.label,
        memory_growth=case.estimator.memory_growth,
        settings=repr(case.estimator),
        target=target_of(case.estimator),
        notes=() if baseline is None else tuple(map(Note, baseline.said)),
        solver=repr(case.solver),
        engine=case.engine_name,
        engine_settings="" if case.engine is None else repr(case.engine),
        processes=None if case.ranks is None else case.ranks.size,
        split="" if case.ranks is None or case.parallel is None else case.parallel.name,
        inner_steps=case.solver.max_steps,
        device=case.device,
        seed=case.seed,
        environment=environment(command, case.device),
    )


def _first(trial: Trial, figures: "Figures") -> tuple[list[torch.Tensor] | None, dict[str, Any]]:
    """The warm-up: its gradient (None after a failure), and what it says about the case."""
    oracles, started = Oracles(), time.perf_counter()
    try:
        with figures.of(oracles), oracles:
            hg = trial.hypergradient()
    except Exception:
        if baseline_of(trial.case.estimator) is not None:  # whose calls are said when it has ended
            figures.without_calls()
        raise
    figures.note_baseline(hg.stats)
    facts = {
        "inner_size": tree.size(hg.inner),
        "outer_size": tree.size(hg.grad),
        "tasks": hg.stats.get("tasks"),
        "status": hg.status.name,
        "reason": "" if hg.status is bl.Status.OK else hg.status.value,
    }
    grad, stats = tree.tensors(hg.grad), [hg.stats]
    del hg
    trial.tidy()
    # The outer optimizer makes its state in its first step. A failed hypergradient is refused there; what it costs is
    # measured without that step.
    try:
        stats.append(trial().stats)
    except bl.BilevelError:
        trial.outer_step = False
    facts |= engines.facts(trial.case, stats, time.perf_counter() - started)
    figures.fields["notes"] = (*figures.fields.get("notes", ()), *engines.notes(stats[-1]))
    trial.tidy()
    return grad if all(bool(leaf.isfinite().all()) for leaf in grad) else None, facts


class Figures:
    """Fields of a record and of its phases, gathered meter by meter, kept when a later pass fails."""

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}
        self.phases: dict[str, dict[str, Any]] = {}

    @contextlib.contextmanager
    def of(self, meter: Meter) -> Iterator[None]:
        """Take over what `meter` found in the block, also if the block raises."""
        try:
            yield
        finally:
            found = meter.figures()
            notes = self.fields.get("notes", ()) + found.pop("notes", ())
            self.fields |= {**found, "notes": notes}
            for name, fields in meter.phases().items():
                self.phases.setdefault(name, {}).update(fields)

    def note_baseline(self, stats: Mapping[str, Any]) -> None:
        """Take over what the result of a baseline says of itself; figures that were not measured are taken out."""
        notes = []
        if why := stats.get(UNCOUNTED):
            notes.append(Note(f"Oracle calls were not counted, because {why}."))
            self.without_calls()
        if stats.get(WITHOUT_INNER):
            notes.append(Note(NO_LOOP, NoteKind.WITHOUT_INNER))
        self.fields["notes"] = (*self.fields.get("notes", ()), *notes)

    def _note_hidden(self, meter: Meter) -> None:
        """Say that operators were hidden, where a function turns out to have had an engine of its own."""
        if isinstance(meter, Tensors) and meter.hidden:
            self.fields["notes"] = (*self.fields.get("notes", ()), engines.HIDDEN)

    def without_calls(self) -> None:
        """Take the oracle calls out: they were not counted."""
        for fields in (self.fields, *self.phases.values()):
            fields.pop("calls", None)

    def take(self, call: Callable[[], object], device: str, passes: _Passes) -> None:
        """Run `call` under the clock and under each meter."""
        tidy = call.tidy if isinstance(call, Trial) else lambda: None
        engine = call.case.engine if isinstance(call, Trial) else None
        seen, clock = engines.sees_operators(engine), Clock(device)
        cuda = Cuda(device, workspaces=engines.may_lose_workspaces(engine), tensors=not seen, snapshot=passes.snapshot)
        gpu = torch.device(device).type == "cuda"
        meters: list[Meter] = [Tensors(), Work()] if seen else [] if gpu else [Allocator()]
        started, together = time.perf_counter(), ranks_here()
        gc.collect()
        with self.of(clock):
            # Ranks must make the same calls, so that their number cannot depend on anybody's clock.
            while len(clock.seconds) < passes.repeats and (
                together or len(clock.seconds) < 2 or time.perf_counter() - started < _LONG
            ):
                with clock:
                    result: object = call()
                del result
                tidy()
        said = _compiled() if seen else (engines.ALLOCATOR,)
        self.fields["notes"] = (*self.fields.get("notes", ()), *said)
        for meter in [cuda, *meters] if gpu else meters:
            with self.of(meter):
                with meter:
                    result = call()
                    if not seen:  # the allocator knows what is left when the block ends, and nothing later
                        result = tidy()
                        gc.collect()
                self._note_hidden(meter)
                del result
                tidy()
                gc.collect()
        if together:
            self._exchange(call, device, passes.repeats, tidy)
        if passes.trace is not None:
            traced(call, passes.trace)
            tidy()

    def _exchange(self, call: Callable[[], object], device: str, repeats: int, tidy: Callable[[], None]) -> None:
        """What goes to other ranks, and how long that takes: as often as the clock runs."""
        meter = Collectives(device)
        with self.of(meter):
            for _ in range(repeats):
                with meter:
                    result: object = call()
                del result
                tidy()

    def record(self, record: Record) -> Record:
        """`record` with the figures filled in."""
        return dataclasses.replace(record, **self.fields, phases=phases_of(self.phases))

    def failed(self, record: Record, error: Exception) -> Record:
        """A record of what was measured before memory ran out; any other error is raised again.

        Raises:
            Exception: `error`, unless it says that memory ran out.
        """
        if not out_of_memory(error):
            raise error
        failure = of_error(error)
        # What is left of a torn call is no leak.
        self.fields.pop("kept_tensor_bytes", None)
        return dataclasses.replace(self.record(record), status=failure.status, reason=failure.reason)


def ranks_here() -> bool:
    """Whether this process is in a group of torch.distributed."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _compiled() -> tuple[str, ...]:
    """What must be said when torch.compile has compiled something in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return (COMPILED,) if dynamo is not None and dynamo.counters["frames"].get("total") else ()


def phases_of(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Phase]:
    """Phases in the order in which they run."""
    order = {"inner": 0, "hypergradient": 1, "outer": 2}
    return {name: Phase(**found[name]) for name in sorted(found, key=lambda name: order.get(name, 3))}
