"""The trajectory as one graph: every step's tape is kept until the cotangent has come through.

| | inner gradients | HVP-class products | memory |
| --- | --- | --- | --- |
| Tape | K | K | K tapes of a differentiable step |
"""

import copy
from typing import Any

from torch import Tensor

from bilevel.batches import PerStep
from bilevel.engine import autodiff, spans
from bilevel.engine.oracles import Oracles
from bilevel.engine.point import At
from bilevel.engine.refusals import check_step, step_of
from bilevel.estimators.base import Instance
from bilevel.estimators.reverse.growth import Growth, Watch, interval
from bilevel.estimators.reverse.terms import Terms
from bilevel.inner.descent import Descent
from bilevel.inner.gradient import GradientDynamics
from bilevel.inner.loop import run
from bilevel.space import tree
from bilevel.space.tree import PartialLeaves, Tree


class Tape:
    """The inner loop with its graph from step `first` on.

    Args:
        instance: what is solved.
        solver: how many steps of what.
        first: earlier steps leave no graph.
        masks: the tasks that each step moves; None for all.
        terms: the terms of the outer loss.
    """

    def __init__(
        self, instance: Instance, solver: Descent, first: int, masks: list[Tensor] | None, terms: Terms
    ) -> None:
        oracles = instance.oracles
        self._oracles, self._first, self._terms, self._count = oracles, first, terms, solver.steps - first
        self._path = list[tuple[int, Tree]]()
        self._watch, self._retain = Watch(oracles.space, interval(self._count)), False
        with spans.span(spans.INNER):
            start = oracles.start() if first > 0 else oracles.differentiable_start()
            self._start = [] if first > 0 or oracles.problem.init is not None else tree.tensors(start)
            before = oracles.generators.peek()
            moves = _Recorded(oracles, first, self._watch)
            found = run(solver, moves, start, moves.point, visit=self._visit, masks=masks, steady=instance.steady)
            drew = not oracles.generators.same(before, oracles.generators.peek())
        if terms.followed(solver.steps):
            self._path.append((solver.steps, found.inner))
        self.solution = instance.seen(found, drew=drew)

    def _visit(self, step: int, inner: Tree, state: Any) -> None:
        self._terms.passed(step, inner)
        if self._terms.followed(step):
            self._path.append((step, inner))

    @property
    def end(self) -> Tree:
        """y_K with its graph."""
        return self._path[-1][1]

    def facing(self, oracles: Oracles, terms: Terms) -> "Tape":
        """The same tape under another outer loss; a pull leaves it whole."""
        other = copy.copy(self)
        other._oracles, other._terms, other._retain, other._path = oracles, terms, True, list(self._path)
        self._watch.squares.clear()
        return other

    def pull(self, *, to_start: bool) -> tuple[PartialLeaves, Growth]:
        """The cotangents of the outer loss's terms to one of x, along the steps and the start. The tape is freed,
        unless it is another's.

        Args:
            to_start: follow it to a start without an init, too, for the figures of `Growth`.
        """
        growth, ends, weights = Growth(self._oracles.space, self._count), list[Tensor](), list[Tensor]()
        while self._path:
            step, inner = self._path.pop()
            cotangent = self._terms.enter(step, tree.detach(inner))
            growth.enter(step - self._first, cotangent)
            pairs = [(y, w) for y, w in zip(tree.tensors(inner), cotangent, strict=True) if w is not None]
            ends += [y for y, _ in pairs]
            weights += [w for _, w in pairs]
            del inner, cotangent, pairs
        xs = tree.tensors(self._oracles.attached)
        start = self._start if to_start else []
        with spans.span(spans.HVP, count=self._terms.top - self._first):
            pulled = autodiff.grad(ends, [*xs, *start], weights, retain_graph=self._retain or None)
        del ends, self._start
        growth.look_at_all(self._watch)
        if start:
            growth.look(0, list(pulled[len(xs) :]))
        return pulled[: len(xs)], growth


class _Recorded:
    """The oracles as the loop sees them, with a graph from a step on."""

    def __init__(self, oracles: Oracles, first: int, watch: Watch) -> None:
        self.space, self.dynamics = oracles.space, oracles.dynamics
        self._oracles, self._first, self._watch = oracles, first, watch
        self._embedded: list[Any] | None = None

    def begin(self, inner: Tree) -> Any:
        x = self._oracles.x if self._first > 0 else self._oracles.attached
        return self.dynamics.init(inner, x)

    def point(self, step: int) -> At:
        if step < self._first:
            return self._oracles.point(step)
        if self._embedded is None or isinstance(self._oracles.batches.inner, PerStep):
            # In a list, because a batch may be anything, None too.
            self._embedded = [self._oracles.differentiable_embedding(step)]
        return self._oracles.differentiable_point(step, self._embedded[0])

    def step(self, inner: Tree, state: Any, at: At) -> tuple[Tree, Any]:
        if at.step < self._first:
            moved, state = self._oracles.step(inner, state, at)
            if at.step < self._first - 1:
                return moved, state
            # The loss of another dynamics may be that at a tensor of its state (Averaged).
            plain = isinstance(self.dynamics, GradientDynamics)
            return tree.attach(moved), state if plain else tree.attach(state)
        moved, state = step_of(self.dynamics, inner, state, self._oracles.attached, at)
        moved = _own_nodes(check_step(self.dynamics, inner, moved), inner)
        self._watch.iterate(at.step + 1 - self._first, moved)
        return moved, state

    def stationarity(self, inner: Tree, at: At) -> list[Tensor]:
        raise AssertionError("a fixed number of steps does not ask")


def _own_nodes(moved: Tree, inner: Tree) -> Tree:
    """`moved` with a node of its own for each tensor that a step handed on as it was: cotangents enter there."""
    before = {id(leaf) for leaf in tree.tensors(inner)}
    leaves = tree.tensors(moved)
    if not any(id(leaf) in before for leaf in leaves):
        return moved
    return tree.like(moved, [leaf.view_as(leaf) if id(leaf) in before else leaf for leaf in leaves])
