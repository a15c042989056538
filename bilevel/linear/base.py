"""The contract of a linear solver, and what every answer is checked against.

Solvers work on leaves and with masks instead of branches, so that tasks converge independently, a GPU is never waited
for, and torch.func.vmap maps over them. What they return is never worse than v = 0: an answer whose residual is above 1
is replaced by an earlier one, and the status says so.
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from bilevel._strategy import Strategy
from bilevel.linear.operator import LinearOperator, Rectangular, Shifted, Transposed, as_operator, named, versions
from bilevel.outcome import LinearSolution, Status, code_if, worst
from bilevel.space.inner_product import PLAIN, Leaves, Space

SMALL = 0.05
"""The largest relative residual that is ever called met without the user's having asked for it."""


class Prepared(abc.ABC):
    """A solver bound to one operator. What it learns about the operator is kept for the next right-hand side."""

    def __init__(self, solver: "LinearSolver", operator: LinearOperator, space: Space) -> None:
        self.solver, self.operator, self.space = solver, operator, space
        self.shifted = Shifted(operator, solver.damping, space) if solver.damping else operator

    @abc.abstractmethod
    def iterate(self, b: Leaves, start: Leaves | None = None) -> LinearSolution:
        """The solver's own work. Residual and status are what its recursion believes; `value` is already safe by that
        residual: no worse than v = 0.
        """

    def found(self, b: Leaves, start: Leaves | None = None) -> LinearSolution:
        """`iterate`; what a solver of the user's own returns is looked at.

        Raises:
            TypeError, ValueError: it is no LinearSolution like b, or b was written to.
        """
        if type(self).__module__.startswith("bilevel."):
            return self.iterate(b, start)
        name, before = f"{type(self).__name__}.iterate(b, start)", versions(b)
        found = self.iterate(b, start)
        if before != versions(b):
            raise ValueError(f"{name} changed b in place, which the residual is taken from; write to a clone of it")
        return _looked_at(name, found, b, alike=not isinstance(self.operator, (Rectangular, Transposed)))

    def solve(self, b: Leaves, start: Leaves | None = None) -> LinearSolution:
        """`iterate` and one product more, for the true residual.

        Raises:
            TypeError: b or the start is no tuple of floating tensors.
            ValueError: they do not fit each other, or the tasks.
        """
        between = isinstance(self.operator, (Rectangular, Transposed))
        start = check_vectors(b, start, self.space, alike=not between)
        found = self.found(b, start)
        return self.solver.checked(found, self.operator.matvec(found.value), b, self.space)


