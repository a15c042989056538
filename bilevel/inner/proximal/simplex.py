"""The simplex: y_i >= 0 with sum r, along the last dimension of each tensor.

    prox_h(v) = max(v - theta, 0)    with theta such that the sum is r

On the active set S (y_i > 0) its derivative is I - 11'/|S|, and r adds 1/|S|; elsewhere it is zero.

| | cost | memory |
| --- | --- | --- |
| apply | a sort of each row | 3 P |

Reference: Held, Wolfe and Crowder 1974; Duchi et al. 2008 (recalled).
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bilevel.inner.proximal.base import Prox, leafwise
from bilevel.optim.base import Hyper, check_hyper, spread, value_of
from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class Simplex(Prox):
    """Project each row of each tensor onto a simplex. At a tie, v_i = theta, the coordinate counts as held at zero.

    Args:
        total: r, positive: a number, a tree of numbers like the inner variable, or a function of outer that returns
            one of both, or a 0-dim tensor. One that is not positive and that a function returns gives NaN.

    Raises:
        ValueError: the total is not positive; (when used) a tensor of y has no dimension.

    Example:
        >>> import torch
        >>> from bilevel.inner.proximal import Simplex
        >>> Simplex().apply(torch.tensor([0.9, 0.5, -1.0]), 0.1, None)
        tensor([0.7000, 0.3000, 0.0000])
    """

    total: Hyper = 1.0

    def __post_init__(self) -> None:
        check_hyper("Simplex", "total", self.total, torch.finfo(torch.float64).tiny)

    def apply(self, point: Tree, rate: Any, outer: Tree) -> Tree:
        totals = spread(value_of(self.total, outer), point, "total")
        return leafwise(
            point, [_projected(v, torch.as_tensor(r)) for v, r in zip(tree.tensors(point), totals, strict=True)]
        )

    def value(self, point: Tree, outer: Tree) -> Tensor:
        return tree.tensors(point)[0].new_zeros(())


def _projected(v: Tensor, total: Tensor) -> Tensor:
    if v.dim() == 0:
        raise ValueError(
            "Simplex was given an inner variable with a tensor of no dimension for one task; one of at least one "
            "dimension was needed, whose last is a simplex"
        )
    if v.shape[-1] == 0:
        return v
    total = torch.where(total > 0, total, torch.nan).to(device=v.device, dtype=v.dtype)
    order = v.detach().sort(dim=-1, descending=True).values
    count = torch.arange(1, v.shape[-1] + 1, dtype=v.dtype, device=v.device)
    thresholds = (order.cumsum(-1) - total.detach()) / count
    # The threshold of the largest set whose members it leaves positive; ties with it are left out.
    theta = torch.where(order > thresholds, thresholds, -torch.inf).amax(-1, keepdim=True)
    active = v.detach() > theta
    size = active.sum(-1, keepdim=True).clamp_min(1)
    exact = (torch.where(active, v, 0.0).sum(-1, keepdim=True) - total) / size
    return torch.where(active, v - exact, 0.0) + 0 * total
