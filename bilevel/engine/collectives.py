"""Sums over ranks inside a loss, differentiable to any order.

A loss whose batch is split over ranks is L(y) = sum_r L_r(y), where y is the same on every rank. Two operators say so
to autograd, and each is the other's transpose:

    vary(y)   the same numbers, used differently on each rank from here on; its transpose sums cotangents over ranks
    total(l)  the sum over ranks; its transpose hands the cotangent to each rank

So L = total(L_r(vary(y))) has, on every rank, the gradient, Hessian-vector product, Jacobian product, ... of the sum,
whoever takes them: a collective is called where a number would cross between ranks, and nowhere else.

What is used is found as it is without ranks: each sum takes with it a flag for each tensor, and a tensor that no rank
uses gets None. A rank that uses none of a tree takes part in its sums nonetheless (`tied`), at every order, because
otherwise the others would wait for it.

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
from bilevel.space.ranks import Ranks, without_data
from bilevel.space.tree import Tree


def vary(ranks: Ranks, value: Tree) -> Tree:
    """The same tree, used differently on each rank: what comes back to it is summed over ranks, in one all-reduce."""
    return tied(ranks, value)[0]


def tied(ranks: Ranks, value: Tree) -> tuple[Tree, Tensor | None]:
    """`vary(value)`, and a number that depends on it for autograd: a loss that uses it is tied to the sums of `value`
    though it may use nothing else of it. None where the tree has no floating tensor.
    """
    entries, structure = tree.flatten(value)
    places = [i for i, entry in enumerate(entries) if isinstance(entry, Tensor) and entry.is_floating_point()]
    if not places:
        return value, None
    first = entries[places[0]]
    tie = torch.full((), 0.5, dtype=first.dtype, device=first.device)
    *varied, tie = _Vary.apply(ranks, *(entries[i] for i in places), tie)
    for i, leaf in zip(places, varied, strict=True):
        entries[i] = leaf
    return tree.unflatten(entries, structure), tie


def total(ranks: Ranks, *leaves: Tensor) -> tuple[Tensor, ...]:
    """The sum over ranks of each tensor, in one all-reduce for each dtype."""
    found: tuple[Tensor, ...] = _Total.apply(ranks, *leaves)
    return found


class _Vary(torch.autograd.Function):
    @staticmethod
    def forward(ranks: Ranks, *leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(leaf.view_as(leaf) for leaf in leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.ranks = inputs[0]
        ctx.kinds = [(leaf.shape, leaf.dtype, leaf.device) for leaf in inputs[1:]]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        there = [leaf is not None for leaf in cotangents]
        kind = {"dtype": ctx.kinds[0][1], "device": ctx.kinds[0][2]}
        flags = torch.ones(len(there), **kind) if all(there) else torch.tensor([float(each) for each in there], **kind)
        *summed, counts = _Total.apply(ctx.ranks, *_filled(cotangents, ctx.kinds), flags)
        if not all(there) and not without_data(counts):
            there = [count > 0 for count in counts.tolist()]
        return None, *(leaf if used else None for leaf, used in zip(summed, there, strict=True))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        return _Vary.apply(ctx.ranks, *_filled(tangents, ctx.kinds))

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


def _filled(leaves: Any, kinds: list[Any]) -> list[Tensor]:
    """Zeros in place of None."""
    return [
        torch.zeros(shape, dtype=dtype, device=device) if leaf is None else leaf
        for leaf, (shape, dtype, device) in zip(leaves, kinds, strict=True)
    ]
