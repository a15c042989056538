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
from torch import Tensor

from bilevel.linear.base import LinearSolver, Prepared, bound, check_number, check_positive, check_steps
from bilevel.linear.operator import LinearOperator
from bilevel.linear.system import System, wide
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

    Failures: NOT_CONTRACTIVE (the residual ended above that of v = 0: the best iterate is returned, on a GPU
        v = 0), NONFINITE.

    Raises:
        ValueError: an argument is out of range; (when used) the operator is not symmetric.

    Example:
        >>> import torch, bilevel as bl
        >>> A = torch.diag(torch.tensor([1.0, 4.0]))
        >>> solver = bl.linear.Chebyshev(lowest=1.0, highest=4.0, max_steps=20)
        >>> solver.solve(lambda v: (A @ v[0],), (torch.ones(2),)).value[0].round(decimals=4)
        tensor([1.0000, 0.2500])
    """

    sharded = True

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
        system = System(self, b)
        x, residual, steps, best, nonfinite = self._run(system, start, None)
        grown = system.known & ~(residual <= 1)
        x = self.space.where(~grown, x)
        if system.here(grown) and bool(grown.any()):
            # Memory is dearer than products where a solve fails: the iterate is computed again, not remembered.
            del x
            x, kept, *_ = self._run(system, start, torch.where(grown, best, steps))
        else:
            kept = torch.where(grown, 1.0, residual)
        unmet = ~self.solver.met(residual, b)
        flags = (unmet, Status.MAX_STEPS), (grown, Status.NOT_CONTRACTIVE), (nonfinite, Status.NONFINITE)
        return system.finish(x, kept, steps, *flags)

    def _run(
        self, system: System, start: Leaves | None, limit: Tensor | None
    ) -> tuple[Leaves, Tensor, Tensor, Tensor, Tensor]:
        """The recursion, of at most `limit` steps per task: v, its residual, steps, those of the best, not finite."""
        space, solver = self.space, self.solver
        low, high = solver.lowest + solver.damping, solver.highest + solver.damping
        middle, half = (high + low) / 2, (high - low) / 2
        x, r = system.begin(start)
        residual = system.relative(r)
        live, nonfinite = system.known & (residual > system.enough), ~system.known
        steps = best = torch.zeros_like(live, dtype=torch.long)
        least = residual
        d, ratio = space.where(live, space.scaled(1 / middle, r)), half / middle
        for step in range(solver.max_steps):
            if limit is not None:
                live = live & (step < limit)
                d = space.where(live, d)
            if system.nothing_left(live):
                break
            image = system.apply(d)
            finite = torch.isfinite(wide(space.norm(image)))
            # What grew until it overflowed has grown; what is not finite at once is the operator's.
            nonfinite, live = nonfinite | (live & ~finite & (residual <= 1)), live & finite
            x, r = space.axpy(1.0, space.where(live, d), x), space.axpy(-1.0, space.where(live, image), r)
            del image
            residual, steps = torch.where(live, system.relative(r), residual), steps + live
            closer = live & (residual < least)
            least, best = torch.where(closer, residual, least), torch.where(closer, steps, best)
            live = live & (residual > system.enough) & (residual < _AWAY)
            ahead = 1 / (2 * middle / half - ratio) if half else 0.0
            pull = 2 * ahead / half if half else 1 / middle
            d = space.where(live, space.axpy(ahead * ratio, d, space.scaled(pull, r)))
            ratio = ahead
        return x, residual, steps, best, nonfinite


_AWAY = 1e6
"""The relative residual at which a task stops: it has run away."""
