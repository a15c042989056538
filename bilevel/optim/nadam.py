"""NAdam, differentiable: Adam with Nesterov momentum.

    m_t = b1 (1 - 0.96^(t psi) / 2);   M_t = m_1 ... m_t;   f, v the moments of Adam;   w = sqrt(v / (1 - b2^t)) + eps
    y <- y - lr ((1 - m_t) / (1 - M_t) g + m_{t+1} / (1 - M_t m_{t+1}) f) / w

| | gradients | extra memory |
| --- | --- | --- |
| step | - | 2 P, and one number a tensor |

psi is momentum_decay; t counts the steps that used a tensor, each tensor's own. At rest g + weight_decay y = 0; with
decoupled weight decay it does not say, as AdamW.

Wins: where Adam's momentum overshoots.
Fails: as Adam, the derivative of early steps is steep where gradients are near zero.
Reference: Dozat 2016, ICLR workshop; equal to torch.optim.NAdam in float64 to 1e-12.
Differences from peers: an entry whose gradient was always zero has derivative zero, where torch's differentiable=True
says NaN. torch keeps M in float32 (in float64 where that is the default dtype), which moves its steps by 1e-9; here M
is a Python number.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bilevel.optim.base import Hyper, Optimizer, check_hyper, coupled_rest, off
from bilevel.optim.entrywise import (
    average,
    average_square,
    check_betas,
    decayed,
    fresh,
    minus_quotient,
    root,
    shrunk,
    stepped,
)
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class NAdam(Optimizer):
    """Adam that looks one step ahead along its momentum.

    Args:
        lr: step size.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: adds weight_decay * y to the gradient; decoupled, it multiplies y by 1 - lr * weight_decay first.
        momentum_decay: psi, how fast the momentum grows to betas[0].
        decoupled_weight_decay: which of the two.

    Each of the first five (each of the two betas) is a number, a tree of numbers like inner, or a function of outer
    that returns a number, a 0-dim tensor or a tree like inner. The values that functions return are not checked for
    their range.

    Raises:
        ValueError: a number is out of range; in `step`, a tree is not like inner.

    Example:
        >>> import torch, bilevel as bl
        >>> nadam = bl.optim.NAdam(lr=0.1)
        >>> y, state = nadam.step(torch.ones(2), nadam.init(torch.zeros(2)), torch.zeros(2), None)
        >>> y
        tensor([-0.1056, -0.1056])
    """

    sharded = True

    lr: Hyper = 2e-3
    betas: tuple[Hyper, Hyper] = (0.9, 0.999)
    eps: Hyper = 1e-8
    weight_decay: Hyper = 0.0
    momentum_decay: Hyper = 4e-3
    decoupled_weight_decay: bool = False

    def __post_init__(self) -> None:
        check_betas("NAdam", self.betas)
        for name in ("lr", "eps", "weight_decay", "momentum_decay"):
            check_hyper("NAdam", name, getattr(self, name), 0.0)

    def init(self, inner: Tree) -> Any:
        return fresh(inner, "first", "second", "product")

    def step(self, grad: Tree, state: Any, inner: Tree, outer: Tree) -> tuple[Tree, Any]:
        hypers = {"betas[0]": self.betas[0], "betas[1]": self.betas[1]}
        hypers |= {name: getattr(self, name) for name in ("lr", "eps", "weight_decay", "momentum_decay")}
        return stepped(self._update, grad, state, inner, outer, hypers)

    def stationarity(self, grad: Tree, inner: Tree, outer: Tree) -> Tree | None:
        if self.decoupled_weight_decay and not off(self.weight_decay):
            return None
        return coupled_rest(grad, self.lr, self.weight_decay, inner, outer)

    def _update(self, y: Tensor, g: Tensor, past: dict[str, Any], h: dict[str, Any]) -> Tensor:
        if self.decoupled_weight_decay:
            y = shrunk(y, h["lr"], h["weight_decay"])
        else:
            g = decayed(y, g, h["weight_decay"])
        lr, beta1, beta2, t = h["lr"], h["betas[0]"], h["betas[1]"], past["step"]
        now, ahead = (beta1 * (1 - 0.5 * 0.96 ** (step * h["momentum_decay"])) for step in (t, t + 1))
        product = now if past["product"] is None else past["product"] * now
        if isinstance(product, Tensor) and product.dim():
            # One number an entry: kept in the shape of y, whose first dimension may be that of tasks.
            product = torch.broadcast_to(product, g.shape)
        past["product"] = product
        m = past["first"] = average(past["first"], beta1, g)
        v = past["second"] = average_square(past["second"], beta2, g)
        below = root(v) / (1 - beta2**t) ** 0.5 + h["eps"]
        y = minus_quotient(y, lr * (1 - now) / (1 - product), g, below)
        return minus_quotient(y, lr * ahead / (1 - product * ahead), m, below)
