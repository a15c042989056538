"""Conjugate gradients on the normal equations: A'A v = A'b, without forming A'A.

    a = |s|^2 / |A p|^2;  v <- v + a p;  r <- r - a A p;  s = A'r;  p <- s + (|s new|^2 / |s old|^2) p

| | products with A | with A' | memory |
| --- | --- | --- | --- |
| iterate | at most max_steps, one more with a start | max_steps + 1 | v, r, p, s, A p: 5 P |
| iterate, least_squares | one more, for the true A'(b - A v) | one more | |
| solve | one more, for the true residual | | |

Wins: a singular A, definite or not, symmetric or not: in tests of peers the solver that was right to 3e-6 where plain
conjugate gradients failed; |b - A v| falls with every step.
Fails: the condition number of A'A is that of A squared, and so are the steps.
Reference: Hestenes and Stiefel 1952 (CGLS). Differences from peers: jaxopt's and torchopt's form A'(A v), whose
rounding is that of the squared condition number; this one follows r itself.
"""

import dataclasses
from collections.abc import Callable

import torch

from bilevel.linear.base import LinearSolver, Prepared, bound, check_number, check_steps
from bilevel.linear.operator import LinearOperator
from bilevel.linear.system import LeastSquares, System, divided, wide
from bilevel.outcome import LinearSolution
from bilevel.space.inner_product import PLAIN, Leaves, Space


@dataclasses.dataclass(frozen=True)
class NormalCG(LinearSolver):
    """Conjugate gradients on the normal equations.

    Args:
        max_steps: steps of two products each, one with A and one with its transpose.
        tol: on |b - A v| / |b|; with least_squares on |A'(b - A v)| / |A'b|.
        damping: solves (A + damping I) v = b; A must be square.
        least_squares: whether b may lie outside the range of A: the least squares solution is then what was asked for,
            else it is a failure.

    Memory: 5 P; independent of the steps; linear in the tasks.

    Failures: BREAKDOWN (b is not in the range of A; the least squares solution so far is returned), UNSOLVED,
    NONFINITE.

    Raises:
        ValueError: an argument is out of range; (when used) A is not symmetric and has no transposed product, or it is
            not square and there is damping.

    Example:
        >>> import torch, bilevel as bl
        >>> A = torch.tensor([[1.0, 0.0], [0.0, -2.0], [0.0, 0.0]])
        >>> operator = bl.linear.Rectangular(lambda v: (A @ v[0],), lambda u: (A.T @ u[0],))
        >>> bl.linear.NormalCG(least_squares=True).solve(operator, (torch.ones(3),)).value[0].round(decimals=4)
        tensor([ 1.0000, -0.5000])
    """

    sharded = True

    max_steps: int = 20
    tol: float = 1e-6
    damping: float = 0.0
    least_squares: bool = False

    def __post_init__(self) -> None:
        check_steps("NormalCG", "max_steps", self.max_steps)
        check_number("NormalCG", "tol", self.tol, 0.0)
        check_number("NormalCG", "damping", self.damping, 0.0)

    def prepare(
        self, operator: LinearOperator | Callable[[Leaves], Leaves], space: Space = PLAIN
    ) -> "PreparedNormalCG":
        return PreparedNormalCG(self, bound("NormalCG", operator, transposed=True, rectangular=True), space)


class PreparedNormalCG(Prepared):
    """NormalCG bound to one operator; nothing is kept between right-hand sides."""

    solver: NormalCG

    def iterate(self, b: Leaves, start: Leaves | None = None) -> LinearSolution:
        system, space = System(self, b, start), self.space
        x, r, s, scale = system.begin_least_squares(start, pulled_b=self.solver.least_squares)
        residual, floor = system.relative(r), system.floor
        slope = wide(space.norm(s))
        nonfinite = ~torch.isfinite(slope)
        live = system.known & ~nonfinite & (residual > system.enough)
        inconsistent = live & (slope == 0)
        live = live & ~inconsistent
        p, steps, largest = space.where(live, s), torch.zeros_like(live, dtype=torch.long), torch.zeros_like(slope)
        del s
        for _ in range(self.solver.max_steps):
            if system.nothing_left(live):
                break
            image = system.apply(p)
            stretch, length = wide(space.norm(image)), wide(space.norm(p))
            finite = torch.isfinite(stretch)
            nonfinite, live = nonfinite | (live & ~finite), live & finite
            largest = torch.where(live, torch.maximum(largest, divided(stretch, length, live & (length > 0))), largest)
            # A is zero along p but for rounding.
            flat = live & (stretch <= floor * largest * length)
            inconsistent, live = inconsistent | flat, live & ~flat
            alpha = divided(slope**2, stretch**2, live)
            x, r = space.axpy(alpha, p, x), space.where(live, space.axpy(-alpha, image, r), r)
            del image
            steps, residual = steps + live, torch.where(live, system.relative(r), residual)
            s = system.apply_transposed(r)
            before, slope = slope, wide(space.norm(s))
            finite = torch.isfinite(slope)
            nonfinite, live = nonfinite | (live & ~finite), live & finite
            unmet = residual > system.enough
            # A' sees next to nothing of the residual: no v leaves less.
            spent = slope <= floor * largest * residual * system.norm
            if self.solver.least_squares:
                spent = spent | (slope <= max(self.solver.tol, floor) * scale)
            inconsistent = inconsistent | (live & unmet & spent)
            live = live & unmet & ~spent
            p = space.where(live, space.axpy(divided(slope, before, live) ** 2, p, s))
            del s
        return LeastSquares(system, scale).finish(x, residual, 2 * steps, inconsistent, nonfinite)
