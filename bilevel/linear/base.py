"""The contract of a linear solver, and what every answer is checked against.

Solvers work on leaves and with masks instead of branches, so that tasks converge independently, a GPU is never waited
for, and torch.func.vmap maps over them. `tasks` makes every dot product one number a task.
"""

import abc
from collections.abc import Callable
from typing import ClassVar

import torch

from bilevel._strategy import Strategy
from bilevel.outcome import LinearSolution, Status, code_if, worst
from bilevel.space import tree
from bilevel.space.tree import Leaves

Product = Callable[[Leaves], Leaves]
"""v -> A v."""


class LinearSolver(Strategy):
    """How (A + damping I) v = b is solved, A symmetric."""

    damping: float
    tol: float
    worse_than_zero: ClassVar[Status] = Status.MAX_STEPS
    """What it means when the residual is more than twice that of v = 0."""

    @abc.abstractmethod
    def iterate(
        self, product: Product, b: Leaves, start: Leaves | None = None, *, tasks: int | None = None
    ) -> LinearSolution:
        """The solver's own work; its residual is what the recursion believes."""

    def solve(
        self, product: Product, b: Leaves, start: Leaves | None = None, *, tasks: int | None = None
    ) -> LinearSolution:
        """Solve and check: one product more than `iterate`, for the true residual.

        Args:
            product: v -> A v, on tuples of tensors shaped like b.
            b: right-hand side.
            start: first guess; None for zero.
            tasks: number of tasks, when every leaf has a leading task dimension.

        Example:
            >>> import torch, bilevel as bl
            >>> found = bl.CG(max_steps=2, tol=1e-8).solve(lambda v: (2 * v[0],), (torch.ones(2),))
            >>> found.value[0], found.status.name
            (tensor([0.5000, 0.5000]), 'OK')
        """
        found = self.iterate(product, b, start, tasks=tasks)
        return self.checked(found, product(found.value), b, tasks)

    def checked(self, found: LinearSolution, image: Leaves, b: Leaves, tasks: int | None) -> LinearSolution:
        """`found` with its residual and status replaced by the truth, given image = A v."""
        residual = tree.axpy(-1.0, tree.axpy(self.damping, found.value, image) if self.damping else image, b)
        scale = tree.norm(b, tasks)
        relative = tree.norm(residual, tasks) / torch.where(scale > 0, scale, 1.0)
        # The recursion's residual drifts from the true one, hence the factor of ten; no solver gets below rounding.
        allowed = max(min(self.tol * 10, 1.0), 100 * torch.finfo(b[0].dtype).eps)
        unmet = code_if(~(relative <= allowed), Status.MAX_STEPS)
        # Between 1 and 2 a little negative curvature is at work, and a truncated answer is still of use: unmet, not
        # failed.
        worse = code_if(relative > 2.0, self.worse_than_zero)
        # A failure of the solver explains a non-finite answer better than NONFINITE does.
        broken = torch.where(
            torch.as_tensor(found.code, device=unmet.device) == 0,
            code_if(~torch.isfinite(relative), Status.NONFINITE),
            0,
        )
        return LinearSolution(found.value, relative, found.steps, worst(found.code, unmet, worse, broken))


def damped(product: Product, damping: float) -> Product:
    """V -> A v + damping v."""
    return product if damping == 0 else lambda v: tree.axpy(damping, v, product(v))


def check_number(owner: str, name: str, value: object, low: float) -> None:
    """Raise ValueError unless `value` is a number of at least `low`."""
    if not isinstance(value, (int, float)) or not low <= value < float("inf"):
        raise ValueError(f"{owner} was given {name}={value!r}; a number of at least {low} was needed")


def check_positive(owner: str, name: str, value: object) -> None:
    """Raise ValueError unless `value` is a positive finite number."""
    if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"{owner} was given {name}={value!r}; a positive number was needed")


def check_steps(owner: str, name: str, value: object) -> None:
    """Raise ValueError unless `value` is a positive integer."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{owner} was given {name}={value!r}; an integer of at least 1 was needed")
