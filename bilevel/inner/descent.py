"""A fixed number of steps of an optimizer.

    y_{k+1}, s_{k+1} = step(dg/dy(y_k, x), s_k, y_k, x),   k = 0 .. K-1

| | inner gradients | memory |
| --- | --- | --- |
| solve | K | 2 P + optimizer state + one graph, independent of K |
"""

import dataclasses

from bilevel.inner.base import Gradient, InnerSolver, Visit, check_optimizer, move
from bilevel.optim.base import Optimizer
from bilevel.outcome import Solution
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class Descent(InnerSolver):
    """K steps of an optimizer: the K-step program.

    Args:
        optimizer: how a gradient moves y.
        steps: K >= 0.

    Raises:
        TypeError, ValueError: the arguments are of the wrong kind, such as a torch.optim optimizer.

    Example:
        >>> import bilevel as bl
        >>> bl.Descent(bl.SGD(lr=0.1), steps=20).max_steps
        20
    """

    optimizer: Optimizer
    steps: int

    def __post_init__(self) -> None:
        check_optimizer("Descent", self.optimizer)
        if not isinstance(self.steps, int) or self.steps < 0:
            raise ValueError(f"Descent was given steps={self.steps!r}; an integer of at least 0 was needed")

    @property
    def max_steps(self) -> int:
        return self.steps

    @property
    def fixed(self) -> bool:
        return True

    def solve(
        self, gradient: Gradient, inner: Tree, outer: Tree, *, tasks: int | None = None, visit: Visit | None = None
    ) -> Solution:
        state = self.optimizer.init(inner)
        first = last = None
        for step in range(self.steps):
            if visit is not None:
                visit(step, inner, state)
            last, direction = gradient(inner, step)
            first = last if first is None else first
            inner, state = move(self.optimizer, direction, state, inner, outer)
        return Solution(inner, self.steps, 0, first, last)
