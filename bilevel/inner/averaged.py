"""Averages of the iterates: the optimizer moves z, and the result is the mean of where z has been.

    z_{k+1} = optimizer.step(dg/dy(z_k), z_k);    y_{k+1} = decay y_k + (1 - decay) z_{k+1},    y = z at the first

| | inner gradients | memory |
| --- | --- | --- |
| step | 1 | P more, for z |

y is what the outer loss, the result and the estimators see; z is in the state, and starts at y. With decay=None y is
the plain mean of z_{start+1} ... z_k. At rest y = z: where the optimizer rests.

Wins: noisy batches, whose last iterate jumps; the mean is nearer to the solution, and its derivative varies less.
Fails: a mean that remembers the start is far from the solution where few steps are taken: choose `start`, or less
decay.
Reference: Polyak and Juditsky 1992; torch.optim.swa_utils.AveragedModel, whose averages (multi_avg_fn of a decay, and
the plain mean) it equals in float64 to 1e-12.
Differences from peers: what torch averages beside the training is here the inner solution, and is differentiated.
"""

import dataclasses
from typing import Any

from torch import Tensor

from bilevel.inner.dynamics import Dynamics, Point
from bilevel.optim.base import Hyper, Optimizer, check_hyper, spread, value_of
from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class Averaged(Dynamics):
    """Steps of an optimizer, of which the inner variable is a running mean.

    The loss at step k is that at z_k; `hg.inner` is the mean. Steps are counted within one call: a loop that is carried
    on starts its mean at the last one.

    Args:
        optimizer: how z moves.
        decay: of the exponential mean: a number in [0, 1), a tree of them like inner, or a function of outer that
            returns a number, a 0-dim tensor or a tree like inner (whose range is not checked). None for the plain mean.
        start: steps that are left out of the mean; until then y = z.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: (y - x) ** 2 / 2, lambda y, x, b: y)
        >>> hg = bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.inner.Averaged(bl.SGD(lr=0.5), decay=0.5), steps=2), estimator=bl.Unrolled())
        >>> hg.inner, hg.grad  # z = 0.5, 0.75
        (tensor(0.6250), tensor(0.6250))
    """

    sharded = True

    optimizer: Optimizer
    decay: Hyper | None = 0.999
    start: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.optimizer, Optimizer):
            raise TypeError(
                f"Averaged was given the optimizer {type(self.optimizer).__name__}; an inner optimizer was needed, "
                f"such as Averaged(bilevel.SGD(lr=0.1), decay=0.99)"
            )
        if self.decay is not None:
            check_hyper("Averaged", "decay", self.decay, 0.0, 1.0)
        if not isinstance(self.start, int) or isinstance(self.start, bool) or self.start < 0:
            raise ValueError(f"Averaged was given start={self.start!r}; an integer of at least 0 was needed")

    @property
    def symmetric(self) -> bool:
        return True

    def init(self, inner: Tree, outer: Tree) -> Any:
        count = len(tree.tensors(inner))
        return {"step": 0, "iterate": [None] * count, "inside": self.optimizer.init(inner)}

    def step(self, inner: Tree, state: Any, outer: Tree, at: Point) -> tuple[Tree, Any]:
        step = state["step"] + 1
        z = tree.like(inner, state["iterate"]) if step > 1 else inner
        z, inside = self.optimizer.step(at.gradient(z), state["inside"], z, outer)
        z = tree.ordered(z, inner)
        after, count = {"step": step, "iterate": list(tree.tensors(z)), "inside": inside}, step - self.start
        if count <= 1:
            return z, after
        if self.decay is None:
            kept: list[Any] = [1 - 1 / count] * len(tree.tensors(inner))
        else:
            kept = spread(value_of(self.decay, outer), inner, "decay")
        leaves = zip(tree.tensors(inner), tree.tensors(z), kept, strict=True)
        return tree.like(inner, [_mean(a, b, share) for a, b, share in leaves]), after

    def stationarity(self, inner: Tree, outer: Tree, at: Point) -> Tree | None:
        return self.optimizer.stationarity(at.gradient(inner), inner, outer)


def _mean(past: Tensor, now: Tensor, kept: Any) -> Tensor:
    # The derivative along z is (1 - kept). In now + kept (past - now) it is a difference that 16 bits round to 0.
    return past + (1 - kept) * (now - past)
