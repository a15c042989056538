"""One sweep back through the inner loop, whatever is kept of its trajectory."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from bilevel.batches import PerStep
from bilevel.engine import spans
from bilevel.estimators.base import Estimate, Instance
from bilevel.estimators.reverse.growth import Growth
from bilevel.estimators.reverse.terms import Terms
from bilevel.inner.descent import Descent
from bilevel.outcome import Solution
from bilevel.space import tree
from bilevel.space.tree import PartialLeaves


class Trajectory(Protocol):
    """The inner loop, run and kept in a way."""

    solution: Solution

    def pull(self, *, to_start: bool) -> tuple[PartialLeaves, Growth]:
        """The cotangents of the outer loss's terms to one of x; what was kept is freed."""


Run = Callable[[Instance, Descent, int, list[Tensor] | None, Terms], Trajectory]
"""(instance, program, first step followed, tasks that each step moves, terms of the outer loss) -> the trajectory."""


def swept(
    instance: Instance, trajectory: Run, *, last: int | None = None, step_weights: Sequence[float] | None = None
) -> Estimate:
    """The gradient of the K-step program, backwards.

    Args:
        instance: what is solved.
        trajectory: runs and keeps the inner loop.
        last: steps that are gone back through; None for all.
        step_weights: of the terms of the outer loss; None for the last iterate alone.
    """
    oracles, dynamics, steps = instance.oracles, instance.solver.dynamics, instance.solver.max_steps
    learned: Solution | None = None
    masks: list[Tensor] | None = None
    if not instance.solver.fixed:
        # A solver that stops by itself runs once to learn K; then the program is known, whichever way it is kept.
        oracles.start()
        if not isinstance(instance.batches.inner, PerStep):
            oracles.embedding(0)
        before, moving = oracles.generators.peek(), list[Tensor]()
        learned = instance.solve(moving=moving.append)
        steps, masks = learned.steps, moving if instance.tasks is not None else None
        oracles.generators.set(before)
    first, program = 0 if last is None else max(steps - last, 0), Descent(dynamics, steps)
    terms = Terms(oracles, step_weights, steps, first)
    forward = trajectory(instance, program, first, masks, terms)
    found, forgets = forward.solution, None
    if learned is not None:
        found = dataclasses.replace(found, code=learned.code, residual=learned.residual)
        forgets = learned.code if instance.problem.init is None else None
        del learned
    with spans.span(spans.HYPERGRADIENT):
        indirect, growth = forward.pull(to_start=forgets is not None)
        grad, stats = tree.accumulate(terms.direct, indirect), dict[str, Any](growth.figures())
        if step_weights is not None:
            stats |= {"final_outer_loss": terms.final}
        return instance.finish(found, grad, terms.loss, codes=[growth.code(forgets=forgets)], stats=stats)
