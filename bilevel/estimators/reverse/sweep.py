"""One sweep back through the inner loop, whatever is kept of its trajectory."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

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
    program = instance.program()
    steps = program.solver.steps
    first = 0 if last is None else max(steps - last, 0)
    terms = Terms(instance.oracles, step_weights, steps, first)
    forward = trajectory(instance, program.solver, first, program.masks, terms)
    found = program.ended(forward.solution)
    forgets = program.code if instance.problem.init is None else None
    with spans.span(spans.HYPERGRADIENT):
        indirect, growth = forward.pull(to_start=forgets is not None)
        grad, stats = tree.accumulate(terms.direct, indirect), dict[str, Any](growth.figures())
        if step_weights is not None:
            stats |= {"final_outer_loss": terms.final}
        return instance.finish(found, grad, terms.loss, codes=[growth.code(forgets=forgets)], stats=stats)
