"""recommend(): which estimators fit a budget, and which of these to take, with the reason in a sentence each."""

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import bilevel as bl
from bilevel.space import tree
from bilevel.testing import ENTRIES, Need
from bilevel_profiling.cases import library
from bilevel_profiling.cases.case import Case, Posed
from bilevel_profiling.cases.case_file import default_estimators
from bilevel_profiling.forecasting.fake import forecast, here, without_data
from bilevel_profiling.forecasting.search import needed
from bilevel_profiling.meters.devices import Device
from bilevel_profiling.records import sizes
from bilevel_profiling.records.record import Record


@dataclasses.dataclass(frozen=True)
class Advice:
    """One estimator, judged.

    Attributes:
        label: of the estimator.
        estimator: the estimator.
        fits: whether its forecast stays within the budget.
        needed_bytes: what it asks for, data and variables included; None if it refuses the problem.
        error: the relative error that was measured, if a record of it was given.
        unmet: what it needs, and the problem lacks.
        sentence: why it stands where it stands.
        forecast: its record; None if it refuses the problem.
    """

    label: str
    estimator: bl.Estimator
    fits: bool
    needed_bytes: int | None
    error: float | None
    sentence: str
    forecast: Record | None
    unmet: tuple[Need, ...] = ()


def recommend(
    case: Case,
    budget: str | int,
    *,
    estimators: Mapping[str, bl.Estimator] | str | None = None,
    lacks: Collection[Need] = (),
    records: Sequence[Record] = (),
    on: Device | str = "a100",
) -> list[Advice]:
    """Rank estimators on a case within a memory budget, without running any.

    Those that fit come first, and of these the ones that need nothing that the problem lacks. Among them the more exact
    one: by the error that was measured, in powers of ten, where
    `records` have it for all of them; else those without bias before those with. Ties go to the one with less compute:
    the lower bound on its time on the device `on`.

    Args:
        case: the problem and the inner solver; its own estimator does not matter.
        budget: of device memory for everything, such as "24GiB".
        estimators: the candidates by label; by default those that a case without a list is compared with, under a
            TaskMean if the case has one; "all" for every estimator of the library as well.
        lacks: what the problem does not have, such as {bl.testing.Need.SOLUTION} where the inner steps do not reach the
            solution. That outer numbers are many (above 100), or inner ones (above 2,000), is seen from the case.
        records: of an earlier comparison of the same case with the same K, for measured errors.
        on: the device that compute is judged by, in roofline time.

    Returns:
        One `Advice` an estimator, the best first; those that do not fit, or refuse the problem, last.

    Raises:
        ValueError: the budget is no size.
        ForecastError: see `forecast`.

    Example:
        >>> import bilevel as bl
        >>> from bilevel.problems import hypercleaning
        >>> case = Case(hypercleaning.setup, solver=bl.Descent(bl.SGD(lr=0.1), steps=50), estimator=bl.Unrolled())
        >>> for advice in recommend(case, "12MiB"):
        ...     print(advice.label, advice.fits)
        unrolled iterates True
        unrolled segments True
        implicit CG True
        memory-reduced True
        first-order corrected True
        unrolled False
    """
    limit = sizes.parse(budget)
    with without_data():
        posed = here(case).pose()  # an error of setup is the user's, and no estimator's refusal
    if isinstance(estimators, str) and estimators != library.ALL:
        raise ValueError(f"recommend was given estimators={estimators!r}; a dict, None or {library.ALL!r} was needed")
    candidates = (
        _candidates(case, everything=estimators is not None) if isinstance(estimators, str | None) else estimators
    )
    lacking = {*lacks, *_sizes(posed)}
    found = [
        dataclasses.replace(
            _judged(case, label, estimator, limit, _error(case, label, estimator, records), on),
            unmet=_unmet(estimator, lacking),
        )
        for label, estimator in candidates.items()
    ]
    fitting = [advice for advice in found if advice.fits]
    measured = all(advice.error is not None for advice in fitting)
    fitting.sort(
        key=lambda advice: (
            len(advice.unmet),
            _magnitude(advice.error) if measured else advice.estimator.bias != "",
            _compute(advice),
        )
    )
    others = sorted((advice for advice in found if not advice.fits), key=lambda advice: advice.needed_bytes or math.inf)
    return [dataclasses.replace(advice, sentence=_sentence(advice, fitting, limit)) for advice in (*fitting, *others)]


