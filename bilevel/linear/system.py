"""One right-hand side as a recursion sees it: divided by a power of two, in wide numbers, with its tasks masked.

What the Krylov solvers share. b is divided by a power of two near max|b|, so that squares neither overflow nor vanish
and scaling rounds nothing; 16-bit numbers are summed up in float32, and only what a product is taken of is narrow. A
task whose b is not finite is zero here, and reported.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from bilevel.linear.base import LinearSolver, Prepared, epsilon, rounding
from bilevel.linear.operator import LinearOperator
from bilevel.outcome import LinearSolution, Status, readable, settled
from bilevel.space.inner_product import NARROW, Leaves, Space


class System:
    """(A + damping I) v = b for a recursion.

    Args:
        prepared: the solver, its operator and space.
        b: the right-hand side as given.
        domain: tensors shaped like v, as b where there are none.
    """

    def __init__(self, prepared: Prepared, b: Leaves, domain: Leaves | None = None) -> None:
        self.space: Space = prepared.space
        self.solver: LinearSolver = prepared.solver
        self.operator: LinearOperator = prepared.shifted
        self.given, self.domain = b, b if domain is None else domain
        self.scale = power_of_two(self.space.largest(b))
        size = wide(self.space.norm(b))
        self.known = torch.isfinite(size)
        self.b = self.space.where(self.known, self._divided(b))
        self.size = wide(self.space.norm(self.b))
        self.norm = torch.where(self.size > 0, self.size, 1.0)
        """|b|, 1 where b = 0."""
        self.enough = max(self.solver.tol, rounding(b))
        """The relative residual at which a recursion stops; past rounding it follows noise."""
        # A product is off by a few eps |A|; of 16 bits by one rounding, since they are summed up in float32.
        self.floor = epsilon(b) if any(leaf.dtype in NARROW for leaf in b) else 10 * epsilon(b)
        """The share of |A| below which a number is a rounding error."""

    def apply(self, v: Leaves) -> Leaves:
        """(A + damping I) v."""
        return widened(self.operator.matvec(_narrowed(v, self.domain)))

    def apply_transposed(self, v: Leaves) -> Leaves:
        """(A + damping I)' v."""
        return widened(self.operator.rmatvec(_narrowed(v, self.given)))

    def begin(self, start: Leaves | None) -> tuple[Leaves, Leaves]:
        """(v, b - A v) to begin with: the start where it is no worse than zero, else zero."""
        if start is None:
            return self.space.zeros_like(widened(self.domain)), self.b
        guess = self._divided(start)
        residual = self.space.axpy(-1.0, self.apply(guess), self.b)
        # A start worse than zero (that of another problem, or for b = 0) is no start.
        keep = self.known & (wide(self.space.norm(residual)) <= self.size)
        return self.space.where(keep, guess), self.space.where(keep, residual, self.b)

    def begin_least_squares(self, start: Leaves | None, *, pulled_b: bool) -> tuple[Leaves, Leaves, Leaves, Tensor]:
        """(v, r = b - A v, A'r, |A'b|) to begin with, of an A that may be not square.

        Without `pulled_b` nobody asks for the last, and it is |A'r|.
        """
        if start is None:
            narrow = self.operator.rmatvec(_narrowed(self.b, self.given))
            self.domain, pulled = narrow, widened(narrow)
            return self.space.zeros_like(pulled), self.b, pulled, wide(self.space.norm(pulled))
        v, r = self.begin(start)
        pulled = self.apply_transposed(r)
        scale = self.space.norm(self.apply_transposed(self.b) if pulled_b else pulled)
        return v, r, pulled, wide(scale)

    def relative(self, residual: Leaves) -> Tensor:
        """|r| / |b| per task."""
        return wide(self.space.norm(residual)) / self.norm

    def nothing_left(self, live: Tensor) -> bool:
        """Whether no task goes on, where that can be seen without waiting for a GPU."""
        return live.device.type == "cpu" and settled(live)

    def here(self, flag: Tensor) -> bool:
        """Whether the numbers of a flag can be looked at without waiting for a GPU."""
        return flag.device.type == "cpu" and readable(flag)

    def unit(self, x: Leaves, length: Tensor, live: Tensor) -> Leaves:
        """Divide x by its length, in the tasks that are live; zero in the others, whatever x holds there."""
        return self.space.scaled(torch.where(live, 1 / torch.where(live, length, 1.0), 0.0), self.space.where(live, x))

    def finish(
        self, value: Leaves, residual: Tensor, products: Tensor | int, *flags: tuple[Tensor, Status]
    ) -> LinearSolution:
        """The answer for b as it was given: v = 0 where the residual is above 1 or v does not fit its dtype.

        Args:
            value: v for the divided b.
            residual: its relative residual, as far as the recursion knows it.
            products: how many moved v, per task.
            flags: (where, status), the later the weightier.
        """
        bad = self.known & ~(residual <= 1 + rounding(self.given))
        code = torch.where(bad, self.solver.worse_than_zero.code, 0)
        for condition, status in (*flags, (~self.known, Status.NONFINITE)):
            code = torch.where(condition, status.code, code)
        most = min(torch.finfo(leaf.dtype).max for leaf in self.domain)
        fits = self.space.largest(value) * self.scale <= most
        code = torch.where(fits, code, Status.NONFINITE.code)
        kept = fits & ~bad & self.known
        scaled = self.space.scaled(self.scale, self.space.where(kept, value))
        value = tuple(leaf.to(like.dtype) for leaf, like in zip(scaled, self.domain, strict=True))
        residual = torch.where(kept, residual, torch.where(self.known, 1.0, float("nan")))
        steps = products.max() if isinstance(products, Tensor) else products
        return LinearSolution(value, residual, steps, code.max())

    def _divided(self, x: Leaves) -> Leaves:
        return tuple(leaf / self.space.per_task(self.scale, leaf).to(leaf.dtype) for leaf in widened(x))


