"""The oracles: what an estimator may ask of a problem. Each opens a named span and costs what it says.

| oracle | cost | memory |
| --- | --- | --- |
| inner_gradient | 1 gradient of g | one graph, freed |
| outer_gradient | 1 gradient of f, in y and x at once | one graph, freed |
| Linearization | 1 gradient of g | its graph, kept while the object lives |
| Linearization.hvp | 1 product H v | 1 P |
| Linearization.mixed | 1 product (H v, M v) in one sweep | P + Q |
| step_vjp | 1 gradient of g and 1 product (H w, M w) | one graph, freed |

H = d2g/dy2, M v = d/dx <dg/dy, v>.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.engine import autodiff, spans
from bilevel.engine.replay import Replay
from bilevel.optim.base import Optimizer
from bilevel.problem import Problem
from bilevel.space import tree
from bilevel.space.tree import Leaves, PartialLeaves, Tree


def inner_gradient(
    problem: Problem, inner: Tree, outer: Tree, embedded: Any, *, create_graph: bool = False
) -> tuple[Tensor, Leaves]:
    """G and dg/dy, at a batch that went through `problem.embed`.

    With `create_graph` the arguments are taken as they come and the gradient keeps its graph; otherwise they are
    detached first.

    Raises:
        ValueError: g does not depend on y.
    """
    with spans.span(spans.INNER_GRADIENT):
        point = inner if create_graph else tree.attach(inner)
        loss = problem.inner_on(point, outer, embedded)
        leaves = tree.tensors(point)
        gradient = autodiff.grad([loss], leaves, create_graph=create_graph)
        if all(leaf is None for leaf in gradient):
            raise ValueError(
                "inner_loss does not depend on the inner variable: its gradient has no path there. Compute it from the "
                "`inner` argument, without .detach(), .item() or torch.no_grad()"
            )
        return loss.detach(), autodiff.filled(gradient, leaves)


def outer_gradient(
    problem: Problem, inner: Tree, outer: Tree, batch: Any, *, to_outer: bool = True
) -> tuple[Tensor, Leaves, PartialLeaves]:
    """f, df/dy and df/dx (None where x does not enter f directly, and without `to_outer`)."""
    with spans.span(spans.OUTER_GRADIENT):
        y, x = tree.attach(inner), tree.attach(outer) if to_outer else tree.detach(outer)
        loss = problem.outer(y, x, batch)
        leaves = tree.tensors(y)
        gradient = autodiff.grad([loss], [*leaves, *tree.tensors(x)])
        return loss.detach(), autodiff.filled(gradient[: len(leaves)], leaves), gradient[len(leaves) :]


def inner_gradient_in_outer(problem: Problem, inner: Tree, outer: Tree, batch: Any) -> tuple[Tensor, PartialLeaves]:
    """G and dg/dx at a fixed y (None where x does not enter g)."""
    with spans.span(spans.INNER_GRADIENT):
        x = tree.attach(outer)
        loss = problem.inner(tree.detach(inner), x, batch)
        return loss.detach(), autodiff.grad([loss], tree.tensors(x))


def outer_gradient_in_outer(problem: Problem, inner: Tree, outer: Tree, batch: Any) -> tuple[Tensor, PartialLeaves]:
    """F and df/dx at a fixed y (None where x does not enter f directly)."""
    with spans.span(spans.OUTER_GRADIENT):
        x = tree.attach(outer)
        loss = problem.outer(tree.detach(inner), x, batch)
        return loss.detach(), autodiff.grad([loss], tree.tensors(x))


def start(problem: Problem, outer: Tree, batch: Any) -> Tree:
    """The inner start init(x), without a graph."""
    with torch.no_grad():
        return tree.detach(problem.start(tree.detach(outer), batch))


def start_vjp(problem: Problem, outer: Tree, batch: Any, weights: Sequence[Tensor | None]) -> PartialLeaves:
    """d<init(x), weights>/dx; None where x does not enter init."""
    x = tree.attach(outer)
    pairs = [
        (leaf, weight)
        for leaf, weight in zip(tree.tensors(problem.start(x, batch)), weights, strict=True)
        if weight is not None
    ]
    return autodiff.grad([leaf for leaf, _ in pairs], tree.tensors(x), [weight for _, weight in pairs])


class Embedding:
    """What the losses receive in place of a batch, made once and without a graph; its cotangents go through the
    features in one plain backward.

    Without `problem.features` it is the batch itself and costs nothing.
    """

    def __init__(self, problem: Problem, outer: Tree, batch: Any) -> None:
        self._problem, self._outer, self._batch = problem, outer, batch
        self.value, self.leaves = batch, list[Tensor]()
        if problem.features is not None:
            self._replay = Replay(tree.tensors(outer)[0].device)
            self._replay.record()
            with torch.no_grad():
                self.value = tree.attach(problem.embed(tree.detach(outer), batch))
            self.leaves = [leaf for leaf in tree.tensors(self.value) if leaf.requires_grad]

    def pull(self, cotangents: PartialLeaves) -> PartialLeaves:
        """Cotangents of `leaves` to cotangents of x, replaying the features' random numbers."""
        x = tree.attach(self._outer)
        if not self.leaves or all(cotangent is None for cotangent in cotangents):
            return (None,) * len(tree.tensors(x))
        self._replay.finish()
        self._replay.seek(0)
        embedded = self._problem.embed(x, self._batch)
        self._replay.end()
        outputs = [leaf for leaf in tree.tensors(embedded) if leaf.is_floating_point()]
        pairs = [(z, w) for z, w in zip(outputs, cotangents, strict=True) if w is not None]
        return autodiff.grad([z for z, _ in pairs], tree.tensors(x), [w for _, w in pairs])


