"""The group lasso's penalty h = sum over groups of lambda_G |y_G|, which holds whole groups at zero.

    prox_{c h}(v)_G = v_G max(1 - c lambda / |v_G|, 0)

Reference: Yuan and Lin 2006 (recalled).
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bilevel.inner.proximal.base import Prox, check_penalty, leafwise, strength, total
from bilevel.optim.base import Hyper
from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True, eq=False)
class GroupLasso(Prox):
    """Shrink the norm of each group. At a tie, |v_G| = c lambda, the group counts as held at zero.

    Args:
        penalty: lambda, at least 0, as for `L1`; a tensor must have the shape of the groups' norms or broadcast to it
            (their shape with a 1 in the place of `dim`).
        groups: what a group is. None: each tensor. An integer: the numbers along that dimension of one task's tensors
            (-1: each row). An integer tensor, for an inner variable that is one tensor: the number of each entry's
            group, from 0, in its shape.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind; (when used) shapes do not fit.

    Example:
        >>> import torch
        >>> from bilevel.inner.proximal import GroupLasso
        >>> v = torch.tensor([3.0, 4.0, 0.1, 0.2])
        >>> GroupLasso(penalty=1.0, groups=torch.tensor([0, 0, 1, 1])).apply(v, 1.0, None)
        tensor([2.4000, 3.2000, 0.0000, 0.0000])
    """

    penalty: Hyper
    groups: int | Tensor | None = None

    def __post_init__(self) -> None:
        check_penalty("GroupLasso", self.penalty)
        numbered = (
            isinstance(self.groups, Tensor) and self.groups.dtype == torch.long and bool((self.groups >= 0).all())
        )
        if not numbered and (isinstance(self.groups, bool) or not isinstance(self.groups, (int, type(None)))):
            raise TypeError(
                f"GroupLasso was given groups={self.groups!r}; None, a dimension, or a torch.long tensor of group "
                f"numbers from 0 was needed"
            )

    def apply(self, point: Tree, rate: Any, outer: Tree) -> Tree:
        moved = []
        for v, limit, norm in self._norms(point, outer):
            threshold = rate * limit
            kept = norm > threshold
            factor = torch.where(kept, 1 - threshold / torch.where(kept, norm, 1.0), 0.0)
            # (A NaN penalty keeps no group; it must not pass for one that holds all.)
            factor = factor + 0 * threshold
            moved.append(v * (factor[self.groups] if isinstance(self.groups, Tensor) else factor))
        return leafwise(point, moved)

    def value(self, point: Tree, outer: Tree) -> Tensor:
        return total([(limit * norm).sum() for _, limit, norm in self._norms(point, outer)])

    def _norms(self, point: Tree, outer: Tree) -> list[tuple[Tensor, Any, Tensor]]:
        """Each tensor with its penalty and the norms of its groups, in a shape that multiplies it."""
        leaves = tree.tensors(point)
        if isinstance(self.groups, Tensor):
            if len(leaves) != 1 or leaves[0].shape != self.groups.shape:
                raise ValueError(
                    f"GroupLasso was given groups of shape {tuple(self.groups.shape)} for an inner variable of shapes "
                    f"{[tuple(leaf.shape) for leaf in leaves]} for one task; one tensor of that shape was needed"
                )
            count = int(self.groups.max()) + 1 if self.groups.numel() else 0
            flat, index = leaves[0].square().reshape(-1), self.groups.reshape(-1).to(leaves[0].device)
            squares = [flat.new_zeros(count).index_add(0, index, flat)]
        elif self.groups is None:
            squares = [leaf.square().sum() for leaf in leaves]
        else:
            squares = [leaf.square().sum(self.groups, keepdim=True) for leaf in leaves]
        limits = strength(self.penalty, tree.like(point, squares), outer)
        return [(v, limit, _root(each)) for v, limit, each in zip(leaves, limits, squares, strict=True)]


def _root(square: Tensor) -> Tensor:
    """The square root, whose derivative at 0 is 0."""
    return torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 0.0)
