"""Stabilized biconjugate gradients: any square A, in few vectors.

    a = z'r / z'Ap;  s = r - a A p;  w = (As)'s / |As|^2;  v <- v + a p + w s;  r <- s - w A s
    p <- r + (z'r new / z'r) (a / w) (p - w A p)

| | products with A | memory |
| --- | --- | --- |
| iterate | at most 2 max_steps, one more with a start | v, its best, r, p, z, A p, A s: 8 P |
| solve | one more, for the true residual | |

The shadow vector z looks drawn at random: that of the textbook, z = r, breaks down on diag(1, -1) with b = (1, 1), as
scipy's does. Where z'r or z'Ap vanishes all the same, a mask begins anew with z + r.

Wins: maps that are not symmetric, where GMRES has no memory for its basis.
Fails: the residual goes up and down (the best iterate is returned); eigenvalues near the imaginary axis stop it
(BREAKDOWN: take GMRES).
Reference: van der Vorst 1992. Differences from peers: the z of jaxopt's and scipy's is r; neither keeps the best
iterate.
"""

import dataclasses
from collections.abc import Callable

import torch

from bilevel.linear.base import LinearSolver, Prepared, bound, check_number, check_steps, epsilon
from bilevel.linear.operator import LinearOperator
from bilevel.linear.system import System, divided, random_like, wide
from bilevel.outcome import LinearSolution, Status
from bilevel.space.inner_product import PLAIN, Leaves, Space

_AWAY = 1e6
"""The relative residual at which a recursion has run away."""


@dataclasses.dataclass(frozen=True)
class BiCGSTAB(LinearSolver):
    """Stabilized biconjugate gradients.

    Args:
        max_steps: steps of two products each.
        tol: on |b - A v| / |b|.
        damping: solves (A + damping I) v = b.
        seed: of the shadow vector; no generator is asked.

    Memory: 8 P; independent of the steps; linear in the tasks.

    Failures, all with the best iterate: BREAKDOWN (the recursion ran away or stood still), NONFINITE.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> A = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
        >>> skewed = bl.linear.Product(lambda v: (A @ v[0],), symmetric=False)
        >>> bl.linear.BiCGSTAB(max_steps=5).solve(skewed, (torch.tensor([4.0, 2.0]),)).value[0].round(decimals=3)
        tensor([1., 2.])
    """

    max_steps: int = 20
    tol: float = 1e-6
    damping: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_steps("BiCGSTAB", "max_steps", self.max_steps)
        check_number("BiCGSTAB", "tol", self.tol, 0.0)
        check_number("BiCGSTAB", "damping", self.damping, 0.0)

    def prepare(
        self, operator: LinearOperator | Callable[[Leaves], Leaves], space: Space = PLAIN
    ) -> "PreparedBiCGSTAB":
        return PreparedBiCGSTAB(self, bound("BiCGSTAB", operator), space)


class PreparedBiCGSTAB(Prepared):
    """BiCGSTAB bound to one operator; nothing is kept between right-hand sides."""

    solver: BiCGSTAB

    def iterate(self, b: Leaves, start: Leaves | None = None) -> LinearSolution:
        system, space = System(self, b), self.space
        floor = system.floor
        x, r = system.begin(start)
        residual = system.relative(r)
        best, least, lowest, live = x, residual, residual, system.known & (residual > system.enough)
        largest = torch.zeros_like(residual)
        nonfinite, broken = ~system.known, torch.zeros_like(live)
        steps = torch.zeros_like(live, dtype=torch.long)
        z = random_like(r, self.solver.seed, space)
        p, rho = r, wide(space.dot(z, r))
        for _ in range(self.solver.max_steps):
            if system.nothing_left(live):
                break
            p = space.where(live, p)
            image = system.apply(p)
            size, across, shadow = wide(space.norm(image)), wide(space.dot(z, image)), wide(space.norm(z))
            finite = torch.isfinite(size) & torch.isfinite(across)
            nonfinite, live = nonfinite | (live & ~finite), live & finite
            image, length = space.where(live, image), wide(space.norm(p))
            largest = torch.maximum(largest, divided(size, length, live & (length > 0)))
            flat = across.abs() <= floor * size * shadow
            alpha = divided(rho, across, live & ~flat)
            x, r = space.axpy(alpha, p, x), space.where(live, space.axpy(-alpha, image, r))
            moved = system.apply(r)
            stretch, along = wide(space.norm(moved)), wide(space.dot(moved, r))
            finite = torch.isfinite(stretch) & torch.isfinite(along)
            nonfinite, live = nonfinite | (live & ~finite), live & finite
            moved = space.where(live, moved)
            still = along.abs() <= floor * stretch * wide(space.norm(r))
            omega = divided(along, stretch**2, live & ~still)
            x, r = space.axpy(omega, r, x), space.axpy(-omega, moved, r)
            del moved
            steps, residual = steps + live, system.relative(r)
            # A v so large that its rounding shows is no gain: a singular A leads there.
            score = residual + floor * largest * wide(space.norm(x)) / system.norm
            closer = live & (score < lowest)
            best, lowest = space.where(closer, x, best), torch.where(closer, score, lowest)
            least = torch.where(closer, residual, least)
            away = live & ~(residual <= _AWAY)
            # Neither half of a step moves anything: nothing ever will.
            stuck = live & flat & still
            broken, live = broken | away | stuck, live & ~away & ~stuck & (least > system.enough)
            new, length = wide(space.dot(z, r)), residual * system.norm
            again = flat | still | (new.abs() <= floor * shadow * length)
            turn = live & again & (length > 0)
            z = space.where(turn, space.axpy(divided(shadow, length, turn), r, z), z)
            beta = divided(new, rho, live & ~again) * divided(alpha, omega, live & ~again)
            p = space.axpy(beta, space.axpy(-omega, image, p), r)
            rho = torch.where(again, wide(space.dot(z, r)), new)
        unmet = ~self.solver.met(least, b)
        # A v that hardly reduced the residual and is so large that A v is rounded in its third digit.
        long = epsilon(b) * largest * wide(space.norm(best)) > max(1e-3, 10 * epsilon(b)) * system.norm
        broken = broken | (long & (least > 0.1))
        return system.finish(
            best,
            least,
            2 * steps,
            (unmet, Status.MAX_STEPS),
            (broken & unmet, Status.BREAKDOWN),
            (nonfinite, Status.NONFINITE),
        )
