"""One step of a dynamics, pulled back: the graph of the step is rebuilt, and freed.

| | cost | memory |
| --- | --- | --- |
| an optimizer | 1 gradient of g and 1 product (H w, M w) | one graph |
| another dynamics | the step's gradients of g and one backward through them | one graph |
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from bilevel.engine import autodiff, spans
from bilevel.engine.cotangents import Cotangents, floating
from bilevel.engine.embedding import Embedding
from bilevel.engine.point import At
from bilevel.engine.refusals import step_of
from bilevel.inner.dynamics import Dynamics
from bilevel.optim.base import Optimizer
from bilevel.space import tree
from bilevel.space.tree import PartialLeaves, Tree

Pulled = tuple[Cotangents, PartialLeaves, PartialLeaves]
"""Cotangents of (y, s), of x, and of the leaves of the step's embedding."""


class Gradient(Protocol):
    """g and dg/dy with a graph; without `numbers` the graph alone."""

    def __call__(self, inner: Tree, embedded: Any, *, numbers: bool = True) -> tuple[Tensor, PartialLeaves]: ...


class StepBack:
    """The vector-Jacobian products of a dynamics' steps.

    Args:
        dynamics: how y moves.
        attached: x, as graph leaves.
        gradient: (inner, embedded batch, numbers) -> g and dg/dy of arguments as they come, with a graph.
        point: (step, embedded batch) -> the inner problem there, for steps with a graph.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        attached: Tree,
        gradient: Gradient,
        point: Callable[[int, Any], At],
    ) -> None:
        self._dynamics, self._attached, self._gradient, self._point = dynamics, attached, gradient, point

    def pull(
        self,
        inner: Tree,
        state: Any,
        step: int,
        embedding: Embedding,
        cotangents: Cotangents,
        *,
        to_inner: bool,
        made_with: PartialLeaves | None,
    ) -> Pulled:
        """As `Oracles.step_vjp`, which says what the arguments are."""
        update = self._dynamics.update
        if update is None:
            assert made_with is None, "a step that is no optimizer's takes its own gradients"
            return self._whole(inner, state, step, embedding, cotangents, to_inner=to_inner)
        return self._split(update, inner, state, embedding, cotangents, to_inner=to_inner, made_with=made_with)

    def _whole(
        self, inner: Tree, state: Any, step: int, embedding: Embedding, cotangents: Cotangents, *, to_inner: bool
    ) -> Pulled:
        y, s, xs = tree.attach(inner), tree.attach(state), tree.tensors(self._attached)
        stepped, state = step_of(self._dynamics, y, s, self._attached, self._point(step, embedding.value))
        moved = tree.ordered(stepped, y), state
        with spans.span(spans.HVP):
            outputs, weights = cotangents.take(*moved)
            wanted = [*tree.tensors(y), *floating(s)] if to_inner else []
            pulled = autodiff.grad(outputs, [*wanted, *xs, *embedding.leaves], weights)
        count = len(wanted)
        back = Cotangents.of(y, s, pulled[:count]) if to_inner else Cotangents([], None)
        return back, pulled[count : count + len(xs)], pulled[count + len(xs) :]

    def _split(
        self,
        optimizer: Optimizer,
        inner: Tree,
        state: Any,
        embedding: Embedding,
        cotangents: Cotangents,
        *,
        to_inner: bool,
        made_with: PartialLeaves | None,
    ) -> Pulled:
        """The step split where it is thin: y', s' = U(dg/dy, y, s, x) with U the optimizer's elementwise algebra.

        First the cotangent w of the gradient through U, then H w and M w by one double backward.
        """
        y, xs = tree.attach(inner), tree.tensors(self._attached)
        ys = tree.tensors(y)
        rate = optimizer.plain_rate
        _, gradient = self._gradient(y, embedding.value, numbers=rate is None and made_with is None)
        with spans.span(spans.HVP):
            roots = [None if leaf is None else autodiff.root(leaf) for leaf in gradient]
            wanted = [*(ys if to_inner else ()), *xs, *embedding.leaves]
            if rate is None or any(leaf is None for leaf in gradient):
                gradient = tuple(None if g is None else g.detach() for g in (made_with or gradient))
                weights, direct, to_outer = self._update_vjp(
                    optimizer, gradient, inner, state, cotangents, to_inner=to_inner
                )
                del gradient
                pairs = [
                    (root, weight)
                    for root, weight in zip(roots, weights, strict=True)
                    if root is not None and weight is not None
                ]
                products = autodiff.grad([root for root, _ in pairs], wanted, [weight for _, weight in pairs])
            else:
                # U(g, y) = y - rate g: the products of the cotangent itself, scaled after and one by one, so that no
                # second P-vector is held meanwhile.
                del gradient
                direct, to_outer = Cotangents(list(cotangents.inner), None), (None,) * len(xs)
                pairs = [
                    (root, w)
                    for root, w in zip(roots, cotangents.inner, strict=True)
                    if root is not None and w is not None
                ]
                cotangents.inner.clear()
                found = list(autodiff.grad([root for root, _ in pairs], wanted, [w for _, w in pairs]))
                for i in range(len(ys) if to_inner else 0):
                    known, product = direct.inner[i], found[i]
                    if known is not None and product is not None:
                        direct.inner[i], found[i] = torch.add(known, product, alpha=-rate), None
                    del known, product
                products = tuple(None if leaf is None else leaf * -rate for leaf in found)
                del found
        count = len(ys) if to_inner else 0
        for i, product in enumerate(products[:count]):
            known = direct.inner[i]
            direct.inner[i] = product if known is None else known if product is None else known + product
        to_outer = tree.accumulate(to_outer, products[count : count + len(xs)])
        return direct if to_inner else Cotangents([], None), to_outer, products[count + len(xs) :]

    def _update_vjp(
        self,
        optimizer: Optimizer,
        gradient: PartialLeaves,
        inner: Tree,
        state: Any,
        cotangents: Cotangents,
        *,
        to_inner: bool,
    ) -> tuple[PartialLeaves, Cotangents, PartialLeaves]:
        g = [None if leaf is None else leaf.requires_grad_() for leaf in gradient]
        y, s, xs = tree.attach(inner), tree.attach(state), tree.tensors(self._attached)
        stepped, state = optimizer.step(tree.like(inner, g), s, y, self._attached)
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


def pull_begin(dynamics: Dynamics, start: Tree, attached: Tree, cotangents: Cotangents) -> PartialLeaves:
    """Pull cotangents of the first state back to an attached x, and add what reaches y_0 to those of y_0."""
    y = tree.attach(start)
    leaves = tree.flatten(dynamics.init(y, attached))[0]
    pairs = [
        (leaf, weight)
        for leaf, weight in zip(leaves, cotangents.state or (), strict=True)
        if weight is not None and leaf.requires_grad
    ]
    cotangents.state, ys = None, tree.tensors(y)
    if not pairs:
        return (None,) * len(tree.tensors(attached))
    pulled = autodiff.grad([leaf for leaf, _ in pairs], [*ys, *tree.tensors(attached)], [w for _, w in pairs])
    cotangents.inner = list(tree.accumulate(tuple(cotangents.inner), pulled[: len(ys)]))
    return pulled[len(ys) :]
