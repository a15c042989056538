"""Adagrad, differentiable.

    v <- v + g^2;   y <- y - lr / (1 + (t - 1) lr_decay) g / (sqrt(v) + eps)           (g with weight_decay y added)

| | gradients | extra memory |
| --- | --- | --- |
| step | - | P |

t counts the steps that used a tensor, each tensor's own; v starts at initial_accumulator_value. At rest
g + weight_decay y = 0.

Wins: sparse features, whose entries keep long steps; no rate to schedule, steps shrink by themselves.
Fails: steps shrink for good, so that a loop of many steps, or one that is carried on, comes to a stand before its rest.
Reference: Duchi, Hazan and Singer 2011, JMLR 12; equal to torch.optim.Adagrad in float64 to 1e-12.
Differences from peers: an entry whose gradient was always zero has derivative zero, where torch's differentiable=True
and TorchOpt's adagrad say NaN.
"""

import dataclasses
from typing import Any

from torch import Tensor

from bilevel.optim.base import Hyper, Optimizer, check_hyper, coupled_rest
from bilevel.optim.entrywise import decayed, fresh, minus_quotient, plus_square, root, stepped
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class Adagrad(Optimizer):
    """Divides the gradient by the root of the sum of its squares; weight decay is added to the gradient.

    Args:
        lr: step size.
        lr_decay: the step size of step t is lr / (1 + (t - 1) lr_decay).
        weight_decay: adds weight_decay * y to the gradient.
        initial_accumulator_value: where the sum of squares starts.
        eps: added to the root.

    Each is a number, a tree of numbers like inner, or a function of outer that returns a number, a 0-dim tensor or a
    tree like inner. The values that functions return are not checked for their range.

    Raises:
        ValueError: a number is out of range; in `step`, a tree is not like inner.

    Example:
        >>> import torch, bilevel as bl
        >>> adagrad = bl.optim.Adagrad(lr=0.1)
        >>> y, state = torch.zeros(2), adagrad.init(torch.zeros(2))
        >>> for _ in range(4):
        ...     y, state = adagrad.step(torch.ones(2), state, y, None)
        >>> y  # -0.1 (1 + 1 / sqrt(2) + 1 / sqrt(3) + 1 / 2)
        tensor([-0.2784, -0.2784])
    """

    sharded = True

    lr: Hyper = 1e-2
    lr_decay: Hyper = 0.0
    weight_decay: Hyper = 0.0
    initial_accumulator_value: Hyper = 0.0
    eps: Hyper = 1e-10

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_hyper("Adagrad", field.name, getattr(self, field.name), 0.0)

    def init(self, inner: Tree) -> Any:
        return fresh(inner, "sum")

    def step(self, grad: Tree, state: Any, inner: Tree, outer: Tree) -> tuple[Tree, Any]:
        hypers = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return stepped(_update, grad, state, inner, outer, hypers)

    def stationarity(self, grad: Tree, inner: Tree, outer: Tree) -> Tree | None:
        return coupled_rest(grad, self.lr, self.weight_decay, inner, outer)


def _update(y: Tensor, g: Tensor, past: dict[str, Any], h: dict[str, Any]) -> Tensor:
    g = decayed(y, g, h["weight_decay"])
    start = h["initial_accumulator_value"]
    if past["sum"] is None:
        past["sum"] = g * g + start
    else:
        past["sum"] = plus_square(past["sum"], 1, g)
    rate = h["lr"] / (1 + (past["step"] - 1) * h["lr_decay"])
    return minus_quotient(y, rate, g, root(past["sum"]) + h["eps"])
