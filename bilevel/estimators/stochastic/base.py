"""What the stochastic estimators share: the chain that they ask for, which of its iterates they keep, its drift."""

from typing import Any

import torch
from torch import Tensor

from bilevel.engine import autodiff, spans
from bilevel.engine.oracles import Oracles
from bilevel.estimators.base import Estimator, Instance
from bilevel.inner.langevin import Langevin
from bilevel.outcome import Status, code_if
from bilevel.space import tree
from bilevel.space.inner_product import NARROW
from bilevel.space.tree import PartialLeaves, Tree

_FAR = 10.0
"""How many times its natural size the inner loss must have risen along a chain for it to run away."""


def check_kept(owner: str, burn_in: Any, thinning: Any) -> None:
    """Raise ValueError unless these say which iterates are kept."""
    for name, value, least in (("burn_in", burn_in, 0), ("thinning", thinning, 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{owner} was given {name}={value!r}; an integer of at least {least} was needed")


def chain_of(estimator: Estimator, instance: Instance) -> Langevin:
    """The dynamics of the inner loop, which must be a Langevin dynamics under a fixed number of steps.

    Raises:
        ValueError: it is another.
    """
    dynamics, solver = instance.solver.dynamics, instance.solver
    if not isinstance(dynamics, Langevin) or not solver.fixed:
        given = f"{type(solver).__name__} of {type(dynamics.update or dynamics).__name__}"
        raise ValueError(
            f"{type(estimator).__name__} takes samples of a Langevin dynamics, and the inner solver is {given}. Write "
            f"Descent(bilevel.inner.Langevin(step_size=0.01, temperature=0.1), steps=1000), or use Unrolled()"
        )
    return dynamics


def kept_of(owner: str, steps: int, burn_in: int, thinning: int, least: int) -> range:
    """The steps whose start is kept as a sample.

    Raises:
        ValueError: they are fewer than `least`.
    """
    kept = range(burn_in, steps, thinning)
    if len(kept) < least:
        raise ValueError(
            f"{owner} keeps {len(kept)} samples of a chain of {steps} steps with burn_in={burn_in} and "
            f"thinning={thinning}; at least {least} was needed: steps = burn_in + thinning * samples"
        )
    return kept


def inner_in_outer(oracles: Oracles, inner: Tree, step: int, weights: Tensor | None) -> tuple[Tensor, PartialLeaves]:
    """g per task and d sum(weights g)/dx at a fixed y, on a step's batch; weights of 1 where None.

    What g draws here, the chain's step draws again: the random numbers of the chain are those of one without samples.
    """
    before = oracles.generators.peek()
    with spans.span(spans.INNER_GRADIENT):
        value = oracles.inner(tree.detach(inner), oracles.attached, oracles.differentiable_embedding(step))
        ones = torch.ones_like(value) if weights is None else weights.to(value.dtype)
        found = autodiff.grad([value], tree.tensors(oracles.attached), [ones])
    oracles.generators.set(before)
    return value.detach(), found


def wide(leaf: Tensor) -> Tensor:
    """A tensor that sums can be added up in."""
    return leaf.float() if leaf.dtype in NARROW else leaf


def added(total: list[Tensor | None], weight: float, leaves: PartialLeaves) -> None:
    """Add weight * leaves to a total, where None is zero."""
    for i, leaf in enumerate(leaves):
        if leaf is not None:
            known = total[i]
            total[i] = weight * wide(leaf) if known is None else known + weight * wide(leaf)


def narrowed(total: list[Tensor | None], like: list[Tensor]) -> PartialLeaves:
    """A total in the dtypes of x."""
    return tuple(None if leaf is None else leaf.to(x.dtype) for leaf, x in zip(total, like, strict=True))


class Samples:
    """Running figures of the losses at the samples, per task."""

    def __init__(self, count: int) -> None:
        self._count, self._seen = count, 0
        self._outer, self._early, self._first, self._last = (Moments() for _ in range(4))

    def add(self, outer_loss: Tensor, inner_loss: Tensor) -> None:
        """One sample's f and g."""
        g = wide(inner_loss)
        self._outer.add(wide(outer_loss))
        if self._seen < max(self._count // 10, 1):
            self._early.add(g)
        (self._first if 2 * self._seen < self._count else self._last).add(g)
        self._seen += 1

    @property
    def mean(self) -> Tensor | float:
        """The mean of f over the samples so far, per task."""
        return self._outer.mean

    @property
    def outer_loss(self) -> Tensor:
        """The mean of f over the samples, per task."""
        assert isinstance(self._outer.mean, Tensor), "there is a sample"
        return self._outer.mean

    def figures(self) -> dict[str, Any]:
        """`samples`; `outer_loss_std`, the standard deviation of f over the samples, per task; `drift`, per task: the
        mean of g over the first tenth of the samples less that over their last half, in standard deviations of the
        latter. Well above 1 where the burn-in was too short.
        """
        spread = self._last.std if self._last.count > 1 else None
        return {
            "samples": self._count,
            "outer_loss_std": self._outer.std,
            "drift": None
            if spread is None
            else (self._early.mean - self._last.mean) / torch.where(spread > 0, spread, 1.0),
        }

    def code(self, instance: Instance, inner: Tree, temperature: float) -> Tensor | int:
        """INNER_UNSTABLE for a chain that runs away: g fluctuates by about tau sqrt(P / 2) at rest."""
        before, after = self._first.mean, self._last.mean
        if not isinstance(before, Tensor) or not isinstance(after, Tensor):
            return 0
        natural = temperature * tree.size(inner) / (instance.tasks or 1) + before.abs()
        return code_if(after - before > _FAR * natural, Status.INNER_UNSTABLE)


class Moments:
    """Running mean and spread of a number per task."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0

    def add(self, value: Tensor) -> None:
        """One value."""
        self.count += 1
        off = value - self.mean
        self.mean = self.mean + off / self.count
        self._squares = self._squares + off * (value - self.mean)

    @property
    def std(self) -> Tensor:
        """The standard deviation; 0 of one value."""
        assert isinstance(self._squares, Tensor), "there is a value"
        return (self._squares / max(self.count - 1, 1)).sqrt()
