"""Stochastic gradient descent, differentiable.

    d = g + weight_decay y;   b <- momentum b + (1 - dampening) d  (b = d at the first step);   y <- y - lr (d +
    momentum b if nesterov else b)

| | gradients | extra memory |
| --- | --- | --- |
| step | - | P for momentum, 0 without |

Reference: torch.optim.SGD, whose steps it equals in float64 to 1e-12. It differs by being out of place and by
    hyper-parameters that may be
functions of the outer variable.
"""

import dataclasses
from typing import Any

from bilevel.optim.base import Hyper, Optimizer, check_hyper, minus, off, plus, spread, value_of
from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class SGD(Optimizer):
    """Gradient descent with momentum, Nesterov momentum and weight decay.

    Args:
        lr: step size.
        momentum: 0 for none; the state then holds nothing.
        dampening: of the momentum, as in torch.optim.SGD.
        weight_decay: adds weight_decay * y to the gradient.
        nesterov: needs momentum and no dampening.

    Each of lr, momentum, dampening and weight_decay is a float or a function of outer; lr and weight_decay functions
    may return a tree like inner.

    Raises:
        ValueError: a number is out of range, or nesterov without momentum.

    Example:
        >>> import torch, bilevel as bl
        >>> sgd = bl.SGD(lr=lambda outer: outer["log_lr"].exp())
        >>> y, state = sgd.step(torch.ones(2), sgd.init(torch.zeros(2)), torch.zeros(2), {"log_lr": torch.tensor(0.0)})
        >>> y
        tensor([-1., -1.])
    """

    lr: Hyper
    momentum: Hyper = 0.0
    dampening: Hyper = 0.0
    weight_decay: Hyper = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        for name in ("lr", "momentum", "dampening", "weight_decay"):
            check_hyper("SGD", name, getattr(self, name), 0.0)
        if self.nesterov and (off(self.momentum) or not off(self.dampening)):
            raise ValueError(
                "SGD was given nesterov=True, which needs a momentum and no dampening; write SGD(lr, momentum=0.9, "
                "nesterov=True)"
            )

    @property
    def plain_rate(self) -> float | None:
        return self.lr if isinstance(self.lr, (int, float)) and off(self.momentum) and off(self.weight_decay) else None

    def init(self, inner: Tree) -> Any:
        return None

    def step(self, grad: Tree, state: Any, inner: Tree, outer: Tree) -> tuple[Tree, Any]:
        decay, momentum, dampening = (
            value_of(hyper, outer) for hyper in (self.weight_decay, self.momentum, self.dampening)
        )
        y, direction = tree.tensors(inner), tree.tensors(grad)
        if not off(decay):
            direction = [plus(g, rate, leaf) for g, rate, leaf in zip(direction, spread(decay, inner), y, strict=True)]
        if not off(momentum):
            past = [None] * len(direction) if state is None else state
            buffers = [
                d if b is None else plus(momentum * b, 1 - dampening, d) for b, d in zip(past, direction, strict=True)
            ]
            direction = (
                [plus(d, momentum, b) for d, b in zip(direction, buffers, strict=True)] if self.nesterov else buffers
            )
            state = buffers
        rates = spread(value_of(self.lr, outer), inner)
        return tree.like(
            inner, [minus(leaf, rate, d) for leaf, rate, d in zip(y, rates, direction, strict=True)]
        ), state
