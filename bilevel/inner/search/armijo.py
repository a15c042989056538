"""Backtracking to the first length that lets the loss fall by a part of what its slope promises.

    t in {t_0, t_0 / 2, t_0 / 4, ...}    first with    g(y + t d) <= g(y) + c t <dg/dy, d>

| | inner losses | memory |
| --- | --- | --- |
| length | 1 + trials taken | P |

Reference: Armijo 1966.
"""

import dataclasses

import torch
from torch import Tensor

from bilevel.inner.dynamics import Point
from bilevel.inner.search.base import LineSearch, allowance, along, check_part, check_trials
from bilevel.outcome import settled
from bilevel.space.tree import Leaves, Tree


@dataclasses.dataclass(frozen=True)
class Armijo(LineSearch):
    """Halve the length until the loss has fallen enough.

    A task for which no length will do does not move (t = 0): its loss never rises, beyond rounding.

    Args:
        decrease: c, between 0 and 1.
        trials: the most lengths tried.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: 8 * y**2, lambda y, x, b: y)
        >>> bl.adapt(problem, torch.ones(1), torch.tensor(1.0), bl.Batches(None, None),  # 1 - 16 t: t = 1/16 lands
        ...     solver=bl.Descent(bl.inner.LBFGS(search=bl.inner.Armijo()), steps=1)).inner
        tensor(0.)
    """

    sharded = True

    decrease: float = 1e-4
    trials: int = 30

    def __post_init__(self) -> None:
        check_part("Armijo", "decrease", self.decrease)
        check_trials("Armijo", self.trials)

    def multiple(self, inner: Tree, direction: Leaves, slope: Tensor, first: Tensor, at: Point) -> Tensor:
        with torch.no_grad():
            slope, first = slope.detach().clamp_max(0.0) * first.detach(), first.detach()
            tried = torch.ones_like(first)
            begun = at.value(along(inner, direction, torch.zeros_like(first), at)).detach()
            found, length = torch.zeros_like(begun, dtype=torch.bool), torch.zeros_like(tried)
            for _ in range(self.trials):
                value = at.value(along(inner, direction, tried * first, at)).detach()
                good = value <= begun + self.decrease * tried * slope + allowance(begun)
                length, found = torch.where(good & ~found, tried, length), found | good
                if settled(~found):
                    break
                tried = tried / 2
            return length
