"""The Neumann series, as Richardson's iteration.

    v_0 = a b;   v_{j+1} = v_j + a (b - A v_j),   so that   v_J = a sum_{j=0..J} (I - a A)^j b

| | products with A | memory |
| --- | --- | --- |
| iterate | steps | v, A v: 2 P |
| solve | one more, for the true residual | |

It converges for 0 < a < 2 / (largest eigenvalue of A). With a = the inner step size and a constant Hessian, J products
equal backpropagation through the last J + 1 steps of gradient descent. Reference: Lorraine et al. 2020, arXiv
1911.02590. A series that grows is reported, not returned as if it were fine (TorchOpt's default is 1,100 times too
large on a well-conditioned 8 x 8 system, without a warning).
"""

import dataclasses

import torch

from bilevel.linear.base import LinearSolver, Product, check_number, check_positive, check_steps, damped
from bilevel.outcome import LinearSolution, Status, code_if
from bilevel.space import tree
from bilevel.space.tree import Leaves


@dataclasses.dataclass(frozen=True)
class Neumann(LinearSolver):
    """Truncated Neumann series of the inverse.

    Args:
        steps: J, products with A; the series then has J + 1 terms.
        step_size: a.
        tol: on the relative residual, for the status only: the number of products is fixed. The default 1 accepts any
            series that reduced the residual, which is how truncation is used.
        damping: solves (A + damping I) v = b.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> bl.Neumann(steps=1, step_size=0.25).solve(lambda v: (2 * v[0],), (torch.ones(1),)).value[0]
        tensor([0.3750])
    """

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

    def iterate(
        self, product: Product, b: Leaves, start: Leaves | None = None, *, tasks: int | None = None
    ) -> LinearSolution:
        apply = damped(product, self.damping)
        v = tuple(self.step_size * leaf for leaf in b) if start is None else start
        size = tree.norm(b, tasks)
        residual = size
        for _ in range(self.steps):
            r = tree.axpy(-1.0, apply(v), b)
            residual = tree.norm(r, tasks)
            v = tree.axpy(self.step_size, r, v)
        # A start from an earlier solution may begin above |b|.
        grew = ~(residual <= size * 2) if start is None else ~torch.isfinite(residual)
        return LinearSolution(
            v,
            residual / torch.where(size > 0, size, 1.0),
            self.steps,
            code_if(grew & torch.isfinite(size), Status.NOT_CONTRACTIVE),
        )
