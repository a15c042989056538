"""The oracles: what an estimator may ask of a problem. Each opens a named span and costs what it says.

| oracle | cost | memory |
| --- | --- | --- |
| step | the dynamics' own: 1 gradient of g for an optimizer | one graph, freed |
| outer_gradient | 1 gradient of f, in y and x at once | one graph, freed |
| linearize | 1 gradient of g | its graph, kept while the object lives |
| Linearization.matvec | 1 product H v | P |
| Linearization.mixed | 1 product (H v, M v) in one sweep | P + Q |
| step_vjp | 1 gradient of g and 1 product (H w, M w) | one graph, freed |

H = d stationarity / dy (d2g/dy2 for gradient methods), M v = d/dx <stationarity, v>. One object per hypergradient holds
x, attached once, the batches as the losses receive them, and the engine that computes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.batches import Batches, PerStep
from bilevel.engine import autodiff, spans, twice
from bilevel.engine.base import Engine
from bilevel.engine.eager import Eager
from bilevel.engine.evaluation import Evaluation
from bilevel.engine.replay import Generators, State
from bilevel.inner.dynamics import Dynamics
from bilevel.linear.operator import LinearOperator
from bilevel.optim.base import Optimizer
from bilevel.problem import Problem
from bilevel.space import tree
from bilevel.space.inner_product import Space
from bilevel.space.tree import Leaves, PartialLeaves, Tree


class Oracles:
    """The oracles of one hypergradient.

    Args:
        problem: the two losses.
        outer: x.
        inner: y_0; None where the problem has an init.
        batches: the data.
        dynamics: how y moves.
        tasks: number of tasks, when y and the batches have a leading task dimension.
        engine: how derivatives are computed.
    """

    def __init__(
        self,
        problem: Problem,
        outer: Tree,
        inner: Tree | None,
        batches: Batches,
        dynamics: Dynamics,
        *,
        tasks: int | None = None,
        engine: Engine | None = None,
    ) -> None:
        self.problem, self.batches, self.dynamics, self.space = problem, batches, dynamics, Space(tasks)
        self.x, self.attached = tree.detach(outer), tree.attach(outer)
        self.evaluation, self.engine = Evaluation(problem, tasks, self._anchor), engine or Eager()
        self.generators = Generators(tree.tensors(outer)[0].device)
        self._shared: Any = None if isinstance(batches.inner, PerStep) else _Unset
        self._start: Tree | None = inner
        self._before_start: State | None = None

    # --- where y begins

    def start(self) -> Tree:
        """y_0, without a graph; init is called once."""
        if self._start is None:
            self._before_start = self.generators.peek()
            batch = self.batches.inner_at(0)
            self._start = self.evaluation.without_graph(self.evaluation.start, self.x, batch)
        return self._start

    def differentiable_start(self) -> Tree:
        """y_0 with its graph in the attached x, or as a graph leaf where there is no init."""
        if self.problem.init is None:
            return tree.attach(self.start())
        self.start()
        start = self._replayed_start()
        # init may return x itself, or one tensor twice: every leaf gets a node of its own.
        return tree.tree_map(
            lambda leaf: leaf.view_as(leaf) if leaf.requires_grad else leaf.detach().requires_grad_(), start
        )

    def start_vjp(self, cotangents: Sequence[Tensor | None]) -> PartialLeaves:
        """d<y_0(x), cotangents>/dx; None where x does not enter init. Draws what the start drew."""
        leaves = tree.tensors(self._replayed_start())
        pairs = [(leaf, weight) for leaf, weight in zip(leaves, cotangents, strict=True) if weight is not None]
        return autodiff.grad([leaf for leaf, _ in pairs], tree.tensors(self.attached), [weight for _, weight in pairs])

    def _replayed(self, before: State | None, function: Callable[[Tree, Any], Any], batch: Any) -> Any:
        """A function of the attached x, drawing what it drew before, if it did."""
        if before is None:
            return function(self.attached, batch)
        now = self.generators.peek()
        self.generators.set(before)
        value = function(self.attached, batch)
        self.generators.set(now)
        return value

    def _anchor(self, outer: Tree) -> Tree:
        """y_0 as a function of x: what a proximal term pulls to."""
        return self.start() if outer is self.x else self._replayed_start()

    def _replayed_start(self) -> Tree:
        return self._replayed(self._before_start, self.evaluation.start, self.batches.inner_at(0))

    # --- batches as the losses receive them

    def embedding(self, step: int) -> "Embedding":
        """The embedded inner batch of a step: made once when every step sees the same batch."""
        if self._shared is None:
            return Embedding(self, self.batches.inner_at(step))
        if self._shared is _Unset:
            self._shared = Embedding(self, self.batches.inner_at(step))
        return self._shared

    def differentiable_embedding(self, step: int) -> Any:
        """The embedded inner batch of a step with its graph in the attached x; shared likewise."""
        batch = self.batches.inner_at(step)
        if isinstance(self._shared, Embedding):
            return self._shared.again()
        before = self.generators.peek() if self.problem.features is not None else None
        value = self.evaluation.embed(self.attached, batch)
        if self._shared is _Unset:
            self._shared = Embedding(self, batch, made=(before, tree.detach(value)))
        return value

    # --- the inner problem

    def begin(self, inner: Tree) -> Any:
        """The state of the dynamics before its first step."""
        return self.dynamics.init(inner, self.x)

    def point(self, step: int) -> "At":
        """The inner problem of a step, for steps without a graph."""
        return At(step, self.embedding(step).value, self._gradient, self.inner_value)

    def step(self, inner: Tree, state: Any, at: "At") -> tuple[Tree, Any]:
        """One step of the dynamics, without a graph.

        Raises:
            ValueError: the step changed the shape of the inner variable.
        """
        with torch.no_grad():
            moved, state = self.dynamics.step(inner, state, self.x, at)
        check_step(self.dynamics, inner, moved)
        return moved, state

    def stationarity(self, inner: Tree, at: "At") -> list[Tensor]:
        """The tensors that are zero where the dynamics rests, without a graph.

        Raises:
            ValueError: the dynamics does not say where it rests.
        """
        with torch.no_grad():
            value = self.dynamics.stationarity(inner, self.x, at)
        if value is None:
            raise ValueError(restless(self.dynamics, "Converge"))
        return tree.tensors(value)

    def inner_gradient(self, inner: Tree, step: int) -> tuple[Tensor, PartialLeaves]:
        """G and dg/dy at a step's batch, without a graph; None for tensors that g does not use."""
        return self._gradient(inner, self.embedding(step).value)

    def _gradient(self, inner: Tree, embedded: Any) -> tuple[Tensor, PartialLeaves]:
        with spans.span(spans.INNER_GRADIENT):
            loss, gradient = self.engine.gradient(self.evaluation.inner, inner, self.x, embedded)
            return loss, used(gradient)

    def inner_value(self, inner: Tree, embedded: Any) -> Tensor:
        """G at an embedded batch, without a graph, per task."""
        return self.evaluation.inner(inner, self.x, embedded).detach()

    def differentiable_gradient(self, inner: Tree, embedded: Any) -> tuple[Tensor, PartialLeaves]:
        """G and dg/dy of arguments as they come, with a graph."""
        with spans.span(spans.INNER_GRADIENT):
            loss, gradient = self.engine.differentiable_gradient(self._twice, inner, self.attached, embedded)
            return loss, used(gradient)

    def _twice(self, inner: Tree, outer: Tree, embedded: Any) -> Tensor:
        """The inner loss; the first time, whether its second derivative is there."""
        loss = self.evaluation.inner(inner, outer, embedded)
        if not self.problem.memo.get("twice differentiable"):
            twice.check(loss, self.evaluation.inner, inner, outer, embedded)
            self.problem.memo["twice differentiable"] = True
        return loss

    def inner_loss(self, inner: Tree, steps: int) -> Tensor:
        """G at a solution found after `steps` steps, per task."""
        return self.inner_value(inner, self.embedding(max(steps - 1, 0)).value)

    def inner_gradient_in_outer(self, inner: Tree, steps: int) -> tuple[Tensor, PartialLeaves]:
        """G and dg/dx at a fixed solution (None where x does not enter g)."""
        batch = self.evaluation.embed(self.attached, self.batches.inner_at(max(steps - 1, 0)))
        return self._in_outer(spans.INNER_GRADIENT, self.evaluation.inner, inner, batch)

    # --- the outer loss

    def outer_loss(self, inner: Tree) -> Tensor:
        """F at `inner`, per task."""
        return self.evaluation.outer(inner, self.x, self._outer_batch(graph=False)).detach()

    def outer_gradient(self, inner: Tree) -> tuple[Tensor, Leaves, PartialLeaves]:
        """f, df/dy and df/dx (None where x does not enter f directly)."""
        with spans.span(spans.OUTER_GRADIENT):
            loss, in_y, in_x = self.engine.gradients(
                self.evaluation.outer, inner, self.attached, self._outer_batch(graph=True), in_inner=True, in_outer=True
            )
            return loss, autodiff.filled(in_y, tree.tensors(inner)), in_x

    def outer_gradient_in_inner(self, inner: Tree) -> tuple[Tensor, PartialLeaves]:
        """F and df/dy (None for tensors that f does not use)."""
        with spans.span(spans.OUTER_GRADIENT):
            return self.engine.gradient(self.evaluation.outer, inner, self.x, self._outer_batch(graph=False))

    def outer_gradient_in_outer(self, inner: Tree) -> tuple[Tensor, PartialLeaves]:
        """F and df/dx at a fixed y (None where x does not enter f directly)."""
        return self._in_outer(spans.OUTER_GRADIENT, self.evaluation.outer, inner, self._outer_batch(graph=True))

    def _outer_batch(self, *, graph: bool) -> Any:
        if graph or self.problem.features is None:
            return self.evaluation.embed(self.attached, self.batches.outer)
        return self.evaluation.without_graph(self.evaluation.embed, self.x, self.batches.outer)

    def _in_outer(self, name: str, loss: Any, inner: Tree, batch: Any) -> tuple[Tensor, PartialLeaves]:
        with spans.span(name):
            value = loss(tree.detach(inner), self.attached, batch)
            return value.detach(), autodiff.grad([value.sum()], tree.tensors(self.attached))

    # --- second order

    def linearize(self, inner: Tree, steps: int) -> "Linearization":
        """The stationarity condition at a solution found after `steps` steps."""
        step = max(steps - 1, 0)
        apart = self.batches.curvature is not None
        embedding = Embedding(self, self.batches.curvature_at(step)) if apart else self.embedding(step)
        return Linearization(self, inner, embedding, step)

    def step_vjp(
        self,
        inner: Tree,
        state: Any,
        step: int,
        embedding: "Embedding",
        cotangents: "Cotangents",
        *,
        to_inner: bool = True,
    ) -> tuple["Cotangents", PartialLeaves, PartialLeaves]:
        """Pull cotangents of (y', s') = step(y, s, x) back to (y, s), x and the embedded batch.

        The graph of this one step is rebuilt, on its embedded batch. `cotangents` is emptied on the way, so that its tensors are freed as soon
        as they are used. `to_inner=False` leaves out H w, when the step's start is a constant.

        Returns:
            cotangents of (y, s) (empty without `to_inner`), of x, and of the leaves of the step's embedding.
        """
        if self.dynamics.update is None:
            return self._whole_step_vjp(inner, state, step, embedding, cotangents, to_inner=to_inner)
        return self._split_step_vjp(self.dynamics.update, inner, state, embedding, cotangents, to_inner=to_inner)

    def _whole_step_vjp(
        self, inner: Tree, state: Any, step: int, embedding: "Embedding", cotangents: "Cotangents", *, to_inner: bool
    ) -> tuple["Cotangents", PartialLeaves, PartialLeaves]:
        y, s, xs = tree.attach(inner), tree.attach(state), tree.tensors(self.attached)
        at = At(step, embedding.value, self.differentiable_gradient, self.differentiable_value)
        moved = self.dynamics.step(y, s, self.attached, at)
        with spans.span(spans.HVP):
            outputs, weights = cotangents.take(*moved)
            wanted = [*tree.tensors(y), *_floating(s)] if to_inner else []
            pulled = autodiff.grad(outputs, [*wanted, *xs, *embedding.leaves], weights)
        count = len(wanted)
        back = Cotangents.of(y, s, pulled[:count]) if to_inner else Cotangents([], None)
        return back, pulled[count : count + len(xs)], pulled[count + len(xs) :]

    def differentiable_value(self, inner: Tree, embedded: Any) -> Tensor:
        """G of an attached x, with its graph."""
        return self.evaluation.inner(inner, self.attached, embedded)

    def _split_step_vjp(
        self,
        optimizer: Optimizer,
        inner: Tree,
        state: Any,
        embedding: "Embedding",
        cotangents: "Cotangents",
        *,
        to_inner: bool,
    ) -> tuple["Cotangents", PartialLeaves, PartialLeaves]:
        """The step split where it is thin: y', s' = U(dg/dy, y, s, x) with U the optimizer's elementwise algebra.

        First the cotangent w of the gradient through U, then H w and M w by one double backward.
        """
        y, xs = tree.attach(inner), tree.tensors(self.attached)
        ys = tree.tensors(y)
        _, gradient = self.differentiable_gradient(y, embedding.value)
        with spans.span(spans.HVP):
            roots, rate = [None if leaf is None else autodiff.root(leaf) for leaf in gradient], optimizer.plain_rate
            wanted = [*(ys if to_inner else ()), *xs, *embedding.leaves]
            if rate is None or any(leaf is None for leaf in gradient):
                gradient = tuple(None if leaf is None else leaf.detach() for leaf in gradient)
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
                # U(g, y) = y - rate g: the products of the cotangent itself, scaled after, so that no second P-vector is
                # held meanwhile.
                del gradient
                direct, to_outer = Cotangents(list(cotangents.inner), None), (None,) * len(xs)
                pairs = [
                    (root, w)
                    for root, w in zip(roots, cotangents.inner, strict=True)
                    if root is not None and w is not None
                ]
                cotangents.inner.clear()
                found = autodiff.grad([root for root, _ in pairs], wanted, [w for _, w in pairs])
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
        cotangents: "Cotangents",
        *,
        to_inner: bool,
    ) -> tuple[PartialLeaves, "Cotangents", PartialLeaves]:
        g = [None if leaf is None else leaf.requires_grad_() for leaf in gradient]
        y, s, xs = tree.attach(inner), tree.attach(state), tree.tensors(self.attached)
        moved = optimizer.step(tree.like(inner, g), s, y, self.attached)
        outputs, weights = cotangents.take(*moved)
        del moved
        given = [leaf for leaf in g if leaf is not None]
        start = [*tree.tensors(y), *_floating(s)] if to_inner else []
        pulled = autodiff.grad(outputs, [*given, *start, *xs], weights)
        in_gradient = iter(pulled[: len(given)])
        back = pulled[len(given) : len(given) + len(start)]
        return (
            tuple(None if leaf is None else next(in_gradient) for leaf in g),
            Cotangents.of(y, s, back) if to_inner else Cotangents([], None),
            pulled[len(given) + len(start) :],
        )