@dataclasses.dataclass(frozen=True)
class LeastSquares:
    """How a least squares solve ends: `scale` is |A'b|."""

    system: System
    scale: Tensor

    def finish(
        self, value: Leaves, residual: Tensor, products: Tensor, inconsistent: Tensor, nonfinite: Tensor
    ) -> LinearSolution:
        """The answer. Where least squares were asked for, A'(b - A v) is computed anew, and decides."""
        system, solver = self.system, self.system.solver
        if not solver.least_squares:
            unmet = ~solver.met(residual, system.given)
            flags = (unmet, Status.MAX_STEPS), (inconsistent & unmet, Status.BREAKDOWN)
            return system.finish(value, residual, products, *flags, (nonfinite, Status.NONFINITE))
        left = system.space.axpy(-1.0, system.apply(value), system.b)
        slope = wide(system.space.norm(system.apply_transposed(left)))
        slope = slope / torch.where(self.scale > 0, self.scale, 1.0)
        residual = torch.where(system.known & ~nonfinite, system.relative(left), residual)
        flags = (~solver.met(slope, system.given), Status.MAX_STEPS), (nonfinite, Status.NONFINITE)
        return system.finish(value, residual, products, *flags)


def wide(number: Tensor) -> Tensor:
    """A number of a recursion in float64 (Apple GPUs have none)."""
    return number.float() if number.device.type == "mps" else number.double()


def widened(x: Sequence[Tensor]) -> Leaves:
    """16-bit numbers in float32, others as they are."""
    return tuple(leaf.float() if leaf.dtype in NARROW else leaf for leaf in x)


def _narrowed(x: Leaves, like: Leaves) -> Leaves:
    return tuple(leaf.to(each.dtype) for leaf, each in zip(x, like, strict=True))


def divided(numerator: Tensor, denominator: Tensor, where: Tensor) -> Tensor:
    """A quotient where it may be taken, 0 elsewhere."""
    return torch.where(where, numerator / torch.where(where, denominator, 1.0), 0.0)


def scattered(like: Leaves, seed: int, space: Space) -> Leaves:
    """Numbers between -1/2 and 1/2 that look drawn; every task has the same. No generator is asked, so that vmap and
    fake tensors see nothing random, and nothing else that is drawn changes.
    """
    lead = 0 if space.tasks is None else 1
    found = []
    for place, leaf in enumerate(like):
        shape = leaf.shape[lead:]
        dtype = torch.float32 if leaf.device.type == "mps" else torch.float64
        index = torch.arange(1, shape.numel() + 1, dtype=dtype, device=leaf.device)
        for factor in (12.9898, 78.233):
            index = torch.sin(index * factor + 37.719 * (seed + 1) + 4.1414 * place) * 43758.5453
            index = index - index.floor()
        found.append((index - 0.5).to(leaf.dtype).reshape(shape).expand(leaf.shape))
    return tuple(found)


def random_like(like: Leaves, seed: int, space: Space) -> Leaves:
    """A vector of length one that looks drawn."""
    spread = scattered(like, seed, space)
    length = wide(space.norm(spread))
    return space.scaled(1 / torch.where(length > 0, length, 1.0), spread)


def power_of_two(largest: Tensor) -> Tensor:
    """The power of two at or just below a positive finite number; 1 for any other. Its reciprocal does not overflow."""
    number = largest.float() if largest.dtype in NARROW else largest
    usable = (number > 0) & torch.isfinite(number)
    half = number / 2
    down = half / torch.frexp(torch.where(usable, half, 1.0)).mantissa
    return torch.where(usable, down.clamp_min(torch.finfo(number.dtype).tiny), 1.0)
