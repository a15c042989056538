"""An inner solve that was made before, and of what."""

import dataclasses
from typing import Any

from bilevel.engine.replay import State
from bilevel.outcome import Solution


@dataclasses.dataclass(frozen=True)
class Known:
    """What a solve found.

    Args:
        instance: of which instance.
        solution: what it found.
        began: the generators' states before its first step.
        ended: and after its last.
    """

    instance: Any
    solution: Solution
    began: State
    ended: State

    def of(self, instance: Any) -> bool:
        """Whether it is that of an instance: of the same objects in all that its inner loop looks at."""
        pairs = zip(_inside(self.instance), _inside(instance), strict=True)
        return all(one is other for one, other in pairs)


def _inside(instance: Any) -> tuple[Any, ...]:
    """What an inner loop looks at."""
    problem = instance.problem
    functions = problem.inner_loss, problem.init, problem.features
    return (*functions, instance.outer, instance.inner, instance.batches.inner, instance.solver, instance.tasks)