class LinearSolver(Strategy):
    """How (A + damping I) v = b is solved."""

    damping: float
    tol: float
    least_squares: bool = False
    """Whether a residual that no v can reduce is accepted: the solver's own verdict then stands."""
    worse_than_zero: ClassVar[Status] = Status.UNSOLVED
    """What it means when the residual is above that of v = 0."""

    @abc.abstractmethod
    def prepare(self, operator: LinearOperator | Callable[[Leaves], Leaves], space: Space = PLAIN) -> Prepared:
        """Bind to an operator; reusable over right-hand sides.

        Args:
            operator: A, or a function v -> A v of a symmetric A.
            space: where v lives; Space(tasks=T) when every leaf has a leading task dimension.

        Raises:
            TypeError: `operator` is neither.
            ValueError: the solver needs a symmetric A.
        """

    def solve(
        self,
        operator: LinearOperator | Callable[[Leaves], Leaves],
        b: Leaves,
        start: Leaves | None = None,
        *,
        tasks: int | None = None,
    ) -> LinearSolution:
        """Solve and check: one product more than the solver's own, for the true residual.

        Args:
            operator: A, or a function v -> A v of a symmetric A, on tuples of tensors shaped like b.
            b: right-hand side.
            start: first guess; None for zero. Where it is worse than zero, the solver begins at zero.
            tasks: number of tasks, when every leaf has a leading task dimension.

        Raises:
            TypeError: `operator` is neither an operator nor a function; b or the start is no tuple of floating tensors.
            ValueError: the solver needs a symmetric A; b, the start and the tasks do not fit each other.

        Example:
            >>> import torch, bilevel as bl
            >>> found = bl.CG(max_steps=2, tol=1e-8).solve(lambda v: (2 * v[0],), (torch.ones(2),))
            >>> found.value[0], found.status.name
            (tensor([0.5000, 0.5000]), 'OK')
        """
        return self.prepare(operator, Space(tasks)).solve(b, start)

    def checked(self, found: LinearSolution, image: Leaves, b: Leaves, space: Space) -> LinearSolution:
        """`found` with its residual and status replaced by the truth, given image = A v without damping.

        Where the true residual is above 1 or not finite, v = 0 is returned in place of v, and the status is a failed
        one. `accepted` says where that is, for callers that have computed something else from v.
        """
        return self.judged(found, self.true_residual(found.value, image, b, space, found.damping), b, space)

    def seen(self, x: Leaves, space: Space) -> Leaves:
        """The part of a vector that the system is about: all of it, but for a solver of some of the variables."""
        return x

    def judged(self, found: LinearSolution, relative: Tensor, b: Leaves, space: Space) -> LinearSolution:
        """The same, given the true residual."""
        accepted = self.accepted(relative, b)
        finite = torch.isfinite(relative)
        unmet = code_if(~self.met(relative, b) & (not self.least_squares), Status.MAX_STEPS)
        worse = code_if(finite & ~accepted, self.worse_than_zero)
        broken = code_if(~finite, Status.NONFINITE)
        value = space.where(accepted, found.value)
        # (v = 0 has the residual 1; that of a right-hand side that is not finite stays NaN.)
        residual = torch.where(accepted | ~torch.isfinite(space.norm(self.seen(b, space))), relative, 1.0)
        code = worst(found.code, unmet, worse, broken)
        return LinearSolution(value, residual, found.steps, code, damping=found.damping)

    def true_residual(
        self, value: Leaves, image: Leaves, b: Leaves, space: Space, damping: Tensor | float | None = None
    ) -> Tensor:
        """|b - (A + damping I) v| / |b| per task, given image = A v; the solver's damping, if no other was taken."""
        damping = self.damping if damping is None else damping
        shifted = image if isinstance(damping, float | int) and not damping else space.axpy(damping, value, image)
        residual = self.seen(space.axpy(-1.0, shifted, b), space)
        scale = space.norm(self.seen(b, space))
        return space.norm(residual) / torch.where(scale > 0, scale, 1.0)

    def accepted(self, residual: Tensor, b: Leaves) -> Tensor:
        """Where a relative residual is no worse than that of v = 0, beyond rounding."""
        return residual <= 1 + rounding(b)

    def met(self, residual: Tensor, b: Leaves) -> Tensor:
        """Where a relative residual may be called OK: near the tolerance, or as small as the dtype allows, and an
        improvement on v = 0.
        """
        # The recursion's residual drifts from the true one, hence the factor of ten; no solver gets below rounding.
        near = min(max(10 * self.tol, 100 * epsilon(b)), SMALL)
        return (residual <= max(1.1 * self.tol, near)) & (residual < 1 - epsilon(b))


def epsilon(leaves: Sequence[Tensor]) -> float:
    """The machine epsilon of the coarsest of some tensors."""
    return max(torch.finfo(leaf.dtype).eps for leaf in leaves)


def rounding(leaves: Sequence[Tensor]) -> float:
    """A relative size below which a recursion on these tensors follows rounding errors."""
    return min(10 * epsilon(leaves), 0.01)


def bound(
    solver: str,
    operator: LinearOperator | Callable[[Leaves], Leaves],
    *,
    symmetric: bool = False,
    transposed: bool = False,
    rectangular: bool = False,
) -> LinearOperator:
    """`operator` as a LinearOperator, refused if the solver needs a symmetric one, one with its transposed product, or
    a square one, and it is not.

    Raises:
        TypeError: neither an operator nor a function.
        ValueError: not symmetric, without its transposed product, or between two spaces.
    """
    found = as_operator(operator)
    if isinstance(found, Rectangular) and not rectangular:
        raise ValueError(
            f"{solver} was given Rectangular, a map between two spaces; a square system was needed. Use "
            f"bilevel.linear.LSMR(...) or NormalCG(...), or Product(..., symmetric=False) where v and b have one shape"
        )
    if symmetric and not found.symmetric:
        raise ValueError(
            f"{solver} was given {named(found)}, an operator with symmetric=False; a symmetric one was needed. "
            f"Use Neumann(...) or Dense(), which solve systems that are not symmetric, as bilevel.linear.GMRES(...), "
            f"BiCGSTAB(...) and, with a transposed product, LSMR(...) do, or set symmetric=True if A equals its "
            f"transpose"
        )
    if transposed and not found.transposable:
        raise ValueError(
            f"{solver} was given {named(found)}, an operator with symmetric=False and without rmatvec(v), its "
            f"transposed product, which {solver} needs; define rmatvec(v), or use bilevel.linear.GMRES(...) or "
            f"BiCGSTAB(...), which need A v alone"
        )
    return found


