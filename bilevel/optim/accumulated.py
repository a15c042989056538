"""Gradient accumulation: a step of another optimizer along the mean of n gradients.

    y_{k+1} = y_k,   but for every n-th k:  y_{k+1} = optimizer.step((g_{k-n+1} + ... + g_k) / n)

| | gradients | extra memory |
| --- | --- | --- |
| step | - | P |

Each gradient is one step of the inner solver, with its own batch of a `PerStep`. A solver of K steps moves y
floor(K / n) times; gradients left over at the end are not used. At rest: that of the optimizer.

Wins: batches n times as large as what fits.
Fails: with one batch for all steps the n gradients are the same, at n times the cost.
Reference: torch, where loss / n is backpropagated n times between two steps; equal in float64 to 1e-12.
Differences from peers: a tensor that some of the n losses do not use has zero for those; one that none uses is left
alone. Learned hyper-parameters and the n batches are differentiated.
"""

import dataclasses
from typing import Any, ClassVar

from torch import Tensor

from bilevel.optim.base import Optimizer, gradients
from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class Accumulated(Optimizer):
    """Lets another optimizer step at every n-th gradient, along their mean.

    Args:
        optimizer: that one.
        every: n, at least 1.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> accumulated, y = bl.optim.Accumulated(bl.SGD(lr=1.0), every=2), torch.zeros(1)
        >>> state = accumulated.init(y)
        >>> for g in (1.0, 3.0, 5.0):
        ...     y, state = accumulated.step(torch.tensor([g]), state, y, None)
        >>> y
        tensor([-2.])
    """

    sharded = True

    optimizer: Optimizer
    every: int

    late: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.optimizer, Optimizer):
            raise TypeError(
                f"Accumulated was given the optimizer {type(self.optimizer).__name__}; an inner optimizer was needed, "
                f"such as Accumulated(bilevel.SGD(lr=0.1), every=4)"
            )
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise ValueError(f"Accumulated was given every={self.every!r}; an integer of at least 1 was needed")

    @property
    def step_limit(self) -> int | None:
        limit = self.optimizer.step_limit
        return None if limit is None else (limit + 1) * self.every - 1

    def init(self, inner: Tree) -> Any:
        return {"count": 0, "sum": [None] * len(tree.tensors(inner)), "inside": self.optimizer.init(inner)}

    def step(self, grad: Tree, state: Any, inner: Tree, outer: Tree) -> tuple[Tree, Any]:
        total = [_sum(a, b) for a, b in zip(state["sum"], gradients(grad, inner), strict=True)]
        count = state["count"] + 1
        if count < self.every:
            return inner, {"count": count, "sum": total, "inside": state["inside"]}
        mean = [None if leaf is None else leaf / self.every for leaf in total]
        moved, inside = self.optimizer.step(tree.like(inner, mean), state["inside"], inner, outer)
        return moved, {"count": 0, "sum": [None] * len(total), "inside": inside}

    def stationarity(self, grad: Tree, inner: Tree, outer: Tree) -> Tree | None:
        return self.optimizer.stationarity(grad, inner, outer)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
