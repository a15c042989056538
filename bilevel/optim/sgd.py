"""Stochastic gradient descent, differentiable.

    d = g + weight_decay y
    b <- momentum b + (1 - dampening) d     (b = d at the first step)
    y <- y - lr (d + momentum b if nesterov else b)

| | gradients | extra memory |
| --- | --- | --- |
| step | - | P for momentum, 0 without |

At rest g + weight_decay y = 0. Reference: torch.optim.SGD, whose steps it equals in float64 to 1e-12, also where a step
does not use some of the tensors. It differs by being out of place and by hyper-parameters that may be functions of the
outer variable.
"""

import dataclasses
from typing import Any

from torch import Tensor

from bilevel.optim.base import (
    Hyper,
    Optimizer,
    check_hyper,
    complements,
    coupled,
    coupled_rest,
    gradients,
    minus,
    off,
    plus,
    spread,
    value_of,
)
from bilevel.space import tree
from bilevel.space.tree import PartialLeaves, Tree


@dataclasses.dataclass(frozen=True)
class SGD(Optimizer):
    """Gradient descent with momentum, Nesterov momentum and weight decay.

    Args:
        lr: step size.
        momentum: 0 for none; the state then holds nothing.
        dampening: of the momentum, as in torch.optim.SGD.
        weight_decay: adds weight_decay * y to the gradient.
        nesterov: needs momentum and no dampening.

    Each of lr, momentum, dampening and weight_decay is a number, a tree of numbers like inner, or a function of outer
    that returns a number, a 0-dim tensor or a tree like inner. The values that functions return are not checked for
    their range.

    Raises:
        ValueError: a number is out of range, or nesterov without momentum; in `step`, a tree is not like inner.

    Example:
        >>> import torch, bilevel as bl
        >>> sgd = bl.SGD(lr=lambda outer: outer["log_lr"].exp())
        >>> y, state = sgd.step(torch.ones(2), sgd.init(torch.zeros(2)), torch.zeros(2), {"log_lr": torch.tensor(0.0)})
        >>> y
        tensor([-1., -1.])
    """

    sharded = True

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
        # One place per tensor from the start: a buffer that comes later moves no other.
        return None if off(self.momentum) else [None] * len(tree.tensors(inner))

    def step(self, grad: Tree, state: Any, inner: Tree, outer: Tree) -> tuple[Tree, Any]:
        direction = coupled(gradients(grad, inner), value_of(self.weight_decay, outer), inner)
        if not off(self.momentum):
            direction, state = self._with_momentum(direction, state, inner, outer)
        rates = spread(value_of(self.lr, outer), inner, "lr")
        moved = [
            y if d is None else minus(y, rate, d)
            for y, rate, d in zip(tree.tensors(inner), rates, direction, strict=True)
        ]
        return tree.like(inner, moved), state

    def _with_momentum(
        self, grad: PartialLeaves, state: list[Tensor | None], inner: Tree, outer: Tree
    ) -> tuple[PartialLeaves, list[Tensor | None]]:
        momenta = spread(value_of(self.momentum, outer), inner, "momentum")
        fresh = complements(spread(value_of(self.dampening, outer), inner, "dampening"))
        buffers = [
            b if d is None or off(momentum) else d if b is None else plus(momentum * b, share, d)
            for d, b, momentum, share in zip(grad, state, momenta, fresh, strict=True)
        ]
        direction = [
            d if d is None or b is None or off(momentum) else plus(d, momentum, b) if self.nesterov else b
            for d, b, momentum in zip(grad, buffers, momenta, strict=True)
        ]
        return tuple(direction), buffers

    def stationarity(self, grad: Tree, inner: Tree, outer: Tree) -> Tree | None:
        return coupled_rest(grad, self.lr, self.weight_decay, inner, outer)
