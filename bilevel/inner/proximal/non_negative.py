"""Numbers of at least 0: the projection max(v, 0)."""

import dataclasses
from typing import Any

from torch import Tensor

from bilevel.inner.proximal.base import Prox, leafwise
from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class NonNegative(Prox):
    """Clip at zero. At a tie, v_i = 0, the coordinate counts as held there.

    Example:
        >>> import torch
        >>> from bilevel.inner.proximal import NonNegative
        >>> NonNegative().apply(torch.tensor([-1.0, 0.5]), 0.1, None)
        tensor([0.0000, 0.5000])
    """

    def apply(self, point: Tree, rate: Any, outer: Tree) -> Tree:
        return leafwise(point, [v.relu() for v in tree.tensors(point)])

    def value(self, point: Tree, outer: Tree) -> Tensor:
        return tree.tensors(point)[0].new_zeros(())
