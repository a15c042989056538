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
        ValueError: A is singular to working precision (a pivot of n rounding errors of the diagonal or less). Under
            vmap, where no number can be read, the solution is NaN instead.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    diagonal, pivots = matrix.detach().diagonal(), factor.detach().diagonal().square()
    floor = matrix.shape[0] * torch.finfo(matrix.dtype).eps * diagonal.abs().amax()
    finite = matrix.detach().isfinite().all()
    singular = finite & ((info != 0) | ~(pivots.amin() > floor))
    if readable(singular) and bool(singular):
        raise ValueError(
            f"{owner} met a kernel matrix of {matrix.shape[0]} rows that is singular to working precision (the largest "
            f"entry of its diagonal, regularizer included, is {float(diagonal.amax()):.3g}, a pivot at most "
            f"{float(floor):.3g}). {_LOOK}"
        )
    return torch.where(finite & ~singular, torch.cholesky_solve(right, factor), torch.nan)


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