def _sizes(posed: Posed) -> Iterator[Need]:
    """What the sizes of the variables rule out."""
    inner = posed.outer if posed.inner is None else posed.inner
    if sum(leaf.numel() for leaf in tree.tensors(posed.outer)) > _MANY_OUTER:
        yield Need.FEW_OUTER
    if sum(leaf.numel() for leaf in tree.tensors(inner)) > _MANY_INNER:
        yield Need.FEW_INNER


_MANY_OUTER, _MANY_INNER = 100, 2_000


def _unmet(estimator: bl.Estimator, lacking: Collection[Need]) -> tuple[Need, ...]:
    """What the estimator's entries of the catalogue need, and is lacking; of a user's own, nothing is known."""
    one = estimator.estimator if isinstance(estimator, bl.TaskMean) else estimator
    alike = [entry for entry in ENTRIES if type(entry.estimator) is type(one)]
    same = [entry for entry in alike if repr(one) in (repr(entry.estimator), repr(entry.usual))] or [
        entry for entry in alike if _solver(entry.estimator) is _solver(one)
    ]
    needs = frozenset.intersection(*(entry.needs for entry in same or alike)) if alike else frozenset()
    return tuple(need for need in Need if need in needs and need in lacking)


def _solver(estimator: bl.Estimator) -> type:
    return type(getattr(estimator, "linear", None))


def _candidates(case: Case, *, everything: bool) -> dict[str, bl.Estimator]:
    plain = library.every(default_estimators()) if everything else default_estimators()
    if isinstance(case.estimator, bl.TaskMean):
        chunk = case.estimator.chunk
        return {label: bl.TaskMean(estimator, chunk) for label, estimator in plain.items()}
    return plain


def _judged(
    case: Case, label: str, estimator: bl.Estimator, limit: int, error: float | None, on: Device | str
) -> Advice:
    try:
        record = forecast(dataclasses.replace(case, estimator=estimator, label=label), on=on)
    except (
        ValueError,
        bl.NotTwiceDifferentiableError,
    ) as refusal:  # an estimator that is blind to how x acts here says so
        return Advice(label, estimator, False, None, error, " ".join(str(refusal).split()), None)
    return Advice(label, estimator, needed(record) <= limit, needed(record), error, "", record)


def _error(case: Case, label: str, estimator: bl.Estimator, records: Sequence[Record]) -> float | None:
    """The error against the hypergradient at the solution if it was measured, else that against the K-step program."""
    for record in records:
        if (record.case, record.estimator, record.inner_steps, record.settings) == (
            case.name,
            label,
            case.solver.max_steps,
            repr(estimator),
        ):
            return (
                record.program_relative_error
                if record.solution_relative_error is None
                else record.solution_relative_error
            )
    return None


def _magnitude(error: float | None) -> float:
    if error is None or not math.isfinite(error):
        return math.inf
    return math.floor(math.log10(max(error, 1e-16)))


def _compute(advice: Advice) -> float:
    record = advice.forecast
    assert record is not None
    return record.roofline_seconds or 0.0


def _sentence(advice: Advice, fitting: Sequence[Advice], limit: int) -> str:
    if advice.needed_bytes is None:
        return f"Refuses the problem: {advice.sentence}"
    used = f"{sizes.text(advice.needed_bytes)} of {sizes.text(limit)}"
    if not advice.fits:
        return f"Does not fit: needs {used}."
    known = (
        f"measured error {advice.error:.1e}"
        if advice.error is not None
        else advice.estimator.bias or "the exact gradient of the K-step program"
    )
    if advice.unmet:
        known += f"; needs {' and '.join(need.value for need in advice.unmet)}, which this problem lacks"
    least = min(_compute(other) for other in fitting)
    ratio = _compute(advice) / least if least else 1.0
    return f"Fits ({used}); {known}; " + (
        "the least time at best of those that fit." if ratio == 1 else f"{ratio:.1f}x the least time at best."
    )
