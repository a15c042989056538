"""A linear system on some of the variables, and in some of the tasks: v = 0 elsewhere.

    E'A E w = E'b,  v = E w      E the variables that are kept

| | products with A | memory |
| --- | --- | --- |
| iterate | the solver's | the solver's and P |

Wins: a hypergradient through a head or an adapter alone, the rest of y held still; tasks that are known to have ended.
Fails: as an approximation of the whole system it is block Gauss-Seidel's first half step, no more.
Differences from peers: Betty and hypertorch take all parameters or a list of them; none masks numbers or tasks.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from bilevel.linear.base import LinearSolver, Prepared
from bilevel.linear.operator import LinearOperator, as_operator
from bilevel.outcome import LinearSolution, Status
from bilevel.space.inner_product import PLAIN, Leaves, Space


@dataclasses.dataclass(frozen=True)
class Masked(LinearSolver):
    """A solver on a part of the variables.

    Args:
        solver: of the smaller system.
        blocks: one entry for each tensor of y, in their order: True, False, or a tensor of bools of its shape (of one
            task's shape, with tasks); None keeps all.
        tasks: bools of shape (T,), the tasks that are solved; None for all.

    The residual is that of the kept equations. Memory: the solver's and P.

    Raises:
        TypeError: `solver` is no linear solver.
        ValueError: (when used) a mask does not fit.

    Example:
        >>> import torch, bilevel as bl
        >>> solver = bl.linear.Masked(bl.CG(), blocks=(True, False))
        >>> solver.solve(lambda v: (2 * v[0] + v[1], v[0] + 2 * v[1]), (torch.ones(1), torch.ones(1))).value
        (tensor([0.5000]), tensor([0.]))
    """

    solver: LinearSolver
    blocks: tuple[bool | Tensor, ...] | None = None
    tasks: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.solver, LinearSolver):
            raise TypeError(
                f"Masked was given {type(self.solver).__name__}; a linear solver was needed, such as "
                f"Masked(bilevel.CG(max_steps=10), blocks=(True, False))"
            )

    @property
    def damping(self) -> float:  # type: ignore[override]
        """The solver's."""
        return self.solver.damping

    @property
    def tol(self) -> float:  # type: ignore[override]
        """The solver's."""
        return self.solver.tol

    @property
    def least_squares(self) -> bool:  # type: ignore[override]
        """The solver's."""
        return self.solver.least_squares

    @property
    def worse_than_zero(self) -> Status:  # type: ignore[override]
        """The solver's."""
        return self.solver.worse_than_zero

    def seen(self, x: Leaves, space: Space) -> Leaves:
        """The kept part of a vector, zero elsewhere."""
        if self.blocks is not None:
            if len(self.blocks) != len(x):
                raise ValueError(
                    f"Masked was given {len(self.blocks)} blocks for an inner variable of {len(x)} tensors; one entry "
                    f"for each was needed"
                )
            x = tuple(_kept(leaf, mask, space) for leaf, mask in zip(x, self.blocks, strict=True))
        if self.tasks is not None:
            if space.tasks is None or tuple(self.tasks.shape) != (space.tasks,):
                raise ValueError(
                    f"Masked was given tasks of the shape {tuple(self.tasks.shape)} for a system with "
                    f"{space.tasks or 'no'} tasks; one bool for each task was needed"
                )
            x = space.where(self.tasks.to(x[0].device), x)
        return self.solver.seen(x, space)

    def prepare(self, operator: LinearOperator | Callable[[Leaves], Leaves], space: Space = PLAIN) -> "PreparedMasked":
        return PreparedMasked(self, as_operator(operator), space)


def _kept(leaf: Tensor, mask: bool | Tensor, space: Space) -> Tensor:
    if isinstance(mask, bool):
        return leaf if mask else torch.zeros_like(leaf)
    shape = leaf.shape if space.tasks is None else leaf.shape[1:]
    if not isinstance(mask, Tensor):
        raise TypeError(f"Masked was given the block {mask!r}; a tensor of bools, or True or False, was needed")
    if mask.dtype != torch.bool or tuple(mask.shape) != tuple(shape):
        raise ValueError(
            f"Masked was given a block of {mask.dtype} of the shape {tuple(mask.shape)}; bools of the shape "
            f"{tuple(shape)}, or True or False, were needed"
        )
    return torch.where(mask.to(leaf.device), leaf, torch.zeros((), dtype=leaf.dtype, device=leaf.device))


class PreparedMasked(Prepared):
    """The smaller system of one operator."""

    solver: Masked

    def __init__(self, solver: Masked, operator: LinearOperator, space: Space) -> None:
        super().__init__(solver, operator, space)
        self._within = solver.solver.prepare(_Restricted(operator, solver, space), space)

    def iterate(self, b: Leaves, start: Leaves | None = None) -> LinearSolution:
        keep = self.solver.seen
        guess = None if start is None else keep(start, self.space)
        found = self._within.found(keep(b, self.space), guess)
        return dataclasses.replace(found, value=keep(found.value, self.space))


@dataclasses.dataclass(frozen=True)
class _Restricted(LinearOperator):
    """E E'A E E'."""

    operator: LinearOperator
    mask: Masked
    space: Space

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        return self.operator.symmetric

    @property
    def transposable(self) -> bool:
        return self.operator.transposable

    @property
    def point(self) -> Leaves | None:
        return self.operator.point

    def matvec(self, v: Leaves) -> Leaves:
        return self.mask.seen(self.operator.matvec(self.mask.seen(v, self.space)), self.space)

    def rmatvec(self, v: Leaves) -> Leaves:
        return self.mask.seen(self.operator.rmatvec(self.mask.seen(v, self.space)), self.space)

    def diagonal(self) -> Leaves | None:
        known = self.operator.diagonal()
        return None if known is None else self.mask.seen(known, self.space)
