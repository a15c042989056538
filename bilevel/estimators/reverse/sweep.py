"""One sweep back through the inner loop, whatever is kept of its trajectory."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from bilevel.engine import spans
from bilevel.engine.oracles import Oracles
from bilevel.estimators.base import Estimate, Instance
from bilevel.estimators.reverse.growth import Growth
from bilevel.estimators.reverse.terms import Terms
from bilevel.inner.descent import Descent
from bilevel.outcome import Solution
from bilevel.space import tree
from bilevel.space.tree import PartialLeaves, Tree


class Trajectory(Protocol):
    """The inner loop, run and kept in a way."""

    solution: Solution

    @property
    def end(self) -> Tree | None:
        """y at its end with its graph; None where no graph is kept."""

    def facing(self, oracles: Oracles, terms: Terms) -> "Trajectory":
        """The same with another outer loss."""

    def pull(self, *, to_start: bool) -> tuple[PartialLeaves, Growth]:
        """The cotangents of the outer loss's terms to one of x; what was kept is freed."""


Trajectories = Callable[[Instance, Descent, int, list[Tensor] | None, Terms], Trajectory]
"""(instance, program, first step followed, tasks that each step moves, terms of the outer loss) -> the trajectory."""


def run(
    instance: Instance,
    trajectory: Trajectories,
    *,
    last: int | None = None,
    step_weights: Sequence[float] | None = None,
) -> "Run":
    """The inner loop, run forwards; its `estimate` is the gradient of the K-step program.

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
    forgets = program.code if instance.problem.init is None else None
    return Run(
        instance.oracles, forward, terms, program.ended(forward.solution), forgets, weighted=step_weights is not None
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """An inner loop that was run. `forgets` is the code of a solver that must have forgotten its start, else None."""

    oracles: Oracles
    forward: Trajectory
    terms: Terms
    solution: Solution
    forgets: Tensor | int | None
    weighted: bool

    @property
    def graph(self) -> tuple[Tree, Tree] | None:
        eager = not self.oracles.engine.pure
        end = self.forward.end
        return (end, self.oracles.attached) if end is not None and eager else None

    def estimate(self, instance: Instance) -> Estimate:
        """The estimate at the outer loss of the instance: that of the run, once, or another, any number of times."""
        forward, terms = self.forward, self.terms
        if instance.oracles is not self.oracles:
            terms = terms.facing(instance.oracles)
            forward = forward.facing(instance.oracles, terms)
        with spans.span(spans.HYPERGRADIENT):
            indirect, growth = forward.pull(to_start=self.forgets is not None)
            grad, stats = tree.accumulate(terms.direct, indirect), dict[str, Any](growth.figures())
            if self.weighted:
                stats |= {"final_outer_loss": terms.final}
            codes = [growth.code(forgets=self.forgets)]
            return instance.finish(self.solution, grad, terms.loss, codes=codes, stats=stats)
