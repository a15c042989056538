"""What optimizers share that treat every entry of the inner variable by itself.

A state is a dict: the steps that used a tensor, under "step", and lists of past tensors with one place per tensor of
the inner variable, None until its first use. So a buffer that comes later moves no other.

16-bit tensors are stepped in float32, and their past is kept in it: float16 ends at 6e-8, above the second moment of a
gradient of 1e-3, and a step that has forgotten the scale of its gradient has a derivative that is a difference of
nearly equal numbers, of which eight bits leave nothing.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel.optim.base import Hyper, check_hyper, gradients, off, plus, spread, value_of
from bilevel.space import tree
from bilevel.space.inner_product import NARROW
from bilevel.space.tree import Tree

Update = Callable[[Tensor, Tensor, dict[str, Any], dict[str, Any]], Tensor]
"""(y, g, past, hypers) -> the tensor moved. `past` holds one tensor's places of the state, which it renews;
past["step"] counts this step already. `hypers` holds one tensor's hyper-parameters."""


def fresh(inner: Tree, *names: str) -> dict[str, list[Any]]:
    """The state before the first step: counts, and empty places of these names."""
    count = len(tree.tensors(inner))
    return {"step": [0] * count, **{name: [None] * count for name in names}}


def stepped(
    update: Update, grad: Tree, state: Any, inner: Tree, outer: Tree, hypers: Mapping[str, Hyper]
) -> tuple[Tree, Any]:
    """One step, tensor by tensor; those that the loss does not use are left alone with their state."""
    if is_narrow(inner):
        return in_float32(lambda g, y: stepped(update, g, state, y, outer, hypers), grad, inner)
    values = {name: spread(value_of(hyper, outer), inner, name) for name, hyper in hypers.items()}
    moved, places = list(tree.tensors(inner)), {name: list(each) for name, each in state.items()}
    for i, g in enumerate(gradients(grad, inner)):
        if g is None:
            continue
        past = {name: each[i] for name, each in places.items()}
        past["step"] += 1
        moved[i] = update(moved[i], g, past, {name: each[i] for name, each in values.items()})
        for name, value in past.items():
            places[name][i] = value
    return tree.like(inner, moved), places


def is_narrow(inner: Tree) -> bool:
    """Whether a tensor has 16 bits."""
    return any(leaf.dtype in NARROW for leaf in tree.tensors(inner))


def in_float32(step: Callable[[Tree, Tree], tuple[Tree, Any]], grad: Tree, inner: Tree) -> tuple[Tree, Any]:
    """A step of (grad, inner), made in float32 where these have 16 bits; the moved tensors get their dtypes back."""
    wide = tree.like(inner, [_wide(leaf) for leaf in tree.tensors(inner)])
    moved, state = step([None if g is None else _wide(g) for g in gradients(grad, inner)], wide)
    pairs = zip(tree.tensors(moved), tree.tensors(inner), strict=True)
    return tree.like(inner, [new.to(old.dtype) for new, old in pairs]), state


def _wide(leaf: Tensor) -> Tensor:
    return leaf.float() if leaf.dtype in NARROW else leaf


def decayed(y: Tensor, g: Tensor, decay: Any) -> Tensor:
    """g + decay y."""
    return g if off(decay) else plus(g, decay, y)


def shrunk(y: Tensor, rate: Any, decay: Any) -> Tensor:
    """y (1 - rate decay)."""
    return y if off(decay) else y * (1 - rate * decay)


def average(past: Tensor | None, beta: Any, g: Tensor) -> Tensor:
    """beta past + (1 - beta) g, with None for zero."""
    return (1 - beta) * g if past is None else plus(beta * past, 1 - beta, g)


def average_square(past: Tensor | None, beta: Any, g: Tensor) -> Tensor:
    """beta past + (1 - beta) g^2, likewise."""
    return (1 - beta) * (g * g) if past is None else plus_square(beta * past, 1 - beta, g)


def plus_square(v: Tensor, share: Any, g: Tensor) -> Tensor:
    """v + share g^2, in one operator where the share is a number."""
    return v + share * (g * g) if isinstance(share, Tensor) else torch.addcmul(v, g, g, value=share)


def minus_quotient(y: Tensor, rate: Any, m: Tensor, below: Tensor) -> Tensor:
    """y - rate m / below, likewise."""
    return y - rate * (m / below) if isinstance(rate, Tensor) else torch.addcdiv(y, m, below, value=-rate)


def root(v: Tensor) -> Tensor:
    """The square root, with derivative zero where v is zero: there that of sqrt is infinite, and 0 * inf is NaN."""
    return v.clamp_min(floor(v.dtype)).sqrt()


def floor(dtype: torch.dtype) -> float:
    """The smallest number that a divisor may have."""
    return torch.finfo(dtype).tiny


def check_betas(owner: str, betas: Any) -> None:
    """Raise ValueError unless `betas` is a pair of hyper-parameters in [0, 1)."""
    if not isinstance(betas, tuple) or len(betas) != 2:
        raise ValueError(f"{owner} was given betas={betas!r}; a pair was needed, such as betas=(0.9, 0.999)")
    for i, beta in enumerate(betas):
        check_hyper(owner, f"betas[{i}]", beta, 0.0, 1.0)
