"""The inner product of the inner variable's space, and the vector algebra that goes with it.

Everything that sums over all numbers of an inner variable is here, and nowhere else: a space that knows about shards or
process groups replaces this one class.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bilevel.space.ranks import Ranks

Leaves = tuple[Tensor, ...]
NARROW = (torch.float16, torch.bfloat16)
"""The 16-bit types: sums over them are taken in float32."""


@dataclasses.dataclass(frozen=True)
class Space:
    """Inner product, norms and linear combinations of leaves (tuples of tensors).

    Args:
        tasks: number of tasks. Every leaf then has a leading dimension of that size, and `dot`, `norm` and `largest`
            return shape (tasks,) instead of a 0-dim tensor. None: one vector.
        ranks: the processes of which each holds a part of every vector, so that no number is on two of them. `dot`,
            `norm`, `total` and `largest` then are those of the whole, the same bits on every rank, and each is one
            all-reduce of a number; all ranks must call them alike. None: this process holds all of it.

    Leaves without elements count as zero vectors. At least one leaf is needed.

    Example:
        >>> import torch
        >>> from bilevel.space.inner_product import Space
        >>> Space(tasks=2).norm((torch.tensor([[3.0, 4.0], [0.0, 1.0]]),))
        tensor([5., 1.], dtype=torch.float64)
    """

    tasks: int | None = None
    ranks: Ranks | None = None

    def dot(self, x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
        """Inner product: 0-dim, or shape (tasks,); of 16-bit numbers in float32, which does not overflow at 65504."""
        found = torch.stack([self._dot(_summable(a), _summable(b)) for a, b in zip(x, y, strict=True)]).sum(0)
        return found if self.ranks is None else self._summed(found)

    def norm(self, x: Sequence[Tensor]) -> Tensor:
        """Euclidean norm: 0-dim, or shape (tasks,). Summed in float64, so that squares neither overflow nor vanish."""
        # (Apple GPUs have no float64.)
        wide = torch.float32 if x[0].device.type == "mps" else torch.float64
        if self.tasks is None and _at_once(x):
            found = _norm(x)
        else:
            parts = [_norms(self._rows(leaf), wide) for leaf in x]
            found = self._unrow(torch.linalg.vector_norm(torch.stack(parts), dim=0))
        return found if self.ranks is None else self._summed(found.square()).sqrt()

    def total(self, leaf: Tensor) -> Tensor:
        """The sum of all numbers of a leaf, in float64: 0-dim, or shape (tasks,)."""
        found = self._unrow(self._rows(leaf).sum(1, dtype=torch.float64))
        return found if self.ranks is None else self._summed(found)

    def largest(self, x: Sequence[Tensor]) -> Tensor:
        """Maximum norm: 0-dim, or shape (tasks,)."""
        rows = [self._rows(leaf) for leaf in x]
        parts = [torch.linalg.vector_norm(row, float("inf"), dim=1) if row.shape[1] else row.sum(1) for row in rows]
        found = self._unrow(torch.stack(parts).amax(0))
        if self.ranks is None:
            return found
        return torch.where(self._summed(found.isnan().float()) > 0, torch.nan, self.ranks.largest([found])[0])

    def axpy(self, alpha: Tensor | float, x: Sequence[Tensor], y: Sequence[Tensor]) -> Leaves:
        """Sum alpha x + y, in the dtype of y; alpha is a number, 0-dim, or one number per task."""
        if isinstance(alpha, Tensor):
            if alpha.dim() == 0 and alpha.dtype == y[0].dtype and _at_once(x) and _at_once(y):
                return tuple(torch._foreach_addcmul(tuple(y), (alpha,) * len(y), tuple(x)))
            return tuple(torch.addcmul(b, self.per_task(alpha, b).to(b.dtype), a) for a, b in zip(x, y, strict=True))
        if _at_once(x) and _at_once(y):
            return tuple(torch._foreach_add(tuple(y), tuple(x), alpha=alpha))
        return tuple(torch.add(b, a, alpha=alpha) for a, b in zip(x, y, strict=True))

    def scaled(self, factor: Tensor | float, x: Sequence[Tensor]) -> Leaves:
        """Multiply x by a factor: a number, 0-dim, or one number per task."""
        if isinstance(factor, Tensor):
            return tuple(self.per_task(factor, leaf).to(leaf.dtype) * leaf for leaf in x)
        return tuple(factor * leaf for leaf in x)

    def where(self, condition: Tensor, x: Sequence[Tensor], y: Sequence[Tensor] | None = None) -> Leaves:
        """Select x where the condition (0-dim, or one per task) holds, else y (None: zero), whatever x holds there."""
        if y is None:
            zeros = {(a.dtype, a.device): torch.zeros((), dtype=a.dtype, device=a.device) for a in x}
            return tuple(torch.where(self.per_task(condition, a), a, zeros[a.dtype, a.device]) for a in x)
        return tuple(torch.where(self.per_task(condition, a), a, b) for a, b in zip(x, y, strict=True))

    def per_task(self, number: Tensor, leaf: Tensor) -> Tensor:
        """Shape one number per task so that it multiplies a leaf; a 0-dim tensor passes through."""
        return number if number.dim() == 0 else number.reshape(-1, *[1] * (leaf.dim() - 1))

    def zeros_like(self, x: Sequence[Tensor]) -> Leaves:
        """The zero vector."""
        return tuple(torch.zeros_like(leaf) for leaf in x)

    def _summed(self, part: Tensor) -> Tensor:
        """The sum over ranks of what each has.

        Raises:
            ValueError: it is to be differentiated.
        """
        assert self.ranks is not None, "asked for where there are ranks"
        if part.requires_grad:
            raise ValueError(
                "a step of the inner loop takes a dot product or a norm of the inner variable, and the steps are to be "
                "differentiated; with an inner variable that is sharded over processes that is not done. Use an "
                "estimator at the solution, such as Implicit(CG(10)), or one of first order"
            )
        return self.ranks.sum([part])[0]

    def _rows(self, leaf: Tensor) -> Tensor:
        # (A size of -1 is ambiguous for a leaf without elements.)
        count = 1 if self.tasks is None else self.tasks
        return leaf.reshape(count, leaf.numel() // count)

    def _unrow(self, rows: Tensor) -> Tensor:
        return rows if self.tasks is not None else rows.squeeze(0)

    def _dot(self, a: Tensor, b: Tensor) -> Tensor:
        if self.tasks is None:
            return torch.dot(a.reshape(-1), b.reshape(-1))
        return torch.linalg.vecdot(self._rows(a), self._rows(b))


PLAIN = Space()
"""The space of one vector."""
_PIECE, _LONG = 1024, 4096


def _at_once(x: Sequence[Tensor]) -> bool:
    """Whether one call may take all leaves: on the CPU, of one wide dtype, not under vmap, and without a graph."""
    first = x[0].dtype
    if first != torch.float32 and first != torch.float64:
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return all(a.dtype == first and a.is_cpu and not a.requires_grad and not wrapped(a) for a in x)


def _norm(x: Sequence[Tensor]) -> Tensor:
    """The norm of all leaves as one vector, summed in float64, as `_norms` does it, in fewer operators."""
    short = [leaf for leaf in x if leaf.dtype == torch.float64 or leaf.numel() < _LONG]
    parts = [torch.stack(torch._foreach_norm(short, 2, torch.float64))] if short else []
    for leaf in x:
        if leaf.dtype == torch.float32 and leaf.numel() >= _LONG:
            flat, cut = leaf.reshape(-1), leaf.numel() // _PIECE * _PIECE
            parts.append(torch.linalg.vector_norm(flat[:cut].view(-1, _PIECE), dim=1))
            if cut < flat.numel():
                parts.append(torch.linalg.vector_norm(flat[cut:], dim=0, keepdim=True))
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    found = torch.linalg.vector_norm(joined, dtype=torch.float64)
    # Squares of float32 overflow above 1e19, and below 1e-19 they vanish. (Fake tensors have no numbers to look at.)
    if len(short) < len(x) and type(found) is Tensor and not 1e-15 < float(found) < math.inf:
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tuple(x), 2, torch.float64)))
    return found


def _norms(rows: Tensor, wide: torch.dtype) -> Tensor:
    """The norm of each row, summed in a wide dtype.

    On the CPU torch copies float32 to float64 for that, which takes five times as long and 2 P of memory. There long
    rows are summed piece by piece: in float32 inside a piece, in float64 over the pieces, which is as accurate to 1e-7.
    """
    narrow = rows.dtype == torch.float32 and rows.device.type == "cpu" and rows.shape[1] >= _LONG
    if not narrow or torch._C._functorch.is_functorch_wrapped_tensor(rows):
        return torch.linalg.vector_norm(rows, dim=1, dtype=wide)
    cut = rows.shape[1] // _PIECE * _PIECE
    pieces = torch.linalg.vector_norm(rows[:, :cut].unflatten(1, (-1, _PIECE)), dim=2)
    rest = torch.linalg.vector_norm(rows[:, cut:], dim=1, keepdim=True)
    found = torch.linalg.vector_norm(torch.cat([pieces, rest], dim=1), dim=1, dtype=wide)
    # Squares of float32 overflow above 1e19, and below 1e-19 they vanish. (Fake tensors have no numbers to look at.)
    if type(found) is Tensor and not bool((torch.isfinite(found) & (found > 1e-15)).all()):
        return torch.linalg.vector_norm(rows, dim=1, dtype=wide)
    return found


def _summable(leaf: Tensor) -> Tensor:
    return leaf.float() if leaf.dtype in NARROW else leaf
