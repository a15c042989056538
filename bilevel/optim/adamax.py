"""Adamax, differentiable: Adam with the largest past gradient in the place of the second moment.

    m <- b1 m + (1 - b1) g;  u <- max(b2 u, |g| + eps);  y <- y - lr / (1 - b1^t) m / u   (g with weight_decay y added)

| | gradients | extra memory |
| --- | --- | --- |
| step | - | 2 P |

t counts the steps that used a tensor, each tensor's own. At rest g + weight_decay y = 0.

Wins: gradients that are rare and large, which it remembers for 1 / (1 - b2) steps.
Fails: the maximum has kinks; where |g| = b2 u the derivative is that of neither side but their mean.
Reference: Kingma and Ba 2015, arXiv 1412.6980, section 7.1; equal to torch.optim.Adamax in float64 to 1e-12.
Differences from peers: with eps=0 an entry whose gradient was always zero stays, where torch's is NaN.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bilevel.optim.base import Hyper, Optimizer, check_hyper, coupled_rest
from bilevel.optim.entrywise import average, check_betas, decayed, floor, fresh, minus_quotient, stepped
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class Adamax(Optimizer):
    """Adam by the maximum norm; weight decay is added to the gradient.

    Args:
        lr: step size.
        betas: decay rates of the mean and of the maximum.
        eps: added to |g|.
        weight_decay: adds weight_decay * y to the gradient.

    Each (each of the two betas) is a number, a tree of numbers like inner, or a function of outer that returns a
    number, a 0-dim tensor or a tree like inner. The values that functions return are not checked for their range.

    Raises:
        ValueError: a number is out of range; in `step`, a tree is not like inner.

    Example:
        >>> import torch, bilevel as bl
        >>> adamax = bl.optim.Adamax(lr=0.1)
        >>> y, state = adamax.step(torch.ones(2), adamax.init(torch.zeros(2)), torch.zeros(2), None)
        >>> y
        tensor([-0.1000, -0.1000])
    """

    sharded = True

    lr: Hyper = 2e-3
    betas: tuple[Hyper, Hyper] = (0.9, 0.999)
    eps: Hyper = 1e-8
    weight_decay: Hyper = 0.0

    def __post_init__(self) -> None:
        check_betas("Adamax", self.betas)
        for name in ("lr", "eps", "weight_decay"):
            check_hyper("Adamax", name, getattr(self, name), 0.0)

    def init(self, inner: Tree) -> Any:
        return fresh(inner, "first", "largest")

    def step(self, grad: Tree, state: Any, inner: Tree, outer: Tree) -> tuple[Tree, Any]:
        hypers = {"betas[0]": self.betas[0], "betas[1]": self.betas[1]}
        hypers |= {name: getattr(self, name) for name in ("lr", "eps", "weight_decay")}
        return stepped(_update, grad, state, inner, outer, hypers)

    def stationarity(self, grad: Tree, inner: Tree, outer: Tree) -> Tree | None:
        return coupled_rest(grad, self.lr, self.weight_decay, inner, outer)


def _update(y: Tensor, g: Tensor, past: dict[str, Any], h: dict[str, Any]) -> Tensor:
    g, beta1 = decayed(y, g, h["weight_decay"]), h["betas[0]"]
    m = past["first"] = average(past["first"], beta1, g)
    u = g.abs() + h["eps"]
    if past["largest"] is not None:
        u = torch.maximum(h["betas[1]"] * past["largest"], u)
    past["largest"] = u
    return minus_quotient(y, h["lr"] / (1 - beta1 ** past["step"]), m, u.clamp_min(floor(u.dtype)))
