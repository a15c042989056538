"""Damping chosen by Levenberg and Marquardt's rule: as little as lets the solver finish.

    (A + lambda I) v = b;    lambda = 0, then first s, factor first s, factor^2 first s, ...    s = |A b| / |b|

| | products with A | memory |
| --- | --- | --- |
| iterate | 1 and at most attempts times the solver's (all of them on a GPU and under vmap) | the solver's and P |
| solve | one more, for the true residual | |

Wins: an inner point that is not yet a minimizer in some tasks, where one damping for all biases the others.
Fails: damping is a bias: a direction of curvature h is off by h / (h + lambda). `stats["linear_damping"]` says what was
taken. Where nothing in the ladder is enough the solver's status stands.
Reference: Marquardt 1963, for linear systems: what the rule asks of a step, that it reduce the loss, is here that the
solver meet its tolerance. Differences from peers: iMAML's code and the others take a constant.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from bilevel.linear.base import LinearSolver, Prepared, check_positive, check_steps
from bilevel.linear.operator import LinearOperator, Shifted, as_operator
from bilevel.linear.system import wide
from bilevel.outcome import LinearSolution, readable
from bilevel.space.inner_product import PLAIN, Leaves, Space


@dataclasses.dataclass(frozen=True)
class LevenbergMarquardt(LinearSolver):
    """A solver with the least damping of a ladder at which it meets its tolerance, task by task.

    Args:
        solver: of each attempt; a damping of its own is added to.
        first: the first damping above none, as a share of |A b| / |b|.
        factor: from one damping to the next; above 1.
        attempts: the most solves, that without damping included.

    The residual is that of the damped system. Memory: the solver's and P.

    Raises:
        TypeError: `solver` is no linear solver.
        ValueError: an argument is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> d = torch.tensor([2.0, -0.1])
        >>> found = bl.linear.LevenbergMarquardt(bl.CG(max_steps=5)).solve(lambda v: (d * v[0],), (torch.ones(2),))
        >>> found.status.name, bool(found.damping > 0.1)
        ('OK', True)
    """

    sharded = True

    solver: LinearSolver
    first: float = 1e-3
    factor: float = 10.0
    attempts: int = 6

    def __post_init__(self) -> None:
        if not isinstance(self.solver, LinearSolver):
            raise TypeError(
                f"LevenbergMarquardt was given {type(self.solver).__name__}; a linear solver was needed, such as "
                f"LevenbergMarquardt(bilevel.CG(max_steps=10))"
            )
        check_positive("LevenbergMarquardt", "first", self.first)
        check_positive("LevenbergMarquardt", "factor - 1", self.factor - 1)
        check_steps("LevenbergMarquardt", "attempts", self.attempts)

    @property
    def damping(self) -> float:  # type: ignore[override]
        """The solver's own."""
        return self.solver.damping

    @property
    def tol(self) -> float:  # type: ignore[override]
        """The solver's."""
        return self.solver.tol

    def seen(self, x: Leaves, space: Space) -> Leaves:
        return self.solver.seen(x, space)

    def prepare(
        self, operator: LinearOperator | Callable[[Leaves], Leaves], space: Space = PLAIN
    ) -> "PreparedLevenbergMarquardt":
        self.solver.prepare(operator, space)  # refuses what it cannot solve
        return PreparedLevenbergMarquardt(self, as_operator(operator), space)


class PreparedLevenbergMarquardt(Prepared):
    """The ladder on one operator; nothing is kept between right-hand sides."""

    solver: LevenbergMarquardt

    def iterate(self, b: Leaves, start: Leaves | None = None) -> LinearSolution:
        space, rule = self.space, self.solver
        size = wide(space.norm(b))
        stretch = wide(space.norm(self.operator.matvec(b))) / torch.where(size > 0, size, 1.0)
        scale = torch.where(torch.isfinite(stretch) & (stretch > 0), stretch, 1.0)
        shift, steps = torch.zeros_like(scale), torch.zeros((), dtype=torch.long, device=scale.device)
        for attempt in range(rule.attempts):
            # (Tasks that are solved are solved again, with the same damping to the same answer.)
            shifted = Shifted(self.operator, shift, space)
            found = rule.solver.prepare(shifted, space).found(b, start)
            steps = steps + found.steps
            unmet = ~rule.solver.met(found.residual, b)
            if attempt + 1 == rule.attempts or (_here(unmet) and not bool(unmet.any())):
                break
            shift = torch.where(unmet, rule.first * rule.factor**attempt * scale, shift)
        return dataclasses.replace(found, steps=steps, damping=shift + rule.damping, sure=False)


def _here(flag: Tensor) -> bool:
    return flag.device.type == "cpu" and readable(flag)