class Linearization:
    """dg/dy at one point, with its graph, so that each product costs one backward.

    With `problem.features` the graph holds the losses' part only; the mixed product goes through the features as a
    plain first-order backward.
    """

    def __init__(self, problem: Problem, inner: Tree, outer: Tree, batch: Any) -> None:
        self._x, y = tree.attach(outer), tree.attach(inner)
        self._leaves = tree.tensors(y)
        self._embedding = Embedding(problem, outer, batch)
        with spans.span(spans.INNER_GRADIENT):
            loss = problem.inner_on(y, self._x, self._embedding.value)
            gradient = autodiff.grad([loss], self._leaves, create_graph=True)
            # Products need the gradient's place in the graph, not its P numbers.
            self._roots: list[autodiff.Root | None] | None = [
                None if leaf is None else autodiff.root(leaf) for leaf in gradient
            ]
        self.loss = loss.detach()

    def _products(self, v: Leaves, inputs: list[Tensor], *, last: bool) -> PartialLeaves:
        assert self._roots is not None, "the graph was freed by mixed()"
        pairs = [(g, w) for g, w in zip(self._roots, v, strict=True) if g is not None]
        return autodiff.grad([g for g, _ in pairs], inputs, [w for _, w in pairs], retain_graph=not last)

    def hvp(self, v: Leaves) -> Leaves:
        """H v."""
        with spans.span(spans.HVP):
            return autodiff.filled(self._products(v, self._leaves, last=False), self._leaves)

    def mixed(self, v: Leaves) -> tuple[Leaves, PartialLeaves]:
        """(H v, M v) in one sweep; frees the graph, so it is the last product."""
        with spans.span(spans.MIXED):
            count, xs = len(self._leaves), tree.tensors(self._x)
            found = self._products(v, [*self._leaves, *xs, *self._embedding.leaves], last=True)
            self._roots = None
            direct = found[count : count + len(xs)]
            return autodiff.filled(found[:count], self._leaves), tree.accumulate(
                direct, self._embedding.pull(found[count + len(xs) :])
            )


