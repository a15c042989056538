"""Lion, differentiable: steps of one length along the sign of a momentum.

    d = sign(b1 m + (1 - b1) g);   y <- (1 - lr weight_decay) y - lr d;   m <- b2 m + (1 - b2) g

| | gradients | extra memory |
| --- | --- | --- |
| step | - | P |

Where it rests is not said: steps of one length do not settle, and with weight decay they stay inside |y| <= 1 /
weight_decay, where the gradient need not vanish.

Wins: half of Adam's state; batches whose gradients are mostly noise.
Fails: the derivative of a sign is zero. The exact derivative of its steps sees neither the inner loss nor the start
through d: what is left is the direct way of lr, of the decay and of y_0 itself. An x in the inner loss gets a
hypergradient of zeros, which is right and of no use: give `smooth`.
Reference: Chen et al. 2023, arXiv 2302.06675, algorithm 2, as it is recalled; torch.optim has none.
Differences from peers: `smooth`, with which d = c / sqrt(c^2 + smooth^2), c = b1 m + (1 - b1) g; and derivatives.
"""

import dataclasses
from typing import Any

from torch import Tensor

from bilevel.optim.base import Hyper, Optimizer, check_hyper, minus, off
from bilevel.optim.entrywise import average, check_betas, fresh, root, shrunk, stepped
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class Lion(Optimizer):
    """Steps along the sign of an interpolated momentum, with decoupled weight decay.

    Args:
        lr: the length of a step, in every entry.
        betas: of the direction, and of the momentum.
        weight_decay: y is first multiplied by 1 - lr * weight_decay.
        smooth: how far from zero the sign is rounded off; 0 for the sign itself, whose derivative is zero.

    Each (each of the two betas) is a number, a tree of numbers like inner, or a function of outer that returns a
    number, a 0-dim tensor or a tree like inner. The values that functions return are not checked for their range.

    Raises:
        ValueError: a number is out of range; in `step`, a tree is not like inner.

    Example:
        >>> import torch, bilevel as bl
        >>> lion = bl.optim.Lion(lr=0.1)
        >>> y, state = lion.step(torch.tensor([3.0, -0.2]), lion.init(torch.zeros(2)), torch.zeros(2), None)
        >>> y
        tensor([-0.1000,  0.1000])
    """

    sharded = True

    lr: Hyper = 1e-4
    betas: tuple[Hyper, Hyper] = (0.9, 0.99)
    weight_decay: Hyper = 0.0
    smooth: Hyper = 0.0

    def __post_init__(self) -> None:
        check_betas("Lion", self.betas)
        for name in ("lr", "weight_decay", "smooth"):
            check_hyper("Lion", name, getattr(self, name), 0.0)

    def init(self, inner: Tree) -> Any:
        return fresh(inner, "first")

    def step(self, grad: Tree, state: Any, inner: Tree, outer: Tree) -> tuple[Tree, Any]:
        hypers = {"betas[0]": self.betas[0], "betas[1]": self.betas[1]}
        hypers |= {name: getattr(self, name) for name in ("lr", "weight_decay", "smooth")}
        return stepped(_update, grad, state, inner, outer, hypers)


def _update(y: Tensor, g: Tensor, past: dict[str, Any], h: dict[str, Any]) -> Tensor:
    c, smooth = average(past["first"], h["betas[0]"], g), h["smooth"]
    d = c.sign() if off(smooth) else c / root(c * c + smooth * smooth)
    past["first"] = average(past["first"], h["betas[1]"], g)
    return minus(shrunk(y, h["lr"], h["weight_decay"]), h["lr"], d)
