"""How many digits of a hypergradient are left: the same estimate again, with its arguments moved by a few roundings.

    digits = -log10 max_i |d(x (1 + s n_i), y_0 (1 + s n_i)) - d(x, y_0)| / |d(x, y_0)|,    s = 8 eps,  n_i ~ N(0, I)

Rounding on the way is as large as such a move, so what a move changes, rounding has changed as well: growth along the
trajectory, kinks that a rounding error crosses (ReLU, max pooling), cancellation in difference quotients, an
ill-conditioned linear system. No figure of one run alone shows them all.

| | inner gradients | HVPs | mixed products | memory |
| --- | --- | --- | --- | --- |
| Probed(e, probes=n) | n + 1 times those of e | likewise | likewise | that of e, and 2 Q + P |

Wins: before numbers of float32 or less are trusted or published; once in a while during training.
Fails: as a proof: a few moves may all miss a kink. Bias (a coarse nu, an unfinished loop) moves alike and is not seen.
Reference: stochastic arithmetic, Vignes 1993, A stochastic arithmetic for reliable scientific computation; moving the
arguments alone, and not every operation, is our simplification.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bilevel.estimators.base import EVERYWHERE, Estimate, Estimator, Instance
from bilevel.estimators.company import Company
from bilevel.estimators.run import estimated
from bilevel.outcome import Status, code_if, worst
from bilevel.space import tree
from bilevel.space.inner_product import Space
from bilevel.space.tree import PartialLeaves

_LENGTH = 8.0
"""Of a move, in machine epsilons of each number."""
_LOST = 1e-2
"""A change that leaves fewer than two digits."""


@dataclasses.dataclass(frozen=True)
class Probed(Estimator):
    """Another estimator, with `stats["digits"]` measured, and the status DIGITS_LOST where fewer than two are left.

    Bias: that of the estimator; the estimate is the one without a move.

    Args:
        estimator: what is probed.
        probes: n, moves tried. All see the same batches and random numbers.

    State: the estimator's own.

    Memory: that of the estimator, and P + 2 Q.

    Raises:
        TypeError, ValueError: the arguments are of the wrong kind.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: ((y - x) ** 2).sum(), lambda y, x, b: (y**2).sum())
        >>> for nu in (1e-2, 1e-6):
        ...     hg = bl.hypergradient(problem, torch.ones(3), torch.zeros(3), bl.Batches(None, None),
        ...         solver=bl.Descent(bl.SGD(lr=0.4), steps=20),
        ...         estimator=bl.estimators.Probed(bl.FirstOrderCorrected(nu)))
        ...     print(hg.status.name, int(hg.digits))
        OK 5
        DIGITS_LOST 1
    """

    estimator: Estimator
    probes: int = 3

    def __post_init__(self) -> None:
        if not isinstance(self.estimator, Estimator):
            raise TypeError(
                f"Probed was given a {type(self.estimator).__name__}; an estimator was needed, such as "
                f"Probed(bilevel.Unrolled())"
            )
        if not isinstance(self.probes, int) or isinstance(self.probes, bool) or self.probes < 1:
            raise ValueError(f"Probed was given probes={self.probes!r}; an integer of at least 1 was needed")

    sees = EVERYWHERE  # the estimator is asked for its own

    @property
    def delegates(self) -> bool:
        return True

    @property
    def memory_growth(self) -> str:
        return self.estimator.memory_growth

    @property
    def bias(self) -> str:
        return self.estimator.bias

    @property
    def company(self) -> Company:
        return self.estimator.company

    def init_state(self, instance: Instance) -> Any:
        return self.estimator.init_state(instance)

    def admit_state(self, instance: Instance, state: Any) -> Any:
        return self.estimator.admit_state(instance, state)

    def estimate(self, instance: Instance, state: Any) -> Estimate:
        generators = instance.oracles.generators
        before = generators.peek()
        found = estimated(self.estimator, instance, state)
        after = generators.peek()
        grad = tuple(None if leaf is None else leaf.detach() for leaf in found.grad)
        changes = []
        for probe in range(self.probes):
            generators.set(before)
            moved = _moved(instance, probe)
            generators.set(before)
            changes.append(_change(self.estimator.estimate(moved, state).grad, grad))
        generators.set(after)
        largest = torch.stack(changes).max()
        lost = code_if(~(largest <= _LOST), Status.DIGITS_LOST)
        smallest = torch.finfo(largest.dtype).eps
        digits = -torch.log10(largest.nan_to_num(1.0, 1.0).clamp(smallest, 1.0))
        return dataclasses.replace(found, code=worst(found.code, lost), stats=found.stats | {"digits": digits})


def _moved(instance: Instance, probe: int) -> Instance:
    """The instance with x and y_0 moved; the moves are the same in every call."""
    generator = torch.Generator().manual_seed(probe)

    def move(leaf: Tensor) -> Tensor:
        noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float32)
        # (A factor near 1 is a whole number of roundings off it.)
        return leaf * (1 + _LENGTH * torch.finfo(leaf.dtype).eps * noise.to(leaf.device, leaf.dtype))

    outer = tree.tree_map(move, instance.outer)
    return dataclasses.replace(
        instance, outer=outer, inner=None if instance.inner is None else tree.tree_map(move, instance.inner)
    )


def _change(found: PartialLeaves, grad: PartialLeaves) -> Tensor:
    """|found - grad| / |grad|; 0 where both are zero."""
    pairs = [(a, b) for a, b in zip(found, grad, strict=True) if a is not None and b is not None]
    if not pairs:
        return torch.zeros(())
    space = Space()
    change, size = space.norm([a.detach() - b for a, b in pairs]), space.norm([b for _, b in pairs])
    return torch.where(change == 0, 0.0, change / size)
