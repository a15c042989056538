"""Conjugate gradients for a symmetric positive (semi-)definite A.

    a = r'r / p'Ap;  v <- v + a p;  r <- r - a Ap;  p <- r + (r'r new / r'r old) p

| | products with A | memory |
| --- | --- | --- |
| iterate | at most max_steps, one more with a start (see below) | v, r, p, Ap: 4 P (16 bits: 6 P) |
| solve | one more, for the true residual | |

Reference: Hestenes and Stiefel 1952. Differences from the textbook and from peers: the direction uses the new residual
(that of the betty-ml wheels 0.1.1 and 0.2.1 does not); the iterate that met the tolerance is the one returned
(hypertorch's and BOAT's return the one before); a step along p'Ap <= 0, or along a p'Ap that is a rounding error, is
never made; a solve that ends worse than v = 0 returns its best iterate; converged tasks are frozen by a mask.

A solve that ends worse than v = 0 is run again up to its best step, so that no iterate need be kept for a failure: at
most max_steps products more, on the CPU only. With 16-bit numbers v and r are float32.

A singular A is no obstacle while b lies in its range: from zero the iterates stay there. The part of b outside it
cannot be reduced, and steps along it grow like 1 / rounding error.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from bilevel.linear.base import LinearSolver, Prepared, bound, check_number, check_steps, epsilon, rounding
from bilevel.linear.operator import LinearOperator
from bilevel.linear.preconditioned import PreparedPreconditionedCG
from bilevel.linear.preconditioners.base import Preconditioning, as_preconditioner
from bilevel.linear.system import power_of_two
from bilevel.outcome import LinearSolution, Status, readable, settled
from bilevel.space.inner_product import NARROW, PLAIN, Leaves, Space


@dataclasses.dataclass(frozen=True)
class CG(LinearSolver):
    """Conjugate gradients.

    Args:
        max_steps: the most products; exact in P steps without rounding.
        tol: on |b - A v| / |b|. Not met within max_steps: Status.MAX_STEPS (the answer is approximate, not failed). On
            the GPU and under vmap all max_steps products are made; on the CPU it stops early.
        damping: solves (A + damping I) v = b. Biases a direction of curvature h by h / (h + damping).
        preconditioner: M near the inverse of A, symmetric and positive definite: a `Preconditioner`, or a function
            r -> M r. Memory is then 6 P, and M.

    Failures, all with the last iterate that is no worse than v = 0 (on the GPU, where finding it again would have to
    wait for the device, v = 0 itself): NEGATIVE_CURVATURE, BREAKDOWN (A is singular to working precision and b not in
    its range), UNSOLVED (the residual ended above that of v = 0), NONFINITE.

    Raises:
        ValueError: an argument is out of range; (when used) the operator is not symmetric.

    Example:
        >>> import torch, bilevel as bl
        >>> A, b = torch.diag(torch.tensor([1.0, 4.0])), torch.ones(2)
        >>> bl.CG(max_steps=5, tol=1e-6).solve(lambda v: (A @ v[0],), (b,)).value[0]
        tensor([1.0000, 0.2500])
    """

    sharded = True

    max_steps: int = 10
    tol: float = 1e-6
    damping: float = 0.0
    preconditioner: Preconditioning | None = None

    def __post_init__(self) -> None:
        check_steps("CG", "max_steps", self.max_steps)
        check_number("CG", "tol", self.tol, 0.0)
        check_number("CG", "damping", self.damping, 0.0)
        as_preconditioner("CG", self.preconditioner)

    def prepare(self, operator: LinearOperator | Callable[[Leaves], Leaves], space: Space = PLAIN) -> Prepared:
        matrix = bound("CG", operator, symmetric=True)
        if self.preconditioner is None:
            return PreparedCG(self, matrix, space)
        return PreparedPreconditionedCG(self, matrix, space, self.preconditioner, self.max_steps)


@dataclasses.dataclass
class _Run:
    """Where a recursion ended, for the system divided by `scale`. All but `value` are per task."""

    value: Leaves
    norm: Tensor
    """|b|^2 (1 where b = 0)."""
    squared: Tensor
    """|r|^2."""
    steps: Tensor
    live: Tensor
    """Whether it would have gone on."""
    nonfinite: Tensor
    negative: Tensor
    singular: Tensor
    """Whether it stopped at a curvature that is a rounding error."""
    stale: Tensor
    """Whether a step was made along a curvature that a later one showed to be a rounding error."""
    safe: Tensor
    """The least |r|^2 on the way, before any such step."""
    safe_step: Tensor
    gain: Tensor
    """The largest |A p| / |p|."""
    path: Tensor
    """The length of the steps made, one after another."""
    drift: Tensor
    """The precision of the products, as far as they are not those of one symmetric A (inf where nobody looked)."""


class PreparedCG(Prepared):
    """CG bound to one operator; nothing is kept between right-hand sides."""

    solver: CG

    def iterate(self, b: Leaves, start: Leaves | None = None) -> LinearSolution:
        # Solved for b over a power of two near max|b|: squares then neither overflow nor vanish, and scaling rounds
        # nothing.
        scale = power_of_two(self.space.largest(b))
        run = self._run(b, start, scale, None)
        residual = (run.squared / run.norm).sqrt()
        done = self.solver.met(residual, b)
        risen = torch.isfinite(run.norm) & ~(residual <= 1 + rounding(b))
        stale = run.stale & ~done
        code = torch.where(run.live, Status.MAX_STEPS.code, 0)
        for condition, status in (
            (risen, Status.UNSOLVED),
            (stale | (run.singular & ~done), Status.BREAKDOWN),
            (run.negative, Status.NEGATIVE_CURVATURE),
            (run.nonfinite, Status.NONFINITE),
        ):
            code = torch.where(condition, status.code, code)
        unsafe, steps = risen | stale, run.steps.max()
        if unsafe.device.type == "cpu" and readable(unsafe) and bool(unsafe.any()):
            # Memory is dearer than products where a solve fails: the iterate is computed again, not remembered.
            limit = torch.where(unsafe, run.safe_step, run.steps)
            residual = torch.where(unsafe, (run.safe / run.norm).sqrt(), residual)
            del run
            value, sure = self._run(b, start, scale, limit).value, False
        else:
            sure = self._sure(run, residual, start, scale)
            residual = torch.where(unsafe, 1.0, residual)
            value = self.space.where(~unsafe, run.value)
            del run
        most = min(torch.finfo(leaf.dtype).max for leaf in b)
        fits = self.space.largest(value) * scale <= most
        value = tuple(
            torch.where(self.space.per_task(fits, leaf), leaf * self.space.per_task(scale, leaf), 0.0).to(like.dtype)
            for leaf, like in zip(value, b, strict=True)
        )
        code = torch.where(fits, code, Status.NONFINITE.code)
        return LinearSolution(value, torch.where(fits, residual, 1.0), steps, code.max(), sure)

    def _sure(self, run: _Run, residual: Tensor, start: Leaves | None, scale: Tensor) -> bool:
        """Whether the recursion's residual is the true one: far above what the products' errors add up to.

        b - A v is the recursion's r but for the errors of the products, each of |A| |p| times a precision, which
        `drift` shows: rounding, 16 bits of autocast, numbers drawn anew. A product of 16 bits is too coarse to tell.
        """
        length = run.path if start is None else run.path + self.space.norm(start) / scale
        errors = run.drift.clamp_min(epsilon(run.value)) * (1 + run.gain * length / run.norm.sqrt())
        sure = (residual > _FAR * errors) & (residual < 0.9)
        wide = not any(leaf.dtype in NARROW for leaf in run.value)
        return wide and sure.device.type == "cpu" and readable(sure) and bool(sure.all())

    def _run(self, b: Leaves, start: Leaves | None, scale: Tensor, limit: Tensor | None) -> _Run:
        """The recursion, of at most `limit` steps per task."""
        space, apply, floor = self.space, self.shifted.matvec, _curvature_floor(b)
        dtypes = [leaf.dtype for leaf in b]
        b = self._divided(b, scale)
        bb = space.dot(b, b)
        if start is None:
            v, r, rr = space.zeros_like(b), b, bb
        else:
            guess = tuple(leaf.to(dtype) for leaf, dtype in zip(self._divided(start, scale), dtypes, strict=True))
            r = space.axpy(-1.0, apply(guess), b)
            rr = space.dot(r, r)
            # A start worse than zero (that of another problem, or for b = 0) is no start.
            keep = rr <= bb
            v = tuple(leaf.to(wide.dtype) for leaf, wide in zip(space.where(keep, guess), b, strict=True))
            r, rr = space.where(keep, r, b), torch.where(keep, rr, bb)
            del guess
        del b
        # (Only `p` is in the operator's 16-bit dtype; what is summed up is not.)
        # It is zero in tasks that have ended, whose r may hold anything: 0 * NaN would reach v.
        p, pp = _narrowed(space.where(torch.isfinite(rr), r), dtypes), rr
        # Past rounding the recursion follows noise and reports curvature that is not there.
        enough = bb * max(self.solver.tol, min(10 * epsilon(p), 0.01)) ** 2
        no, zero = torch.zeros_like(rr, dtype=torch.bool), torch.zeros_like(rr, dtype=torch.long)
        live, nonfinite, negative, singular, stale, steps = rr > enough, ~torch.isfinite(bb), no, no, no, zero
        weakest, drift = torch.full_like(rr, float("inf")), torch.full_like(rr, float("inf"))
        gain, path = torch.zeros_like(rr), torch.zeros_like(rr)
        here = rr.device.type == "cpu" and not torch._C._functorch.is_functorch_wrapped_tensor(rr)
        one, most = here and space.tasks is None, self.solver.max_steps
        looks = {most // 2, most - 1} - {0} if here else set[int]()
        best, best_step, before, before_step = rr, zero, rr, zero  # `before`: the best before the weakest curvature
        for step in range(self.solver.max_steps):
            if limit is not None:
                live = live & (step < limit)
            if live.device.type == "cpu" and settled(live):  # a GPU would have to be waited for
                break
            Ap = apply(p)
            curvature = space.dot(p, Ap)
            # The largest |A p| / |p| seen stands for the norm of A, p'Ap / p'p against it says whether A bends at all.
            length = torch.where(live, pp, 1.0)
            stretch, quotient = space.norm(Ap) / length.sqrt(), curvature / length
            finite = torch.isfinite(stretch) & torch.isfinite(quotient)
            gain = torch.where(live & finite, torch.maximum(gain, stretch), gain)
            if step in looks:
                apart = _conjugate(space, r, p, Ap) / (torch.where(live, rr, 1.0) * length).sqrt() / gain
                drift = torch.where(live & finite, torch.maximum(drift.nan_to_num(0.0, 0.0), apart), drift)
            flat = quotient.abs() <= floor * gain
            # |A p|^2 <= |A| p'Ap for a semi-definite A: a flat direction that A moves far is one of an indefinite A.
            bent = torch.where(flat, stretch**2 > 10 * floor * gain**2, quotient < 0)
            noise = weakest < floor * gain
            nonfinite = nonfinite | (live & ~finite)
            negative = negative | (live & finite & bent)
            singular = singular | (live & finite & flat & ~bent)
            stale = stale | (live & finite & noise)
            live = live & finite & ~flat & ~bent & ~noise
            weaker = live & (quotient < weakest)
            weakest = torch.where(weaker, quotient, weakest)
            before, before_step = torch.where(weaker, best, before), torch.where(weaker, best_step, before_step)

            alpha = torch.where(live, rr / torch.where(live, curvature, 1.0), 0.0)
            path = path + alpha * length.sqrt()
            v = space.axpy(alpha, p, v)
            r = space.axpy(-alpha, Ap, r)
            del Ap
            steps = steps + live
            new = space.dot(r, r)
            nonfinite = nonfinite | (live & ~torch.isfinite(new))
            beta, rr = torch.where(live, new / torch.where(live, rr, 1.0), 0.0), torch.where(live, new, rr)
            if step + 1 < self.solver.max_steps:
                p = space.axpy(beta, p, r)
                # (One system that has ended on the CPU makes no further product.)
                p = _narrowed(p if one else space.where(live & torch.isfinite(new), p), dtypes)
                pp = rr + beta**2 * pp
            closer = live & (rr < best)
            best, best_step = torch.where(closer, rr, best), torch.where(closer, steps, best_step)
            live = live & (rr > enough) & torch.isfinite(rr)
        safe, safe_step = torch.where(stale, before, best), torch.where(stale, before_step, best_step)
        norm = torch.where(bb > 0, bb, 1.0)
        return _Run(v, norm, rr, steps, live, nonfinite, negative, singular, stale, safe, safe_step, gain, path, drift)

    def _divided(self, x: Leaves, scale: Tensor) -> Leaves:
        """Divide x by a power of two, 16-bit numbers in float32."""
        wide = [leaf.float() if leaf.dtype in NARROW else leaf for leaf in x]
        return tuple(leaf / self.space.per_task(scale, leaf).to(leaf.dtype) for leaf in wide)


_FAR = 4.0
"""How many times what rounding may add to it a recursion's residual is to be to be taken for the true one."""


def _conjugate(space: Space, r: Leaves, p: Leaves, Ap: Leaves) -> Tensor:
    """sqrt(P) |(p - r)'A p|, which is zero for one symmetric A, p - r being beta times the last direction.

    Errors of A p that point anywhere show with 1 / sqrt(P) of their size in one direction; hence float64, and the root.
    """
    parts = [space.total((a - b).mul_(c)) for a, b, c in zip(p, r, Ap, strict=True)]
    count = sum(leaf.numel() for leaf in p) // (space.tasks or 1)
    return torch.stack(parts).sum(0).abs() * count**0.5


def _narrowed(x: Leaves, dtypes: list[torch.dtype]) -> Leaves:
    return tuple(leaf.to(dtype) for leaf, dtype in zip(x, dtypes, strict=True))


def _curvature_floor(b: Leaves) -> float:
    """The share of |A| below which a curvature is a rounding error.

    A product is off by a few eps |A|; of 16 bits by one rounding, since they are summed up in float32.
    """
    return epsilon(b) if any(leaf.dtype in NARROW for leaf in b) else 10 * epsilon(b)
