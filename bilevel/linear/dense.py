"""A direct solve, from the matrix that P products spell out. For tests and small problems.

| | products with A | memory |
| --- | --- | --- |
| iterate | P (of one task), once per `prepare` | P^2 per task; more where A is singular |

A v = b is solved with the products A v as they are given. For the transposed system of an A that is not symmetric, wrap
the operator: `Transposed(operator)`, which needs its `rmatvec`.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from bilevel.linear.base import LinearSolver, Prepared, bound, check_number, rounding
from bilevel.linear.operator import LinearOperator
from bilevel.outcome import LinearSolution, Status, readable
from bilevel.space.inner_product import NARROW, PLAIN, Leaves, Space


@dataclasses.dataclass(frozen=True)
class Dense(LinearSolver):
    """Form A column by column and solve with LU; where A is singular, for the least squares solution of least norm.

    A singular system whose b lies in the range of A is solved; Status.BREAKDOWN says that b does not.

    Args:
        damping: solves (A + damping I) v = b.
        tol: on the true relative residual, for the status.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> bl.Dense().solve(lambda v: (torch.diag(torch.tensor([1.0, -4.0])) @ v[0],), (torch.ones(2),)).value[0]
        tensor([ 1.0000, -0.2500])
    """

    damping: float = 0.0
    tol: float = 1e-6

    def __post_init__(self) -> None:
        check_number("Dense", "damping", self.damping, 0.0)
        check_number("Dense", "tol", self.tol, 0.0)

    def prepare(self, operator: LinearOperator | Callable[[Leaves], Leaves], space: Space = PLAIN) -> "PreparedDense":
        return PreparedDense(self, bound("Dense", operator), space)


class PreparedDense(Prepared):
    """The matrix of one operator and its factors, made at the first right-hand side and used for all."""

    solver: Dense
    _factors: "_Factors | None" = None

    def iterate(self, b: Leaves, start: Leaves | None = None) -> LinearSolution:
        """A direct solve; it has no use for `start`. Waits for the GPU, to see whether A is singular."""
        count = 1 if self.space.tasks is None else self.space.tasks
        sizes = [leaf.numel() // count for leaf in b]
        rhs = _joined(b, count)
        if self._factors is None:
            self._factors = _Factors(self._matrix(b, sizes, count))
        size = torch.linalg.vector_norm(rhs, dim=1)
        known = torch.isfinite(size)
        solution = self._factors.solve(torch.where(known.unsqueeze(1), rhs, 0.0))
        image = (self._factors.matrix @ solution.unsqueeze(2)).squeeze(2)
        residual = torch.linalg.vector_norm(rhs - image, dim=1) / torch.where(size > 0, size, 1.0)
        code = torch.where(self._factors.deficient & ~self.solver.met(residual, b), Status.BREAKDOWN.code, 0)
        code = torch.where(self._factors.finite & known, code, Status.NONFINITE.code)
        # (Rounding in a system that is nearly singular; the least squares solution is never worse than zero.)
        safe = ~(residual > 1 + rounding(b))
        code = torch.where(safe, code, torch.maximum(code, torch.tensor(Status.UNSOLVED.code, device=code.device)))
        solution, residual = torch.where(safe.unsqueeze(1), solution, 0.0), torch.where(safe, residual, 1.0)
        residual = residual if self.space.tasks is not None else residual.squeeze(0)
        return LinearSolution(_split(solution, b, sizes), residual, rhs.shape[1], code.max())

    def _matrix(self, b: Leaves, sizes: list[int], count: int) -> Tensor:
        """A + damping I, of shape (tasks, P, P), 16-bit products in float32."""
        rhs = _joined(b, count)
        columns = []
        for index in range(rhs.shape[1]):
            unit = torch.zeros_like(rhs[:1])
            unit[:, index] = 1
            columns.append(_joined(self.operator.matvec(_split(unit.expand(count, -1), b, sizes)), count))
        if not columns:
            return rhs.new_zeros(count, 0, 0)
        matrix = torch.stack(columns, dim=2)
        return matrix + self.solver.damping * torch.eye(len(columns), dtype=matrix.dtype, device=matrix.device)


class _Factors:
    """LU of a stack of matrices, and their singular values where LU meets a zero pivot.

    `deficient` says per task whether the matrix is singular to working precision; `finite` whether it is finite.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.finite = torch.isfinite(matrix).flatten(1).all(1)
        self.matrix = torch.where(self.finite[:, None, None], matrix, 0.0)
        self._lu, self._pivots, info = torch.linalg.lu_factor_ex(self.matrix)
        self._floor = matrix.shape[-1] * torch.finfo(matrix.dtype).eps
        if matrix.shape[-1] == 0:
            self.deficient = ~self.finite
        else:
            # Rounding turns the zero pivot of a singular matrix into a tiny one, behind which the answer is arbitrary.
            sizes = self._lu.diagonal(dim1=-2, dim2=-1).abs()
            self.deficient = (info != 0) | (sizes.amin(1) <= sizes.amax(1) * self._floor)
        self._svd: tuple[Tensor, Tensor, Tensor] | None = None
        if readable(self.deficient) and bool(self.deficient.any()):
            self._svd = torch.linalg.svd(self.matrix)

    def solve(self, rhs: Tensor) -> Tensor:
        """The solution per task; of a singular matrix the least squares solution of least norm."""
        exact = torch.linalg.lu_solve(self._lu, self._pivots, rhs.unsqueeze(2)).squeeze(2)
        exact = torch.where(torch.isfinite(exact), exact, 0.0)
        if self._svd is None:
            return exact
        u, values, vh = self._svd
        kept = values > values.amax(1, keepdim=True) * self._floor
        parts = (u.mT @ rhs.unsqueeze(2)).squeeze(2)
        least = (vh.mT @ torch.where(kept, parts / torch.where(kept, values, 1.0), 0.0).unsqueeze(2)).squeeze(2)
        return torch.where(self.deficient.unsqueeze(1), least, exact)


def _joined(leaves: Leaves, count: int) -> Tensor:
    """Leaves as rows, one per task; of 16-bit numbers in float32, which LU needs."""
    wide = [leaf.float() if leaf.dtype in NARROW else leaf for leaf in leaves]
    return torch.cat([leaf.reshape(count, leaf.numel() // count) for leaf in wide], dim=1)


def _split(rows: Tensor, like: Leaves, sizes: list[int]) -> Leaves:
    parts = zip(rows.split(sizes, dim=1), like, strict=True)
    return tuple(part.reshape(leaf.shape).to(leaf.dtype) for part, leaf in parts)
