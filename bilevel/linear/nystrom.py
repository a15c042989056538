"""The inverse of a low-rank model of A plus a shift.

    A ~ C' M^+ C,  C rows of A, M their square part;    v = (C' M^+ C + rho I)^-1 b

| | products with A | memory |
| --- | --- | --- |
| prepare (at the first right-hand side) | rank | rank P, twice on the way |
| iterate | none | 2 P |
| solve | one, for the true residual | |

Wins: many right-hand sides at one y, and no wait between products, which are independent of each other.
Fails: a direction that the columns miss gets 1 / rho, so a slowly falling spectrum gives an answer worse than v = 0
(UNSOLVED says so). As a preconditioner of conjugate gradients (`NystromPreconditioner`) it cannot do harm.
Reference: Hataya and Yamada 2023, arXiv 2302.09726 (formulas as in its code). Differences from peers: theirs solves
with M as it is, which an indefinite A makes singular; here negative eigenvalues of M are left out, and the true
residual decides.
"""

import dataclasses
from collections.abc import Callable

import torch

from bilevel.linear.base import LinearSolver, Prepared, bound, check_columns, check_number, check_positive, check_steps
from bilevel.linear.operator import LinearOperator
from bilevel.linear.sketch import LowRank, joined, low_rank, split
from bilevel.linear.system import System
from bilevel.outcome import LinearSolution, Status
from bilevel.space.inner_product import PLAIN, Leaves, Space


@dataclasses.dataclass(frozen=True)
class Nystrom(LinearSolver):
    """The inverse of a low-rank model of A plus damping I.

    Args:
        rank: l, products with A; at most P.
        damping: rho; positive, it is what is divided by where the model is zero.
        columns: which columns of A the model is made of, numbered through the leaves; None for `rank` random
            combinations of all.
        tol: on |b - (A + damping I) v| / |b|, for the status only. The default 1 accepts what is better than v = 0.
        seed: of the random combinations.

    Memory: 2 rank P where it is made, rank P after; linear in the tasks. Waits for a GPU where the model is made.

    Failures: UNSOLVED (worse than v = 0, which is returned: the columns missed what b needs), NONFINITE.

    Raises:
        ValueError: an argument is out of range; (when used) the operator is not symmetric.

    Example:
        >>> import torch, bilevel as bl
        >>> A = torch.diag(torch.tensor([3.0, 1.0]))
        >>> solver = bl.linear.Nystrom(rank=2, damping=1.0)
        >>> solver.solve(lambda v: (A @ v[0],), (torch.ones(2),)).value[0].round(decimals=4)
        tensor([0.2500, 0.5000])
    """

    rank: int
    damping: float
    columns: tuple[int, ...] | None = None
    tol: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_steps("Nystrom", "rank", self.rank)
        check_positive("Nystrom", "damping", self.damping)
        check_number("Nystrom", "tol", self.tol, 0.0)
        check_columns("Nystrom", self.columns, self.rank)

    def prepare(self, operator: LinearOperator | Callable[[Leaves], Leaves], space: Space = PLAIN) -> "PreparedNystrom":
        return PreparedNystrom(self, bound("Nystrom", operator, symmetric=True), space)


class PreparedNystrom(Prepared):
    """The low-rank model of one operator, made at the first right-hand side and used for all."""

    solver: Nystrom
    _model: LowRank | None = None

    def inverse(self, b: Leaves) -> Leaves:
        """(model + damping I)^-1 b, whatever its residual is; 16-bit numbers in float32."""
        if self._model is None:
            each = self.solver
            self._model = low_rank(self.operator, b, self.space, each.rank, each.columns, each.seed)
        return split(self._model.inverse(joined(b, self.space), self.solver.damping), b, self.space)

    def iterate(self, b: Leaves, start: Leaves | None = None) -> LinearSolution:
        """The model's answer; it has no use for `start`, and does not know the residual."""
        system = System(self, b)
        narrow = tuple(leaf.to(like.dtype) for leaf, like in zip(system.b, b, strict=True))
        value = self.inverse(narrow)
        finite = torch.isfinite(system.space.largest(value))
        value = system.space.where(finite, value)
        residual = torch.where(finite, torch.zeros_like(system.size), 1.0)
        return system.finish(value, residual, self.solver.rank, (~finite, Status.NONFINITE))
