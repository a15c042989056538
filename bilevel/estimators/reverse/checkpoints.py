"""The trajectory as iterates: the graph of one step at a time is rebuilt on the way back.

| kept | inner gradients | HVP-class products | memory, S = P + optimizer state |
| --- | --- | --- | --- |
| every iterate | 2 K | K | K S + one tape |
| segments of shrinking length | about 3 K - sqrt(2 K) | K | sqrt(2 K) S + one tape |
| c snapshots | K + 1 + t(K, c) | K | (c + 1) S + one tape |

Which ones is a plan's to say (bilevel.estimators.reverse.plans). An iterate is kept with the state of the random number
generators before its step, so a rebuilt step draws what the first pass drew. References: Chen et al. 2016, arXiv
1604.06174. Segments shrink towards the end of the loop (as snapshots pile up), which needs sqrt(2 K) iterates at once
instead of 2 sqrt(K), and the last one is never recomputed.

Offloaded, what is kept waits on the host: of the S numbers an iterate the device holds those of two.
"""

import copy
import functools
from typing import Any

from torch import Tensor

from bilevel.batches import PerStep
from bilevel.engine.cotangents import Cotangents, floating
from bilevel.engine.embedding import Embedding
from bilevel.engine.offload import Store
from bilevel.engine.oracles import Oracles
from bilevel.engine.replay import State
from bilevel.estimators.base import Instance
from bilevel.estimators.reverse.growth import Growth
from bilevel.estimators.reverse.plans import Plan
from bilevel.estimators.reverse.plans import shrinking as shrinking
from bilevel.estimators.reverse.terms import Terms
from bilevel.inner.descent import Descent
from bilevel.inner.loop import where
from bilevel.space import tree
from bilevel.space.tree import PartialLeaves, Tree

_IN_PLACE = (
    "{name}.step() changed the inner variable or its state in place, after it was kept to rebuild the step from. "
    "Steps are "
    "pure: write state = {{'t': state['t'] + 1}} instead of state['t'] += 1 on a tensor, and y = y - d instead of "
    "y.sub_(d)"
)


class _Kept:
    """What rebuilds a step: the iterate, the dynamics' state, and the generators' before it."""

    def __init__(self, store: Store, inner: Tree, state: Any, random: State, changed: str, *, stays: bool) -> None:
        leaves, self._structure = tree.flatten((inner, state))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._others = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        self._kept, self.random = store.put(tensors, changed, stay=[stays] * len(tensors)), random

    def fetch(self) -> None:
        """It is needed soon."""
        self._kept.fetch()

    def take(self) -> tuple[Tree, Any]:
        """The iterate and the state.

        Raises:
            ValueError: one of them was changed in place.
        """
        tensors = iter(self._kept.take())
        leaves = [next(tensors) if other is None else other[0] for other in self._others]
        inner, state = tree.unflatten(leaves, self._structure)
        return inner, state


