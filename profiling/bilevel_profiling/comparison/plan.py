"""What a comparison is to do and how, checked before any work is begun."""

import dataclasses
import io
import pickle
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

import bilevel as bl
from bilevel_profiling.cases.case import Setup, in_steps
from bilevel_profiling.cases.case_file import CaseError, Definition, given
from bilevel_profiling.measurement import together
from bilevel_profiling.records.ranks import processes


@dataclasses.dataclass(frozen=True)
class Plan:
    """One case of a comparison, as it was asked for.

    Args:
        source: a function `setup(device)`, the name of a built-in case, or the path of a case file.
        overrides: fields of the case's `Definition` that are to be otherwise.
        labels: which of the case's estimators and baselines; None for all. The baselines among the overrides are always
            taken.
        seed: in place of that of the settings; the case is then called "name, seed 3", so that its rows stand by
            themselves.
    """

    source: Setup | str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    labels: Sequence[str] | None = None
    seed: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a comparison measures: the same for all its cases.

    Args:
        device: "cpu" or "cuda".
        seed: set before `setup` and before each call, in every process.
        repeats: of the clock.
        time_limit: seconds for each process.
        threads: of torch in each process. One is repeatable: two on two cores wait for each other whenever a neighbor
            takes a core.
        memory_limit: bytes that each run of an estimator may take beyond what torch itself has taken; None for no
            limit. For a CPU, on Linux. The runs that make float64 references are not limited.
        resume: keep the finished rows of an earlier comparison in the folder, and measure only what is missing.
        retry_failed: like `resume`, but rows and outer loops that ended with ERROR, CRASHED, TIMEOUT or OUT_OF_MEMORY
            are measured anew.
        trace: also write a torch.profiler trace of each run, into traces/.
        snapshot: also write a snapshot of the CUDA allocator for each run, into snapshots/; of no effect on the CPU.
        processes: the numbers of ranks to measure with, such as (1, 2, 4): each cell is a row with each, run by as many
            processes in one group (gloo on the CPU; NCCL on CUDA, a GPU for each), its work split as the case says.
            None at all: one process without a group.
        wait_limit: with an executor, seconds without an answer, beyond what a run may take, after which it is given up.
        command: kept in the records' environments.
    """

    device: str = "cpu"
    seed: int = 0
    repeats: int = 5
    time_limit: float = 300.0
    threads: int = 1
    memory_limit: int | None = None
    resume: bool = False
    retry_failed: bool = False
    trace: bool = False
    snapshot: bool = False
    processes: tuple[int, ...] = ()
    wait_limit: float = 3600.0
    command: str = ""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row to be: an estimator of the case under an inner solver."""

    label: str
    """Of the row: the estimator's, with the solver's where the case compares several."""
    estimator: str
    solver: bl.InnerSolver
    solver_name: str = ""
    """Where the case names its solvers; else it is told by the number of inner steps."""
    engine: str = ""
    """Its label in the case; empty for the default."""
    tasks: str = ""
    """For a mean over tasks, how they are weighted, as a name."""
    processes: int | None = None
    """Ranks that run it together; None for one process without a group."""

    @property
    def steps(self) -> int:
        """K, or the most steps that the solver may take."""
        return self.solver.max_steps

    @property
    def title(self) -> str:
        """What the row is called where engines and numbers of processes are told apart."""
        more = ", ".join(filter(None, [self.engine, processes(self.processes)]))
        return f"{self.label} ({more})" if more else self.label


@dataclasses.dataclass(frozen=True)
class Settled:
    """A plan with its case loaded, and which of the case's estimators take part."""

    plan: Plan
    case: Definition
    labels: tuple[str, ...]
    seed: int = 0
    processes: tuple[int | None, ...] = (None,)

    @property
    def cells(self) -> list[Cell]:
        """The rows to be, by solver in the order of K; with named solvers in the order of the case. Baselines have no
        engine.
        """
        case, rows = self.case, self.compared
        solvers = [("", in_steps(case.optimizer, k)) for k in sorted(set(case.inner_steps))]
        found: list[Cell] = []
        for name, solver in case.solvers.items() or solvers:
            for label in self.labels:
                tasks = _tasks(rows[label])
                row = f"{label}, {name}" if name else label
                engines = ("",) if label in case.baselines else tuple(case.engines) or ("",)
                found += [
                    Cell(row, label, solver, name, engine, tasks, count)
                    for engine in engines
                    for count in self.processes
                ]
        return found

    @property
    def compared(self) -> dict[str, bl.Estimator]:
        """The case's estimators and baselines, as they are beside those that take part."""
        return self.case.among(self.labels)


def _tasks(estimator: bl.Estimator) -> str:
    if not isinstance(estimator, bl.TaskMean):
        return ""
    weights = "" if estimator.weights is None else repr(estimator.weights)
    return f"tasks {weights}".strip()


