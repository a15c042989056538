"""The oracles: what an estimator may ask of a problem. Each opens a named span and costs what it says.

| oracle | cost | memory |
| --- | --- | --- |
| step | the dynamics' own: 1 gradient of g for an optimizer | one graph, freed |
| outer_gradient | 1 gradient of f, in y and x at once | one graph, freed |
| inner_gradients | 1 gradient of g, in y and x at once | one graph, freed |
| linearize | 1 gradient of g | its graph, kept while the object lives |
| Linearization.matvec | 1 product H v | P |
| Linearization.mixed | 1 product (H v, M v) in one sweep | P + Q |
| Linearization.mixed_alone | the part of that product that leads to x | Q |
| step_vjp | 1 gradient of g and 1 product (H w, M w) | one graph, freed |
| step_forward | 1 gradient of g in y and x; then 1 product H z + M' e a push | its graph, kept while the object lives |

H = d stationarity / dy (d2g/dy2 for gradient methods), M v = d/dx <stationarity, v>. One object per hypergradient holds
x, attached once, the batches as the losses receive them, and the engine that computes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.batches import Batches, PerStep
from bilevel.engine import autodiff, partials, spans, starts, twice
from bilevel.engine.along import Hessian, curvature
from bilevel.engine.base import Derivatives, Losses
from bilevel.engine.cotangents import Cotangents
from bilevel.engine.eager import Eager
from bilevel.engine.embedding import Embedding, Source, Unset
from bilevel.engine.evaluation import Evaluation, Pure
from bilevel.engine.linearization import Linearization
from bilevel.engine.point import At
from bilevel.engine.refusals import THIRD, check_step, restless, step_of, used
from bilevel.engine.replay import Generators, State
from bilevel.engine.step_back import StepBack, pull_begin
from bilevel.engine.step_forward import Pushed, StepForward
from bilevel.inner.dynamics import Dynamics
from bilevel.problem import Problem, Pulled, distance
from bilevel.space import tree
from bilevel.space.inner_product import Space
from bilevel.space.ranks import Ranks
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
        posed: the problem and the outer batch whose outer loss a dynamics sees, where an estimator has put another one
            in the place of f; None for the same.
        constant: the outer tensors, by position, that nobody differentiates in.
        ranks: the processes of which each holds a part of y; None for one that holds all.
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
        engine: Derivatives | None = None,
        posed: tuple[Problem, Any] | None = None,
        constant: frozenset[int] = frozenset(),
        ranks: Ranks | None = None,
    ) -> None:
        self.problem, self.batches, self.space = problem, batches, Space(tasks, ranks)
        self.dynamics = dynamics if tasks is None else dynamics.over(tasks)
        self.x, self.attached = tree.detach(outer), tree.attach(outer, constant)
        self.evaluation, self.engine = Evaluation(problem, tasks, ranks), engine or Eager().open()
        self._posed = (
            (self.evaluation, batches.outer) if posed is None else (Evaluation(posed[0], tasks, ranks), posed[1])
        )
        self.generators = Generators(tree.tensors(outer)[0].device)
        # (It must not hold an embedding: such a cycle would keep every call's tensors until a collection.)
        self.source = Source(self.evaluation, self.generators, self.x, self.attached)
        self.shared: Any = None if isinstance(batches.inner, PerStep) else Unset
        self._start: Tree | None = inner
        self._before_start: State | None = None

    # --- where y begins

    def start(self) -> Tree:
        """y_0, without a graph; init is called once."""
        if self._start is None:
            self._before_start = self.generators.peek()
            batch = self.batches.inner_at(0)
            self._start = self.evaluation.without_graph(self.evaluation.start, self.x, batch)
            self._start = starts.dense(self._start) if self.engine.pure else self._start
        return self._start

    def differentiable_start(self) -> Tree:
        """y_0 with its graph in the attached x, or as a graph leaf where there is no init."""
        if self.problem.init is None:
            return tree.attach(self.start())
        self.start()
        start = self._replayed_start()
        return starts.with_nodes(starts.dense(start) if self.engine.pure else start)

    def start_vjp(self, cotangents: Sequence[Tensor | None]) -> PartialLeaves:
        """d<y_0(x), cotangents>/dx; None where x does not enter init. Draws what the start drew."""
        return starts.pull(self._replayed_start(), cotangents, self.attached)

    def _anchor(self, outer: Tree) -> Tree:
        """y_0 as a function of x: what a proximal term pulls to."""
        return self.start() if outer is self.x else self._replayed_start()

    def inner(self, inner: Tree, outer: Tree, embedded: Any) -> Tensor:
        """g at an embedded batch, as the arguments come, per task."""
        if not isinstance(self.problem.inner_loss, Pulled):
            return self.evaluation.inner(inner, outer, embedded)
        # Before the loss, so that its copies are gone when the loss's activations come.
        pull = distance(self.problem.inner_loss.strength, inner, self._anchor(outer), self.space.tasks)
        return self.evaluation.inner(inner, outer, embedded) + pull

    def _replayed_start(self) -> Tree:
        return self.source.replayed(self._before_start, self.evaluation.start, self.batches.inner_at(0))

    # --- batches as the losses receive them

    def embedding(self, step: int) -> Embedding:
        """The embedded inner batch of a step: made once when every step sees the same batch."""
        if isinstance(self.shared, Embedding):
            return self.shared
        made = Embedding(self.source, self.batches.inner_at(step))
        self.shared = made if self.shared is Unset else None
        return made

    def differentiable_embedding(self, step: int) -> Any:
        """The embedded inner batch of a step with its graph in the attached x; shared likewise."""
        batch = self.batches.inner_at(step)
        if isinstance(self.shared, Embedding):
            return self.shared.again()
        before = self.generators.peek() if self.problem.features is not None else None
        value = self.evaluation.embed(self.attached, batch)
        if self.shared is Unset:
            self.shared = Embedding(self.source, batch, made=(before, tree.detach(value)))
        return value

    # --- the inner problem

    def begin(self, inner: Tree) -> Any:
        """The state of the dynamics before its first step."""
        return self.dynamics.init(inner, self.x)

    def point(self, step: int) -> At:
        """The inner problem of a step, for steps without a graph."""
        return self._point(step, self.embedding(step))

    def _point(self, step: int, embedding: Embedding) -> At:
        return At(
            step,
            embedding.value,
            self._gradient,
            self.inner_value,
            self.source.along(graph=False),
            self._outer_numbers,
            self._curvature,
        )

    def differentiable_point(self, step: int, embedded: Any) -> At:
        """The inner problem of a step on an embedded batch, for steps with a graph."""
        return At(
            step,
            embedded,
            self.differentiable_gradient,
            self.differentiable_value,
            self.source.along(graph=True),
            self._outer_direction,
            self._differentiable_curvature,
        )

    def begin_vjp(self, cotangents: Cotangents) -> PartialLeaves:
        """Pull cotangents of the first state back to x, and add what reaches y_0 to those of y_0."""
        return pull_begin(self.dynamics, self.start(), self.attached, cotangents)

    def step(self, inner: Tree, state: Any, at: At) -> tuple[Tree, Any]:
        """One step of the dynamics, without a graph.

        Raises:
            ValueError: the step changed the shape of the inner variable.
        """
        with torch.no_grad():
            moved, state = step_of(self.dynamics, inner, state, self.x, at)
        return check_step(self.dynamics, inner, moved), state

    def stationarity(self, inner: Tree, at: At) -> list[Tensor]:
        """The tensors that are zero where the dynamics rests, without a graph.

        Raises:
            ValueError: the dynamics does not say where it rests.
        """
        with torch.no_grad():
            value = self.dynamics.stationarity(inner, self.x, at)
        if value is None:
            raise ValueError(restless(self.dynamics, "Converge"))
        return tree.tensors(tree.ordered(value, inner))

    def inner_gradient(self, inner: Tree, step: int) -> tuple[Tensor, PartialLeaves]:
        """g and dg/dy at a step's batch, without a graph; None for tensors that g does not use."""
        return self._gradient(inner, self.embedding(step).value)

    def _gradient(self, inner: Tree, embedded: Any) -> tuple[Tensor, PartialLeaves]:
        with spans.span(spans.INNER_GRADIENT):
            function, batch = self._stated(self.inner, self.x, embedded)
            loss, gradient = self.engine.gradient(function, inner, self.x, batch)
            return loss, used(gradient)

    def inner_value(self, inner: Tree, embedded: Any) -> Tensor:
        """g at an embedded batch, without a graph, per task."""
        return self.inner(inner, self.x, embedded).detach()

    def differentiable_gradient(
        self, inner: Tree, embedded: Any, *, numbers: bool = True
    ) -> tuple[Tensor, PartialLeaves]:
        """g and dg/dy of arguments as they come, with a graph; without `numbers` the graph alone is wanted."""
        with spans.span(spans.INNER_GRADIENT):
            function, batch = self._stated(self._twice, self.attached, embedded)
            if self.engine.pure and not self.problem.memo.get("twice differentiable"):
                before = self.generators.peek()
                self._twice(inner, self.attached, embedded)
                self.generators.set(before)
            loss, gradient = self.engine.differentiable_gradient(function, inner, self.attached, batch, numbers=numbers)
            return loss, used(gradient)

    def _curvature(self, inner: Tree, embedded: Any) -> tuple[Tensor, PartialLeaves, Hessian]:
        """g, dg/dy and the products with d2g/dy2, without a graph."""
        return curvature(lambda y: self.differentiable_gradient(y, embedded), inner)

    def _differentiable_curvature(self, inner: Tree, embedded: Any) -> tuple[Tensor, PartialLeaves, Hessian]:
        """The same of arguments as they come, with a graph: third derivatives of g."""
        if self.engine.pure:
            raise ValueError(THIRD)
        loss, gradient = self.differentiable_gradient(inner, embedded)
        return loss, gradient, Hessian(tree.tensors(inner), gradient, graph=True)

    def _stated(self, function: Losses, outer: Tree, embedded: Any) -> tuple[Losses, Any]:
        """g and its batch as the engine wants them: for one whose work outlives the call, without anything of it."""
        if not self.engine.pure:
            return function, embedded
        pulled = isinstance(self.problem.inner_loss, Pulled)
        return Pure(self.evaluation, "inner_loss"), (embedded, self._anchor(outer)) if pulled else embedded

    def _outer_stated(self, evaluation: Evaluation) -> Losses:
        return Pure(evaluation, "outer_loss") if self.engine.pure else evaluation.outer

    def _twice(self, inner: Tree, outer: Tree, embedded: Any) -> Tensor:
        """The inner loss; the first time, whether its second derivative is there."""
        loss = self.inner(inner, outer, embedded)
        if not self.problem.memo.get("twice differentiable"):
            twice.check(loss, self.inner, inner, outer, embedded, alone=self.space.ranks is None)
            self.problem.memo["twice differentiable"] = True
        return loss

    def inner_loss(self, inner: Tree, steps: int) -> Tensor:
        """g at a solution found after `steps` steps, per task."""
        return self.inner_value(inner, self.embedding(max(steps - 1, 0)).value)

    def inner_gradient_in_outer(self, inner: Tree, steps: int) -> tuple[Tensor, PartialLeaves]:
        """g and dg/dx at a fixed solution (None where x does not enter g)."""
        return partials.in_outer(spans.INNER_GRADIENT, self.inner, inner, self.attached, self._last_batch(steps))

    def inner_gradients(
        self, inner: Tree, steps: int, *, weights: Tensor | None = None, apart: bool = False
    ) -> tuple[Tensor, PartialLeaves, PartialLeaves]:
        """g, dg/dy and dg/dx at a point, on the batch of the last of `steps` steps (None where they do not enter).

        `weights`: those of the sum of the tasks' losses; `apart`: on the batch for curvature.
        """
        batch = self._last_batch(steps, apart=apart)
        loss, in_y, in_x = partials.in_both(
            spans.INNER_GRADIENT, self.inner, inner, self.attached, batch, weights=weights
        )
        return loss, used(in_y), in_x

    def _last_batch(self, steps: int, *, apart: bool = False) -> Any:
        """The embedded batch of the last of `steps` steps, with its graph in the attached x."""
        if isinstance(self.shared, Embedding) and (self.batches.curvature is None or not apart):
            return self.shared.again()
        at = self.batches.curvature_at if apart else self.batches.inner_at
        return self.evaluation.embed(self.attached, at(max(steps - 1, 0)))

    # --- the outer loss

    def outer_loss(self, inner: Tree) -> Tensor:
        """f at `inner`, per task."""
        return self.evaluation.outer(inner, self.x, self._outer_batch(graph=False)).detach()

    def outer_gradient(self, inner: Tree) -> tuple[Tensor, Leaves, PartialLeaves]:
        """f, df/dy and df/dx (None where x does not enter f directly)."""
        with spans.span(spans.OUTER_GRADIENT):
            function = self._outer_stated(self.evaluation)
            loss, in_y, in_x = self.engine.gradients(
                function, inner, self.attached, self._outer_batch(graph=True), in_inner=True, in_outer=True
            )
            return loss, autodiff.filled(in_y, tree.tensors(inner)), in_x

    def outer_gradient_in_inner(self, inner: Tree) -> tuple[Tensor, PartialLeaves]:
        """f and df/dy (None for tensors that f does not use)."""
        with spans.span(spans.OUTER_GRADIENT):
            function = self._outer_stated(self.evaluation)
            return self.engine.gradient(function, inner, self.x, self._outer_batch(graph=False))

    def _outer_numbers(self, inner: Tree) -> tuple[Tensor, PartialLeaves]:
        """f and df/dy as a dynamics sees them, without a graph."""
        evaluation, batch = self._posed
        with spans.span(spans.OUTER_GRADIENT):
            embedded = self._embedded(evaluation, batch, graph=False)
            return self.engine.gradient(self._outer_stated(evaluation), inner, self.x, embedded)

    def _outer_direction(self, inner: Tree) -> tuple[Tensor, PartialLeaves]:
        """The same of arguments as they come, with a graph."""
        evaluation, batch = self._posed
        with spans.span(spans.OUTER_GRADIENT):
            embedded = self._embedded(evaluation, batch, graph=True)
            function = self._outer_stated(evaluation)
            return self.engine.differentiable_gradient(function, inner, self.attached, embedded)

    def outer_gradient_in_outer(self, inner: Tree) -> tuple[Tensor, PartialLeaves]:
        """f and df/dx at a fixed y (None where x does not enter f directly)."""
        batch = self._outer_batch(graph=True)
        return partials.in_outer(spans.OUTER_GRADIENT, self.evaluation.outer, inner, self.attached, batch)

    def _outer_batch(self, *, graph: bool) -> Any:
        return self._embedded(self.evaluation, self.batches.outer, graph=graph)

    def _embedded(self, evaluation: Evaluation, batch: Any, *, graph: bool) -> Any:
        if graph or evaluation.problem.features is None:
            return evaluation.embed(self.attached, batch)
        return evaluation.without_graph(evaluation.embed, self.x, batch)

    # --- second order

    def linearize(self, inner: Tree, steps: int, *, keep: bool = False) -> Linearization:
        """The stationarity condition at a solution found after `steps` steps; `keep`: and dg/dy there."""
        step, taken = max(steps - 1, 0), list[Tree]()
        apart = self.batches.curvature is not None
        embedding = Embedding(self.source, self.batches.curvature_at(step)) if apart else self.embedding(step)

        def condition(y: Tree, x: Tree, batch: Any) -> tuple[Tensor | None, Tree]:
            at = self.differentiable_point(step, batch)
            value = self.dynamics.stationarity(y, x, at)
            if value is None:
                raise ValueError(restless(self.dynamics, "an estimator at the solution"))
            if keep and at.last is not None and at.last[0] is y:
                taken[:] = [tree.detach(at.last[1])]
            return at.loss, tree.ordered(value, y)

        with_graph = self.engine.linearize(condition, inner, self.attached, embedding.value, embedding.leaves)
        point, gradient = tuple(tree.tensors(inner)), taken[0] if taken else None
        return Linearization(with_graph, embedding, point, symmetric=self.dynamics.symmetric, gradient=gradient)

    def step_vjp(
        self,
        inner: Tree,
        state: Any,
        step: int,
        embedding: Embedding,
        cotangents: Cotangents,
        *,
        to_inner: bool = True,
        made_with: PartialLeaves | None = None,
    ) -> tuple[Cotangents, PartialLeaves, PartialLeaves]:
        """Pull cotangents of (y', s') = step(y, s, x) back to (y, s), x and the embedded batch.

        The graph of this one step is rebuilt, on its embedded batch. `cotangents` is emptied on the way, so that its
        tensors are freed as soon as they are used. `to_inner=False` leaves out H w, for a start that is a constant.
        `made_with` is the gradient of an optimizer's step that was made on another batch than the embedded one: then
        the gradient alone is differentiated there, and the optimizer's algebra where it ran.

        Returns:
            cotangents of (y, s) (empty without `to_inner`), of x, and of the leaves of the step's embedding.
        """
        back = StepBack(self.dynamics, self.attached, self.differentiable_gradient, self.differentiable_point)
        return back.pull(inner, state, step, embedding, cotangents, to_inner=to_inner, made_with=made_with)

    def differentiable_value(self, inner: Tree, embedded: Any) -> Tensor:
        """g of an attached x, with its graph."""
        return self.inner(inner, self.attached, embedded)

    def step_forward(self, inner: Tree, state: Any, step: int, embedded: Any, drawn: State | None) -> Pushed:
        """One step with its derivative, on a batch of `differentiable_embedding`; `drawn` is the generators' state
        before that was made. Raises ValueError where products forward and backward disagree.
        """
        known, made = self.problem.memo.setdefault("forward", []), self.shared
        if not isinstance(made, Embedding):
            made = Embedding(self.source, self.batches.inner_at(step), (drawn, tree.detach(embedded)))
        return StepForward(self, known).step(inner, state, self._point(step, made), embedded, made)

    def gradients(self, inner: Tree, embedded: Any) -> tuple[Tensor, PartialLeaves, PartialLeaves]:
        """g, dg/dy and dg/dx of arguments as they come, with a graph."""
        loss, in_y, in_x = partials.with_graph(self.engine, self._twice, inner, self.attached, embedded)
        return loss, used(in_y), in_x