def step_vjp(
    problem: Problem,
    optimizer: Optimizer,
    inner: Tree,
    state: Any,
    outer: Tree,
    embedding: Embedding,
    cotangents: list[Tensor | None],
    *,
    to_inner: bool = True,
) -> tuple[list[Tensor | None], PartialLeaves, PartialLeaves]:
    """Pull cotangents of (y', s') = step(y, s, x) back to (y, s), x and the embedded batch, rebuilding the graph of
    this one step.

    The step is split where it is thin: y', s' = U(dg/dy, y, s, x) with U the optimizer's elementwise algebra. First the
        cotangent w of
    the gradient through U, then H w and M w by one double backward. `cotangents` runs over the tensors of y' and of s'
    (None for zero) and is emptied on the way, so that they are freed as soon as they are used.

    `to_inner=False` leaves out H w, when the step's start is a constant.

    Returns:
        cotangents of the tensors of (y, s) (an empty list without `to_inner`), of x, and of `embedding.leaves`.
    """
    y, x = tree.attach(inner), tree.attach(outer)
    ys, xs = tree.tensors(y), tree.tensors(x)
    _, gradient = inner_gradient(problem, y, x, embedding.value, create_graph=True)
    with spans.span(spans.HVP):
        roots, rate = [autodiff.root(leaf) for leaf in gradient], optimizer.plain_rate
        wanted = [*(ys if to_inner else ()), *xs, *embedding.leaves]
        direct: list[Tensor | None]
        if rate is None:
            gradient = tuple(leaf.detach() for leaf in gradient)
            weights, direct, to_outer = _optimizer_vjp(
                optimizer, gradient, inner, state, outer, cotangents, to_inner=to_inner
            )
            del gradient
            products = autodiff.grad(roots, wanted, weights)
        else:
            # U(g, y) = y - rate g: the products of the cotangent itself, scaled after, so that no second P-vector is
            # held meanwhile.
            del gradient
            weights, direct, to_outer = (
                tuple(leaf for leaf in cotangents if leaf is not None),
                list(cotangents),
                (None,) * len(xs),
            )
            cotangents.clear()
            products = tuple(None if leaf is None else leaf * -rate for leaf in autodiff.grad(roots, wanted, weights))
    count = len(ys) if to_inner else 0
    for i, product in enumerate(products[:count]):
        known = direct[i]
        direct[i] = product if known is None else known if product is None else known + product
    to_outer = tree.accumulate(to_outer, products[count : count + len(xs)])
    return direct if to_inner else [], to_outer, products[count + len(xs) :]


def _optimizer_vjp(
    optimizer: Optimizer,
    gradient: Leaves,
    inner: Tree,
    state: Any,
    outer: Tree,
    cotangents: list[Tensor | None],
    *,
    to_inner: bool,
) -> tuple[Leaves, list[Tensor | None], PartialLeaves]:
    g, y, s = [leaf.detach().requires_grad_() for leaf in gradient], tree.attach(inner), tree.attach(state)
    # Attached whatever the optimizer's fields look like: a user's may read outer in its step.
    x = tree.attach(outer)
    moved, next_state = optimizer.step(tree.like(inner, g), s, y, x)
    outputs = [*tree.tensors(moved), *(leaf for leaf in tree.tensors(next_state) if leaf.is_floating_point())]
    # The state after the last step has no cotangents at all: zip stops before it.
    pairs = [(output, weight) for output, weight in zip(outputs, cotangents, strict=False) if weight is not None]
    cotangents.clear()
    start = [*tree.tensors(y), *(leaf for leaf in tree.tensors(s) if leaf.requires_grad)] if to_inner else []
    pulled = autodiff.grad(
        [output for output, _ in pairs], [*g, *start, *tree.tensors(x)], [weight for _, weight in pairs]
    )
    return (
        autodiff.filled(pulled[: len(g)], g),
        list(pulled[len(g) : len(g) + len(start)]),
        pulled[len(g) + len(start) :],
    )
