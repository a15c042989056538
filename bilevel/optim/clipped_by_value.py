"""The gradient clipped entry by entry, then a step of another optimizer.

    y <- optimizer.step(min(max(g, -limit), limit))

| | gradients | extra memory |
| --- | --- | --- |
| step | - | P for the clipped gradient |

At rest: that of the optimizer where it is at g = 0. With coupled weight decay the clipped gradient balances the decay,
so it does not say.

Wins: single entries that explode, which a clip by the norm would let slow down all others.
Fails: an entry that is clipped has derivative zero in g.
Reference: torch.nn.utils.clip_grad_value_, which it equals to the bit.
Differences from peers: it has a derivative, and the limit may be a function of outer, or a tree like inner.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bilevel.optim.base import Hyper, Optimizer, check_hyper, gradients, same_rest, spread, value_of
from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class ClippedByValue(Optimizer):
    """Clips every entry of the gradient to [-limit, limit], then lets another optimizer step.

    Args:
        optimizer: that one.
        limit: a positive number, a tree of them like inner, or a function of outer that returns a number, a 0-dim
            tensor or a tree like inner (whose range is not checked).

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> clipped, y = bl.optim.ClippedByValue(bl.SGD(lr=1.0), limit=1.0), torch.zeros(2)
        >>> clipped.step(torch.tensor([0.5, 4.0]), clipped.init(y), y, None)[0]
        tensor([-0.5000, -1.0000])
    """

    sharded = True

    optimizer: Optimizer
    limit: Hyper

    def __post_init__(self) -> None:
        if not isinstance(self.optimizer, Optimizer):
            raise TypeError(
                f"ClippedByValue was given the optimizer {type(self.optimizer).__name__}; an inner optimizer was "
                f"needed, such as ClippedByValue(bilevel.SGD(lr=0.1), limit=1.0)"
            )
        check_hyper("ClippedByValue", "limit", self.limit, 0.0)
        if not callable(self.limit) and not all(_positive(leaf) for leaf in tree.flatten(self.limit)[0]):
            raise ValueError(
                f"ClippedByValue was given limit={self.limit!r}; positive numbers were needed, since nothing moves at 0"
            )

    @property
    def step_limit(self) -> int | None:
        return self.optimizer.step_limit

    def init(self, inner: Tree) -> Any:
        return self.optimizer.init(inner)

    def step(self, grad: Tree, state: Any, inner: Tree, outer: Tree) -> tuple[Tree, Any]:
        limits = spread(value_of(self.limit, outer), inner, "limit")
        clipped = [
            leaf if leaf is None else _clipped(leaf, limit)
            for leaf, limit in zip(gradients(grad, inner), limits, strict=True)
        ]
        return self.optimizer.step(tree.like(inner, clipped), state, inner, outer)

    def stationarity(self, grad: Tree, inner: Tree, outer: Tree) -> Tree | None:
        return same_rest(self.optimizer.stationarity(grad, inner, outer), grad)


def _positive(limit: Any) -> bool:
    return bool((limit > 0).all()) if isinstance(limit, Tensor) else limit > 0


def _clipped(g: Tensor, limit: Any) -> Tensor:
    if not isinstance(limit, Tensor):
        return g.clamp(-limit, limit)
    limit = limit.to(g.dtype)
    return torch.clamp(g, -limit, limit)
