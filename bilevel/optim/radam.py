"""RAdam, differentiable: Adam that waits until its second moment can be trusted.

    R = 2 / (1 - b2) - 1;   r = R - 2 t b2^t / (1 - b2^t);   m, v the moments of Adam
    y <- y - lr m / (1 - b1^t) c,  c = sqrt((r-4)(r-2)R / ((R-4)(R-2)r)) sqrt(1 - b2^t) / (sqrt(v) + eps) if r > 5, or 1

| | gradients | extra memory |
| --- | --- | --- |
| step | - | 2 P |

t counts the steps that used a tensor, each tensor's own; with b2 = 0.999 the first five are plain steps of momentum. At
rest g + weight_decay y = 0; with decoupled weight decay it does not say, as AdamW.

Wins: no warm-up to choose; the first steps are linear in g, so that short loops have tame derivatives.
Fails: the first steps have no scale of their own: lr must suit plain descent, too.
Reference: Liu et al. 2020, arXiv 1908.03265; equal to torch.optim.RAdam in float64 to 1e-12.
Differences from peers: an entry whose gradient was always zero has derivative zero, where torch's differentiable=True
says NaN. betas[1] may be learned; its derivative does not see the switch at r = 5.
"""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from bilevel.optim.base import Hyper, Optimizer, check_hyper, coupled_rest, minus, off
from bilevel.optim.entrywise import average, average_square, check_betas, decayed, fresh, root, shrunk, stepped
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class RAdam(Optimizer):
    """Adam with the variance of its step rectified.

    Args:
        lr: step size.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: adds weight_decay * y to the gradient; decoupled, it multiplies y by 1 - lr * weight_decay first.
        decoupled_weight_decay: which of the two.

    Each of the first four (each of the two betas) is a number, a tree of numbers like inner, or a function of outer
    that returns a number, a 0-dim tensor or a tree like inner. The values that functions return are not checked for
    their range.

    Raises:
        ValueError: a number is out of range; in `step`, a tree is not like inner.

    Example:
        >>> import torch, bilevel as bl
        >>> radam = bl.optim.RAdam(lr=0.1)
        >>> y, state = radam.step(torch.full((2,), 3.0), radam.init(torch.zeros(2)), torch.zeros(2), None)
        >>> y  # a plain step
        tensor([-0.3000, -0.3000])
    """

    sharded = True

    lr: Hyper = 1e-3
    betas: tuple[Hyper, Hyper] = (0.9, 0.999)
    eps: Hyper = 1e-8
    weight_decay: Hyper = 0.0
    decoupled_weight_decay: bool = False

    late: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_betas("RAdam", self.betas)
        for name in ("lr", "eps", "weight_decay"):
            check_hyper("RAdam", name, getattr(self, name), 0.0)

    def init(self, inner: Tree) -> Any:
        return fresh(inner, "first", "second")

    def step(self, grad: Tree, state: Any, inner: Tree, outer: Tree) -> tuple[Tree, Any]:
        hypers = {"betas[0]": self.betas[0], "betas[1]": self.betas[1]}
        hypers |= {name: getattr(self, name) for name in ("lr", "eps", "weight_decay")}
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
        beta1, beta2, t = h["betas[0]"], h["betas[1]"], past["step"]
        m = past["first"] = average(past["first"], beta1, g)
        v = past["second"] = average_square(past["second"], beta2, g)
        plain = m / (1 - beta1**t)
        share = _rectified(beta2, t)
        if share is None:
            return minus(y, h["lr"], plain)
        adapted = share / (root(v) + h["eps"])
        if isinstance(share, Tensor):
            adapted = torch.where(share > 0, adapted, 1.0)
        return minus(y, h["lr"], plain * adapted)


def _rectified(beta2: Any, t: int) -> Any:
    """sqrt of the rectification and of 1 - b2^t; None before the switch, or 0 there where b2 is a tensor."""
    end = 2 / (1 - beta2) - 1
    length = end - 2 * t * beta2**t / (1 - beta2**t)
    late = length > 5
    if isinstance(late, Tensor):
        # Masked, not branched on; the numbers in place of those before the switch have a derivative that is thrown
        # away, and must not be infinite.
        end, length = torch.where(late, end, 7.0), torch.where(late, length, 6.0)
    elif not late:
        return None
    ratio = (length - 4) * (length - 2) * end / ((end - 4) * (end - 2) * length)
    share = (ratio * (1 - beta2**t)) ** 0.5
    return torch.where(late, share, 0.0) if isinstance(late, Tensor) else share