class _Unset:
    """The shared embedding before it is made."""


@dataclasses.dataclass
class Cotangents:
    """Cotangents of (y, s): one for each tensor of y, and one for each leaf of s (None where zero); None for all of s.

    The state's leaves are counted with those that are no tensors, so that a moment that only appears at a tensor's
    first use cannot be mistaken for another's.
    """

    inner: list[Tensor | None]
    state: list[Tensor | None] | None

    def take(self, inner: Tree, state: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs of a step that have a cotangent, and those cotangents, which are let go of here."""
        leaves, weights = tree.flatten(inner)[0], self.inner
        if self.state is not None:
            leaves, weights = [*leaves, *tree.flatten(state)[0]], [*weights, *self.state]
        pairs = [(leaf, weight) for leaf, weight in zip(leaves, weights, strict=True) if weight is not None]
        self.inner, self.state = [], None
        return [leaf for leaf, _ in pairs], [weight for _, weight in pairs]

    @classmethod
    def of(cls, inner: Tree, state: Any, pulled: Sequence[Tensor | None]) -> "Cotangents":
        """Cotangents of a step's start, from those of its floating tensors."""
        count, leaves = len(tree.tensors(inner)), tree.flatten(state)[0]
        rest = iter(pulled[count:])
        return cls(list(pulled[:count]), [next(rest) if _is_floating(leaf) else None for leaf in leaves])


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _floating(state: Any) -> list[Tensor]:
    return [leaf for leaf in tree.tensors(state) if leaf.is_floating_point()]


class At:
    """The inner problem at one step, as a dynamics sees it; remembers the last gradient taken, and its loss."""

    def __init__(
        self,
        step: int,
        batch: Any,
        gradient: Callable[[Tree, Any], tuple[Tensor, PartialLeaves]],
        value: Callable[[Tree, Any], Tensor],
    ) -> None:
        self.step, self.batch = step, batch
        self.loss: Tensor | None = None
        self._gradient, self._value = gradient, value
        self._last: tuple[Tree, Tree] | None = None

    def gradient(self, inner: Tree) -> Tree:
        """dg/dy at `inner`; asked twice of the same object, it is computed once."""
        if self._last is not None and self._last[0] is inner:
            return self._last[1]
        with torch.enable_grad():
            loss, gradient = self._gradient(inner, self.batch)
        self.loss = loss.detach() if self.loss is None else self.loss
        found = tree.like(inner, gradient)
        self._last = (inner, found)
        return found

    def value(self, inner: Tree) -> Tensor:
        """The inner loss at `inner`."""
        with torch.enable_grad():
            return self._value(inner, self.batch)


class Embedding:
    """What the losses receive in place of a batch, made once and without a graph.

    Its cotangents go through the features in one plain backward. Without `Problem.features` it is the batch itself and
    costs nothing.
    """

    def __init__(self, oracles: Oracles, batch: Any, made: tuple[State | None, Any] | None = None) -> None:
        self._oracles, self._batch, self._before = oracles, batch, None
        self.value, self.leaves = batch, list[Tensor]()
        if oracles.problem.features is not None:
            if made is None:
                evaluation, before = oracles.evaluation, oracles.generators.peek()
                made = before, evaluation.without_graph(evaluation.embed, oracles.x, batch)
            self._before, self.value = made[0], tree.attach(made[1])
            self.leaves = [leaf for leaf in tree.tensors(self.value) if leaf.requires_grad]

    def again(self) -> Any:
        """The embedded batch with its graph in the attached x, from the same random numbers."""
        return self._oracles._replayed(self._before, self._oracles.evaluation.embed, self._batch)

    def pull(self, cotangents: PartialLeaves) -> PartialLeaves:
        """Cotangents of `leaves` to cotangents of x, replaying the features' random numbers."""
        xs = tree.tensors(self._oracles.attached)
        if not self.leaves or all(cotangent is None for cotangent in cotangents):
            return (None,) * len(xs)
        outputs = [leaf for leaf in tree.tensors(self.again()) if leaf.is_floating_point()]
        pairs = [(z, w) for z, w in zip(outputs, cotangents, strict=True) if w is not None]
        return autodiff.grad([z for z, _ in pairs], xs, [w for _, w in pairs])


class Linearization(LinearOperator):
    """The stationarity condition at one point: the operator v -> (d stationarity / dy)' v, and the mixed product.

    With `Problem.features` the graph holds the losses' part only; the mixed product goes through the features as a
    plain first-order backward.
    """

    def __init__(self, oracles: Oracles, inner: Tree, embedding: Embedding, step: int) -> None:
        self._oracles, self._embedding, self._like = oracles, embedding, tree.tensors(inner)
        self.symmetric = oracles.dynamics.symmetric

        def condition(y: Tree, x: Tree, batch: Any) -> tuple[Tensor | None, Tree]:
            at = At(step, batch, oracles.differentiable_gradient, oracles.differentiable_value)
            value = oracles.dynamics.stationarity(y, x, at)
            if value is None:
                raise ValueError(restless(oracles.dynamics, "an estimator at the solution"))
            return at.loss, value

        self._graph = oracles.engine.linearize(condition, inner, oracles.attached, embedding.value, embedding.leaves)
        self.loss = self._graph.loss

    symmetric: bool = False

    def matvec(self, v: Leaves) -> Leaves:
        """H' v: H v where the condition is the gradient of a loss."""
        with spans.span(spans.HVP):
            return self._graph.transposed(v)

    def mixed(self, v: Leaves) -> tuple[Leaves, PartialLeaves]:
        """(H' v, M v) in one sweep; frees the graph, so it is the last product."""
        with spans.span(spans.MIXED):
            image, in_outer, in_batch = self._graph.last(v)
            return image, tree.accumulate(in_outer, self._embedding.pull(in_batch))


def used(gradient: PartialLeaves) -> PartialLeaves:
    """A gradient of the inner loss, which must have a path to some tensor of y."""
    if all(leaf is None for leaf in gradient):
        raise ValueError(
            "inner_loss does not depend on the inner variable: its gradient has no path there. Compute it from the "
            "`inner` argument, without .detach(), .item() or torch.no_grad()"
        )
    return gradient


def check_step(dynamics: Dynamics, inner: Tree, moved: Tree) -> None:
    """Raise ValueError if a step changed a shape or dtype."""
    for before, after in zip(tree.tensors(inner), tree.tensors(moved), strict=True):
        if before.shape != after.shape or before.dtype != after.dtype:
            raise ValueError(
                f"an inner step changed a tensor of shape {tuple(before.shape)} and dtype {before.dtype} into "
                f"{tuple(after.shape)} and {after.dtype}. A hyper-parameter of "
                f"{type(dynamics.update or dynamics).__name__} has a shape that broadcasts against y; give a 0-dim "
                f"tensor or a tree like inner"
            )


def restless(dynamics: Dynamics, who: str) -> str:
    """Why a dynamics without a stationarity condition is refused."""
    name = type(dynamics.update or dynamics).__name__
    return (
        f"{who} needs to know where the inner loop comes to rest, and {name} does not say. Its stationarity() returns "
        f"None: with decoupled weight decay (AdamW) that point depends on the moments, not on the losses alone. Use "
        f"Unrolled(), or an optimizer that says: SGD and Adam with weight_decay, or AdamW(weight_decay=0) with the decay "
        f"written into inner_loss; an optimizer of your own defines stationarity(grad, inner, outer)"
    )
