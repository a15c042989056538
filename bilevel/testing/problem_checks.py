"""check_problem(): what is wrong with a bilevel problem before hours are spent on it?"""

import dataclasses
import enum
from collections.abc import Callable

import torch

import bilevel as bl
from bilevel.hypergradient import check_arguments
from bilevel.space.tree import Tree
from bilevel.testing import derivative_checks, loss_checks
from bilevel.testing.case import Case


class Kind(enum.Enum):
    """What was found. The value says why it matters."""

    NOT_DETERMINISTIC = (
        "random numbers that no seed of torch controls: recomputing estimators differentiate another program"
    )
    KEEPS_STATE = "an evaluation changes the next: recomputing estimators see another loss"
    EDITED_IN_PLACE = "an argument is changed: the trajectory that is visited again is another"
    UNUSED = "a tensor influences nothing: its gradient is zero"
    NOT_TWICE_DIFFERENTIABLE = "a second derivative is missing: estimators with Hessian-vector products are wrong"
    NOT_FINITE = "a loss or a gradient is not finite"
    DIGITS_LOST = "rounding leaves few digits of the hypergradient in this dtype"
    WRONG_GRADIENT = "the K-step program's gradient is not that of its finite differences"
    RAISES = "a function of the problem raises"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One defect: its kind, and a sentence with where and how much."""

    kind: Kind
    sentence: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What `check_problem` found, and what it could not look at."""

    findings: tuple[Finding, ...]
    skipped: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def raise_if_any(self) -> None:
        """Raise with every sentence, if there is one.

        Raises:
            BilevelError: there are findings.
        """
        if self.findings:
            raise bl.BilevelError("\n".join(f"{found.kind.name}: {found.sentence}" for found in self.findings))


def check_problem(
    problem: bl.Problem,
    outer: Tree,
    inner: Tree | None,
    batches: bl.Batches,
    *,
    solver: bl.InnerSolver,
) -> Report:
    """Look for what makes hypergradients wrong or useless: in the losses, their derivatives and their arithmetic.

    Looked for, each a `Kind`: random numbers that torch's seed does not control; losses that keep state; arguments
    changed in place; tensors that nothing uses; a missing second derivative (products with it against differences of
    the gradient); losses that are not finite, at the start and after the inner loop; a hypergradient in float32 or less
    that is more than 1% off that in float64 (where the problem can be cast); a gradient of the program of at most 3
    steps that its finite differences do not confirm. Costs about ten hypergradients with Unrolled("segments").

    Args:
        problem: the two losses; of one task (take one task's batches for a problem under TaskMean).
        outer: as for `hypergradient`; not changed.
        inner: likewise.
        batches: likewise.
        solver: likewise.

    Returns:
        The findings. What could not be looked at is in `skipped`.

    Raises:
        TypeError, ValueError: an argument is not what `hypergradient` needs.

    Example:
        >>> import random, torch, bilevel as bl
        >>> problem = bl.Problem(
        ...     inner_loss=lambda y, x, batch: (y - x * (1 + 0.1 * random.random())).square().sum(),
        ...     outer_loss=lambda y, x, batch: y.square().sum(),
        ... )
        >>> report = check_problem(problem, torch.ones(2), torch.zeros(2), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.1), steps=5))
        >>> [found.kind.name for found in report.findings]
        ['NOT_DETERMINISTIC']
    """
    check_arguments("check_problem", problem, outer, inner, batches, solver)
    findings: list[Finding] = []
    skipped: list[str] = []
    before = torch.get_rng_state()
    try:
        case = Case(problem, outer, inner, batches, solver)
        for check in _CHECKS:
            name = check.__name__.removeprefix("check_").replace("_", " ")
            try:
                for kind, sentence in check(case):
                    findings.append(Finding(Kind[kind], sentence))
            except derivative_checks.CannotTellError as reason:
                skipped.append(f"{name}: {reason}")
            except Exception as error:  # whatever a user's function raises is a finding
                findings.append(Finding(Kind.RAISES, f"{name}: {type(error).__name__}: {error}"))
            if check in _FATAL and findings:
                skipped.append("derivatives and the inner loop: they mean nothing before the findings above are mended")
                break
    finally:
        torch.set_rng_state(before)
    return Report(tuple(findings), tuple(skipped))


Check = Callable[[Case], list[tuple[str, str]]]
_FATAL: tuple[Check, ...] = (loss_checks.check_evaluations,)
_CHECKS: tuple[Check, ...] = (
    loss_checks.check_evaluations,
    loss_checks.check_use,
    loss_checks.check_finite,
    derivative_checks.check_second_derivative,
    derivative_checks.check_program,
    derivative_checks.check_digits,
)
