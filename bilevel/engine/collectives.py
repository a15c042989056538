"""Sums over ranks inside a loss, differentiable to any order.

A loss whose batch is split over ranks is L(y) = sum_r L_r(y), where y is the same on every rank. Two operators say so
to autograd, and each is the other's transpose:

    vary(y)   the same numbers, used differently on each rank from here on; its transpose sums cotangents over ranks
    total(l)  the sum over ranks; its transpose hands the cotangent to each rank

So L = total(L_r(vary(y))) has, on every rank, the gradient, Hessian-vector product, Jacobian product, ... of the sum,
whoever takes them: a collective is called where a number would cross between ranks, and nowhere else.

| | collectives |
| --- | --- |
| loss | one all-reduce of a number |
| gradient | that, and one all-reduce of P numbers for each tree that varies |
| product with a second derivative | one of P numbers more |
"""

from typing import Any

import torch
from torch import Tensor

from bilevel.space import tree
from bilevel.space.ranks import Ranks
from bilevel.space.tree import Tree


def vary(ranks: Ranks, value: Tree) -> Tree:
    """The same tree, used differently on each rank: what comes back to it is summed over ranks, in one all-reduce."""
    entries, structure = tree.flatten(value)
    places = [i for i, entry in enumerate(entries) if isinstance(entry, Tensor) and entry.is_floating_point()]
    if places:
        varied = _Vary.apply(ranks, *(entries[i] for i in places))
        for i, leaf in zip(places, varied, strict=True):
            entries[i] = leaf
    return tree.unflatten(entries, structure)


def total(ranks: Ranks, *leaves: Tensor) -> tuple[Tensor, ...]:
    """The sum over ranks of each tensor, in one all-reduce for each dtype."""
    return _Total.apply(ranks, *leaves)


class _Vary(torch.autograd.Function):
    @staticmethod
    def forward(ranks: Ranks, *leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(leaf.view_as(leaf) for leaf in leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.ranks = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return None, *_Total.apply(ctx.ranks, *cotangents)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor) -> Any:
        return _Vary.apply(ctx.ranks, *tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], ranks: Ranks, *leaves: Tensor) -> Any:
        return _Vary.apply(ranks, *leaves), in_dims[1:]


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ranks: Ranks, *leaves: Tensor) -> tuple[Tensor, ...]:
        return ranks.sum(leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.ranks = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return None, *_Vary.apply(ctx.ranks, *cotangents)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor) -> Any:
        return _Total.apply(ctx.ranks, *tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], ranks: Ranks, *leaves: Tensor) -> Any:
        return _Total.apply(ranks, *leaves), in_dims[1:]
