"""Single loops: every call moves y, the adjoint and x one round on."""

from typing import Any

import bilevel as bl
from bilevel.testing.catalogue.entry import AT_SOLUTION, GRADIENTS, Calls, Entry, Slope, counts

RATE = 0.75
"""Of v: below 2 / L for curvatures up to 2.6."""
ROUNDS = 50


def one_round(label: str, estimator: bl.Estimator, **more: Any) -> Entry:
    """The entry of a method that shares the gradient of its first step with its products: the first call."""
    return Entry(
        label,
        estimator,
        target="solution",
        calls=lambda steps, products: counts(max(steps, 1), 1, 0, 1),
        memory="constant",
        sees=AT_SOLUTION,
        definite=True,
        solves=further,
        settles=ROUNDS,
        **more,
    )


def further(steps: int) -> int:
    """Inner gradients of the solve, whose first one is shared."""
    return max(steps - 1, 0)


def products_of_v(label: str, estimator: bl.Estimator, **more: Any) -> Entry:
    """The entry of a method that moves v at the new y, with a product for each step of v."""
    return Entry(
        label,
        estimator,
        target="solution",
        calls=lambda steps, products: counts(steps + 1, 1, products, 1),
        memory="constant",
        sees=AT_SOLUTION,
        definite=True,
        **more,
    )


def _differences(steps: int, products: int) -> Calls:
    """A gradient at y, which is that of the first step, and one at each side."""
    return counts(max(steps, 1) + 2, 1, 0, 0)


ENTRIES = (
    one_round("soba", bl.estimators.SOBA(RATE)),
    one_round("saba", bl.estimators.SABA(RATE, inner_batches=1)),
    one_round("masoba", bl.estimators.MASOBA(RATE, theta=0.5)),
    one_round("fsla", bl.estimators.FSLA(RATE, eta=0.5)),
    Entry(
        "fdehbo",
        bl.estimators.FdeHBO(RATE, eta=0.5, radius=1e3),
        target="solution",
        calls=_differences,
        memory="constant",
        sees=GRADIENTS,
        definite=True,
        bias="width^2",
        slope=Slope("width", 2, lambda width: bl.estimators.FdeHBO(RATE, 0.5, 1e3, width), (0.1, 0.05, 0.025)),
        solves=further,
        settles=ROUNDS,
    ),
    products_of_v(
        "amigo",
        bl.estimators.AmIGO(RATE, steps=12),
        spending=lambda products: bl.estimators.AmIGO(0.3, steps=products),
        settles=4,
    ),
    products_of_v(
        "stocbio",
        bl.estimators.StocBiO(0.4, terms=8),
        spending=lambda products: bl.estimators.StocBiO(0.3, terms=products + 1),
        bias="(1 - rate mu)^Q",
        on_quadratic=lambda q: q.gradient(q.mapped(lambda h: (1 - (1 - 0.4 * h) ** 8) / h), q.last),
    ),
)
