"""compare(): estimators against each other, every cell in a fresh process, here or on the workers of an executor.

For each case: the references (one process a solver), then one cell for each estimator with each engine under each
solver (a process for time, live bytes, FLOPs and error, another for resident memory), then one outer loop for each of
them under the last solver. A row is on the disk as soon as it is known, and an outer loop joins its row. What is
finished can be continued: see `resume`. What is done is in `tasks`.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, TypedDict, Unpack

import bilevel as bl
from bilevel_profiling.baselines import packages
from bilevel_profiling.baselines.baseline import Baseline, Function
from bilevel_profiling.cases.case import OuterOptimizer, Setup
from bilevel_profiling.cases.parallel import Parallel
from bilevel_profiling.comparison import resume as resuming
from bilevel_profiling.comparison.dispatch import Dispatch, check
from bilevel_profiling.comparison.folder import Folder
from bilevel_profiling.comparison.plan import Plan, Settings, Settled, settle
from bilevel_profiling.comparison.progress import Progress
from bilevel_profiling.comparison.tasks import Key, OuterLoop, Piece, Reference, Row, Site, key_of
from bilevel_profiling.measurement import isolate
from bilevel_profiling.measurement.environment import environment
from bilevel_profiling.measurement.errand import Answer, Errand, available
from bilevel_profiling.records import sizes
from bilevel_profiling.records.failure import never_begun, unfinished
from bilevel_profiling.records.record import Record, Target
from bilevel_profiling.records.records_file import RecordsFile


class Choices(TypedDict, total=False):
    """What `compare` takes by name."""

    optimizer: bl.Optimizer | None
    inner_steps: Sequence[int] | None
    solver: bl.InnerSolver | None
    solvers: Mapping[str, bl.InnerSolver] | None
    outer_steps: int | None
    batches: Callable[..., bl.Batches] | None
    evaluate: Callable[..., Mapping[str, float]] | None
    outer_optimizer: OuterOptimizer | None
    solution: bl.InnerSolver | None
    name: str | None
    baselines: Sequence[str] | Mapping[str, Function | Baseline] | None
    engines: Sequence[str] | Mapping[str, bl.Engine] | None
    parallel: Parallel | None
    seeds: Sequence[int] | None
    device: str
    seed: int
    repeats: int
    time_limit: float
    threads: int
    memory_limit: int | str | None
    resume: bool
    retry_failed: bool
    trace: bool
    snapshot: bool
    processes: int | Sequence[int] | None
    wait_limit: float
    command: str


def compare(
    setup: Setup | str | Sequence[Setup | str],
    estimators: Mapping[str, bl.Estimator] | None = None,
    *,
    out: str | Path = "report",
    progress: Progress | None = None,
    executor: Executor | None = None,
    **choices: Unpack[Choices],
) -> list[Record]:
    """Measure estimators on one problem, or several, and write a report.

    Args:
        setup: a function `setup(device)` that other processes can import; or the name of a built-in case, or the path
            of a case file, whose choices the other arguments override; or a list of these.
        estimators: by label; by default those of the case.
        out: folder of the report; made if missing. Rows of an earlier comparison are kept aside in it, as
            records-<date>.jsonl.
        progress: told about each step of the work; silent by default.
        executor: any `concurrent.futures.Executor`, such as a `ProcessPoolExecutor`, Dask's `client.get_executor()`, or
            loky's or mpi4py's, whose workers do the measuring, several at a time and on any machine; None for this
            process, one at a time. It stays yours to shut down. On each worker every run is in a fresh process of its
            own, so that memory is as it would be alone, also with a `ThreadPoolExecutor`; times are not where workers
            share a machine, which their rows say. Rows tell host and worker in their environment.
        choices: how the inner variable moves: `optimizer` with the `inner_steps` to compare at, or any inner `solver`,
            or several, `solvers` by label; `outer_steps` of the loop under the last solver (0 for none); `batches`,
            `evaluate`, `outer_optimizer` and `solution` as in a case file; the `name` of the case in the records;
            `baselines` beside the case's own, the names of libraries such as ["betty"], or a dict of label to a
            function that returns a hypergradient (or a `Baseline`); the `engines` to measure every estimator with, by
            label, such as {"eager": bl.Eager(), "compiled": bl.Compiled()}, or names, such as ["eager", "compiled"];
            `seeds`, such as range(5), with each of which all is measured, as a case of its own ("quadratic, seed 3");
            `parallel`, how the work is split over `processes`; and the fields of `Settings`, where `memory_limit` may
            also be text such as "4GiB", and `processes` one number.

    Returns:
        The records, one for each estimator, engine and solver; failures are among them, and with `resume` the rows that
        were there.

    Raises:
        CaseError: the case is not usable.
        ResumeError: what is in `out` cannot be continued: it was measured otherwise, or is damaged.
        ValueError, ImportError: a library of baselines is not known, or not installed.
        TypeError: the function or an object cannot be sent to another process; or an argument is not known, or no
            executor.
        OSError: the folder cannot be written.
        RuntimeError: a script calls this outside of `if __name__ == "__main__":`.
        KeyboardInterrupt: after the report of what was finished has been written.

    Example:
        >>> import bilevel as bl
        >>> from bilevel.problems import quadratic
        >>> records = compare(quadratic.setup, {"unrolled": bl.Unrolled()}, optimizer=bl.SGD(lr=1.0), inner_steps=[5],
        ...     repeats=2, out=getfixture("tmp_path"))
        >>> [(r.estimator, r.inner_steps, r.status, r.program_relative_error < 1e-12) for r in records]
        [('unrolled', 5, 'OK', True)]

        On workers, here two threads (each measures in processes of its own):

        >>> from concurrent.futures import ThreadPoolExecutor
        >>> with ThreadPoolExecutor(2) as workers:
        ...     records = compare(quadratic.setup, {"unrolled": bl.Unrolled()}, optimizer=bl.SGD(lr=1.0), repeats=2,
        ...         inner_steps=[5], out=getfixture("tmp_path"), executor=workers)
        >>> records[0].status, "worker" in records[0].environment
        ('OK', True)
    """
    if unknown := [name for name in choices if name not in Choices.__annotations__]:
        close = difflib.get_close_matches(unknown[0], Choices.__annotations__, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise TypeError(f"compare() was given {unknown[0]}, which it does not take{hint}")
    asked: dict[str, Any] = {name: value for name, value in choices.items() if value is not None}
    fields = {field.name for field in dataclasses.fields(Settings)}
    how = {name: asked.pop(name) for name in fields & set(asked)}
    if "memory_limit" in how:
        how["memory_limit"] = sizes.parse(how["memory_limit"])
    if "inner_steps" in asked:
        asked["inner_steps"] = tuple(asked["inner_steps"])
    if "solver" in asked:
        asked["solvers"] = {**asked.get("solvers", {}), "": asked.pop("solver")}
    if estimators is not None:
        asked["estimators"] = estimators
    if "baselines" in asked and not isinstance(asked["baselines"], Mapping):
        asked["baselines"] = packages.named(_names("baselines", asked["baselines"]))
    if "engines" in asked and not isinstance(asked["engines"], Mapping):
        asked["engines"] = _names("engines", asked["engines"])
    if isinstance(how.get("processes"), int):
        how["processes"] = (how["processes"],)
    seeds = asked.pop("seeds", [None])
    if not isinstance(seeds, Sequence) or isinstance(seeds, str) or not seeds or ("seed" in how and seeds != [None]):
        raise TypeError(
            f"compare() was given {seeds!r} as seeds; a list of integers was needed, and no seed= beside it"
        )
    setups = setup if isinstance(setup, (list, tuple)) else [setup]
    plans = [Plan(each if callable(each) else str(each), asked, seed=seed) for each in setups for seed in seeds]
    comparison = Comparison(plans, out, Settings(**how), progress, executor)
    comparison.run()
    return comparison.records


def _names(what: str, given: Any) -> list[str]:
    """Names of libraries or engines.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(given, str) and isinstance(given, Iterable) and not callable(given):
        return list(given)
    needed, mine = (
        ("names of libraries or a dict of label to function", getattr(given, "__name__", "function"))
        if what == "baselines"
        else ("names or a dict of label to engine", repr(given))
    )
    write = f"[{given!r}]" if isinstance(given, str) else f'{{"mine": {mine}}}'
    raise TypeError(f"compare() was given {given!r} as {what}; {needed} were needed: write {what}={write}")


