"""largest_fit(): the largest number of inner steps, batch, chunk, ... whose forecast stays within a budget.

    largest v with base(v) + peak(v) <= budget

Found by bisection on exact forecasts, guided by the line through them, so v fits and v + 1 does not, both forecast.
That is the answer if memory grows with v; all forecasts made on the way are checked for it.
"""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import bilevel as bl
from bilevel_profiling.cases.case import Case, in_steps, limit_of
from bilevel_profiling.forecasting.fake import forecast
from bilevel_profiling.measurement.surroundings import frozen_heap
from bilevel_profiling.records import sizes
from bilevel_profiling.records.record import Record

INNER_STEPS, CHUNK = "inner_steps", "chunk"


class NotMonotone(ValueError):
    """Memory went down as the quantity went up, so there is no single largest value that fits."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a search found.

    Attributes:
        over: what was varied.
        value: its largest value that fits; 0 if not even 1 does.
        at_most: the largest value that was looked at.
        budget_bytes: the budget.
        forecasts: by value, all that were made.
    """

    over: str
    value: int
    at_most: int
    budget_bytes: int
    forecasts: dict[int, Record]

    @property
    def capped(self) -> bool:
        """Whether everything up to `at_most` fits, so that a larger value might too."""
        return self.value == self.at_most

    @property
    def constant(self) -> bool:
        """Whether memory is the same to the byte at all values looked at from the second on (the first may lack what
        later ones add once).
        """
        seen = [needed(record) for _, record in sorted(self.forecasts.items())][1:]
        return len(seen) > 1 and len(set(seen)) == 1

    @property
    def record(self) -> Record | None:
        """The forecast at `value`; None if nothing fits."""
        return self.forecasts.get(self.value)

    @property
    def text(self) -> str:
        """The finding in a sentence."""
        if not self.value:
            least = needed(self.forecasts[min(self.forecasts)])
            return f"does not fit: {self.over} = 1 needs {sizes.text(least)} of {sizes.text(self.budget_bytes)}"
        used = f"{sizes.text(needed(self.forecasts[self.value]))} of {sizes.text(self.budget_bytes)}"
        if self.capped:
            why = (
                f"memory does not grow with {self.over}"
                if self.constant
                else f"no more than {self.at_most:,} was looked at"
            )
            return f"{self.over} = {self.value:,} fits ({used}); {why}"
        more = needed(self.forecasts[self.value + 1])
        too_many = f"is {more - self.budget_bytes:,} bytes too many"
        over = f"would need {sizes.text(more)}" if sizes.text(more) != sizes.text(self.budget_bytes) else too_many
        return f"{self.over} = {self.value:,} fits ({used}); {self.value + 1:,} {over}"


def largest_fit(case: Case, budget: str | int, over: str = INNER_STEPS, *, at_most: int = 256) -> int:
    """The largest value that fits, found without running anything.

    Args:
        case: what is to fit; its own value of `over` does not matter.
        budget: of device memory, for everything: data, variables, and what the call adds. A size such as "24GiB", or
            bytes. For a case on "cuda" each tensor counts in the allocator's blocks of 512 bytes; leave room for
            workspaces and fragmentation.
        over: "inner_steps"; "chunk", of a TaskMean; or the name of any whole-number parameter of the case's `setup`,
            such as "batch".
        at_most: where the search ends: the largest value that is looked at.

    Returns:
        The largest value that fits, `at_most` if all do, 0 if not even 1 does. `fit` returns the forecasts too.

    Raises:
        NotMonotone: memory does not grow with `over`.
        ValueError: the budget is no size, or the case has nothing called `over`.
        ForecastError: see `forecast`.

    Example:
        >>> import bilevel as bl
        >>> from bilevel.problems import hypercleaning
        >>> case = Case(hypercleaning.setup, solver=bl.Descent(bl.SGD(lr=0.1), steps=1), estimator=bl.Unrolled())
        >>> steps = largest_fit(case, "8MiB")
        >>> fits, exceeds = (needed(forecast(with_value(case, "inner_steps", k))) for k in (steps, steps + 1))
        >>> fits <= 8 * 2**20 < exceeds
        True
    """
    return fit(case, budget, over, at_most=at_most).value


