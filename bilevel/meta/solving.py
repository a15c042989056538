"""Solving (K + lam I) A = R for a kernel matrix, in float64, with a word when it cannot be solved."""

import torch
from torch import Tensor

from bilevel.engine import autodiff
from bilevel.linear.base import LinearSolver
from bilevel.outcome import readable

_LOOK = (
    "Two support examples may have the same embedding, or the embeddings fewer dimensions than there are examples. "
    "Write a larger regularizer=..., or jitter=1e-8 (a part of the mean of the diagonal)"
)


def cholesky(owner: str, matrix: Tensor, right: Tensor) -> Tensor:
    """A^{-1} B through one Cholesky factor, exactly differentiable.

    Args:
        owner: named in messages.
        matrix: A, symmetric positive definite, of shape (n, n), in float64.
        right: B, of shape (n, c).

    Raises:
        ValueError: A is singular to working precision (its smallest eigenvalue is below 10 n rounding errors of its
            Frobenius norm). Under vmap, where no number can be read, the solution is NaN instead.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    finite, size = matrix.detach().isfinite().all(), torch.linalg.matrix_norm(matrix.detach())
    floor = 10 * matrix.shape[0] * torch.finfo(matrix.dtype).eps * size
    singular = finite & ((info != 0) | ~(_smallest_eigenvalue(factor.detach()) > floor))
    if readable(singular) and bool(singular):
        raise ValueError(
            f"{owner} met a kernel matrix of {matrix.shape[0]} rows that is singular to working precision (its norm, "
            f"regularizer included, is {float(size):.3g}, its smallest eigenvalue below {float(floor):.3g}). {_LOOK}"
        )
    return torch.where(finite & ~singular, torch.cholesky_solve(right, factor), torch.nan)


def _smallest_eigenvalue(factor: Tensor) -> Tensor:
    """An estimate from above of the smallest eigenvalue of L L', by three inverse iterations.

    Pivots would not do: noise in a small one is magnified by those before it.
    """
    vector = torch.sin(torch.arange(1, len(factor) + 1, dtype=factor.dtype, device=factor.device))[:, None]
    length = torch.linalg.vector_norm(vector)
    for _ in range(3):
        vector = torch.cholesky_solve(vector / length, factor)
        length = torch.linalg.vector_norm(vector)
    return 1 / length


def iterative(owner: str, matrix: Tensor, right: Tensor, solver: LinearSolver) -> Tensor:
    """A^{-1} B by an iterative solver; its derivative by a second solve with the same A.

    Raises:
        ValueError: the solver did not meet its tolerance. Under vmap, and in the derivative, the solution is NaN
            instead.
    """

    def solve(a: Tensor, b: Tensor) -> Tensor:
        found = solver.solve(lambda v: (a @ v[0],), (b,))
        unmet = torch.as_tensor(found.code, device=b.device) != 0
        return torch.where(unmet, torch.nan, found.value[0])

    solution = autodiff.symmetric_solve(matrix, right, solve)
    failed = matrix.detach().isfinite().all() & right.detach().isfinite().all() & ~solution.detach().isfinite().all()
    if readable(failed) and bool(failed):
        raise ValueError(
            f"{owner} was given {solver!r}, which did not meet its tolerance on a kernel matrix of {len(matrix)} rows. "
            f"Give it more max_steps or a larger tol, or leave solver out for a Cholesky factor. {_LOOK}"
        )
    return solution
