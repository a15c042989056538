"""Estimators that differentiate the condition for a solution."""

from typing import Any

import bilevel as bl
from bilevel.testing.catalogue.entry import AT_SOLUTION, Entry, counts


def at_solution(label: str, estimator: bl.Estimator, **more: Any) -> Entry:
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
    at_solution(
        "implicit cg",
        bl.Implicit(bl.CG(max_steps=60, tol=1e-13)),
        spending=lambda products: bl.Implicit(bl.CG(products, tol=0.0)),
        everyday=bl.Implicit(bl.CG(max_steps=10)),
    ),
    at_solution(
        "implicit neumann",
        bl.Implicit(bl.Neumann(steps=2500, step_size=0.8)),
        spending=lambda products: bl.Implicit(bl.Neumann(products, 0.3)),
        everyday=bl.Implicit(bl.Neumann(steps=20, step_size=0.1)),
    ),
    # One product per number of y.
    at_solution("implicit dense", bl.Implicit(bl.Dense()), quadratic_in_inner=True, definite=False),
    at_solution(
        "memory reduced",
        bl.MemoryReduced(steps=60, tol=1e-13),
        spending=lambda products: bl.MemoryReduced(steps=products),
        everyday=bl.MemoryReduced(),
    ),
    at_solution(
        "memory reduced, warm",
        bl.MemoryReduced(steps=60, tol=1e-13, warm_inner=True, warm_adjoint=True),
        spending=lambda products: bl.MemoryReduced(steps=products, warm_inner=True, warm_adjoint=True),
        everyday=bl.MemoryReduced(steps=5, warm_inner=True, warm_adjoint=True),
    ),
)
