"""Estimators that differentiate the condition for a solution."""

from collections.abc import Callable
from typing import Any

import bilevel as bl
from bilevel.testing.catalogue.entry import AT_SOLUTION, Entry, counts


def at_solution(
    label: str, estimator: bl.Estimator, *, hvps: Callable[[int], int] = lambda products: products, **more: Any
) -> Entry:
    """The entry of an estimator that differentiates the solution with a linear solve: K steps, then the solver's
    products at one more gradient, `hvps` of its budget.
    """
    return Entry(
        label,
        estimator,
        target="solution",
        calls=lambda steps, products: counts(steps + 1, 1, hvps(products), 1),
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
    at_solution(
        "implicit minres",
        bl.Implicit(bl.linear.MINRES(max_steps=40, tol=1e-13)),
        spending=lambda products: bl.Implicit(bl.linear.MINRES(products, tol=0.0)),
        everyday=bl.Implicit(bl.linear.MINRES(max_steps=10)),
    ),
    at_solution(
        "implicit gmres",
        bl.Implicit(bl.linear.GMRES(max_steps=60, restart=6, tol=1e-13)),
        spending=lambda products: bl.Implicit(bl.linear.GMRES(products, restart=products, tol=0.0)),
        everyday=bl.Implicit(bl.linear.GMRES(max_steps=10, restart=10)),
    ),
    at_solution(
        "implicit bicgstab",
        bl.Implicit(bl.linear.BiCGSTAB(max_steps=30, tol=1e-13)),
        hvps=lambda products: 2 * products,
        spending=lambda products: bl.Implicit(bl.linear.BiCGSTAB(products, tol=0.0)),
        everyday=bl.Implicit(bl.linear.BiCGSTAB(max_steps=5)),
    ),
    at_solution(
        "implicit lsmr",
        bl.Implicit(bl.linear.LSMR(max_steps=40, tol=1e-13)),
        hvps=lambda products: 2 * products + 1,
        spending=lambda products: bl.Implicit(bl.linear.LSMR(products, tol=0.0)),
        everyday=bl.Implicit(bl.linear.LSMR(max_steps=10)),
    ),
    at_solution(
        "implicit normal cg",
        bl.Implicit(bl.linear.NormalCG(max_steps=40, tol=1e-13)),
        hvps=lambda products: 2 * products + 1,
        spending=lambda products: bl.Implicit(bl.linear.NormalCG(products, tol=0.0)),
        everyday=bl.Implicit(bl.linear.NormalCG(max_steps=10)),
    ),
    at_solution(
        "implicit chebyshev",
        bl.Implicit(bl.linear.Chebyshev(lowest=0.02, highest=3.0, max_steps=220, tol=1e-13)),
        spending=lambda products: bl.Implicit(bl.linear.Chebyshev(0.02, 3.0, products, tol=0.0)),
        everyday=bl.Implicit(bl.linear.Chebyshev(lowest=0.1, highest=20.0, max_steps=20)),
    ),
    at_solution(
        "implicit cg, nystrom preconditioner",
        bl.Implicit(bl.CG(max_steps=60, tol=1e-13, preconditioner=bl.linear.NystromPreconditioner(rank=2))),
        hvps=lambda products: products + 2,
        spending=lambda products: bl.Implicit(
            bl.CG(products, tol=0.0, preconditioner=bl.linear.NystromPreconditioner(rank=2))
        ),
        everyday=bl.Implicit(bl.CG(max_steps=10, preconditioner=bl.linear.NystromPreconditioner(rank=10))),
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
