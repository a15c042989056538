"""Generalized minimal residuals: any square A, by products with A alone.

    Arnoldi:  A Q_k = Q_{k+1} H_k;      v_k minimizes |b - A v| over v_0 + span(r, A r, ..., A^{k-1} r)

| | products with A | memory |
| --- | --- | --- |
| iterate | at most max_steps, one more with a start | the basis, v, A q: (restart + 4) P |
| solve | one more, for the true residual | |

Wins: maps that are not symmetric (the condition of an optimizer's step, of a game, of a fixed point), without their
transposed product; the residual never rises.
Fails: memory grows with `restart`; restarted before it has converged it may stand still (MAX_STEPS or BREAKDOWN
says so).
Reference: Saad and Schultz 1986. Differences from peers: jaxopt's and scipy's restart with a product that is not
counted, this one combines the new residual from its basis; a basis that ends early on a singular A is told
(BREAKDOWN); tasks end by masks.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from bilevel.linear.base import LinearSolver, Prepared, bound, check_number, check_steps
from bilevel.linear.operator import LinearOperator
from bilevel.linear.system import System, divided, wide
from bilevel.outcome import LinearSolution, Status
from bilevel.space.inner_product import PLAIN, Leaves, Space


@dataclasses.dataclass(frozen=True)
class GMRES(LinearSolver):
    """Generalized minimal residuals, restarted.

    Args:
        max_steps: the most products; exact in P steps without rounding and without a restart.
        restart: m, vectors that are kept; fewer where max_steps is less.
        tol: on |b - A v| / |b|.
        damping: solves (A + damping I) v = b.

    Memory: (restart + 4) P; linear in the tasks.

    Failures: BREAKDOWN (A is singular and b not in what it reaches, or a restart stands still), UNSOLVED, NONFINITE.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> A = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> turn = bl.linear.Product(lambda v: (A @ v[0],), symmetric=False)
        >>> bl.linear.GMRES(max_steps=2).solve(turn, (torch.tensor([3.0, 4.0]),)).value[0].round(decimals=4)
        tensor([-4.,  3.])
    """

    sharded = True

    max_steps: int = 20
    restart: int = 20
    tol: float = 1e-6
    damping: float = 0.0

    def __post_init__(self) -> None:
        check_steps("GMRES", "max_steps", self.max_steps)
        check_steps("GMRES", "restart", self.restart)
        check_number("GMRES", "tol", self.tol, 0.0)
        check_number("GMRES", "damping", self.damping, 0.0)

    def prepare(self, operator: LinearOperator | Callable[[Leaves], Leaves], space: Space = PLAIN) -> "PreparedGMRES":
        return PreparedGMRES(self, bound("GMRES", operator), space)


class PreparedGMRES(Prepared):
    """GMRES bound to one operator; nothing is kept between right-hand sides."""

    solver: GMRES

    def iterate(self, b: Leaves, start: Leaves | None = None) -> LinearSolution:
        system, space = System(self, b), self.space
        x, r = system.begin(start)
        residual, steps = system.relative(r), torch.zeros_like(system.known, dtype=torch.long)
        flags = _Flags(system.known & (residual > system.enough), ~system.known, torch.zeros_like(system.known))
        done = 0
        while done < self.solver.max_steps and not system.nothing_left(flags.live):
            cycle = _Cycle(system, r, flags)
            del r
            count = min(self.solver.restart, self.solver.max_steps - done)
            for _ in range(count):
                if system.nothing_left(flags.live):
                    break
                steps = steps + flags.live
                cycle.step()
            done += count
            x = cycle.moved(x)
            r = cycle.left() if done < self.solver.max_steps else space.zeros_like(x)
            residual = cycle.residual
        unmet = ~self.solver.met(residual, b)
        return system.finish(
            x,
            residual,
            steps,
            (unmet, Status.MAX_STEPS),
            (flags.singular & unmet, Status.BREAKDOWN),
            (flags.nonfinite, Status.NONFINITE),
        )


@dataclasses.dataclass
class _Flags:
    """Per task: whether it goes on, met what is not finite, met the end of what A reaches."""

    live: Tensor
    nonfinite: Tensor
    singular: Tensor


class _Cycle:
    """One basis: from a residual to the next."""

    def __init__(self, system: System, r: Leaves, flags: _Flags) -> None:
        self.system, self.space, self.flags = system, system.space, flags
        self.first = wide(self.space.norm(r))
        self.basis = [system.unit(r, self.first, flags.live)]
        self.columns = list[list[Tensor]]()
        """Of H."""
        self._triangle, self._turns, self._right = list[list[Tensor]](), list[tuple[Tensor, Tensor]](), [self.first]
        self._made, self._weights = list[Tensor](), list[Tensor]()
        self.residual = self.first / system.norm
        self._residuals, self._pivots = [self.residual], list[Tensor]()
        self._largest = torch.zeros_like(self.first)

    def step(self) -> None:
        """One product, and the rotation that keeps H a triangle."""
        space, flags, floor = self.space, self.flags, self.system.floor
        w = self.system.apply(self.basis[-1])
        size, column = wide(space.norm(w)), list[Tensor]()
        finite = torch.isfinite(size)
        flags.nonfinite = flags.nonfinite | (flags.live & ~finite)
        flags.live = flags.live & finite
        self._largest = torch.maximum(self._largest, torch.where(flags.live, size, 0.0))
        for q in self.basis:
            along = torch.where(flags.live, wide(space.dot(q, w)), 0.0)
            column.append(along)
            w = space.axpy(-along, q, w)
        length = wide(space.norm(w))
        ended = ~(length > floor * size)
        length = torch.where(flags.live & ~ended, length, 0.0)
        turned = [*column, length]
        for place, (c, s) in enumerate(self._turns):
            upper, lower = turned[place], turned[place + 1]
            turned[place], turned[place + 1] = c * upper + s * lower, c * lower - s * upper
        pivot = turned[-2]
        gamma = torch.hypot(pivot, length)
        # A column that leads nowhere new: A takes this direction, but for rounding, into what was reached before.
        flat = flags.live & (gamma <= floor * self._largest)
        made = flags.live & ~flat
        c, s = torch.where(made, divided(pivot, gamma, made), 1.0), divided(length, gamma, made)
        last = self._right[-1]
        self._right[-1:] = [torch.where(made, c * last, 0.0), torch.where(made, -s * last, last)]
        self._triangle.append([*turned[:-2], torch.where(made, gamma, 1.0)])
        self._turns.append((c, s))
        self._made.append(made)
        self._pivots.append(torch.where(made, gamma, 0.0))
        self.columns.append([*column, length])
        self.residual = torch.where(made, self._right[-1].abs() / self.system.norm, self.residual)
        self._residuals.append(self.residual)
        unmet = self.residual > self.system.enough
        flags.singular = flags.singular | flat | (made & ended & unmet)
        flags.live = made & ~ended & unmet
        self.basis.append(self.system.unit(w, length, flags.live))

    def moved(self, x: Leaves) -> Leaves:
        """v of the least residual in this basis."""
        weights, residual = self._solved(self._made), self.residual
        singular = self.flags.singular
        if self._made and not (self.system.here(singular) and not bool(singular.any())):
            # Of a basis that ended without a solution, what comes after a direction that A hardly moves may be noise.
            cut, going = list[Tensor](), torch.ones_like(self._made[0])
            kept = self._residuals[0]
            for made, pivot, after in zip(self._made, self._pivots, self._residuals[1:], strict=True):
                going = going & (pivot > self.system.floor**0.5 * self._largest)
                cut.append(made & going)
                kept = torch.where(cut[-1], after, kept)
            short = self._solved(cut)
            better = singular & (self._score(kept, short) < self._score(residual, weights))
            weights = [torch.where(better, a, b) for a, b in zip(short, weights, strict=True)]
            self.residual = torch.where(better, kept, residual)
        # A cycle that gains next to nothing by a v longer than all before it: the recursion stands still.
        length, there = torch.stack([*weights, 0 * self.first]).square().sum(0).sqrt(), wide(self.space.norm(x))
        stalled = (there > 0) & (length > there) & (self.residual > 0.999 * self._residuals[0])
        weights = [torch.where(stalled, 0.0, each) for each in weights]
        self.residual = torch.where(stalled, self._residuals[0], self.residual)
        self.flags.singular, self.flags.live = self.flags.singular | stalled, self.flags.live & ~stalled
        self._weights = weights
        for weight, q in zip(weights, self.basis, strict=False):
            x = self.space.axpy(weight, q, x)
        return x

    def _solved(self, made: list[Tensor]) -> list[Tensor]:
        """The triangle's solution in the columns that were made."""
        count = len(made)
        weights = [torch.zeros_like(self.first)] * count
        for i in reversed(range(count)):
            rest = self._right[i]
            for j in range(i + 1, count):
                rest = rest - self._triangle[j][i] * weights[j]
            weights[i] = divided(rest, self._triangle[i][i], made[i])
        return weights

    def _score(self, residual: Tensor, weights: list[Tensor]) -> Tensor:
        """A residual, and what rounding A v may add to it."""
        length = torch.stack(weights).square().sum(0).sqrt()
        return residual + self.system.floor * self._largest * length / self.system.norm

    def left(self) -> Leaves:
        """b - A v, from the basis: Q (beta e_1 - H y)."""
        parts = [self.first, *(torch.zeros_like(self.first) for _ in self.columns)]
        for column, weight in zip(self.columns, self._weights, strict=True):
            for row, each in enumerate(column):
                parts[row] = parts[row] - each * weight
        r = self.space.zeros_like(self.basis[0])
        for part, q in zip(parts, self.basis, strict=True):
            r = self.space.axpy(part, q, r)
        return r
