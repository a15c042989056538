"""Adam and AdamW, differentiable.

    m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2;  y <- y - lr (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)

| | gradients | extra memory |
| --- | --- | --- |
| step | - | 2 P |

t counts the steps that used a tensor, each tensor's own. At rest g + weight_decay y = 0 for Adam. AdamW rests where
lr weight_decay y balances a step of the moments, so where depends on the second moments it has seen: with decay it does
not say.

Reference: Kingma and Ba 2015, arXiv 1412.6980; Loshchilov and Hutter 2019, arXiv 1711.05101; equal to torch.optim in
float64 to 1e-12. It differs in the square root: where v is exactly zero (a dead unit) the derivative of sqrt is
infinite and 0 * inf makes the whole hypergradient NaN in a plain transcription (TorchOpt's MetaAdam does). Here v is
clamped at the smallest normal number before the root, which changes no step and gives such entries derivative zero.
"""

import dataclasses
from typing import Any

from bilevel.optim.base import (
    Hyper,
    Optimizer,
    check_hyper,
    complements,
    coupled,
    coupled_rest,
    gradients,
    off,
    plus,
    spread,
    value_of,
)
from bilevel.optim.entrywise import check_betas, in_float32, is_narrow, minus_quotient, plus_square, root
from bilevel.space import tree
from bilevel.space.tree import PartialLeaves, Tree


def _init(inner: Tree) -> dict[str, list[Any]]:
    # One place per tensor from the start: a moment that comes later moves no other.
    count = len(tree.tensors(inner))
    return {"step": [0] * count, "first": [None] * count, "second": [None] * count}


def _adam_step(
    optimizer: "Adam | AdamW", lr: Any, grad: PartialLeaves, state: Any, inner: Tree, outer: Tree
) -> tuple[Tree, Any]:
    betas1 = spread(value_of(optimizer.betas[0], outer), inner, "betas[0]")
    betas2 = spread(value_of(optimizer.betas[1], outer), inner, "betas[1]")
    eps, rates = spread(value_of(optimizer.eps, outer), inner, "eps"), spread(lr, inner, "lr")
    fresh1, fresh2 = complements(betas1), complements(betas2)
    counts, first, second = (list(state[name]) for name in ("step", "first", "second"))
    moved, corrections = list(tree.tensors(inner)), dict[Any, tuple[Any, Any]]()
    for i, g in enumerate(grad):
        if g is None:
            continue
        m, v, beta1, beta2 = first[i], second[i], betas1[i], betas2[i]
        m = first[i] = fresh1[i] * g if m is None else plus(beta1 * m, fresh1[i], g)
        v = second[i] = fresh2[i] * (g * g) if v is None else plus_square(beta2 * v, fresh2[i], g)
        count = counts[i] = counts[i] + 1
        # Nearly always one pair for all tensors.
        key = (count, id(beta1), id(beta2))
        if key not in corrections:
            corrections[key] = 1 - beta1**count, (1 - beta2**count) ** 0.5
        correction1, correction2 = corrections[key]
        moved[i] = minus_quotient(moved[i], rates[i] / correction1, m, root(v) / correction2 + eps[i])
    return tree.like(inner, moved), {"step": counts, "first": first, "second": second}


def _check(owner: str, optimizer: "Adam | AdamW") -> None:
    check_betas(owner, optimizer.betas)
    for name in ("lr", "eps", "weight_decay"):
        check_hyper(owner, name, getattr(optimizer, name), 0.0)


@dataclasses.dataclass(frozen=True)
class Adam(Optimizer):
    """Adam; weight decay is added to the gradient (see `AdamW` for the decoupled form).

    Args:
        lr: step size.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: adds weight_decay * y to the gradient.

    Each (each of the two betas) is a number, a tree of numbers like inner, or a function of outer that returns a
    number, a 0-dim tensor or a tree like inner. The values that functions return are not checked for their range.

    Raises:
        ValueError: a number is out of range; in `step`, a tree is not like inner.

    Example:
        >>> import torch, bilevel as bl
        >>> adam = bl.Adam(lr=0.1)
        >>> y, state = adam.step(torch.ones(2), adam.init(torch.zeros(2)), torch.zeros(2), None)
        >>> y
        tensor([-0.1000, -0.1000])
    """

    sharded = True

    lr: Hyper = 1e-3
    betas: tuple[Hyper, Hyper] = (0.9, 0.999)
    eps: Hyper = 1e-8
    weight_decay: Hyper = 0.0

    def __post_init__(self) -> None:
        _check("Adam", self)

    def init(self, inner: Tree) -> Any:
        return _init(inner)

    def step(self, grad: Tree, state: Any, inner: Tree, outer: Tree) -> tuple[Tree, Any]:
        if is_narrow(inner):
            return in_float32(lambda g, y: self.step(g, state, y, outer), grad, inner)
        direction = coupled(gradients(grad, inner), value_of(self.weight_decay, outer), inner)
        return _adam_step(self, value_of(self.lr, outer), direction, state, inner, outer)

    def stationarity(self, grad: Tree, inner: Tree, outer: Tree) -> Tree | None:
        return coupled_rest(grad, self.lr, self.weight_decay, inner, outer)


@dataclasses.dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay: y is first multiplied by 1 - lr * weight_decay.

    Args:
        lr: step size.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay.

    Each (each of the two betas) is a number, a tree of numbers like inner, or a function of outer that returns a
    number, a 0-dim tensor or a tree like inner. The values that functions return are not checked for their range.

    Raises:
        ValueError: a number is out of range; in `step`, a tree is not like inner.

    Example:
        >>> import torch, bilevel as bl
        >>> adamw = bl.AdamW(lr=0.1, weight_decay=0.1)
        >>> y, state = adamw.step(torch.ones(2), adamw.init(torch.ones(2)), torch.ones(2), None)
        >>> y
        tensor([0.8900, 0.8900])
    """

    sharded = True

    lr: Hyper = 1e-3
    betas: tuple[Hyper, Hyper] = (0.9, 0.999)
    eps: Hyper = 1e-8
    weight_decay: Hyper = 1e-2

    def __post_init__(self) -> None:
        _check("AdamW", self)

    def init(self, inner: Tree) -> Any:
        return _init(inner)

    def step(self, grad: Tree, state: Any, inner: Tree, outer: Tree) -> tuple[Tree, Any]:
        if is_narrow(inner):
            return in_float32(lambda g, y: self.step(g, state, y, outer), grad, inner)
        decay, lr = value_of(self.weight_decay, outer), value_of(self.lr, outer)
        shrunk, direction = inner, gradients(grad, inner)
        if not off(decay):
            rates = zip(spread(lr, inner, "lr"), spread(decay, inner, "weight_decay"), strict=True)
            leaves = zip(tree.tensors(inner), direction, rates, strict=True)
            shrunk = tree.like(inner, [y if g is None else y * (1 - a * b) for y, g, (a, b) in leaves])
        return _adam_step(self, lr, direction, state, shrunk, outer)

    def stationarity(self, grad: Tree, inner: Tree, outer: Tree) -> Tree | None:
        return grad if off(self.weight_decay) else None
