"""Minimal residuals for a symmetric A, definite or not.

    Lanczos:  A V_k = V_{k+1} T_k;      v_k minimizes |b - A v| over span(b, A b, ..., A^{k-1} b)

| | products with A | memory |
| --- | --- | --- |
| iterate | at most max_steps, one more with a start | v, two residuals, two directions, A v: 7 P |
| solve | one more, for the true residual | |

Wins: a Hessian that is symmetric and not positive definite, where conjugate gradients must stop; |b - A v| never rises,
so that a solve cut short is the best of its length.
Fails: at a point that is no minimizer the number is that of a saddle: solvable, and no hypergradient of an argmin. An
ill-conditioned A takes as many steps as for conjugate gradients.
Reference: Paige and Saunders 1975; with a preconditioner, Choi, Paige and Saunders 2011 (formulas recalled).
Differences from peers: torchopt, Betty and hypertorch have none; scipy's stops on an estimate, here the true residual
decides; a b outside the range of a singular A is told (BREAKDOWN), and the least squares solution reached is returned.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from bilevel.linear.base import LinearSolver, Prepared, bound, check_number, check_steps
from bilevel.linear.operator import LinearOperator
from bilevel.linear.preconditioners.base import Preconditioning, as_preconditioner, prepared_preconditioner
from bilevel.linear.system import System, divided, wide
from bilevel.outcome import LinearSolution, Status
from bilevel.space.inner_product import PLAIN, Leaves, Space


@dataclasses.dataclass(frozen=True)
class MINRES(LinearSolver):
    """Minimal residuals.

    Args:
        max_steps: the most products.
        tol: on |b - A v| / |b|; with a preconditioner M the recursion stops on sqrt(r'Mr / b'Mb), and the true residual
            decides on the status.
        damping: solves (A + damping I) v = b.
        preconditioner: M near the inverse of A, symmetric and positive definite: a `Preconditioner`, or a function
            r -> M r.

    Memory: 7 P, 8 P with a preconditioner; independent of the steps; linear in the tasks.

    Failures: BREAKDOWN (b is not in the range of A; the least squares solution so far is returned), UNSOLVED,
    NONFINITE. Never NEGATIVE_CURVATURE.

    Raises:
        ValueError: an argument is out of range; (when used) the operator is not symmetric.

    Example:
        >>> import torch, bilevel as bl
        >>> A = torch.diag(torch.tensor([1.0, -1.0]))
        >>> bl.linear.MINRES(max_steps=5).solve(lambda v: (A @ v[0],), (torch.ones(2),)).value[0].round(decimals=4)
        tensor([ 1., -1.])
    """

    sharded = True

    max_steps: int = 20
    tol: float = 1e-6
    damping: float = 0.0
    preconditioner: Preconditioning | None = None

    def __post_init__(self) -> None:
        check_steps("MINRES", "max_steps", self.max_steps)
        check_number("MINRES", "tol", self.tol, 0.0)
        check_number("MINRES", "damping", self.damping, 0.0)
        as_preconditioner("MINRES", self.preconditioner)

    def prepare(self, operator: LinearOperator | Callable[[Leaves], Leaves], space: Space = PLAIN) -> "PreparedMINRES":
        return PreparedMINRES(self, bound("MINRES", operator, symmetric=True), space)


class PreparedMINRES(Prepared):
    """MINRES bound to one operator; the preconditioner is made at the first right-hand side and used for all."""

    solver: MINRES
    _inverse: Callable[[Leaves], Leaves] | None = None

    def iterate(self, b: Leaves, start: Leaves | None = None) -> LinearSolution:
        system = System(self, b)
        if self.solver.preconditioner is not None and self._inverse is None:
            self._inverse = prepared_preconditioner(self.solver.preconditioner, self.shifted, self.space, b)
        run = self._run(system, start, None)
        unmet = ~self.solver.met(run.residual, b)
        singular = (run.singular | run.improper) & unmet
        value, residual, steps = run.value, run.residual, run.steps
        if system.here(singular) and bool(singular.any()):
            # What was added since A could reduce the residual is noise; it is computed again, not remembered.
            limit = torch.where(singular, run.spent_at, run.steps)
            del run.value, value
            again = self._run(system, start, limit)
            value, residual = again.value, again.residual
        flags = (unmet, Status.MAX_STEPS), (singular, Status.BREAKDOWN), (run.nonfinite, Status.NONFINITE)
        return system.finish(value, residual, steps, *flags)

    def _run(self, system: System, start: Leaves | None, limit: Tensor | None) -> "_Run":
        """The recursion, of at most `limit` steps per task."""
        space = self.space
        x, r2 = system.begin(start)
        first = system.relative(r2)
        y = r2 if self._inverse is None else self._inverse(r2)
        squared = wide(space.dot(r2, y))
        improper, length = squared < 0, squared.clamp_min(0.0).sqrt()
        enough = length * system.enough / torch.where(first > 0, first, 1.0)
        live = system.known & (first > system.enough) & torch.isfinite(length) & (length > 0)
        nonfinite, singular = system.known & ~torch.isfinite(squared), torch.zeros_like(live)
        norm, left, length_first, floor = torch.where(length > 0, length, 1.0), length, length, system.floor
        zero, steps = torch.zeros_like(length), torch.zeros_like(live, dtype=torch.long)
        before, dbar, over, cs, sn, largest = zero, zero, zero, zero - 1, zero, zero
        least, spent_at = zero + float("inf"), steps
        r1, w2 = space.zeros_like(r2), space.zeros_like(r2)
        w = w2
        for step in range(self.solver.max_steps):
            if limit is not None:
                live = live & (step < limit)
            if system.nothing_left(live):
                break
            q = system.unit(y, length, live)
            y = system.apply(q)
            if step:
                y = space.axpy(-divided(length, before, live), r1, y)
            along = wide(space.dot(q, y))
            y = space.axpy(-divided(along, length, live), r2, y)
            r1, r2 = r2, y
            if self._inverse is not None:
                y = self._inverse(r2)
            squared = wide(space.dot(r2, y))
            finite = torch.isfinite(along) & torch.isfinite(squared)
            nonfinite, improper = nonfinite | (live & ~finite), improper | (live & finite & (squared < 0))
            live = live & finite & ~improper
            before, length = length, torch.where(live, squared, 0.0).sqrt()
            along = torch.where(live, along, 0.0)
            largest = torch.maximum(largest, torch.hypot(along, length))
            # What rounding leaves of a Lanczos vector is nothing: the space is used up.
            ended = length <= floor * largest
            length = torch.where(ended, 0.0, length)
            # The rotations that turn T into a triangle.
            last, delta, gbar = over, cs * dbar + sn * along, sn * dbar - cs * along
            over, dbar = sn * length, -cs * length
            gamma, reach = torch.hypot(gbar, length), torch.hypot(gbar, dbar)
            # |A r| / |r|: where it is least, next to nothing that A reaches is left in r.
            nearer = live & (reach < least)
            least, spent_at = torch.where(nearer, reach, least), torch.where(nearer, steps, spent_at)
            singular = singular | (live & ((reach <= floor * largest) | (gamma <= floor * largest)))
            live = live & ~singular
            cs, sn = (
                torch.where(live, divided(gbar, gamma, live), cs),
                torch.where(live, divided(length, gamma, live), sn),
            )
            w1, w2 = w2, w
            w = system.unit(space.axpy(-delta, w2, space.axpy(-last, w1, q)), gamma, live)
            # |A w| = 1: a direction that is as long as this is one on which A is zero but for rounding.
            noise = live & (floor * largest * wide(space.norm(w)) > 1)
            singular, live = singular | noise, live & ~noise
            x = space.axpy(torch.where(live, cs * left, 0.0), w, x)
            left, steps = torch.where(live, sn * left, left), steps + live
            live = live & (left.abs() > enough) & ~ended
        residual = torch.where(length_first > 0, left.abs() / norm, 1.0) * first
        return _Run(x, residual, steps, nonfinite, singular, improper, spent_at)


@dataclasses.dataclass
class _Run:
    """Where a recursion ended; all but `value` are per task."""

    value: Leaves
    residual: Tensor
    steps: Tensor
    nonfinite: Tensor
    singular: Tensor
    improper: Tensor
    """Whether the preconditioner proved not to be positive definite."""
    spent_at: Tensor
    """How many steps had been made when |A r| / |r| was least."""
