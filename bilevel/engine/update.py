"""The product of an optimizer's algebra: y', s' = U(g, y, s, x) with the gradient g as an argument."""

from typing import Any

from bilevel.engine import autodiff
from bilevel.engine.cotangents import Cotangents, floating
from bilevel.optim.base import Optimizer
from bilevel.space import tree
from bilevel.space.tree import PartialLeaves, Tree


def update_vjp(
    optimizer: Optimizer,
    gradient: PartialLeaves,
    inner: Tree,
    state: Any,
    outer: Tree,
    cotangents: Cotangents,
    *,
    to_inner: bool,
) -> tuple[PartialLeaves, Cotangents, PartialLeaves]:
    """Pull cotangents of (y', s') back to the gradient, to (y, s) where `to_inner`, and to an attached x."""
    g = [None if leaf is None else leaf.requires_grad_() for leaf in gradient]
    y, s, xs = tree.attach(inner), tree.attach(state), tree.tensors(outer)
    stepped, state = optimizer.step(tree.like(inner, g), s, y, outer)
    moved = tree.ordered(stepped, y), state
    del stepped, state
    outputs, weights = cotangents.take(*moved)
    del moved
    given = [leaf for leaf in g if leaf is not None]
    start = [*tree.tensors(y), *floating(s)] if to_inner else []
    pulled = autodiff.grad(outputs, [*given, *start, *xs], weights)
    in_gradient = iter(pulled[: len(given)])
    back = pulled[len(given) : len(given) + len(start)]
    return (
        tuple(None if leaf is None else next(in_gradient) for leaf in g),
        Cotangents.of(y, s, back) if to_inner else Cotangents([], None),
        pulled[len(given) + len(start) :],
    )
