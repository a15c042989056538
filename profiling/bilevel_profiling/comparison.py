"""compare(): estimators against each other, every cell in a fresh process.

For each case: the references (one process a K), then one cell for each estimator at each K (a process for time, live bytes, FLOPs and error,
another for resident memory), then one outer loop for each estimator at one K. A row is written as soon as it is known, and an outer loop joins its
row.
"""

import dataclasses
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import bilevel as bl
from bilevel_profiling import cell, isolate
from bilevel_profiling import record as records_file
from bilevel_profiling.case import OuterOptimizer, Setup
from bilevel_profiling.case_file import Definition
from bilevel_profiling.environment import environment
from bilevel_profiling.failure import Failure
from bilevel_profiling.meters.resident import Resident
from bilevel_profiling.plan import Plan, Settled, settle
from bilevel_profiling.progress import Progress, Silent, Task, row_text
from bilevel_profiling.record import Iteration, Record

RECORDS = "records.jsonl"


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
    progress: Progress | None = None,
    command: str = "",
) -> list[Record]:
    """Measure estimators on one problem and write a report.

    Args:
        setup: a function `setup(device)` that other processes can import; or the name of a built-in case, or the path of a case file, whose
            choices the other arguments override.
        estimators: by label; by default those of the case.
        optimizer: how the inner variable moves.
        inner_steps: the K to compare at.
        out: folder of the report; made if missing. Its records.jsonl is replaced.
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
        progress: told about each step of the work; silent by default.
        command: kept in the records' environments.

    Returns:
        The records, one for each estimator and K; failures are among them.

    Raises:
        CaseError: the case is not usable.
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
    plan = Plan(setup if callable(setup) else str(setup), known, device=device, seed=seed, repeats=repeats, time_limit=time_limit, threads=threads)
    comparison = Comparison([plan], out, progress=progress, command=command)
    comparison.run()
    return comparison.records


class Comparison:
    """Several plans with one report. `records` grows while `run` works, and holds what is finished whenever that is interrupted.

    Args:
        plans: the cases.
        out: folder of the report.
        progress: see `compare`.
        command: see `compare`.

    Raises:
        CaseError, TypeError, RuntimeError, OSError: see `compare`; before any work is begun.
    """

    def __init__(self, plans: Sequence[Plan], out: str | Path, *, progress: Progress | None = None, command: str = "") -> None:
        isolate.refuse_recursion()
        self.out = Path(out)
        self.records: list[Record] = []
        self._progress = progress or Silent()
        self._command = command
        self._settled = settle(plans)
        self.out.mkdir(parents=True, exist_ok=True)
        records_file.write([], self.out / RECORDS)
        self._date = environment()["date"]

    def run(self) -> Path:
        """Do the work and write the report; also of what is finished when interrupted.

        Returns:
            The path of index.html.
        """
        from bilevel_profiling import report

        isolate.warm_up(_preload(self._settled))
        try:
            self._progress.start([task for each in self._settled for task, _ in self._tasks(each)])
            for each in self._settled:
                for task, work in self._tasks(each):
                    self._progress.begin(task)
                    self._progress.finish(task, work())
        finally:
            self._progress.stop()
            page = report.write(self.records, self.out, self._command)
        return page

    def _tasks(self, settled: Settled) -> Iterator[tuple[Task, Callable[[], str]]]:
        """What there is to do, in order, as functions that do it and say how it went."""
        plan, definition, labels = settled.plan, settled.case, settled.labels
        steps = sorted(set(definition.inner_steps))
        # Where the references are, by kind, K, and whether they are means over tasks; or why there is none.
        notes: dict[Any, Path | str] = {("solution", None, kind): "the case declares no solver for it." for kind in (False, True)}
        by_task = {label: isinstance(definition.estimators[label], bl.TaskMean) for label in labels}
        for kind in sorted(set(by_task.values())):
            label = next(label for label in labels if by_task[label] == kind)
            wanted: list[tuple[str, int | None]] = [("program", k) for k in steps]
            if definition.solution is not None:
                wanted.append(("solution", None))
            for name, k in wanted:
                job = self._job(plan, label, steps[-1] if k is None else k)
                text = f"float64 reference, {'converged solution' if k is None else f'K = {k}'}"
                yield Task(definition.name, text, 5 + job.inner_steps / 4), self._referencing(plan, definition, job, name, notes, (name, k, kind))
        for k in steps:
            for label in labels:
                sources = [notes.get(key, "none.") for key in (("program", k, by_task[label]), ("solution", None, by_task[label]))]
                work = self._measuring(plan, definition, self._job(plan, label, k), sources)
                yield Task(definition.name, f"{label}, K = {k}", 15 + k), work
        k = steps[-1]
        for label in labels if definition.outer_steps else ():
            work = self._looping(plan, definition, self._job(plan, label, k), definition.outer_steps)
            yield Task(definition.name, f"{label}, outer loop of {definition.outer_steps}", (15 + k) * (0.5 + definition.outer_steps / 12)), work

    def _job(self, plan: Plan, label: str, steps: int) -> cell.Job:
        return cell.Job(plan.source, plan.overrides, label, steps, plan.device, plan.seed, plan.repeats, self._command, plan.threads)

    def _referencing(self, plan: Plan, definition: Definition, job: cell.Job, kind: str, notes: dict[Any, Path | str], key: Any) -> Callable[[], str]:
        stem = f"{definition.name}-{kind}{f'-{job.inner_steps}' if kind == 'program' else ''}{'-tasks' if key[2] else ''}-{job.device}-{job.seed}"
        path = self.out / "references" / f"{_filename(stem)}.pt"

        def work() -> str:
            outcome = isolate.run(cell.reference, job, kind, path, time_limit=plan.time_limit)
            if outcome.failure is None:
                notes[key] = path
                return str(outcome.value)
            notes[key] = f"none, because making it ended with {outcome.failure.status}: {outcome.failure.reason}"
            self._keep_log(outcome.log, stem)
            return outcome.failure.status

        return work

    def _measuring(self, plan: Plan, definition: Definition, job: cell.Job, sources: list[Path | str]) -> Callable[[], str]:
        def work() -> str:
            outcome = isolate.run(cell.cost, job, *sources, time_limit=plan.time_limit)
            if outcome.failure is not None:
                record = self._blank(definition, job, outcome.failure)
                self._keep_log(outcome.log, f"{definition.name}-{job.label}-{job.inner_steps}")
            else:
                record = outcome.value
                if record.wall_seconds is not None:
                    record = dataclasses.replace(record, resident_bytes=self._resident(plan, definition, job))
            record = dataclasses.replace(record, environment={**record.environment, "date": self._date})
            self.records.append(record)
            records_file.append(record, self.out / RECORDS)
            return row_text(record)

        return work

    def _resident(self, plan: Plan, definition: Definition, job: cell.Job) -> int | None:
        meters: list[Resident] = []

        def around(pid: int) -> Resident:
            meters.append(Resident(pid))
            return meters[-1]

        try:
            outcome = isolate.run(cell.resident, job, time_limit=plan.time_limit, around=around)
        except ImportError:  # memory-profiler is optional
            return None
        if outcome.failure is not None:
            said = f"{outcome.failure.status}: {outcome.failure.reason}"
            self._keep_log(f"{said}\n{outcome.log}", f"{definition.name}-{job.label}-{job.inner_steps}-resident")
            return None
        return meters[-1].figures()["resident_bytes"]

    def _looping(self, plan: Plan, definition: Definition, job: cell.Job, steps: int) -> Callable[[], str]:
        def work() -> str:
            place = next((n for n, r in enumerate(self.records) if _is_row(r, definition, job)), None)
            if place is None or self.records[place].status in ("ERROR", "CRASHED", "TIMEOUT", "OUT_OF_MEMORY"):
                return "left out: its single hypergradient failed"
            before = next((r.metrics_before for r in self.records if r.case == definition.name and r.metrics_before), None)
            outcome = isolate.run(cell.loop, job, steps, before, time_limit=plan.time_limit)
            if outcome.failure is not None:
                found: dict[str, Any] = {"iterations": (Iteration(index=0, status=outcome.failure.status),)}
                self._keep_log(outcome.log, f"{definition.name}-{job.label}-loop")
                said = f"{outcome.failure.status}: {outcome.failure.reason}"
            else:
                loop = outcome.value
                found = {"iterations": loop.iterations, "metrics_before": loop.metrics_before, "metrics": loop.metrics}
                said = _loop_text(loop.iterations, loop.metrics)
            self.records[place] = dataclasses.replace(self.records[place], **found)
            self._rewrite()
            return said

        return work

    def _blank(self, definition: Definition, job: cell.Job, failure: Failure) -> Record:
        return Record(
            case=definition.name,
            estimator=job.label,
            settings=repr(definition.estimators[job.label]),
            inner_steps=job.inner_steps,
            device=job.device,
            dtype=next((r.dtype for r in self.records if r.case == definition.name), "float32"),
            seed=job.seed,
            status=failure.status,
            reason=failure.reason,
            environment=next((r.environment for r in self.records if r.device == job.device), environment(self._command)),
        )

    def _rewrite(self) -> None:
        draft = self.out / f"{RECORDS}.tmp"
        records_file.write(self.records, draft)
        draft.replace(self.out / RECORDS)

    def _keep_log(self, log: str, stem: str) -> None:
        if log.strip():
            folder = self.out / "logs"
            folder.mkdir(exist_ok=True)
            (folder / f"{_filename(stem)}.txt").write_text(log, encoding="utf-8")


def _preload(settled: Sequence[Settled]) -> list[str]:
    """What the cases want loaded, as far as it is there: a module that cannot be found is for `setup` to complain about."""
    wanted = dict.fromkeys(name for each in settled for name in each.case.preload)
    return [name for name in wanted if importlib.util.find_spec(name.partition(".")[0]) is not None]


def _is_row(record: Record, definition: Definition, job: cell.Job) -> bool:
    return (record.case, record.estimator, record.inner_steps) == (definition.name, job.label, job.inner_steps)


def _loop_text(iterations: Sequence[Iteration], metrics: Mapping[str, float]) -> str:
    losses = [iteration.outer_loss for iteration in iterations if iteration.outer_loss is not None]
    parts = [f"outer loss {losses[0]:.4g} to {losses[-1]:.4g}"] if losses else []
    parts += [f"{name} {value:.4g}" for name, value in list(metrics.items())[:2]]
    last = iterations[-1].status if iterations else "OK"
    return ", ".join([*parts, *([last] if last != "OK" else [])])


def _filename(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text)