def check_vectors(b: object, start: object, space: Space, *, alike: bool) -> Leaves | None:
    """The start in b's dtypes; with `alike` it must have b's shapes.

    Raises:
        TypeError, ValueError: as `Prepared.solve`.
    """
    for name, given in (("b", b), ("start", start)):
        if given is None and name == "start":
            continue
        if not isinstance(given, (tuple, list)) or not given:
            raise TypeError(
                f"a linear solver was given {name}={_said(given)}; a tuple of one floating tensor or more was needed, "
                f"such as (torch.ones(3),)"
            )
        for leaf in given:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                raise TypeError(f"a linear solver was given {_said(leaf)} in {name}; a floating tensor was needed")
            if space.tasks is not None and tuple(leaf.shape[:1]) != (space.tasks,):
                raise ValueError(
                    f"a linear solver was given tasks={space.tasks} and a tensor of the shape {tuple(leaf.shape)} in "
                    f"{name}; {space.tasks} was needed as the first dimension of each"
                )
    if start is None or not alike:
        return start  # type: ignore[return-value]
    shapes, needed = ([tuple(leaf.shape) for leaf in each] for each in (start, b))  # type: ignore[attr-defined]
    if shapes != needed:
        raise ValueError(f"a linear solver was given a start of the shapes {shapes}; those of b, {needed}, were needed")
    return tuple(leaf.to(like.dtype) for leaf, like in zip(start, b, strict=True))  # type: ignore[call-overload]


def _looked_at(name: str, found: object, b: Leaves, *, alike: bool) -> LinearSolution:
    write = "Write bilevel.LinearSolution(v, residual, steps, bilevel.Status.OK.code)"
    if not isinstance(found, LinearSolution):
        raise TypeError(f"{name} returned {_said(found)}; a LinearSolution was needed. {write}")
    value = found.value
    if not isinstance(value, (tuple, list)) or not all(isinstance(leaf, Tensor) for leaf in value):
        raise TypeError(
            f"{name} returned value={_said(value)}; a tuple of tensors was needed. {write}, with v=(tensor,)"
        )
    if isinstance(found.code, Status):
        raise TypeError(f"{name} returned code={found.code.name}; its integer, Status.code, was needed. {write}")
    shapes, needed = ([tuple(leaf.shape) for leaf in each] for each in (value, b))
    if alike and shapes != needed:
        raise ValueError(f"{name} returned a value of the shapes {shapes}; those of b, {needed}, were needed")
    if alike:
        value = tuple(leaf.to(like.dtype) for leaf, like in zip(value, b, strict=True))
    residual, steps = (torch.as_tensor(each, device=b[0].device) for each in (found.residual, found.steps))
    return dataclasses.replace(found, value=tuple(value), residual=residual, steps=steps)


def _said(given: object) -> str:
    return f"a tensor of {given.dtype}" if isinstance(given, Tensor) else repr(given)[:80]


def check_number(owner: str, name: str, value: object, low: float) -> None:
    """Raise ValueError unless `value` is a number of at least `low`."""
    if not isinstance(value, (int, float)) or not low <= value < float("inf"):
        raise ValueError(f"{owner} was given {name}={value!r}; a number of at least {low} was needed")


def check_positive(owner: str, name: str, value: object) -> None:
    """Raise ValueError unless `value` is a positive finite number."""
    if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise ValueError(f"{owner} was given {name}={value!r}; a positive number was needed")


def check_columns(owner: str, columns: object, rank: int) -> None:
    """Raise ValueError unless `columns` is None or a tuple of `rank` different column numbers."""
    if columns is None:
        return
    if (
        not isinstance(columns, tuple)
        or not all(isinstance(each, int) and each >= 0 for each in columns)
        or len(set(columns)) != len(columns)
        or len(columns) != rank
    ):
        raise ValueError(
            f"{owner} was given columns={columns!r}; a tuple of rank={rank} different column numbers from 0 was needed"
        )


def check_steps(owner: str, name: str, value: object) -> None:
    """Raise ValueError unless `value` is a positive integer."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{owner} was given {name}={value!r}; an integer of at least 1 was needed")
