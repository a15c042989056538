"""compare(): estimators against each other, every cell in a fresh process.

For each case: the references (one process a K), then one cell for each estimator at each K (a process for time, live
    bytes, FLOPs and error,
another for resident memory), then one outer loop for each estimator at one K. A row is on the disk as soon as it is
known, and an outer loop joins its row. What is finished can be continued: see `resume`.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import bilevel as bl
from bilevel_profiling.cases.case import OuterOptimizer, Setup
from bilevel_profiling.cases.case_file import Definition
from bilevel_profiling.comparison import resume as resuming
from bilevel_profiling.comparison.folder import Folder
from bilevel_profiling.comparison.plan import Plan, Settled, settle
from bilevel_profiling.comparison.progress import Progress, Silent, Task, row_text
from bilevel_profiling.measurement import cell, isolate
from bilevel_profiling.measurement.environment import environment
from bilevel_profiling.meters.resident import Resident
from bilevel_profiling.records import sizes
from bilevel_profiling.records.failure import OUT_OF_MEMORY, Failure, limited, unfinished
from bilevel_profiling.records.record import Iteration, Record
from bilevel_profiling.records.records_file import RecordsFile

_LOOP_NOTE = "The outer loop ended with "
Key = tuple[str, str, int | None]
"""Case, label, K."""


def compare(
    setup: Setup | str,
    estimators: Mapping[str, bl.Estimator] | None = None,
    *,
    optimizer: bl.Optimizer | None = None,
    inner_steps: Sequence[int] | None = None,
    out: str | Path = "report",
    device: str = "cpu",
    seed: int = 0,
    repeats: int = 5,
    time_limit: float = 300.0,
    threads: int = 1,
    outer_steps: int | None = None,
    batches: Callable[..., bl.Batches] | None = None,
    evaluate: Callable[..., Mapping[str, float]] | None = None,
    outer_optimizer: OuterOptimizer | None = None,
    solution: bl.InnerSolver | None = None,
    name: str | None = None,
    memory_limit: int | str | None = None,
    resume: bool = False,
    retry_failed: bool = False,
    trace: bool = False,
    snapshot: bool = False,
    progress: Progress | None = None,
    command: str = "",
) -> list[Record]:
    """Measure estimators on one problem and write a report.

    Args:
        setup: a function `setup(device)` that other processes can import; or the name of a built-in case, or the path
            of a case file, whose choices the other arguments override.
        estimators: by label; by default those of the case.
        optimizer: how the inner variable moves.
        inner_steps: the K to compare at.
        out: folder of the report; made if missing. Rows of an earlier comparison are kept aside in it, as
            records-<date>.jsonl.
        device: "cpu" or "cuda".
        seed: set before `setup`, and before each call, in every process.
        repeats: of the clock.
        time_limit: seconds for each process.
        threads: of torch in each process; one is the most repeatable.
        outer_steps: outer steps of the loop at the largest K; 0 for none.
        batches: the data of each outer step, as in a case file, like the next four.
        evaluate: metrics before and after the outer loop.
        outer_optimizer: the torch optimizer of the outer variable.
        solution: an inner solver that converges.
        name: of the case in the records.
        memory_limit: what each run may take beyond what torch itself has taken, in bytes or as "4GiB"; more is a row
            OUT_OF_MEMORY. CPU and Linux only; the float64 references are not limited.
        resume: keep the finished rows of an earlier comparison in `out`, and measure only what is missing.
        retry_failed: like `resume`, but rows and outer loops that ended with ERROR, CRASHED, TIMEOUT or OUT_OF_MEMORY
            are measured anew.
        trace: also write a torch.profiler trace of each run, into traces/.
        snapshot: also write a snapshot of the CUDA allocator for each run, into snapshots/; of no effect on the CPU.
        progress: told about each step of the work; silent by default.
        command: kept in the records' environments.

    Returns:
        The records, one for each estimator and K; failures are among them, and with `resume` the rows that were there.

    Raises:
        CaseError: the case is not usable.
        ResumeError: what is in `out` cannot be continued: it was measured otherwise, or is damaged.
        TypeError: the function or an object cannot be sent to another process.
        OSError: the folder cannot be written.
        RuntimeError: a script calls this outside of `if __name__ == "__main__":`.
        KeyboardInterrupt: after the report of what was finished has been written.

    Example:
        >>> import bilevel as bl
        >>> from bilevel.problems import quadratic
        >>> records = compare(quadratic.setup, {"unrolled": bl.Unrolled()}, optimizer=bl.SGD(lr=1.0), inner_steps=[5], repeats=2,
        ...     out=getfixture("tmp_path"))
        >>> [(r.estimator, r.inner_steps, r.status, r.program_relative_error < 1e-12) for r in records]
        [('unrolled', 5, 'OK', True)]
    """
    overrides = {
        "estimators": estimators,
        "optimizer": optimizer,
        "inner_steps": None if inner_steps is None else tuple(inner_steps),
        "outer_steps": outer_steps,
        "batches": batches,
        "evaluate": evaluate,
        "outer_optimizer": outer_optimizer,
        "solution": solution,
        "name": name,
    }
    known = {key: value for key, value in overrides.items() if value is not None}
    plan = Plan(
        setup if callable(setup) else str(setup),
        known,
        device=device,
        seed=seed,
        repeats=repeats,
        time_limit=time_limit,
        threads=threads,
        memory_limit=None if memory_limit is None else sizes.parse(memory_limit),
    )
    comparison = Comparison(
        [plan],
        out,
        resume=resume,
        retry_failed=retry_failed,
        trace=trace,
        snapshot=snapshot,
        progress=progress,
        command=command,
    )
    comparison.run()
    return comparison.records


class Comparison:
    """Several plans with one report. `records` grows while `run` works, and holds what is finished whenever that is
    interrupted.

    Args:
        plans: the cases.
        out: folder of the report.
        resume: see `compare`.
        retry_failed: see `compare`.
        trace: see `compare`.
        snapshot: see `compare`.
        progress: see `compare`.
        command: see `compare`.

    Raises:
        CaseError, ResumeError, TypeError, RuntimeError, OSError: see `compare`; before any work is begun.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        out: str | Path,
        *,
        resume: bool = False,
        retry_failed: bool = False,
        trace: bool = False,
        snapshot: bool = False,
        progress: Progress | None = None,
        command: str = "",
    ) -> None:
        isolate.refuse_recursion()
        self._progress = progress or Silent()
        self._command = command
        self._trace, self._snapshot = trace, snapshot
        self._settled = settle(plans)
        self._folder = Folder(out)
        self.out = self._folder.path
        try:
            rows, said = (
                resuming.resume(self._folder, self._settled)
                if resume or retry_failed
                else resuming.begin(self._folder, self._settled)
            )
            self._file = RecordsFile(self._folder.records, rows)
        except BaseException:
            self._folder.release()
            raise
        for sentence in said:
            self._progress.say(sentence)
        again = self.records if retry_failed else []
        self._again = {_key(record) for record in again if unfinished(record)}
        self._loop_again = {_key(record) for record in again if resuming.loop_failed(record)}
        self._date = environment()["date"]

    @property
    def records(self) -> list[Record]:
        """What is finished."""
        return self._file.records

    def run(self) -> Path:
        """Do the work and write the report; also of what is finished when interrupted.

        Returns:
            The path of index.html.
        """
        from bilevel_profiling import report

        work = [each for settled in self._settled for each in self._tasks(settled)]
        if work:
            isolate.warm_up(_preload(self._settled))
        try:
            self._progress.start([task for task, _ in work])
            for task, do in work:
                self._progress.begin(task)
                self._progress.finish(task, do())
        finally:
            self._progress.stop()
            page = report.write(self.records, self.out, self._command)
            self._folder.release()
        return page

    def _tasks(self, settled: Settled) -> Iterator[tuple[Task, Callable[[], str]]]:
        """What there is left to do, in order, as functions that do it and say how it went."""
        plan, definition, labels = settled.plan, settled.case, settled.labels
        steps = sorted(set(definition.inner_steps))
        by_task = {label: isinstance(definition.estimators[label], bl.TaskMean) for label in labels}
        missing = [(k, label) for k in steps for label in labels if self._wanted((definition.name, label, k))]
        # Where the references are, by kind, K, and whether they are means over tasks; or why there is none.
        notes: dict[Any, Path | str] = {
            ("solution", None, kind): "the case declares no solver for it." for kind in (False, True)
        }
        for kind in sorted({by_task[label] for _, label in missing}):
            label = next(label for _, label in missing if by_task[label] == kind)
            wanted: list[tuple[str, int | None]] = [
                ("program", k) for k in sorted({k for k, label in missing if by_task[label] == kind})
            ]
            if definition.solution is not None:
                wanted.append(("solution", None))
            for name, k in wanted:
                job = self._job(plan, label, steps[-1] if k is None else k)
                text = f"float64 reference, {'converged solution' if k is None else f'K = {k}'}"
                yield (
                    Task(definition.name, text, 5 + job.inner_steps / 4),
                    self._referencing(plan, definition, job, name, notes, (name, k, kind)),
                )
        for k, label in missing:
            keys = ("program", k, by_task[label]), ("solution", None, by_task[label])
            yield (
                Task(definition.name, f"{label}, K = {k}", 15 + k),
                self._measuring(plan, definition, self._job(plan, label, k), keys, notes),
            )
        k = steps[-1]
        for label in labels if definition.outer_steps else ():
            if self._loop_wanted((definition.name, label, k)):
                work = self._looping(plan, definition, self._job(plan, label, k), definition.outer_steps)
                yield (
                    Task(
                        definition.name,
                        f"{label}, outer loop of {definition.outer_steps}",
                        (15 + k) * (0.5 + definition.outer_steps / 12),
                    ),
                    work,
                )

    def _wanted(self, key: Key) -> bool:
        return key in self._again or self._place(key) is None

    def _loop_wanted(self, key: Key) -> bool:
        place = self._place(key)
        if place is None or key in self._again or key in self._loop_again:
            return True
        return not self.records[place].iterations and not unfinished(self.records[place])

    def _place(self, key: Key) -> int | None:
        return next(
            (place for place, record in enumerate(self.records) if _key(record) == key and record.source == "measured"),
            None,
        )

    def _job(self, plan: Plan, label: str, steps: int) -> cell.Job:
        return cell.Job(
            plan.source, plan.overrides, label, steps, plan.device, plan.seed, plan.repeats, self._command, plan.threads
        )

    def _referencing(
        self, plan: Plan, definition: Definition, job: cell.Job, kind: str, notes: dict[Any, Path | str], key: Any
    ) -> Callable[[], str]:
        stem = f"{definition.name}-{kind}{f'-{job.inner_steps}' if kind == 'program' else ''}{'-tasks' if key[2] else ''}-{job.device}-{job.seed}"
        path = self._folder.reference(stem)

        def work() -> str:
            outcome = isolate.run(cell.reference, job, kind, path, time_limit=plan.time_limit)
            if outcome.failure is None:
                notes[key] = path
                return str(outcome.value)
            notes[key] = f"none, because making it ended with {outcome.failure.status}: {outcome.failure.reason}"
            self._folder.keep_log(outcome.log, stem)
            return outcome.failure.status

        return work

    def _measuring(
        self, plan: Plan, definition: Definition, job: cell.Job, keys: Sequence[Any], notes: Mapping[Any, Path | str]
    ) -> Callable[[], str]:
        def work() -> str:
            sources = [notes.get(key, "none.") for key in keys]
            stem = f"{definition.name}-{job.label}-{job.inner_steps}"
            asked = dataclasses.replace(
                job,
                trace=self._folder.trace(stem) if self._trace else None,
                snapshot=self._folder.snapshot(stem) if self._snapshot and job.device == "cuda" else None,
            )
            outcome = isolate.run(
                cell.cost, asked, *sources, time_limit=plan.time_limit, memory_limit=plan.memory_limit
            )
            if outcome.failure is not None:
                record = self._blank(definition, job, outcome.failure)
                self._folder.keep_log(outcome.log, stem)
            else:
                record = outcome.value
                if record.status == OUT_OF_MEMORY and plan.memory_limit is not None:
                    record = dataclasses.replace(record, reason=limited(record.reason, plan.memory_limit))
                if record.wall_seconds is not None:
                    record = dataclasses.replace(record, resident_bytes=self._resident(plan, definition, job))
            record = dataclasses.replace(record, environment={**record.environment, "date": self._date})
            place = self._place(_key(record))
            if place is None:
                self._file.append(record)
            else:
                self._file.replace(place, record)
            return row_text(record)

        return work

    def _resident(self, plan: Plan, definition: Definition, job: cell.Job) -> int | None:
        meters: list[Resident] = []

        def around(pid: int) -> Resident:
            meters.append(Resident(pid))
            return meters[-1]

        try:
            outcome = isolate.run(
                cell.resident, job, time_limit=plan.time_limit, around=around, memory_limit=plan.memory_limit
            )
        except ImportError:  # memory-profiler is optional
            return None
        if outcome.failure is not None:
            said = f"{outcome.failure.status}: {outcome.failure.reason}"
            self._folder.keep_log(f"{said}\n{outcome.log}", f"{definition.name}-{job.label}-{job.inner_steps}-resident")
            return None
        return meters[-1].figures()["resident_bytes"]

    def _looping(self, plan: Plan, definition: Definition, job: cell.Job, steps: int) -> Callable[[], str]:
        def work() -> str:
            place = self._place((definition.name, job.label, job.inner_steps))
            if place is None or unfinished(self.records[place]):
                return "left out: its single hypergradient failed"
            row = self.records[place]
            before = next(
                (r.metrics_before for r in self.records if r.case == definition.name and r.metrics_before), None
            )
            outcome = isolate.run(
                cell.loop, job, steps, before, time_limit=plan.time_limit, memory_limit=plan.memory_limit
            )
            notes = tuple(note for note in row.notes if not note.startswith(_LOOP_NOTE))
            if outcome.failure is not None:
                said = f"{outcome.failure.status}: {outcome.failure.reason}"
                found: dict[str, Any] = {
                    "iterations": (Iteration(index=0, status=outcome.failure.status),),
                    "notes": (*notes, _LOOP_NOTE + said),
                }
                self._folder.keep_log(outcome.log, f"{definition.name}-{job.label}-loop")
            else:
                loop = outcome.value
                found = {
                    "iterations": loop.iterations,
                    "metrics_before": loop.metrics_before,
                    "metrics": loop.metrics,
                    "notes": notes,
                }
                said = _loop_text(loop.iterations, loop.metrics)
            self._file.replace(place, dataclasses.replace(row, **found))
            return said

        return work

    def _blank(self, definition: Definition, job: cell.Job, failure: Failure) -> Record:
        estimator = definition.estimators[job.label]
        return Record(
            case=definition.name,
            estimator=job.label,
            settings=repr(estimator),
            memory_growth=estimator.memory_growth,
            inner_steps=job.inner_steps,
            device=job.device,
            dtype=next((r.dtype for r in self.records if r.case == definition.name), "float32"),
            seed=job.seed,
            status=failure.status,
            reason=failure.reason,
            environment=next(
                (r.environment for r in self.records if r.device == job.device), environment(self._command)
            ),
        )


def _preload(settled: Sequence[Settled]) -> list[str]:
    """What the cases want loaded, as far as it is there: a module that cannot be found is for `setup` to complain
    about.
    """
    wanted = dict.fromkeys(name for each in settled for name in each.case.preload)
    return [name for name in wanted if importlib.util.find_spec(name.partition(".")[0]) is not None]


def _key(record: Record) -> Key:
    return record.case, record.estimator, record.inner_steps


def _loop_text(iterations: Sequence[Iteration], metrics: Mapping[str, float]) -> str:
    losses = [iteration.outer_loss for iteration in iterations if iteration.outer_loss is not None]
    parts = [f"outer loss {losses[0]:.4g} to {losses[-1]:.4g}"] if losses else []
    parts += [f"{name} {value:.4g}" for name, value in list(metrics.items())[:2]]
    last = iterations[-1].status if iterations else "OK"
    return ", ".join([*parts, *([last] if last != "OK" else [])])