class Comparison:
    """Several plans with one report. `records` grows while `run` works, and holds what is finished whenever that is
    interrupted.

    Args:
        plans: what is compared.
        out: folder of the report.
        settings: how.
        progress: told about each step of the work; silent by default.
        executor: what does it; None for this process.

    Raises:
        CaseError, ResumeError, TypeError, RuntimeError, OSError: see `compare`; before any work is begun.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        out: str | Path,
        settings: Settings | None = None,
        progress: Progress | None = None,
        executor: Executor | None = None,
    ) -> None:
        isolate.refuse_recursion()
        far = executor is not None
        if far:
            check(executor)
        settings = settings or Settings()
        self._progress, self._executor = progress or Progress(), executor
        self._settled = settle(plans, settings, far=far)
        folder = Folder(out)
        self.out = folder.path
        try:
            begin = resuming.resume if settings.resume or settings.retry_failed else resuming.begin
            rows, said = begin(folder, self._settled, settings, far)
            file = RecordsFile(folder.records, rows)
        except BaseException:
            folder.release()
            raise
        for sentence in said:
            self._progress.say(sentence)
        keys = [Row(each, cell).key for each in self._settled for cell in each.cells]
        order = {key: place for place, key in enumerate(keys)}
        self._site = Site(settings, folder, file, environment()["date"], order)
        again = self.records if settings.retry_failed else []
        self._again = {key_of(record) for record in again if unfinished(record)}
        self._again |= {key_of(record) for record in self.records if never_begun(record)}
        self._loop_again = {key_of(record) for record in again if any(map(unfinished, record.iterations))}

    @property
    def records(self) -> list[Record]:
        """What is finished."""
        return self._site.rows.records

    def run(self) -> Path:
        """Do the work and write the report; also of what is finished when interrupted.

        Returns:
            The path of index.html.
        """
        from bilevel_profiling import report

        work = [piece for settled in self._settled for piece in self._pieces(settled)]
        if work and self._executor is None:
            isolate.warm_up(available([name for each in self._settled for name in each.case.preload]))
        try:
            self._progress.start([piece.task for piece in work])
            if self._executor is None:
                self._one_by_one(work)
            else:
                Dispatch(self._executor, self._site, self._progress).run(work)
        finally:
            self._progress.stop()
            try:
                self._site.tidy()
            finally:
                page = report.write(self.records, self.out, self._site.settings.command)
                self._site.folder.release()
        return page

    def _one_by_one(self, work: Sequence[Piece]) -> None:
        for piece in work:
            self._progress.begin(piece.task)
            errand = piece.errand(self._site)
            answer = errand.do() if isinstance(errand, Errand) else errand
            said = piece.take(self._site, answer) if isinstance(answer, Answer) else answer
            self._progress.finish(piece.task, said)

    def _pieces(self, settled: Settled) -> Iterator[Piece]:
        """What there is left to do, in order."""
        cells = settled.cells
        rows = [row for cell in cells if self._wanted((row := Row(settled, cell)).key)]
        references = [Reference(settled, row.cell, Target.PROGRAM) for row in rows]
        if settled.case.solution is not None:
            references += [Reference(settled, row.cell, Target.SOLUTION) for row in rows]
        first: dict[Path, Reference] = {}
        for each in references:
            first.setdefault(each.path(self._site), each)  # estimators share them
        yield from first.values()
        yield from rows
        last = cells[-1].solver
        for cell in cells if settled.case.outer_steps else ():
            loop = OuterLoop(settled, cell)
            if cell.solver is last and self._loop_wanted(loop.key):
                yield loop

    def _wanted(self, key: Key) -> bool:
        return key in self._again or self._site.place(key) is None

    def _loop_wanted(self, key: Key) -> bool:
        place = self._site.place(key)
        if place is None or key in self._again or key in self._loop_again:
            return True
        row = self.records[place]
        return not row.iterations and not unfinished(row)
