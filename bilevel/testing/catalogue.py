"""The library's own estimators, one entry per variant, with everything that is promised of each.

The conformance matrix, the memory contracts, the oracle counts and the forecasts of the test suite take their lists
from here, so a new estimator is one entry. Counts are hand-written: they do not ask the estimator.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import bilevel as bl
from bilevel.estimators.reverse.checkpoints import shrinking

Calls = dict[str, int]
EVERYWHERE = frozenset(bl.Path)
AT_SOLUTION = frozenset({bl.Path.INNER_LOSS, bl.Path.OUTER_LOSS, bl.Path.STATIONARITY})
GRADIENTS = frozenset({bl.Path.INNER_LOSS, bl.Path.OUTER_LOSS})


@dataclasses.dataclass(frozen=True)
class Entry:
    """One variant of an estimator and what is promised of it.

    Args:
        label: its name in tests and reports.
        estimator: the variant, with linear solves accurate enough for its target.
        target: "program" for the gradient of the K-step program, "solution" for that of the inner solution.
        calls: oracle calls as a function of (K, products of the linear solver), with a fixed number of steps K.
        memory: how peak memory grows with K at most: "constant", "sqrt" or "linear".
        sees: the paths of the outer variable that it follows; equals `estimator.sees`.
        bias: what separates it from its target, as an order; None for nothing but rounding and unfinished solves.
        spending: the same variant with exactly so many products of its linear solver; None where it has none.
        quadratic_in_inner: whether it holds P x P numbers.

    Raises:
        ValueError: target or memory is none of the words above.

    Example:
        >>> entry = by_label("iterates")
        >>> entry.target, entry.memory, entry.calls(5, 0)["hvp"]
        ('program', 'linear', 5)
    """

    label: str
    estimator: bl.Estimator
    target: str
    calls: Callable[[int, int], Calls]
    memory: str
    sees: frozenset[bl.Path]
    bias: str | None = None
    spending: Callable[[int], bl.Estimator] | None = None
    quadratic_in_inner: bool = False

    def __post_init__(self) -> None:
        for name, value, words in (("target", self.target, TARGETS), ("memory", self.memory, GROWTHS)):
            if value not in words:
                raise ValueError(f"Entry {self.label!r} was given {name}={value!r}; one of {words} was needed")

    def at(self, products: int) -> bl.Estimator:
        """The variant with a budget of `products`, where it has a linear solver that takes one; else as it is."""
        return self.estimator if self.spending is None else self.spending(products)

    @property
    def exact(self) -> bool:
        """Whether it is the gradient of the K-step program to rounding."""
        return self.target == "program" and self.bias is None


TARGETS = ("program", "solution")
GROWTHS = ("constant", "sqrt", "linear")


def counts(inner_gradient: int, outer_gradient: int, hvp: int, mixed: int) -> Calls:
    """Oracle calls by name."""
    return {"inner_gradient": inner_gradient, "outer_gradient": outer_gradient, "hvp": hvp, "mixed": mixed}


def unrolled(label: str, keep: str, *, segment: int | None = None, last: int | None = None) -> Entry:
    """The entry of a variant of Unrolled: 1, 2 or about 3 inner gradients and one product per step gone back through.

    Args:
        label: its name.
        keep: as for `Unrolled`.
        segment: likewise.
        last: likewise.
    """

    def calls(steps: int, products: int) -> Calls:
        back = steps if last is None else min(last, steps)
        again = {"graph": 0, "iterates": back, "segments": back + _recomputed(back, segment)}[keep]
        return counts(steps + again, 1, back, 0)

    whole_memory = "sqrt" if keep == "segments" and segment is None else "linear"
    return Entry(
        label,
        bl.Unrolled(keep, segment=segment, last=last),
        target="program",
        calls=calls,
        memory=whole_memory if last is None else "constant",
        sees=EVERYWHERE,
        bias=None if last is None else f"(1 - lr mu)^{last}",
    )


def _recomputed(steps: int, segment: int | None) -> int:
    """Every segment but the last is run again from its first iterate, up to its last."""
    if segment is None:
        lengths = shrinking(steps)
    else:
        lengths = [min(segment, steps - begin) for begin in range(0, steps, segment)]
    return sum(length - 1 for length in lengths[:-1])


def _at_solution(label: str, estimator: bl.Estimator, **more: Any) -> Entry:
    """The entry of an estimator that differentiates the solution with a linear solve: K steps, then the solver's
    products at one more gradient.
    """
    return Entry(
        label,
        estimator,
        target="solution",
        calls=lambda steps, products: counts(steps + 1, 1, products, 1),
        memory="constant",
        sees=AT_SOLUTION,
        **more,
    )


ENTRIES = (
    unrolled("graph", "graph"),
    unrolled("graph last 2", "graph", last=2),
    unrolled("iterates", "iterates"),
    unrolled("iterates last 2", "iterates", last=2),
    unrolled("segments", "segments"),
    unrolled("segments of 3", "segments", segment=3),
    unrolled("segments last 4", "segments", last=4),
    _at_solution(
        "implicit cg",
        bl.Implicit(bl.CG(max_steps=60, tol=1e-13)),
        spending=lambda products: bl.Implicit(bl.CG(products, tol=0.0)),
    ),
    _at_solution(
        "implicit neumann",
        bl.Implicit(bl.Neumann(steps=2500, step_size=0.8)),
        spending=lambda products: bl.Implicit(bl.Neumann(products, 0.3)),
    ),
    # One product per number of y.
    _at_solution("implicit dense", bl.Implicit(bl.Dense()), quadratic_in_inner=True),
    _at_solution(
        "memory reduced",
        bl.MemoryReduced(steps=60, tol=1e-13),
        spending=lambda products: bl.MemoryReduced(steps=products),
    ),
    _at_solution(
        "memory reduced, warm",
        bl.MemoryReduced(steps=60, tol=1e-13, warm_inner=True, warm_adjoint=True),
        spending=lambda products: bl.MemoryReduced(steps=products, warm_inner=True, warm_adjoint=True),
    ),
    Entry(
        "corrected",
        bl.FirstOrderCorrected(),
        target="solution",
        calls=lambda steps, products: counts(2 * steps + 2, 2 * steps + 2, 0, 0),
        memory="constant",
        sees=GRADIENTS,
        bias="nu^2",
    ),
    Entry(
        "corrected forward",
        bl.FirstOrderCorrected(scheme="forward"),
        target="solution",
        calls=lambda steps, products: counts(2 * steps + 2, steps + 2, 0, 0),
        memory="constant",
        sees=GRADIENTS,
        bias="nu",
    ),
    Entry(
        "corrected, 4 points",
        bl.FirstOrderCorrected(scheme=4),
        target="solution",
        calls=lambda steps, products: counts(4 * steps + 4, 4 * steps + 4, 0, 0),
        memory="constant",
        sees=GRADIENTS,
        bias="nu^4",
    ),
    Entry(
        "corrected, warm",
        bl.FirstOrderCorrected(warm_sides=True),
        target="solution",
        calls=lambda steps, products: counts(2 * steps + 2, 2 * steps + 2, 0, 0),
        memory="constant",
        sees=GRADIENTS,
        bias="nu^2",
    ),
    Entry(
        "first order",
        bl.FirstOrder(),
        target="program",
        calls=lambda steps, products: counts(steps, 1, 0, 0),
        memory="constant",
        sees=frozenset({bl.Path.START, bl.Path.OUTER_LOSS}),
        bias="K lr |H|",
    ),
    Entry(
        "bootstrapped",
        bl.Bootstrapped(bl.Unrolled(), bl.estimators.FurtherSteps(3)),
        target="program",
        # K + 3 steps to the target, K differentiated ones, and f once more for its direct part.
        calls=lambda steps, products: counts(2 * steps + 3, 2, steps, 0),
        memory="linear",
        sees=EVERYWHERE,
        bias="the gradient of the matching loss, not of F",
    ),
)
"""Every variant that the library answers for."""


def by_label(label: str) -> Entry:
    """The entry of that label.

    Raises:
        KeyError: there is none.
    """
    return {entry.label: entry for entry in ENTRIES}[label]
