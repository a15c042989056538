"""Conjugate gradients for a symmetric positive definite A.

    a = r'r / p'Ap;  v <- v + a p;  r <- r - a Ap;  p <- r + (r'r new / r'r old) p

| | products with A | memory |
| --- | --- | --- |
| iterate | at most max_steps (one more with a start) | v, r, p, Ap: 4 P |
| solve | one more, for the true residual | |

Reference: Hestenes and Stiefel 1952. Differences from the textbook and from peers: the direction uses the new residual
    (that of the
betty-ml wheels 0.1.1 and 0.2.1 does not); the iterate that met the tolerance is the one returned (hypertorch's and
BOAT's return the one before); a direction with p'Ap <= 0 ends the task with Status.NEGATIVE_CURVATURE instead of a step
of the wrong sign; converged tasks are frozen by a mask.
"""

import dataclasses

import torch

from bilevel.linear.base import LinearSolver, Product, check_number, check_steps, damped
from bilevel.outcome import LinearSolution, Status, code_if, settled, worst
from bilevel.space import tree
from bilevel.space.tree import Leaves


@dataclasses.dataclass(frozen=True)
class CG(LinearSolver):
    """Conjugate gradients.

    Args:
        max_steps: the most products; exact in P steps without rounding.
        tol: on |b - A v| / |b|. Not met within max_steps: Status.MAX_STEPS (the answer is approximate, not failed). On
            the GPU and under vmap all max_steps products are made; on the CPU it stops early.
        damping: solves (A + damping I) v = b. Biases a direction of curvature h by h / (h + damping).

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> A, b = torch.diag(torch.tensor([1.0, 4.0])), torch.ones(2)
        >>> bl.CG(max_steps=5, tol=1e-6).solve(lambda v: (A @ v[0],), (b,)).value[0]
        tensor([1.0000, 0.2500])
    """

    max_steps: int = 10
    tol: float = 1e-6
    damping: float = 0.0

    def __post_init__(self) -> None:
        check_steps("CG", "max_steps", self.max_steps)
        check_number("CG", "tol", self.tol, 0.0)
        check_number("CG", "damping", self.damping, 0.0)

    def iterate(
        self, product: Product, b: Leaves, start: Leaves | None = None, *, tasks: int | None = None
    ) -> LinearSolution:
        apply = damped(product, self.damping)
        # Solved for b over a power of two near max|b|: squares then neither overflow nor vanish, and scaling rounds
        # nothing.
        scale = tree.largest(b, tasks)
        scale = torch.where((scale > 0) & torch.isfinite(scale), scale / torch.frexp(scale).mantissa, 1.0)
        b = tree.scaled(1 / scale, b)
        v = tuple(torch.zeros_like(leaf) for leaf in b) if start is None else tree.scaled(1 / scale, start)
        r = b if start is None else tree.axpy(-1.0, apply(v), b)
        p, rr = r, tree.dot(r, r, tasks)
        bb = tree.dot(b, b, tasks)
        del b
        # Past rounding the recursion follows noise and reports curvature that is not there.
        enough = bb * max(self.tol, 10 * torch.finfo(p[0].dtype).eps) ** 2
        live, negative, steps = (
            rr > enough,
            torch.zeros_like(rr, dtype=torch.bool),
            torch.zeros_like(rr, dtype=torch.long),
        )
        for step in range(self.max_steps):
            if live.device.type == "cpu" and settled(live):  # a GPU would have to be waited for
                break
            Ap = apply(p)
            curvature = tree.dot(p, Ap, tasks)
            negative = negative | (live & ~(curvature > 0))
            live = live & (curvature > 0)
            alpha = torch.where(live, rr / torch.where(live, curvature, 1.0), 0.0)
            v = tree.axpy(alpha, p, v)
            r = tree.axpy(-alpha, Ap, r)
            del Ap
            steps = steps + live
            rr_new = tree.dot(r, r, tasks)
            if step + 1 < self.max_steps:
                p = tree.axpy(torch.where(live, rr_new / torch.where(live, rr, 1.0), 0.0), p, r)
            rr = rr_new
            live = live & (rr > enough)
        residual = (rr / torch.where(bb > 0, bb, 1.0)).sqrt()
        v = tree.scaled(scale, v)
        code = worst(code_if(negative, Status.NEGATIVE_CURVATURE), code_if(live, Status.MAX_STEPS))
        return LinearSolution(v, residual, steps.max(), code)
