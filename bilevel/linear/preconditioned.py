"""Conjugate gradients with a preconditioner M near the inverse of A.

    z = M r;  a = r'z / p'Ap;  v <- v + a p;  r <- r - a A p;  p <- z + (r'z new / r'z old) p

| | products with A | memory |
| --- | --- | --- |
| iterate | at most max_steps, one more with a start | v, its best, r, z, p, A p: 6 P, and M |

|b - A v| may rise on the way, as without M; the best iterate is returned.
"""

from collections.abc import Callable

import torch

from bilevel.linear.base import LinearSolver, Prepared
from bilevel.linear.operator import LinearOperator
from bilevel.linear.preconditioners.base import Preconditioning, prepared_preconditioner
from bilevel.linear.system import System, divided, wide
from bilevel.outcome import LinearSolution, Status
from bilevel.space.inner_product import Leaves, Space


class PreparedPreconditionedCG(Prepared):
    """CG with a preconditioner, bound to one operator; M is made at the first right-hand side and used for all."""

    def __init__(
        self,
        solver: LinearSolver,
        operator: LinearOperator,
        space: Space,
        preconditioner: Preconditioning,
        max_steps: int,
    ) -> None:
        super().__init__(solver, operator, space)
        self._preconditioner, self._max_steps = preconditioner, max_steps
        self._inverse: Callable[[Leaves], Leaves] | None = None

    def iterate(self, b: Leaves, start: Leaves | None = None) -> LinearSolution:
        if self._inverse is None:
            self._inverse = prepared_preconditioner(self._preconditioner, self.shifted, self.space, b)
        system, space, inverse = System(self, b), self.space, self._inverse
        floor = system.floor
        x, r = system.begin(start)
        residual = system.relative(r)
        best, least = x, residual
        live, nonfinite = system.known & (residual > system.enough), ~system.known
        negative, singular = torch.zeros_like(live), torch.zeros_like(live)
        steps, largest = torch.zeros_like(live, dtype=torch.long), torch.zeros_like(residual)
        z = inverse(r)
        slope = wide(space.dot(r, z))
        p = z
        for step in range(self._max_steps):
            # (A preconditioner that is not positive definite shows here.)
            nonfinite = nonfinite | (live & ~torch.isfinite(slope))
            singular = singular | (live & torch.isfinite(slope) & (slope <= 0))
            live = live & torch.isfinite(slope) & (slope > 0)
            if system.nothing_left(live):
                break
            p = space.where(live, p)
            image = system.apply(p)
            curvature, length, stretch = wide(space.dot(p, image)), wide(space.norm(p)), wide(space.norm(image))
            finite = torch.isfinite(curvature) & torch.isfinite(stretch)
            nonfinite, live = nonfinite | (live & ~finite), live & finite
            quotient, moved = divided(curvature, length**2, live), divided(stretch, length, live)
            largest = torch.maximum(largest, moved)
            # |A p|^2 <= |A| p'Ap for a semi-definite A: a flat direction that A moves far is one of an indefinite A.
            flat = quotient.abs() <= floor * largest
            bent = torch.where(flat, moved**2 > 10 * floor * largest**2, quotient < 0)
            negative, singular = negative | (live & bent), singular | (live & flat & ~bent)
            live = live & ~flat & ~bent
            alpha = divided(slope, curvature, live)
            x, r = space.axpy(alpha, p, x), space.where(live, space.axpy(-alpha, image, r), r)
            del image
            steps, residual = steps + live, torch.where(live, system.relative(r), residual)
            closer = live & (residual < least)
            best, least = space.where(closer, x, best), torch.where(closer, residual, least)
            live = live & (residual > system.enough) & torch.isfinite(residual)
            if step + 1 < self._max_steps:
                z = inverse(r)
                old, slope = slope, wide(space.dot(r, z))
                p = space.axpy(divided(slope, old, live), p, z)
        unmet = ~self.solver.met(least, b)
        return system.finish(
            best,
            least,
            steps,
            (unmet, Status.MAX_STEPS),
            (singular & unmet, Status.BREAKDOWN),
            (negative & unmet, Status.NEGATIVE_CURVATURE),
            (nonfinite, Status.NONFINITE),
        )