class Checkpoints:
    """The inner loop with some of its iterates.

    Args:
        instance: what is solved.
        solver: how many steps of what.
        plan: which iterates are kept.
        masks: the tasks that each step moves; None for all.
        terms: the terms of the outer loss.
        resampled: whether the gradient of each step is differentiated at `Batches.curvature_at` of it.
        offload: whether what is kept waits on the host.
    """

    def __init__(
        self,
        instance: Instance,
        solver: Descent,
        plan: Plan,
        masks: list[Tensor] | None,
        terms: Terms,
        *,
        resampled: bool = False,
        offload: bool = False,
    ) -> None:
        oracles = instance.oracles
        self._oracles, self._plan, self._steps, self._live = oracles, plan, solver.steps, masks
        self._terms, self._resampled = terms, resampled
        self._curvature: Embedding | None = None
        self._kept, self._wanted = list[tuple[int, _Kept]](), plan.at_first(solver.steps)
        self._initial: list[Tensor] = []
        self._store = Store(leaves=offload)
        self._changed = _IN_PLACE.format(name=type(oracles.dynamics.update or oracles.dynamics).__name__)
        start = oracles.start()
        if solver.steps and not isinstance(oracles.batches.inner, PerStep):
            oracles.embedding(0)  # drawn before the first step, which is rebuilt without drawing it again
        self.solution = instance.solve(start, solver=solver, visit=self._keep, masks=masks)

    def _keep(self, step: int, inner: Tree, state: Any) -> None:
        """Keep what a step is rebuilt from, if it begins a segment or is in the last one."""
        self._terms.passed(step, inner)
        if step == 0:
            self._initial = floating(state)
        if step in self._wanted:
            random = self._oracles.generators.state(self._kept[-1][1].random if self._kept else None)
            # (A user's step may go on with the same dict; the tensors in it are checked to be as they were.)
            self._put(step, inner, state, random, needed_next=step == self._steps - 1)

    def _put(self, step: int, inner: Tree, state: Any, random: State, *, needed_next: bool) -> None:
        self._kept.append((step, _Kept(self._store, inner, state, random, self._changed, stays=needed_next)))

    @property
    def end(self) -> None:
        """No graph leads to its end."""
        return None

    def facing(self, oracles: Oracles, terms: Terms) -> "Checkpoints":
        """The same iterates under another outer loss; a pull leaves them where they are."""
        other = copy.copy(self)
        other._oracles, other._terms, other._curvature = oracles, terms, None
        other._kept = list(self._kept)
        return other

    def pull(self, *, to_start: bool) -> tuple[PartialLeaves, Growth]:
        """The cotangents of the outer loss's terms to one of x, along the steps and the start. The iterates are freed.

        Args:
            to_start: follow it to a start without an init, too, for the figures of `Growth`.
        """
        oracles, first, terms = self._oracles, self._plan.first, self._terms
        growth, cotangents = Growth(oracles.space, self._steps - first), Cotangents([], None)
        if terms.followed(self._steps):
            cotangents.inner = terms.enter(self._steps, self.solution.inner)
            growth.enter(self._steps - first, cotangents.inner)
        # What is drawn anew goes on from here, what is rebuilt draws what it drew.
        fresh = oracles.generators.peek()
        shared = not isinstance(oracles.batches.curvature if self._resampled else oracles.batches.inner, PerStep)
        total: PartialLeaves = (None,) * len(tree.tensors(oracles.attached))
        to_state = first == 0 and bool(self._initial)
        through_init, embedding, pending = oracles.problem.init is not None and first == 0, None, None
        for step in reversed(range(first, self._steps)):
            if step > terms.top:
                if self._kept[-1][0] == step:
                    self._kept.pop()
                continue
            random, inner, state = self._taken(step)
            if step < terms.top:
                oracles.generators.set(random)
                made_with = None
                if self._resampled:
                    made_with = self._made_with(inner, step)
                    oracles.generators.set(fresh)
                embedding = self._fresh_embedding(step) if self._resampled else oracles.embedding(step)
                cotangents, in_outer, in_batch = self._step_back(
                    inner,
                    state,
                    step,
                    embedding,
                    cotangents,
                    to_inner=step > first or through_init or to_start or to_state,
                    made_with=made_with,
                )
                fresh = oracles.generators.peek() if self._resampled else fresh
                total = tree.accumulate(total, in_outer)
                if shared:
                    pending = in_batch if pending is None else tree.accumulate(pending, in_batch)
                else:
                    total = tree.accumulate(total, embedding.pull(in_batch))
            if terms.followed(step):
                oracles.generators.set(fresh)
                entering = terms.enter(step, inner)
                fresh = oracles.generators.peek()
                growth.enter(step - first, entering)
                known = tuple(cotangents.inner) or (None,) * len(entering)
                cotangents.inner = list(tree.accumulate(known, tuple(entering)))
                del entering, known
            del inner, state
            if growth.wanted(step - first):
                growth.look(step - first, cotangents.inner)
        if pending is not None and embedding is not None:
            total = tree.accumulate(total, embedding.pull(pending))
        if to_state and cotangents.state is not None:
            total = tree.accumulate(total, oracles.begin_vjp(cotangents))
        if through_init:
            total = tree.accumulate(total, oracles.start_vjp(cotangents.inner))
        oracles.generators.set(fresh)
        return total, growth

    def _taken(self, step: int) -> tuple[State, Tree, Any]:
        """What an iterate's step is rebuilt from, and the iterate and the state; no longer kept."""
        if self._kept[-1][0] != step:
            self._run_again(step)
        _, kept = self._kept.pop()
        inner, state = kept.take()
        if self._kept:
            self._kept[-1][1].fetch()  # the next to be used begins its way back
        return kept.random, inner, state

    def _made_with(self, inner: Tree, step: int) -> PartialLeaves | None:
        """The gradient that a step was made with, for an optimizer whose algebra asks what it was."""
        update = self._oracles.dynamics.update
        plain = update is not None and update.plain_rate is not None
        return None if plain else self._oracles.inner_gradient(inner, step)[1]

    def _fresh_embedding(self, step: int) -> Embedding:
        """The embedded batch of a step's derivatives; made once where all steps share it."""
        oracles = self._oracles
        if isinstance(oracles.batches.curvature, PerStep) or self._curvature is None:
            self._curvature = Embedding(oracles.source, oracles.batches.curvature_at(step))
        return self._curvature

    def _step_back(
        self,
        inner: Tree,
        state: Any,
        step: int,
        embedding: Embedding,
        cotangents: Cotangents,
        *,
        to_inner: bool,
        made_with: PartialLeaves | None,
    ) -> tuple[Cotangents, PartialLeaves, PartialLeaves]:
        """One step's product; the cotangents of tasks that were at rest go past it."""
        pull = functools.partial(
            self._oracles.step_vjp, inner, state, step, embedding, to_inner=to_inner, made_with=made_with
        )
        if not self._live:
            return pull(cotangents)
        live = self._live[step]
        resting, moving = (
            Cotangents(self._masked(mask, cotangents.inner), cotangents.state and self._masked(mask, cotangents.state))
            for mask in (~live, live)
        )
        shared = [leaf is not None and leaf.dim() == 0 for leaf in cotangents.state or ()]
        if moving.state is not None and any(shared):
            moving.state = [
                given if alike else kept_
                for given, kept_, alike in zip(cotangents.state or (), moving.state, shared, strict=True)
            ]
        back, in_outer, in_batch = pull(moving)
        if to_inner:
            back.inner = list(tree.accumulate(tuple(back.inner), tuple(resting.inner)))
            if resting.state is not None and back.state is not None and len(back.state) == len(resting.state):
                back.state = list(tree.accumulate(tuple(back.state), tuple(resting.state)))
        return back, in_outer, in_batch

    def _masked(self, tasks: Tensor, cotangents: list[Tensor | None]) -> list[Tensor | None]:
        # (A number that tasks share is moved by every step.)
        return [
            leaf if leaf is None else None if leaf.dim() == 0 else leaf * self._oracles.space.per_task(tasks, leaf)
            for leaf in cotangents
        ]

    def _run_again(self, stop: int) -> None:
        """Keep the iterate of a step, and those that the plan wants on the way to it from the last kept one."""
        oracles, (begin, snapshot) = self._oracles, self._kept[-1]
        wanted, random = self._plan.again(begin, stop, len(self._kept)), snapshot.random
        oracles.generators.set(random)
        y, s = snapshot.take()
        for step in range(begin, stop):
            moved, state = oracles.step(y, tree.tree_map(lambda leaf: leaf, s), oracles.point(step))
            if self._live:
                moved = where(oracles.space, self._live[step], moved, y)
                state = state if step == 0 else where(oracles.space, self._live[step], state, s)
            y, s = moved, state
            if step + 1 == stop or step + 1 in wanted:
                random = oracles.generators.state(random)
                self._put(step + 1, y, s, random, needed_next=step + 1 == stop)
