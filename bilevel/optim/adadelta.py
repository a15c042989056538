"""Adadelta, differentiable.

    v <- rho v + (1 - rho) g^2;   d = sqrt(u + eps) / sqrt(v + eps) g;   u <- rho u + (1 - rho) d^2;   y <- y - lr d

| | gradients | extra memory |
| --- | --- | --- |
| step | - | 2 P |

With weight_decay y added to g; at rest g + weight_decay y = 0.

Wins: steps in the units of y, so that no rate has to be found.
Fails: eps sets the length of the first steps (sqrt(eps / (1 - rho))), which is short; a short inner loop hardly moves.
Reference: Zeiler 2012, arXiv 1212.5701; equal to torch.optim.Adadelta in float64 to 1e-12.
Differences from peers: with eps=0 an entry whose gradient was always zero stays and has derivative zero, where torch's
says NaN.
"""

import dataclasses
from typing import Any

from torch import Tensor

from bilevel.optim.base import Hyper, Optimizer, check_hyper, coupled_rest, minus
from bilevel.optim.entrywise import average_square, decayed, fresh, root, stepped
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class Adadelta(Optimizer):
    """Scales the gradient by the ratio of the mean squares of past steps and gradients.

    Args:
        lr: the step is multiplied by it.
        rho: decay rate of both mean squares.
        eps: added to both.
        weight_decay: adds weight_decay * y to the gradient.

    Each is a number, a tree of numbers like inner, or a function of outer that returns a number, a 0-dim tensor or a
    tree like inner. The values that functions return are not checked for their range.

    Raises:
        ValueError: a number is out of range; in `step`, a tree is not like inner.

    Example:
        >>> import torch, bilevel as bl
        >>> adadelta = bl.optim.Adadelta(lr=1.0, rho=0.75, eps=0.25)
        >>> y, state = adadelta.step(torch.ones(2), adadelta.init(torch.zeros(2)), torch.zeros(2), None)
        >>> y  # -sqrt(0.25) / sqrt(0.25 + 0.25)
        tensor([-0.7071, -0.7071])
    """

    sharded = True

    lr: Hyper = 1.0
    rho: Hyper = 0.9
    eps: Hyper = 1e-6
    weight_decay: Hyper = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay"):
            check_hyper("Adadelta", name, getattr(self, name), 0.0)
        check_hyper("Adadelta", "rho", self.rho, 0.0, 1.0)

    def init(self, inner: Tree) -> Any:
        return fresh(inner, "square", "moved")

    def step(self, grad: Tree, state: Any, inner: Tree, outer: Tree) -> tuple[Tree, Any]:
        hypers = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return stepped(_update, grad, state, inner, outer, hypers)

    def stationarity(self, grad: Tree, inner: Tree, outer: Tree) -> Tree | None:
        return coupled_rest(grad, self.lr, self.weight_decay, inner, outer)


def _update(y: Tensor, g: Tensor, past: dict[str, Any], h: dict[str, Any]) -> Tensor:
    g, rho, eps = decayed(y, g, h["weight_decay"]), h["rho"], h["eps"]
    v = past["square"] = average_square(past["square"], rho, g)
    u = past["moved"] if past["moved"] is not None else g.new_zeros(g.shape)
    d = root(u + eps) / root(v + eps) * g
    past["moved"] = average_square(u, rho, d)
    return minus(y, h["lr"], d)
