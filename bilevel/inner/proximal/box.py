"""Bounds: h is 0 where low <= y <= high and infinite elsewhere, and its proximal operator clips.

    prox_h(v) = min(max(v, low), high)

At a solution the coordinates that are held at a bound move with the bound alone, the others as if there were none.
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
class Box(Prox):
    """Clip to an interval. At a tie, v_i on a bound, the coordinate counts as held there.

    Args:
        low, high: None for no bound; a number, a tree like the inner variable of one task, or a function of outer that
            returns one of both, a 0-dim tensor, or tensors that broadcast. Where low is above high, the clip is NaN.

    Raises:
        ValueError: both are None, or low is above high.

    Example:
        >>> import torch
        >>> from bilevel.inner.proximal import Box
        >>> Box(low=0.0, high=lambda x: x).apply(torch.tensor([-1.0, 0.5, 3.0]), 0.1, torch.tensor(2.0))
        tensor([0.0000, 0.5000, 2.0000])
    """

    low: Hyper | None = None
    high: Hyper | None = None

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            if getattr(self, name) is not None:
                check_hyper("Box", name, getattr(self, name), -float("inf"))
        if self.low is None and self.high is None:
            raise ValueError("Box was given no bound; write Box(low=0.0), Box(high=1.0) or both")
        if isinstance(self.low, (int, float)) and isinstance(self.high, (int, float)) and self.low > self.high:
            raise ValueError(f"Box was given low={self.low} above high={self.high}; no number lies between them")

    def apply(self, point: Tree, rate: Any, outer: Tree) -> Tree:
        moved = tree.tensors(point)
        bounds = [self._bound("low", point, outer), self._bound("high", point, outer)]
        for i, v in enumerate(moved):
            low, high = (None if each is None else each[i] for each in bounds)
            found = v if low is None else torch.where(v > low, v, low)
            found = found if high is None else torch.where(found < high, found, high)
            if low is not None and high is not None:
                found = torch.where(torch.as_tensor(low > high, device=v.device), torch.nan, found)
            moved[i] = torch.where(v.isnan(), v, found)
        return leafwise(point, moved)

    def value(self, point: Tree, outer: Tree) -> Tensor:
        return tree.tensors(point)[0].new_zeros(())

    def _bound(self, name: str, point: Tree, outer: Tree) -> list[Any] | None:
        given = getattr(self, name)
        return None if given is None else spread(value_of(given, outer), point, name)
