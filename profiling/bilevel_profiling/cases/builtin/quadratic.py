"""Random quadratic in float64, where every error is known exactly: six inner numbers, four outer ones."""

import bilevel as bl
from bilevel.problems.quadratic import setup as setup

OPTIMIZER = bl.SGD(lr=1.0)
INNER_STEPS = [5, 20, 80]
SOLUTION = bl.Converge(bl.SGD(lr=1.0), tol=1e-12, max_steps=5000)
OUTER_STEPS = 20

ESTIMATORS = {
    "unrolled": bl.Unrolled(),
    "unrolled iterates": bl.Unrolled(keep="iterates"),
    "unrolled segments": bl.Unrolled(keep="segments"),
    "unrolled last 5": bl.Unrolled(last=5),
    "implicit dense": bl.Implicit(bl.Dense()),
    "implicit CG": bl.Implicit(bl.CG(max_steps=6, tol=1e-10)),
    "implicit Neumann": bl.Implicit(bl.Neumann(steps=10, step_size=1.0)),
    "memory-reduced": bl.MemoryReduced(),
    "first-order corrected": bl.FirstOrderCorrected(),
    # It sees x only in the outer loss and at the start of the inner loop, so nearly all of the hypergradient escapes
    # it.
    "first-order": bl.FirstOrder(),
}
