"""Adam and AdamW, differentiable.

    m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2;  y <- y - lr (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)

| | gradients | extra memory |
| --- | --- | --- |
| step | - | 2 P |

Reference: Kingma and Ba 2015, arXiv 1412.6980; Loshchilov and Hutter 2019, arXiv 1711.05101; equal to torch.optim in
    float64 to 1e-12. It
differs in the square root: where v is exactly zero (a dead unit) the derivative of sqrt is infinite and 0 * inf makes
    the whole
hypergradient NaN in a plain transcription (TorchOpt's MetaAdam does). Here v is clamped at the smallest normal number
before the root, which changes no step and gives such entries derivative zero.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bilevel.optim.base import Hyper, Optimizer, check_hyper, minus, off, plus, spread, value_of
from bilevel.space import tree
from bilevel.space.tree import Tree


def _adam_step(
    betas: tuple[Any, Any], eps: Any, lr: Any, grad: list[Tensor], state: Any, inner: Tree
) -> tuple[list[Tensor], Any]:
    (beta1, beta2), count = betas, state["step"] + 1
    if count == 1:
        first = [(1 - beta1) * g for g in grad]
        second = [(1 - beta2) * (g * g) for g in grad]
    else:
        first = [beta1 * m + (1 - beta1) * g for m, g in zip(state["first"], grad, strict=True)]
        second = [beta2 * v + (1 - beta2) * (g * g) for v, g in zip(state["second"], grad, strict=True)]
    correction1, correction2 = 1 - beta1**count, (1 - beta2**count) ** 0.5
    moved = []
    for y, m, v, rate in zip(tree.tensors(inner), first, second, spread(lr, inner), strict=True):
        # float16 ends at 6e-8, below its smallest normal number, and a second moment is often there.
        floor = 6e-8 if v.dtype == torch.float16 else torch.finfo(v.dtype).tiny
        root = v.clamp_min(floor).sqrt()
        moved.append(minus(y, rate / correction1, m / (root / correction2 + eps)))
    return moved, {"step": count, "first": first, "second": second}


def _check(owner: str, lr: Hyper, betas: tuple[Hyper, Hyper], eps: Hyper, weight_decay: Hyper) -> None:
    if not isinstance(betas, tuple) or len(betas) != 2:
        raise ValueError(f"{owner} was given betas={betas!r}; a pair was needed, such as betas=(0.9, 0.999)")
    check_hyper(owner, "lr", lr, 0.0)
    check_hyper(owner, "eps", eps, 0.0)
    check_hyper(owner, "weight_decay", weight_decay, 0.0)
    check_hyper(owner, "betas[0]", betas[0], 0.0, 1.0)
    check_hyper(owner, "betas[1]", betas[1], 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Adam(Optimizer):
    """Adam; weight decay is added to the gradient (see `AdamW` for the decoupled form).

    Args:
        lr: step size.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: adds weight_decay * y to the gradient.

    Each is a float or a function of outer; lr and weight_decay functions may return a tree like inner.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> adam = bl.Adam(lr=0.1)
        >>> y, state = adam.step(torch.ones(2), adam.init(torch.zeros(2)), torch.zeros(2), None)
        >>> y
        tensor([-0.1000, -0.1000])
    """

    lr: Hyper = 1e-3
    betas: tuple[Hyper, Hyper] = (0.9, 0.999)
    eps: Hyper = 1e-8
    weight_decay: Hyper = 0.0

    def __post_init__(self) -> None:
        _check("Adam", self.lr, self.betas, self.eps, self.weight_decay)

    def init(self, inner: Tree) -> Any:
        return {"step": 0, "first": None, "second": None}

    def step(self, grad: Tree, state: Any, inner: Tree, outer: Tree) -> tuple[Tree, Any]:
        decay, direction = value_of(self.weight_decay, outer), tree.tensors(grad)
        if not off(decay):
            rates = spread(decay, inner)
            direction = [plus(g, rate, y) for g, rate, y in zip(direction, rates, tree.tensors(inner), strict=True)]
        betas = (value_of(self.betas[0], outer), value_of(self.betas[1], outer))
        moved, state = _adam_step(betas, value_of(self.eps, outer), value_of(self.lr, outer), direction, state, inner)
        return tree.like(inner, moved), state


@dataclasses.dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay: y is first multiplied by 1 - lr * weight_decay.

    Args:
        lr: step size.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay.

    Each is a float or a function of outer; lr and weight_decay functions may return a tree like inner.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> adamw = bl.AdamW(lr=0.1, weight_decay=0.1)
        >>> y, state = adamw.step(torch.ones(2), adamw.init(torch.ones(2)), torch.ones(2), None)
        >>> y
        tensor([0.8900, 0.8900])
    """

    lr: Hyper = 1e-3
    betas: tuple[Hyper, Hyper] = (0.9, 0.999)
    eps: Hyper = 1e-8
    weight_decay: Hyper = 1e-2

    def __post_init__(self) -> None:
        _check("AdamW", self.lr, self.betas, self.eps, self.weight_decay)

    def init(self, inner: Tree) -> Any:
        return {"step": 0, "first": None, "second": None}

    def step(self, grad: Tree, state: Any, inner: Tree, outer: Tree) -> tuple[Tree, Any]:
        decay, lr = value_of(self.weight_decay, outer), value_of(self.lr, outer)
        shrunk = inner
        if not off(decay):
            rates = zip(spread(lr, inner), spread(decay, inner), strict=True)
            shrunk = tree.like(inner, [y * (1 - a * b) for y, (a, b) in zip(tree.tensors(inner), rates, strict=True)])
        betas = (value_of(self.betas[0], outer), value_of(self.betas[1], outer))
        moved, state = _adam_step(betas, value_of(self.eps, outer), lr, tree.tensors(grad), state, shrunk)
        return tree.like(inner, moved), state
