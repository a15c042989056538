"""The Neumann series, as Richardson's iteration.

    v_0 = a b;   v_{j+1} = v_j + a (b - A v_j),   so that   v_J = a sum_{j=0..J} (I - a A)^j b

| | products with A | memory |
| --- | --- | --- |
| iterate | steps; on the CPU, where the series grows, again up to its best term | v, A v: 2 P |
| solve | one more, for the true residual | |

It converges for 0 < a < 2 / (largest eigenvalue of A). With a = the inner step size and a constant Hessian, J products
equal backpropagation through the last J + 1 steps of gradient descent. Reference: Lorraine et al. 2020, arXiv
1911.02590. A series that grows is reported, not returned as if it were fine (TorchOpt's default is 1,100 times too
large on a well-conditioned 8 x 8 system, without a warning).

A need not be symmetric: the series converges where every eigenvalue of I - a A lies inside the unit circle. The part of
b outside the range of a singular A is never reduced: the residual says so.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from bilevel.linear.base import LinearSolver, Prepared, bound, check_number, check_positive, check_steps, rounding
from bilevel.linear.operator import LinearOperator
from bilevel.outcome import LinearSolution, Status, readable
from bilevel.space.inner_product import PLAIN, Leaves, Space


@dataclasses.dataclass(frozen=True)
class Neumann(LinearSolver):
    """Truncated Neumann series of the inverse.

    Args:
        steps: J, products with A; the series then has J + 1 terms.
        step_size: a.
        tol: on the relative residual, for the status only: the number of products is fixed. The default 1 accepts any
            series that reduced the residual, which is how truncation is used.
        damping: solves (A + damping I) v = b.

    A series that ends worse than v = 0 is Status.NOT_CONTRACTIVE, and its best term is returned (on the GPU, where
    finding it again would have to wait for the device, v = 0).

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> bl.Neumann(steps=1, step_size=0.25).solve(lambda v: (2 * v[0],), (torch.ones(1),)).value[0]
        tensor([0.3750])
    """

    sharded = True

    worse_than_zero = Status.NOT_CONTRACTIVE

    steps: int = 10
    step_size: float = 0.1
    tol: float = 1.0
    damping: float = 0.0

    def __post_init__(self) -> None:
        check_steps("Neumann", "steps", self.steps)
        check_number("Neumann", "tol", self.tol, 0.0)
        check_number("Neumann", "damping", self.damping, 0.0)
        check_positive("Neumann", "step_size", self.step_size)

    def prepare(self, operator: LinearOperator | Callable[[Leaves], Leaves], space: Space = PLAIN) -> "PreparedNeumann":
        return PreparedNeumann(self, bound("Neumann", operator), space)


@dataclasses.dataclass
class _Run:
    """Where a series ended; all but `value` are per task. Residuals are relative."""

    value: Leaves
    residual: Tensor
    """Of the iterate before the last: that of the last would cost one product more."""
    grows: Tensor
    nonfinite: Tensor
    best: Tensor
    best_at: Tensor
    """How many updates had been made at the least residual."""


class PreparedNeumann(Prepared):
    """A Neumann series bound to one operator; nothing is kept between right-hand sides."""

    solver: Neumann

    def iterate(self, b: Leaves, start: Leaves | None = None) -> LinearSolution:
        run = self._run(b, start, None)
        code = torch.where(run.grows, Status.NOT_CONTRACTIVE.code, 0)
        code = torch.where(run.nonfinite, Status.NONFINITE.code, code)
        bad = run.grows | run.nonfinite
        if bad.device.type == "cpu" and readable(bad) and bool(bad.any()):
            limit = torch.where(bad, run.best_at, self.solver.steps + 1)
            residual = torch.where(bad, run.best, run.residual)
            del run
            value = self._run(b, start, limit).value
        else:
            residual, value = torch.where(bad, 1.0, run.residual), self.space.where(~bad, run.value)
        return LinearSolution(value, residual, self.solver.steps, code.max())

    def _run(self, b: Leaves, start: Leaves | None, limit: Tensor | None) -> _Run:
        """The series, of at most `limit` updates per task."""
        space, a, apply = self.space, self.solver.step_size, self.shifted.matvec
        size = space.norm(b)
        known = torch.isfinite(size)
        size = torch.where(size > 0, size, 1.0)
        residual = size / size  # that of v = 0 (NaN for a right-hand side that is not finite)
        last, best, best_at = residual, residual, torch.zeros_like(residual, dtype=torch.long)
        nonfinite, going = ~known, known
        if start is None:
            v, done = space.where(known if limit is None else known & (limit > 0), space.scaled(a, b)), 1
        else:
            v, done = start, 0
        for step in range(self.solver.steps):
            r = space.axpy(-1.0, apply(v), b)
            last, residual = residual, space.norm(r) / size
            if step == 0 and start is not None:
                # A start worse than zero (that of another problem, or for b = 0) is no start.
                keep = residual <= 1
                v, r, residual = space.where(keep & known, v), space.where(keep, r, b), torch.where(keep, residual, 1.0)
            finite = torch.isfinite(residual)
            # What was no worse than v = 0 and is not finite a product later was not grown: A is not finite.
            nonfinite = nonfinite | (going & ~finite & (last <= 1))
            going = going & finite
            closer = going & (residual < best)
            best, best_at = torch.where(closer, residual, best), torch.where(closer, done, best_at)
            allowed = going if limit is None else going & (done < limit)
            v, done = space.where(allowed, space.axpy(a, r, v), v), done + 1
            del r
        # The residuals of a symmetric A are log-convex: the next one grows by at least the last ratio.
        ahead = residual**2 / torch.where(last > 0, last, 1.0) if self.operator.symmetric else residual
        grows = known & ~nonfinite & ~(torch.maximum(residual, ahead) <= 1 + rounding(b))
        return _Run(v, residual, grows, nonfinite, best, best_at)