def fit(
    case: Case,
    budget: str | int,
    over: str = INNER_STEPS,
    *,
    at_most: int = 256,
    told: Callable[[int, Record], None] | None = None,
) -> Fit:
    """As `largest_fit`, with the forecasts that were made.

    Args:
        case: see `largest_fit`.
        budget: see `largest_fit`.
        over: see `largest_fit`.
        at_most: see `largest_fit`.
        told: called with each value and its forecast.

    Raises:
        NotMonotone, ValueError, ForecastError: see `largest_fit`.
    """
    limit = sizes.parse(budget)
    if not isinstance(at_most, int) or isinstance(at_most, bool) or at_most < 1:
        raise ValueError(f"at_most is {at_most!r}; an integer of at least 1 was needed")
    forecasts: dict[int, Record] = {}

    def fits(value: int) -> bool:
        if value not in forecasts:
            forecasts[value] = forecast(with_value(case, over, value))
            if told is not None:
                told(value, forecasts[value])
            _check_monotone(over, forecasts)
        return needed(forecasts[value]) <= limit

    low, high = 0, at_most + 1
    with frozen_heap():  # once for all forecasts
        while low + 1 < high:
            value = _next(low, high, limit, {value: needed(record) for value, record in forecasts.items()})
            low, high = (value, high) if fits(value) else (low, value)
    return Fit(over, low, at_most, limit, dict(sorted(forecasts.items())))


def needed(record: Record) -> int:
    """Bytes of a device's memory that a forecast asks for, what was there before included, and cuBLAS's workspaces
    where they are known.
    """
    if record.cuda_allocated_bytes is not None:
        return record.cuda_allocated_bytes + (record.cuda_workspace_bytes or 0)
    return (record.base_tensor_bytes or 0) + (record.peak_tensor_bytes or 0)


def with_value(case: Case, over: str, value: int) -> Case:
    """The case with another value of what is varied.

    Raises:
        ValueError: the case has nothing of that name; the message lists what it has.
    """
    limited = limit_of(case.solver) is not None
    if over == INNER_STEPS and limited:
        return dataclasses.replace(case, solver=in_steps(case.solver, value))
    if over == CHUNK and isinstance(case.estimator, bl.TaskMean):
        return dataclasses.replace(case, estimator=dataclasses.replace(case.estimator, chunk=value))
    if over in parameters(case.setup):
        return dataclasses.replace(case, setup=functools.partial(case.setup, **{over: value}))
    known = [
        *([INNER_STEPS] if limited else []),
        *([CHUNK] if isinstance(case.estimator, bl.TaskMean) else []),
        *parameters(case.setup),
    ]
    raise ValueError(
        f"case {case.name} cannot be varied over {over!r}; "
        + (f"it can be over {', '.join(known)}" if known else "nothing in it can")
    )


def parameters(setup: Callable[..., Any]) -> list[str]:
    """The parameters of a setup function that are whole numbers, by their defaults or annotations; "seed" is none to
    vary.
    """
    try:
        found = inspect.signature(setup).parameters.values()
    except (TypeError, ValueError):  # some callables have no signature to look at
        return []
    return [
        parameter.name
        for parameter in found
        if parameter.name not in ("device", "seed")
        and parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and (type(parameter.default) is int or parameter.annotation in (int, "int", int | None, "int | None"))
    ]


def _next(low: int, high: int, limit: int, known: dict[int, int]) -> int:
    """Where to look next, strictly between `low`, which fits, and `high`, which does not or is past the end.

    The line through two values tells where the budget ends: exactly, for memory that grows by the same bytes each time.
        Every second look halves the
    bracket, so that no other growth takes many.
    """
    begun = next((value for value in (1, 2, 4) if value not in known and low < value < high), None)
    if begun is not None:
        return begun
    if len(known) % 2 and high in known:
        return (low + high) // 2
    a, b = (low, high) if low and high in known else sorted(known)[-2:] if len(known) > 1 else (0, 0)
    slope = (known[b] - known[a]) / (b - a) if b > a and a in known else 0.0
    guess = high - 1 if slope <= 0 else a + int((limit - known[a]) / slope)
    if low in known and known.get(high, 0) > limit and guess <= low:
        guess = low + 1
    return min(max(guess, low + 1), high - 1)


def _check_monotone(over: str, forecasts: dict[int, Record]) -> None:
    pairs = sorted((value, needed(record)) for value, record in forecasts.items())
    for (small, less), (large, more) in itertools.pairwise(pairs):
        if more < less:
            raise NotMonotone(
                f"memory falls as {over} grows: {small:,} needs {sizes.text(less)}, {large:,} needs "
                f"{sizes.text(more)}. There is no single largest value that fits; forecast the values that you are "
                f"interested in, one by one"
            )
