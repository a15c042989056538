"""RMSprop, plain, centered and with momentum, differentiable.

    v <- alpha v + (1 - alpha) g^2;   m <- alpha m + (1 - alpha) g  (centered);   d = g / (sqrt(v - m^2) + eps)
    b <- momentum b + d               y <- y - lr b                    (g with weight_decay y added)

| | gradients | extra memory |
| --- | --- | --- |
| step | - | P, P more if centered, P more with momentum |

At rest g + weight_decay y = 0.

Wins: scales that differ from entry to entry, with half of Adam's state.
Fails: eps outside of the root makes its first steps long, lr / sqrt(1 - alpha) an entry; warm up, or use Adam.
Reference: Tieleman and Hinton 2012, lecture 6.5; centered: Graves 2013, arXiv 1308.0850; equal to torch.optim.RMSprop
in float64 to 1e-12.
Differences from peers: an entry whose gradient was always zero has derivative zero, where torch's differentiable=True
and TorchOpt's rmsprop say NaN. A centered variance that rounding makes negative is zero, where torch's root says NaN.
"""

import dataclasses
from typing import Any

from torch import Tensor

from bilevel.optim.base import Hyper, Optimizer, check_hyper, coupled_rest, minus, off
from bilevel.optim.entrywise import average, average_square, decayed, fresh, minus_quotient, root, stepped
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class RMSprop(Optimizer):
    """Divides the gradient by the root of its mean square; weight decay is added to the gradient.

    Args:
        lr: step size.
        alpha: decay rate of the mean square, and of the mean where centered.
        eps: added to the root.
        weight_decay: adds weight_decay * y to the gradient.
        momentum: of the divided gradient; 0 for none, the state then holds none.
        centered: divide by the standard deviation.

    Each of the first five is a number, a tree of numbers like inner, or a function of outer that returns a number, a
    0-dim tensor or a tree like inner. The values that functions return are not checked for their range.

    Raises:
        ValueError: a number is out of range; in `step`, a tree is not like inner.

    Example:
        >>> import torch, bilevel as bl
        >>> rmsprop = bl.optim.RMSprop(lr=0.1, alpha=0.75)
        >>> y, state = rmsprop.step(torch.ones(2), rmsprop.init(torch.zeros(2)), torch.zeros(2), None)
        >>> y
        tensor([-0.2000, -0.2000])
    """

    sharded = True

    lr: Hyper = 1e-2
    alpha: Hyper = 0.99
    eps: Hyper = 1e-8
    weight_decay: Hyper = 0.0
    momentum: Hyper = 0.0
    centered: bool = False

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay", "momentum"):
            check_hyper("RMSprop", name, getattr(self, name), 0.0)
        check_hyper("RMSprop", "alpha", self.alpha, 0.0, 1.0)

    def init(self, inner: Tree) -> Any:
        names = ["square", *(["mean"] if self.centered else []), *([] if off(self.momentum) else ["momentum"])]
        return fresh(inner, *names)

    def step(self, grad: Tree, state: Any, inner: Tree, outer: Tree) -> tuple[Tree, Any]:
        names = ("lr", "alpha", "eps", "weight_decay", "momentum")
        return stepped(_update, grad, state, inner, outer, {name: getattr(self, name) for name in names})

    def stationarity(self, grad: Tree, inner: Tree, outer: Tree) -> Tree | None:
        return coupled_rest(grad, self.lr, self.weight_decay, inner, outer)


def _update(y: Tensor, g: Tensor, past: dict[str, Any], h: dict[str, Any]) -> Tensor:
    g = decayed(y, g, h["weight_decay"])
    v = past["square"] = average_square(past["square"], h["alpha"], g)
    if "mean" in past:
        m = past["mean"] = average(past["mean"], h["alpha"], g)
        v = v - m * m
    below = root(v) + h["eps"]
    if off(h["momentum"]):
        return minus_quotient(y, h["lr"], g, below)
    b, d = past["momentum"], g / below
    b = past["momentum"] = d if b is None else h["momentum"] * b + d
    return minus(y, h["lr"], b)
