"""Least squares by bidiagonalization: any A whose transposed product is known, square or not, singular or not.

    Golub-Kahan:  A V_k = U_{k+1} B_k;      v_k minimizes |A'(b - A v)| over span(A'b, (A'A) A'b, ...)

| | products with A | with A' | memory |
| --- | --- | --- | --- |
| iterate | at most max_steps, one more with a start | max_steps + 1 | v, two directions, two of the basis, A v: 6 P |
| iterate, least_squares | one more, for the true A'(b - A v) | one more | |
| solve | one more, for the true residual | | |

Wins: singular and non-square systems: from zero it goes to the solution of least norm, or, where there is none, to the
least squares solution; both |b - A v| and |A'(b - A v)| fall with every step.
Fails: the condition number of A'A is that of A squared, and so are the steps: with a definite A take CG, with a
symmetric one MINRES.
Reference: Fong and Saunders 2011, arXiv 1006.0758 (formulas recalled; held against scipy's in the tests). Differences
from peers: curvlinops' goes through scipy and numpy, vector by vector; this one stays on the device, and masks tasks.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from bilevel.linear.base import LinearSolver, Prepared, bound, check_number, check_steps
from bilevel.linear.operator import LinearOperator
from bilevel.linear.system import LeastSquares, System, divided, wide
from bilevel.outcome import LinearSolution
from bilevel.space.inner_product import PLAIN, Leaves, Space


@dataclasses.dataclass(frozen=True)
class LSMR(LinearSolver):
    """Least squares minimal residuals.

    Args:
        max_steps: steps of two products each, one with A and one with its transpose.
        tol: on |b - A v| / |b|; with least_squares on |A'(b - A v)| / |A'b|.
        damping: solves (A + damping I) v = b; A must be square.
        least_squares: whether b may lie outside the range of A: the least squares solution is then what was asked for,
            else it is a failure.

    Memory: 6 P; independent of the steps; linear in the tasks.

    Failures: BREAKDOWN (b is not in the range of A; the least squares solution so far is returned), UNSOLVED,
    NONFINITE.

    Raises:
        ValueError: an argument is out of range; (when used) A is not symmetric and has no transposed product, or it is
            not square and there is damping.

    Example:
        >>> import torch, bilevel as bl
        >>> A = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
        >>> bl.linear.LSMR().solve(lambda v: (A @ v[0],), (torch.full((2,), 2.0),)).value[0].round(decimals=4)
        tensor([1., 1.])
    """

    sharded = True

    max_steps: int = 20
    tol: float = 1e-6
    damping: float = 0.0
    least_squares: bool = False

    def __post_init__(self) -> None:
        check_steps("LSMR", "max_steps", self.max_steps)
        check_number("LSMR", "tol", self.tol, 0.0)
        check_number("LSMR", "damping", self.damping, 0.0)

    def prepare(self, operator: LinearOperator | Callable[[Leaves], Leaves], space: Space = PLAIN) -> "PreparedLSMR":
        return PreparedLSMR(self, bound("LSMR", operator, transposed=True, rectangular=True), space)


class PreparedLSMR(Prepared):
    """LSMR bound to one operator; nothing is kept between right-hand sides."""

    solver: LSMR

    def iterate(self, b: Leaves, start: Leaves | None = None) -> LinearSolution:
        system, space = System(self, b, start), self.space
        x, u, v, scale = system.begin_least_squares(start, pulled_b=self.solver.least_squares)
        first, floor = system.relative(u), system.floor
        beta = wide(space.norm(u))
        u = system.unit(u, beta, beta > 0)
        v = space.scaled(divided(torch.ones_like(beta), beta, beta > 0), v)
        alpha = wide(space.norm(v))
        nonfinite = ~torch.isfinite(alpha)
        live = system.known & ~nonfinite & (alpha > 0) & (first > system.enough)
        inconsistent = system.known & ~nonfinite & (alpha == 0) & (first > system.enough)
        v = system.unit(v, alpha, live)
        h, hbar = v, space.zeros_like(v)
        one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
        left, alphabar = torch.where(live, alpha * beta, 0.0), alpha
        rho, rhobar, cbar, sbar, zeta = one, one, one, zero, zero
        size, steps = torch.where(live, alpha, 0.0) ** 2, torch.zeros_like(live, dtype=torch.long)
        norm = _ResidualNorm(beta)
        residual = first
        for _ in range(self.solver.max_steps):
            if system.nothing_left(live):
                break
            u = space.axpy(-alpha, u, system.apply(v))
            beta = wide(space.norm(u))
            finite = torch.isfinite(beta)
            beta = torch.where(live & finite & (beta > floor * size.sqrt()), beta, 0.0)
            u = system.unit(u, beta, beta > 0)
            v = space.axpy(-beta, v, system.apply_transposed(u))
            alpha = wide(space.norm(v))
            finite = finite & torch.isfinite(alpha)
            nonfinite, live = nonfinite | (live & ~finite), live & finite
            size = size + torch.where(live, beta, 0.0) ** 2
            alpha = torch.where(live & (beta > 0) & (alpha > floor * size.sqrt()), alpha, 0.0)
            size = size + alpha**2
            v = system.unit(v, alpha, alpha > 0)
            # Two rotations: B to a triangle, and the transpose of that.
            old, oldbar, oldzeta = rho, rhobar, zeta
            rho = torch.hypot(alphabar, beta)
            going = live & (rho > floor * size.sqrt())
            c, s = divided(alphabar, rho, going), divided(beta, rho, going)
            theta, alphabar = s * alpha, c * alpha
            thetabar, inner = sbar * rho, cbar * rho
            rhobar = torch.hypot(inner, theta)
            going = going & (rhobar > floor * size.sqrt())
            cbar, sbar = divided(inner, rhobar, going), divided(theta, rhobar, going)
            zeta, left = torch.where(going, cbar * left, 0.0), torch.where(going, -sbar * left, left)
            hbar = space.where(going, space.axpy(-divided(thetabar * rho, old * oldbar, going), hbar, h))
            x = space.axpy(divided(zeta, rho * rhobar, going), hbar, x)
            h = space.where(going, space.axpy(-divided(theta, rho, going), h, v))
            residual = torch.where(
                going, norm.after(c, s, thetabar, rhobar, zeta, oldzeta, going) / system.norm, residual
            )
            steps = steps + going
            unmet = residual > system.enough
            # A' sees next to nothing of the residual: no v leaves less.
            spent = left.abs() <= (max(self.solver.tol, floor) * scale if self.solver.least_squares else 0.0)
            spent = spent | (left.abs() <= floor * size.sqrt() * residual * system.norm) | ~going
            inconsistent = inconsistent | (live & unmet & spent)
            live = going & unmet & ~spent & (alpha > 0)
        return LeastSquares(system, scale).finish(x, residual, 2 * steps, inconsistent, nonfinite)


class _ResidualNorm:
    """|b - A v| of LSMR, followed by its own rotations. All numbers are per task."""

    def __init__(self, beta: Tensor) -> None:
        zero = torch.zeros_like(beta)
        self._next, self._bent, self._rho, self._tau = beta, zero, torch.ones_like(beta), zero
        self._theta = zero

    def after(
        self, c: Tensor, s: Tensor, thetabar: Tensor, rhobar: Tensor, zeta: Tensor, oldzeta: Tensor, going: Tensor
    ) -> Tensor:
        """The norm after a step; tasks that do not go on keep theirs outside."""
        here, self._next = c * self._next, -s * self._next
        length = torch.hypot(self._rho, thetabar)
        ct, st = divided(self._rho, length, going & (length > 0)), divided(thetabar, length, going & (length > 0))
        old, self._theta = self._theta, st * rhobar
        self._rho = ct * rhobar
        self._bent = -st * self._bent + ct * here
        self._tau = divided(oldzeta - old * self._tau, length, going & (length > 0))
        ahead = divided(zeta - self._theta * self._tau, self._rho, going & (self._rho != 0))
        return torch.hypot(self._bent - ahead, self._next)
