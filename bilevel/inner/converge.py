"""Steps of an optimizer until the gradient is small.

| | inner gradients | memory |
| --- | --- | --- |
| solve | steps + 1 | 2 P + optimizer state + one graph, independent of the number of steps |

Tasks stop independently: a task whose gradient norm meets the tolerance is frozen by a mask while the others go on.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bilevel.inner.base import Gradient, InnerSolver, Visit, check_optimizer, move
from bilevel.optim.base import Optimizer
from bilevel.outcome import Solution, Status, code_if, settled
from bilevel.space import tree
from bilevel.space.tree import Tree

# On a GPU the test waits for the device; between tests converged tasks are already frozen, so only work is lost, never
# accuracy.
_CHECK_EVERY_ON_GPU = 10


@dataclasses.dataclass(frozen=True)
class Converge(InnerSolver):
    """Descend until |dg/dy| <= tol, for every task.

    Args:
        optimizer: how a gradient moves y.
        tol: on the Euclidean norm of the inner gradient, absolute. By strong convexity |y - y*| <= tol / mu.
        max_steps: the most steps; running out is reported as Status.INNER_MAX_STEPS.

    Raises:
        TypeError, ValueError: the arguments are of the wrong kind.

    Example:
        >>> import torch, bilevel as bl
        >>> solver = bl.Converge(bl.SGD(lr=0.25), tol=1e-6, max_steps=100)
        >>> found = solver.solve(lambda y, step: ((y**2).sum(), (2 * y,)), torch.ones(2, dtype=torch.float64), None)
        >>> found.status, found.steps
        (<Status.OK: 'Computed as asked.'>, 22)
    """

    optimizer: Optimizer
    tol: float = 1e-6
    max_steps: int = 1000

    def __post_init__(self) -> None:
        check_optimizer("Converge", self.optimizer)
        if not isinstance(self.tol, (int, float)) or not self.tol > 0:
            raise ValueError(f"Converge was given tol={self.tol!r}; a positive number was needed")
        if not isinstance(self.max_steps, int) or self.max_steps < 1:
            raise ValueError(f"Converge was given max_steps={self.max_steps!r}; an integer of at least 1 was needed")

    @property
    def fixed(self) -> bool:
        return False

    def solve(
        self, gradient: Gradient, inner: Tree, outer: Tree, *, tasks: int | None = None, visit: Visit | None = None
    ) -> Solution:
        state = self.optimizer.init(inner)
        every = _CHECK_EVERY_ON_GPU if tree.tensors(inner)[0].is_cuda else 1
        first: Tensor | None = None
        for step in range(self.max_steps + 1):
            loss, direction = gradient(inner, step)
            first = loss if first is None else first
            residual = tree.norm(direction, tasks)
            live = ~(residual <= self.tol)
            if step == self.max_steps or (step % every == 0 and settled(live)):
                return Solution(inner, step, code_if(live, Status.INNER_MAX_STEPS), first, loss, residual)
            if visit is not None:
                visit(step, inner, state)
            moved, next_state = move(self.optimizer, direction, state, inner, outer)
            inner = moved if tasks is None else _where(live, moved, inner)
            state = next_state if tasks is None or step == 0 else _where(live, next_state, state)
        raise AssertionError("the loop returns at max_steps")


def _where(live: Tensor, new: Any, old: Any) -> Any:
    def choose(a: Any, b: Any) -> Any:
        return (
            torch.where(tree.per_task(live, a), a, b)
            if isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim() > 0
            else a
        )

    return tree.tree_map(choose, new, old)
