"""A low-rank model of a symmetric positive semi-definite A, from products with few vectors.

    Y = A W,  A ~ Y (W'Y)^+ Y' = Q diag(s) Q'          (Nystrom)

W are unit vectors (columns of A) or random ones. Negative eigenvalues of W'Y are those of an indefinite A: they are
left out, so that the model is semi-definite whatever A is.
"""

import dataclasses

import torch
from torch import Tensor

from bilevel.linear.operator import LinearOperator
from bilevel.linear.system import scattered, widened
from bilevel.space.inner_product import PLAIN, Leaves, Space


@dataclasses.dataclass(frozen=True)
class LowRank:
    """Q diag(values) Q', with orthonormal columns: Q of shape (tasks, P, l), values of shape (tasks, l)."""

    basis: Tensor
    values: Tensor

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(Q'r, r - Q Q'r) of rows (tasks, P)."""
        along = (self.basis.mT @ rows.unsqueeze(-1)).squeeze(-1)
        return along, rows - (self.basis @ along.unsqueeze(-1)).squeeze(-1)

    def inverse(self, rows: Tensor, shift: float) -> Tensor:
        """(Q diag(values) Q' + shift I)^-1 r of rows (tasks, P)."""
        along, rest = self.parts(rows)
        return (self.basis @ (along / (self.values + shift)).unsqueeze(-1)).squeeze(-1) + rest / shift


def joined(leaves: Leaves, space: Space) -> Tensor:
    """Leaves as rows (tasks, P), of 16-bit numbers in float32."""
    count = 1 if space.tasks is None else space.tasks
    return torch.cat([leaf.reshape(count, leaf.numel() // count) for leaf in widened(leaves)], dim=1)


def split(rows: Tensor, like: Leaves, space: Space) -> Leaves:
    """Rows (tasks, P) as leaves, in the dtype of the rows."""
    count = 1 if space.tasks is None else space.tasks
    parts = rows.split([leaf.numel() // count for leaf in like], dim=1)
    return tuple(part.reshape(leaf.shape) for part, leaf in zip(parts, like, strict=True))


def low_rank(
    operator: LinearOperator, like: Leaves, space: Space, rank: int, columns: tuple[int, ...] | None, seed: int
) -> LowRank:
    """The model of A from `rank` products.

    Args:
        operator: A, symmetric.
        like: tensors shaped like v.
        space: where v lives.
        rank: l; at most P.
        columns: which columns of A; None for as many random combinations of all.
        seed: of those.

    Raises:
        ValueError: a column that there is not.
    """
    zeros = joined(tuple(torch.zeros_like(leaf) for leaf in like), space)
    tasks, size = zeros.shape
    if columns is not None and columns and max(columns) >= size:
        raise ValueError(f"Nystrom was given the column {max(columns)} of an A with {size} columns, counted from 0")
    rank = min(rank, size) if columns is None else len(columns)
    if columns is None:
        drawn = scattered((zeros.new_zeros(size, rank),), seed, PLAIN)[0]
        test = torch.linalg.qr(drawn).Q if size else drawn
    else:
        test = torch.zeros(size, rank, dtype=zeros.dtype, device=zeros.device)
        test[torch.tensor(columns, device=zeros.device), torch.arange(rank, device=zeros.device)] = 1
    images = []
    for place in range(rank):
        vector = split(test[:, place].expand(tasks, size), like, space)
        narrow = tuple(each.to(leaf.dtype) for each, leaf in zip(vector, like, strict=True))
        images.append(joined(operator.matvec(narrow), space))
    if not images:
        return LowRank(zeros.unsqueeze(-1)[..., :0], zeros[:, :0])
    image = torch.stack(images, dim=-1)
    core = (test.mT @ image).double()
    finite = torch.isfinite(image).flatten(1).all(1)
    core = torch.where(finite[:, None, None], (core + core.mT) / 2, 0.0)
    sizes, turn = torch.linalg.eigh(core)
    floor = 10 * rank * torch.finfo(torch.float32 if narrow[0].dtype.itemsize < 8 else torch.float64).eps
    kept = sizes > floor * sizes.abs().amax(-1, keepdim=True)
    root = torch.where(kept, sizes, 1.0).rsqrt() * kept
    # A ~ F F'; its left singular vectors and squared singular values are the model's.
    factor = image @ (turn * root.unsqueeze(-2)).to(image.dtype)
    factor = torch.where(finite[:, None, None], factor, 0.0)
    left, values, _ = torch.linalg.svd(factor, full_matrices=False)
    filled = values > floor**0.5 * 1e-3 * values.amax(-1, keepdim=True)
    basis = torch.where(filled.unsqueeze(-2), left, 0.0)
    values = torch.where(filled, values, 0.0) ** 2
    return LowRank(torch.where(finite[:, None, None], basis, float("nan")), values)
