"""The trajectory as one graph: every step's tape is kept until the cotangent has come through.

| | inner gradients | HVP-class products | memory |
| --- | --- | --- | --- |
| Tape | K | K | K tapes of a differentiable step |
"""

from typing import Any

from torch import Tensor

from bilevel.batches import PerStep
from bilevel.engine import autodiff, spans
from bilevel.engine.oracles import Oracles
from bilevel.engine.point import At
from bilevel.engine.refusals import check_step
from bilevel.estimators.base import Instance
from bilevel.estimators.reverse.growth import Growth, Watch, interval
from bilevel.inner.descent import Descent
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
    """

    def __init__(self, instance: Instance, solver: Descent, first: int, masks: list[Tensor] | None) -> None:
        oracles = instance.oracles
        self._oracles, self._count = oracles, solver.steps - first
        self._watch = Watch(oracles.space, interval(self._count))
        with spans.span(spans.INNER):
            start = oracles.start() if first > 0 else oracles.differentiable_start()
            self._start = [] if first > 0 or oracles.problem.init is not None else tree.tensors(start)
            before = oracles.generators.peek()
            moves = _Recorded(oracles, first, self._watch)
            found = run(solver, moves, start, moves.point, masks=masks)
            drew = not oracles.generators.same(before, oracles.generators.peek())
        self._end, self.solution = tree.tensors(found.inner), instance.seen(found, drew=drew)

    def pull(self, cotangent: list[Tensor | None], *, to_start: bool) -> tuple[PartialLeaves, Growth]:
        """The cotangent of y_K to one of x, along the steps and the start.

        Args:
            cotangent: what enters at y_K; emptied. The tape is freed.
            to_start: follow it to a start without an init, too, for the figures of `Growth`.
        """
        weights = [leaf for leaf in cotangent if leaf is not None]
        cotangent.clear()
        xs = tree.tensors(self._oracles.attached)
        start = self._start if to_start else []
        growth = Growth(self._oracles.space, weights, self._count)
        with spans.span(spans.HVP, count=self._count):
            pulled = autodiff.grad(self._end, [*xs, *start], weights)
        del self._end, self._start
        growth.look_at_all(self._watch)
        if start:
            growth.look(list(pulled[len(xs) :]))
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
            return (tree.attach(moved) if at.step == self._first - 1 else moved), state
        moved, state = self.dynamics.step(inner, state, self._oracles.attached, at)
        moved = check_step(self.dynamics, inner, moved)
        self._watch.iterate(at.step + 1 - self._first, moved)
        return moved, state

    def stationarity(self, inner: Tree, at: At) -> list[Tensor]:
        raise AssertionError("a fixed number of steps does not ask")
