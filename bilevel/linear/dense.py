"""A direct solve, from the matrix that P products spell out. For tests and small problems.

| | products with A | memory |
| --- | --- | --- |
| iterate | P (of one task) | P^2 a task |
"""

import dataclasses

import torch

from bilevel.linear.base import LinearSolver, Product, check_number
from bilevel.outcome import LinearSolution, Status, code_if
from bilevel.space.tree import Leaves


@dataclasses.dataclass(frozen=True)
class Dense(LinearSolver):
    """Form A column by column and solve with LU.

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

    def iterate(
        self, product: Product, b: Leaves, start: Leaves | None = None, *, tasks: int | None = None
    ) -> LinearSolution:
        count = 1 if tasks is None else tasks
        sizes = [leaf.numel() // count for leaf in b]

        def split(flat: torch.Tensor) -> Leaves:
            return tuple(part.reshape(leaf.shape) for part, leaf in zip(flat.split(sizes, dim=1), b, strict=True))

        def join(leaves: Leaves) -> torch.Tensor:
            return torch.cat([leaf.reshape(count, -1) for leaf in leaves], dim=1)

        rhs = join(b)
        identity = torch.eye(rhs.shape[1], dtype=rhs.dtype, device=rhs.device)
        columns = [join(product(split(row.expand(count, -1)))) for row in identity]
        matrix = torch.stack(columns, dim=2) + self.damping * identity
        factors, pivots, info = torch.linalg.lu_factor_ex(matrix)
        solution = torch.linalg.lu_solve(factors, pivots, rhs.unsqueeze(2))
        image = (matrix @ solution).squeeze(2)
        # Rounding turns the zero pivot of a singular matrix into a tiny one, behind which the answer is arbitrary.
        sizes_of_pivots = factors.diagonal(dim1=-2, dim2=-1).abs()
        singular = sizes_of_pivots.amin(1) <= sizes_of_pivots.amax(1) * matrix.shape[-1] * torch.finfo(matrix.dtype).eps
        scale = rhs.norm(dim=1)
        residual = (rhs - image).norm(dim=1) / torch.where(scale > 0, scale, 1.0)
        broken = ((info != 0) | singular | ~torch.isfinite(residual)) & torch.isfinite(scale)
        return LinearSolution(
            split(solution.squeeze(2)),
            residual if tasks else residual[0],
            rhs.shape[1],
            code_if(broken, Status.BREAKDOWN),
        )
