"""Chebyshev's iteration for a symmetric A whose spectrum is known to lie in an interval.

    v_k minimizes the largest |p_k(h)|, p_k(0) = 1, over lowest <= h <= highest;    |r_k| <= |b| / T_k(c),
    c = (highest + lowest) / (highest - lowest)

| | products with A | memory |
| --- | --- | --- |
| iterate | max_steps (fewer where tol is met, on the CPU), one more with a start | v, r, d, A d: 4 P |
| solve | one more, for the true residual | |

Wins: no inner product steers it: it is a fixed polynomial of A, so it is linear in b, the same for all tasks, and a
sharded vector needs no reduction to go on. At the same products it beats the Neumann series by a square root of the
condition number.
Fails: an eigenvalue outside the interval makes it grow (NOT_CONTRACTIVE); conjugate gradients need no interval and are
never slower in the energy norm. `bilevel.linear.spectrum` finds the interval.
Reference: Golub and Varga 1961; Saad, Iterative Methods, algorithm 12.1. Differences from peers: none has it.
"""

import dataclasses
from collections.abc import Callable

import torch

from bilevel.linear.base import LinearSolver, Prepared, bound, check_number, check_positive, check_steps
from bilevel.linear.operator import LinearOperator
from bilevel.linear.system import System
from bilevel.outcome import LinearSolution, Status
from bilevel.space.inner_product import PLAIN, Leaves, Space


@dataclasses.dataclass(frozen=True)
class Chebyshev(LinearSolver):
    """Chebyshev's iteration.

    Args:
        lowest: no eigenvalue of A on which b has a part lies below; positive.
        highest: none lies above.
        max_steps: the most products.
        tol: on |b - A v| / |b|.
        damping: solves (A + damping I) v = b; the interval is that of A.

    Memory: 4 P; independent of the steps; linear in the tasks.

    Failures: NOT_CONTRACTIVE (the residual ended above that of v = 0: v = 0 is returned), NONFINITE.

    Raises:
        ValueError: an argument is out of range; (when used) the operator is not symmetric.

    Example:
        >>> import torch, bilevel as bl
        >>> A = torch.diag(torch.tensor([1.0, 4.0]))
        >>> solver = bl.linear.Chebyshev(lowest=1.0, highest=4.0, max_steps=20)
        >>> solver.solve(lambda v: (A @ v[0],), (torch.ones(2),)).value[0].round(decimals=4)
        tensor([1.0000, 0.2500])
    """

    worse_than_zero = Status.NOT_CONTRACTIVE

    lowest: float
    highest: float
    max_steps: int = 20
    tol: float = 1e-6
    damping: float = 0.0

    def __post_init__(self) -> None:
        check_positive("Chebyshev", "lowest", self.lowest)
        check_number("Chebyshev", "highest", self.highest, self.lowest)
        check_steps("Chebyshev", "max_steps", self.max_steps)
        check_number("Chebyshev", "tol", self.tol, 0.0)
        check_number("Chebyshev", "damping", self.damping, 0.0)

    def prepare(
        self, operator: LinearOperator | Callable[[Leaves], Leaves], space: Space = PLAIN
    ) -> "PreparedChebyshev":
        return PreparedChebyshev(self, bound("Chebyshev", operator, symmetric=True), space)


class PreparedChebyshev(Prepared):
    """Chebyshev's iteration bound to one operator; nothing is kept between right-hand sides."""

    solver: Chebyshev

    def iterate(self, b: Leaves, start: Leaves | None = None) -> LinearSolution:
        system, space, solver = System(self, b), self.space, self.solver
        low, high = solver.lowest + solver.damping, solver.highest + solver.damping
        middle, half = (high + low) / 2, (high - low) / 2
        x, r = system.begin(start)
        residual = system.relative(r)
        live, nonfinite = system.known & (residual > system.enough), ~system.known
        steps = torch.zeros_like(live, dtype=torch.long)
        d, ratio = space.where(live, space.scaled(1 / middle, r)), half / middle
        for _ in range(solver.max_steps):
            if system.nothing_left(live):
                break
            image = system.apply(d)
            x, r = space.axpy(1.0, d, x), space.axpy(-1.0, image, r)
            del image
            after = system.relative(r)
            # What grew until it overflowed has grown; what is not finite at once is the operator's.
            nonfinite = nonfinite | (live & ~torch.isfinite(after) & (residual <= 1))
            residual, steps = torch.where(live, after, residual), steps + live
            live = live & (residual > system.enough) & (residual < _AWAY)
            ahead = 1 / (2 * middle / half - ratio) if half else 0.0
            pull = 2 * ahead / half if half else 1 / middle
            d = space.where(live, space.axpy(ahead * ratio, d, space.scaled(pull, r)))
            ratio = ahead
        unmet = ~solver.met(residual, b)
        x = space.where(torch.isfinite(residual), x)
        return system.finish(
            x, residual, steps, (unmet & (residual <= 1), Status.MAX_STEPS), (nonfinite, Status.NONFINITE)
        )


_AWAY = 1e6
"""The relative residual at which a task stops: it has run away."""
