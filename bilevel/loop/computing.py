"""One hypergradient of a loop: in reduced precision where asked, and held against the full one now and then."""

import dataclasses
from typing import Any

from torch import Tensor

from bilevel.batches import Batches
from bilevel.engine.base import Engine
from bilevel.estimators.base import Estimator
from bilevel.hypergradient import hypergradient
from bilevel.inner.base import InnerSolver
from bilevel.loop.mixed_precision import MixedPrecision
from bilevel.loop.precision_check import Precision, PrecisionCheck
from bilevel.loop.randomness import Randomness
from bilevel.outcome import Hypergradient, Status, readable
from bilevel.problem import Problem
from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class Computing:
    """How a loop computes its hypergradients.

    Args:
        problem, solver, estimator, engine: as of `hypergradient`.
        precision: of the losses; None for that of the variables.
        check: holds some against full precision; None for none.
        random: the generators, which it leaves as they are.
    """

    problem: Problem
    solver: InnerSolver
    estimator: Estimator
    engine: Engine | None = None
    precision: MixedPrecision | None = None
    check: PrecisionCheck | None = None
    random: Randomness = dataclasses.field(default_factory=Randomness)

    def hypergradient(
        self, look: int | None, outer: Tree, inner: Tree | None, batches: Batches, state: Any
    ) -> tuple[Hypergradient, Precision | None]:
        """A hypergradient, and how much of it is kept, where the step `look` is one that is looked at."""
        given = (outer, inner, batches)
        how: dict[str, Any] = {
            "solver": self.solver,
            "estimator": self.estimator,
            "state": state,
            "engine": self.engine,
        }
        problem = self.problem if self.precision is None else self.precision.problem(self.problem)
        if self.check is None or look is None or not self.check.due(look):
            return hypergradient(problem, *given, **how), None
        # Before the other one, so that not both are held at a time.
        before = self.random.peek()
        try:
            full, seconds = self.check.full(self.problem, *given, **how, reduced=self.precision is not None)
        finally:
            self.random.set(before)
        found = hypergradient(problem, *given, **how)
        return found, self.check.compare(found.grad, full, seconds)

    def overflowed(self, found: Hypergradient) -> bool:
        """Whether S of float16 was too large for this one, which must not be used then."""
        return self.precision is not None and self.precision.scale > 1 and not usable(found)


def usable(found: Hypergradient) -> bool:
    """Whether all of it is finite. Without data nothing can be seen to fail."""
    status = status_seen(found)
    if status in (Status.NONFINITE, Status.DIVERGED):
        return False
    return not status.failed or bool(tree.finite(found.grad))


def status_seen(found: Hypergradient) -> Status:
    """The status, OK where it cannot be read: a forecast takes the step that a sound hypergradient would."""
    return found.status if not isinstance(found.code, Tensor) or readable(found.code) else Status.OK