def settle(plans: Sequence[Plan], settings: Settings | None = None, *, far: bool = False) -> list[Settled]:
    """Load the cases and check everything that can be checked beforehand.

    Args:
        plans: what is compared.
        settings: how.
        far: whether the processes may be on other machines, or of another program, and so do not know the main script.

    Raises:
        CaseError: a case, a label or a number is not usable.
        TypeError: a function or an object cannot be sent to another process.

    Example:
        >>> settle([Plan("quadratic", labels=["unrolled"])])[0].labels
        ('unrolled',)
    """
    settings = settings or Settings()
    found = [_loaded(plan, settings) for plan in plans]
    names = [each.case.name for each in found]
    for name in names:
        if names.count(name) > 1:
            raise CaseError(
                f"two cases are called {name}, and their rows could not be told apart; give each once, or rename a file"
            )
    _check_labels(found)
    _check_numbers(settings)
    _check_split(found, settings)
    for each in found:
        _check_sendable(each.plan, far)
    counts = tuple(sorted(set(settings.processes))) or (None,)
    return [dataclasses.replace(each, labels=_labels(each), processes=counts) for each in found]


def _loaded(plan: Plan, settings: Settings) -> Settled:
    case = given(plan.source, **plan.overrides)
    if plan.seed is None:
        return Settled(plan, case, (), settings.seed)
    if type(plan.seed) is not int:
        raise CaseError(f"a seed is {plan.seed!r}; an integer was needed")
    name = f"{case.name}, seed {plan.seed}"  # among the overrides, so that other processes call it so as well
    named = dataclasses.replace(plan, overrides={**plan.overrides, "name": name})
    return Settled(named, dataclasses.replace(case, name=name), (), plan.seed)


def _labels(each: Settled) -> tuple[str, ...]:
    always = each.plan.overrides.get("baselines") or ()
    wanted = None if each.plan.labels is None else {*each.plan.labels, *always}
    return tuple(label for label in each.case.compared if wanted is None or label in wanted)


def _check_labels(found: list[Settled]) -> None:
    """Each label must exist somewhere, and each case must be left with one."""
    have = "; ".join(f"{each.case.name} has {', '.join(each.case.compared)}" for each in found)
    asked = dict.fromkeys(label for each in found for label in each.plan.labels or ())
    unknown = [label for label in asked if not any(label in each.case.compared for each in found)]
    if unknown:
        commas = [label for each in found for label in each.case.compared if "," in label]
        hint = f" (--estimators takes commas apart, so it cannot name {commas[0]!r})" if commas else ""
        raise CaseError(f"there is no estimator {' or '.join(map(repr, unknown))}: {have}{hint}")
    for each in found:
        if not _labels(each):
            raise CaseError(f"case {each.case.name} has none of the estimators asked for: {have}")


def _check_numbers(settings: Settings) -> None:
    if not settings.time_limit > 0:
        raise CaseError(f"the time limit is {settings.time_limit!r}; a positive number of seconds was needed")
    if not isinstance(settings.repeats, int) or settings.repeats < 1:
        raise CaseError(f"repeats is {settings.repeats!r}; a positive integer was needed")
    if not settings.wait_limit > 0:
        raise CaseError(f"wait_limit is {settings.wait_limit!r}; a positive number of seconds was needed")
    if settings.memory_limit is None:
        return
    if not isinstance(settings.memory_limit, int) or settings.memory_limit < 1:
        raise CaseError(f"the memory limit is {settings.memory_limit!r}; a positive number of bytes was needed")
    if sys.platform != "linux":
        raise CaseError(f"a memory limit was given; it needs Linux, and this is {sys.platform}")
    if settings.device != "cpu":
        raise CaseError(
            f"a memory limit was given for device {settings.device}; it limits the address space, of which CUDA takes "
            f"more than it uses. Leave it out, or write torch.cuda.set_per_process_memory_fraction(...) into setup"
        )


def _check_split(found: list[Settled], settings: Settings) -> None:
    try:
        for count in settings.processes:
            together.check_possible(count, settings.device)
    except ValueError as error:
        raise CaseError(str(error)) from None
    for each in found if settings.processes else ():
        if each.case.parallel is None:
            raise CaseError(
                f"case {each.case.name} does not say how its work is split over processes. Write PARALLEL = DATA (its "
                f"losses are means over the rows of the batches) or PARALLEL = TASKS (its estimators are means over "
                f"tasks) into the case file, with from bilevel_profiling import DATA, TASKS; or compare(parallel=DATA)"
            )


class _Pickler(pickle.Pickler):
    """Notes what belongs to the main script, which only this process and its own children know."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.main: list[str] = []

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, (type, types.FunctionType)) and value.__module__ in ("__main__", "__mp_main__"):
            self.main.append(value.__qualname__)
        return NotImplemented


def _check_sendable(plan: Plan, far: bool) -> None:
    for name, value in {"setup": plan.source, **plan.overrides}.items():
        if getattr(value, "__module__", None) == "__main__" and not hasattr(sys.modules["__main__"], "__file__"):
            raise TypeError(
                f"{name} is defined in an interactive session, which other processes cannot import; put it into a file"
            )
        pickler = _Pickler(io.BytesIO())
        try:
            pickler.dump(value)
        except Exception as error:  # pickle raises whatever an object's own reduction does
            raise TypeError(
                f"{name} cannot be sent to another process ({error}). Define functions at the top level of a module, "
                f"not as lambdas; or write the case as a file with setup(device), ESTIMATORS and OPTIMIZER, and pass "
                f"its path"
            ) from error
        if far and pickler.main:
            raise TypeError(
                f"{name} needs {pickler.main[0]} of the main script, which the workers of an executor cannot import. "
                f"Define it in a module that they can, or write the case as a file with setup(device), ESTIMATORS and "
                f"OPTIMIZER, and pass its path"
            )
