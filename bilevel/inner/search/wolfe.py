"""Bisection to a length that meets the strong Wolfe conditions.

    g(y + t d) <= g(y) + c1 t <dg/dy, d>        |<dg/dy(y + t d), d>| <= c2 |<dg/dy, d>|

A length that is too long (the first fails, or the slope has turned) is an upper end, one that is too short a lower end;
the next is in their middle, or twice the lower one while there is no upper one.

| | inner losses | inner gradients | memory |
| --- | --- | --- | --- |
| length | 1 + trials taken | trials taken | P and its gradient |

Reference: Nocedal and Wright, Numerical Optimization, 2006, section 3.1 (the conditions; recalled).
Differences from peers: torch.optim.LBFGS and scipy interpolate by cubics, which takes fewer trials; a length on a grid
is locally constant, so that the derivative of the steps needs nothing of the search.
"""

import dataclasses

import torch
from torch import Tensor

from bilevel.inner.dynamics import Point
from bilevel.inner.search.base import LineSearch, allowance, along, check_part, check_trials
from bilevel.optim.base import gradients
from bilevel.outcome import settled
from bilevel.space.tree import Leaves, Tree


@dataclasses.dataclass(frozen=True)
class Wolfe(LineSearch):
    """Bisect until the loss has fallen enough and its slope is nearly flat.

    Where the trials run out, the longest tried length with enough decrease is taken, 0 without any.

    Args:
        decrease: c1, between 0 and 1.
        flatness: c2, between c1 and 1.
        trials: the most lengths tried.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: y**2 / 32, lambda y, x, b: y)
        >>> bl.adapt(problem, torch.ones(1), torch.tensor(1.0), bl.Batches(None, None),  # 1 - t / 16, t doubled 4 times
        ...     solver=bl.Descent(bl.inner.LBFGS(search=bl.inner.Wolfe(flatness=0.1)), steps=1)).inner
        tensor(0.)
    """

    sharded = True

    decrease: float = 1e-4
    flatness: float = 0.9
    trials: int = 30

    def __post_init__(self) -> None:
        check_part("Wolfe", "decrease", self.decrease)
        check_part("Wolfe", "flatness", self.flatness)
        check_trials("Wolfe", self.trials)
        if self.flatness <= self.decrease:
            raise ValueError(
                f"Wolfe was given flatness={self.flatness} and decrease={self.decrease}; a flatness above the decrease "
                f"was needed, such as Wolfe(decrease=1e-4, flatness=0.9)"
            )

    def multiple(self, inner: Tree, direction: Leaves, slope: Tensor, first: Tensor, at: Point) -> Tensor:
        with torch.no_grad():
            slope, first = slope.detach().clamp_max(0.0) * first.detach(), first.detach()
            tried = torch.ones_like(first)
            begun = at.value(along(inner, direction, torch.zeros_like(first), at)).detach()
            low, high = torch.zeros_like(tried), torch.full_like(tried, torch.inf)
            found, length = torch.zeros_like(begun, dtype=torch.bool), torch.zeros_like(tried)
            for _ in range(self.trials):
                there = along(inner, direction, tried * first, at)
                ahead = _slope(at, there, direction) * first
                fell = at.value(there).detach() <= begun + self.decrease * tried * slope + allowance(begun)
                long = ~fell | ~(ahead <= self.flatness * slope.abs())
                short = ~long & (ahead < -self.flatness * slope.abs())
                better = fell & (tried > length) & ~found
                length = torch.where(better | (~long & ~short & ~found), tried, length)
                found = found | (~long & ~short)
                if settled(~found):
                    break
                low, high = torch.where(short, tried, low), torch.where(long, tried, high)
                tried = torch.where(found, tried, torch.where(high.isinf(), 2 * tried, (low + high) / 2))
            return length


def _slope(at: Point, there: Tree, direction: Leaves) -> Tensor:
    """<dg/dy, d> at a point, without a graph."""
    pairs = [
        (g.detach(), d.detach())
        for g, d in zip(gradients(at.gradient(there), there), direction, strict=True)
        if g is not None
    ]
    return at.space.dot([g for g, _ in pairs], [d for _, d in pairs])
