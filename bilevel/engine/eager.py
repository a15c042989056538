"""The eager engine: torch.autograd, operator by operator.

| | cost | memory |
| --- | --- | --- |
| gradient | 1 gradient | one graph, freed |
| linearize | 1 gradient | its graph, kept while the object lives |
| transposed, last | 1 product each | P; P + Q |
| product | 1 product each, the first one 2 | P, and from the first one on the graph of a product |
| outside | the part of a product that leads to x: 0.4 of one where x weighs the examples' losses | Q |
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.engine import autodiff
from bilevel.engine.base import Condition, Derivatives, Engine, Losses
from bilevel.space import tree
from bilevel.space.tree import Leaves, PartialLeaves, Tree


@dataclasses.dataclass(frozen=True)
class Eager(Engine):
    """Every operator is run as it is met: the reference that the other engines are held against.

    Example:
        >>> import torch
        >>> Eager().open().gradient(lambda y, x, b: (x * y**2).sum(), torch.ones(2), torch.ones(2), None)[1]
        (tensor([2., 2.]),)
    """

    def open(self) -> "Operators":
        return Operators()


class Operators(Derivatives):
    """Derivatives by torch.autograd."""

    def gradient(self, loss: Losses, inner: Tree, outer: Tree, batch: Any) -> tuple[Tensor, PartialLeaves]:
        value, gradient, _ = self.gradients(loss, inner, outer, batch, in_inner=True, in_outer=False)
        return value, gradient

    def differentiable_gradient(
        self, loss: Losses, inner: Tree, outer: Tree, batch: Any, *, numbers: bool = True
    ) -> tuple[Tensor, PartialLeaves]:
        value = loss(inner, outer, batch)
        return value.detach(), autodiff.grad([_total(value)], tree.tensors(inner), create_graph=True)

    def gradients(
        self, loss: Losses, inner: Tree, outer: Tree, batch: Any, *, in_inner: bool, in_outer: bool
    ) -> tuple[Tensor, PartialLeaves, PartialLeaves]:
        y = tree.attach(inner) if in_inner else tree.detach(inner)
        value = loss(y, outer, batch)
        ys, xs = tree.tensors(y), tree.tensors(outer)
        found = autodiff.grad([_total(value)], [*ys, *xs] if in_outer else ys)
        return value.detach(), found[: len(ys)], found[len(ys) :] if in_outer else (None,) * len(xs)

    def linearize(
        self, condition: Condition, inner: Tree, outer: Tree, batch: Any, batch_leaves: Sequence[Tensor]
    ) -> "Graph":
        return Graph(condition, inner, outer, batch, batch_leaves)


class Graph:
    """A condition at one point, with its graph."""

    def __init__(
        self, condition: Condition, inner: Tree, outer: Tree, batch: Any, batch_leaves: Sequence[Tensor]
    ) -> None:
        y = tree.attach(inner)
        self._ys, self._xs, self._batch = tree.tensors(y), tree.tensors(outer), list(batch_leaves)
        self.loss, value = condition(y, outer, batch)
        # Products need the condition's place in the graph, not its P numbers.
        self._roots: list[autodiff.Root | None] | None = [
            None if leaf is None else autodiff.root(leaf) for leaf in tree.flatten(value)[0]
        ]
        self._turned: tuple[list[Tensor], PartialLeaves] | None = None

    def _products(self, v: Leaves, inputs: list[Tensor], *, last: bool) -> PartialLeaves:
        assert self._roots is not None, "the graph was freed by last()"
        pairs = [(root, w) for root, w in zip(self._roots, v, strict=True) if root is not None]
        return autodiff.grad([root for root, _ in pairs], inputs, [w for _, w in pairs], retain_graph=not last)

    def transposed(self, v: Leaves) -> Leaves:
        """(d condition / d inner)' v."""
        return autodiff.filled(self._products(v, self._ys, last=False), self._ys)

    def product(self, v: Leaves) -> Leaves:
        """(d condition / d inner) v: the derivative of the transposed product, which is linear, in its weights."""
        assert self._roots is not None, "the graph was freed by last()"
        if self._turned is None:
            weights = [torch.zeros_like(y, requires_grad=True) for y in self._ys]
            pairs = [(root, w) for root, w in zip(self._roots, weights, strict=True) if root is not None]
            roots, known = [root for root, _ in pairs], [w for _, w in pairs]
            self._turned = weights, autodiff.grad(roots, self._ys, known, create_graph=True)
        weights, pulled = self._turned
        there = [(image, w) for image, w in zip(pulled, v, strict=True) if image is not None]
        found = autodiff.grad([image for image, _ in there], weights, [w for _, w in there], retain_graph=True)
        return autodiff.filled(found, weights)

    def last(self, v: Leaves) -> tuple[Leaves, PartialLeaves, PartialLeaves]:
        """The transposed products with v in inner, in outer and in the batch, in one sweep that frees the graph."""
        count, to_outer = len(self._ys), len(self._ys) + len(self._xs)
        found = self._products(v, [*self._ys, *self._xs, *self._batch], last=True)
        self._roots = None
        return autodiff.filled(found[:count], self._ys), found[count:to_outer], found[to_outer:]

    def outside(self, v: Leaves) -> tuple[PartialLeaves, PartialLeaves]:
        """The same without that in inner, which is most of the work."""
        found = self._products(v, [*self._xs, *self._batch], last=True)
        self._roots = self._turned = None
        return found[: len(self._xs)], found[len(self._xs) :]


def _total(loss: Tensor) -> Tensor:
    """The loss, summed over tasks where there are tasks."""
    return loss.sum() if loss.dim() else loss
