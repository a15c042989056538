"""Estimators that differentiate the condition for a solution."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from bilevel.testing.catalogue.entry import AT_SOLUTION, GRADIENTS, Entry, counts
from bilevel.testing.catalogue.quadratic import Quadratic


def _eye(quadratic: Quadratic) -> Tensor:
    return torch.eye(len(quadratic.H), dtype=quadratic.H.dtype)


def one_step(label: str, estimator: bl.Estimator, **more: Any) -> Entry:
    """The entry of an estimator that takes what a single step makes of x for what all of them do."""
    return Entry(label, estimator, target="program", memory="constant", **({"sees": GRADIENTS} | more))


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
        definite=False,
        spending=lambda products: bl.Implicit(bl.linear.MINRES(products, tol=0.0)),
        everyday=bl.Implicit(bl.linear.MINRES(max_steps=10)),
    ),
    at_solution(
        "implicit gmres",
        bl.Implicit(bl.linear.GMRES(max_steps=60, restart=6, tol=1e-13)),
        definite=False,
        spending=lambda products: bl.Implicit(bl.linear.GMRES(products, restart=products, tol=0.0)),
        everyday=bl.Implicit(bl.linear.GMRES(max_steps=10, restart=10)),
    ),
    at_solution(
        "implicit bicgstab",
        bl.Implicit(bl.linear.BiCGSTAB(max_steps=30, tol=1e-13)),
        definite=False,
        hvps=lambda products: 2 * products,
        spending=lambda products: bl.Implicit(bl.linear.BiCGSTAB(products, tol=0.0)),
        everyday=bl.Implicit(bl.linear.BiCGSTAB(max_steps=5)),
    ),
    at_solution(
        "implicit lsmr",
        bl.Implicit(bl.linear.LSMR(max_steps=40, tol=1e-13)),
        definite=False,
        hvps=lambda products: 2 * products + 1,
        spending=lambda products: bl.Implicit(bl.linear.LSMR(products, tol=0.0)),
        everyday=bl.Implicit(bl.linear.LSMR(max_steps=10)),
    ),
    at_solution(
        "implicit normal cg",
        bl.Implicit(bl.linear.NormalCG(max_steps=40, tol=1e-13)),
        definite=False,
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
    at_solution(
        "fixed point",
        bl.estimators.FixedPoint(bl.linear.GMRES(max_steps=80, restart=40, tol=1e-13)),
        definite=False,
        spending=lambda products: bl.estimators.FixedPoint(bl.linear.GMRES(products, restart=products, tol=0.0)),
        everyday=bl.estimators.FixedPoint(bl.linear.GMRES(max_steps=10, restart=10)),
    ),
    one_step(
        "T1-T2",
        bl.estimators.T1T2(),
        calls=lambda steps, products: counts(steps + 1, 1, 0, 1),
        bias="scale * h in each direction of curvature h, for 1",
        sees=AT_SOLUTION,
        on_quadratic=lambda q: q.gradient(_eye(q), q.last),
    ),
    one_step(
        "T1-T2, by a difference",
        bl.estimators.T1T2(difference=True),
        calls=lambda steps, products: counts(steps + 2, 1, 0, 0),
        bias="scale * h in each direction of curvature h, for 1; radius^2",
        on_quadratic=lambda q: q.gradient(_eye(q), q.last),
    ),
    one_step(
        "T1-T2, half",
        bl.estimators.T1T2(scale=0.5),
        calls=lambda steps, products: counts(steps + 1, 1, 0, 1),
        bias="h / 2 in each direction of curvature h, for 1",
        sees=AT_SOLUTION,
        on_quadratic=lambda q: q.gradient(0.5 * _eye(q), q.last),
    ),
    one_step(
        "sama",
        bl.estimators.Sama(),
        # Of no steps, the first one is differentiated.
        calls=lambda steps, products: counts(max(steps, 1) + 2, 1, 0, 0),
        bias="that of the last step alone",
        # A bilinear coupling has the same difference at any radius.
        on_quadratic=lambda q: q.gradient(q.rate * _eye(q), q.last),
    ),
    one_step(
        "darts",
        bl.estimators.Darts(xi=0.3),
        calls=lambda steps, products: counts(steps + 3, 1, 0, 0),
        bias="that of one virtual step",
        on_quadratic=lambda q: q.gradient(0.3 * _eye(q), q.last - 0.3 * q.H @ (q.last - q.solution)),
    ),
)
