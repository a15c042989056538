"""What a comparison is to do, checked before any work is begun."""

import dataclasses
import pickle
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from bilevel_profiling.cases.case import Setup
from bilevel_profiling.cases.case_file import CaseError, Definition, given


@dataclasses.dataclass(frozen=True)
class Plan:
    """One case of a comparison, as it was asked for.

    Args:
        source: a function `setup(device)`, the name of a built-in case, or the path of a case file.
        overrides: fields of the case's `Definition` that are to be otherwise.
        labels: which of the case's estimators; None for all.
        device: "cpu" or "cuda".
        seed: set before `setup` and before each call, in every process.
        repeats: of the clock.
        time_limit: seconds for each process.
        memory_limit: bytes that each run of an estimator may take beyond what torch itself has taken; None for no
            limit. For a CPU, on Linux. The runs that make float64 references are not limited.
        threads: of torch in each process. One is repeatable: two on two cores wait for each other whenever a neighbor
            takes a core.
    """

    source: Setup | str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    labels: Sequence[str] | None = None
    device: str = "cpu"
    seed: int = 0
    repeats: int = 5
    time_limit: float = 300.0
    threads: int = 1
    memory_limit: int | None = None


@dataclasses.dataclass(frozen=True)
class Settled:
    """A plan with its case loaded, and which of the case's estimators take part."""

    plan: Plan
    case: Definition
    labels: tuple[str, ...]


def settle(plans: Sequence[Plan]) -> list[Settled]:
    """Load the cases and check everything that can be checked beforehand.

    Raises:
        CaseError: a case, a label or a number is not usable.
        TypeError: a function or an object cannot be sent to another process.

    Example:
        >>> settle([Plan("quadratic", labels=["unrolled"])])[0].labels
        ('unrolled',)
    """
    found = [Settled(plan, given(plan.source, **plan.overrides), ()) for plan in plans]
    names = [each.case.name for each in found]
    for name in names:
        if names.count(name) > 1:
            raise CaseError(
                f"two cases are called {name}, and their rows could not be told apart; give each once, or rename a file"
            )
    _check_labels(found)
    for each in found:
        _check_numbers(each.plan)
        _check_sendable(each.plan)
    return [dataclasses.replace(each, labels=_labels(each)) for each in found]


def _labels(each: Settled) -> tuple[str, ...]:
    return tuple(label for label in each.case.estimators if each.plan.labels is None or label in each.plan.labels)


def _check_labels(found: list[Settled]) -> None:
    """Each label must exist somewhere, and each case must be left with one."""
    have = "; ".join(f"{each.case.name} has {', '.join(each.case.estimators)}" for each in found)
    asked = dict.fromkeys(label for each in found for label in each.plan.labels or ())
    unknown = [label for label in asked if not any(label in each.case.estimators for each in found)]
    if unknown:
        raise CaseError(f"there is no estimator {' or '.join(map(repr, unknown))}: {have}")
    for each in found:
        if not _labels(each):
            raise CaseError(f"case {each.case.name} has none of the estimators asked for: {have}")


def _check_numbers(plan: Plan) -> None:
    if not plan.time_limit > 0:
        raise CaseError(f"the time limit is {plan.time_limit!r}; a positive number of seconds was needed")
    if not isinstance(plan.repeats, int) or plan.repeats < 1:
        raise CaseError(f"repeats is {plan.repeats!r}; a positive integer was needed")
    if plan.memory_limit is None:
        return
    if not isinstance(plan.memory_limit, int) or plan.memory_limit < 1:
        raise CaseError(f"the memory limit is {plan.memory_limit!r}; a positive number of bytes was needed")
    if sys.platform != "linux":
        raise CaseError(f"a memory limit was given; it needs Linux, and this is {sys.platform}")
    if plan.device != "cpu":
        raise CaseError(
            f"a memory limit was given for device {plan.device}; it limits the address space, of which CUDA takes more "
            f"than it uses. Leave it out, or write torch.cuda.set_per_process_memory_fraction(...) into setup"
        )


def _check_sendable(plan: Plan) -> None:
    for name, value in {"setup": plan.source, **plan.overrides}.items():
        if getattr(value, "__module__", None) == "__main__" and not hasattr(sys.modules["__main__"], "__file__"):
            raise TypeError(
                f"{name} is defined in an interactive session, which other processes cannot import; put it into a file"
            )
        try:
            pickle.dumps(value)
        except Exception as error:  # pickle raises whatever an object's own reduction does
            raise TypeError(
                f"{name} cannot be sent to another process ({error}). Define functions at the top level of a module, "
                f"not as lambdas; or write the case as a file with setup(device), ESTIMATORS and OPTIMIZER, and pass "
                f"its path"
            ) from error
