"""The gradient of an expectation by a covariance: first order only, no derivative of the path.

    F(x) = E[f(y, x)], y ~ exp(-g(y, x) / tau):    dF/dx = E[df/dx] - Cov(f, dg/dx) / tau

| | inner gradients | outer gradients | second order | memory |
| --- | --- | --- | --- | --- |
| Covariance(), M samples of K steps | K + M | M | 0 | running means of f, dg/dx and f dg/dx: 2 Q, and P |
| the same, tasks in one chunk | 2 K + M | 2 M | 0 | M T numbers and Q: the chain is run again with the means known |

The identity is exact and standard; the published description of the stochastic method of Kim and Hospedales, arXiv
2410.10417, is a recursion along the chain (`Pathwise`), not this. What is left is the noise of M correlated samples,
which grows with the spread of f, and a bias of order step_size, because the chain is not exactly distributed like
exp(-g / tau). The mean of f is of the same samples (M - 1 in the denominator): of samples that are correlated over c
steps the covariance lacks a part of about c / M.
"""

import dataclasses
from typing import Any

from torch import Tensor

from bilevel.batches import PerStep
from bilevel.engine import spans
from bilevel.estimators.base import Estimate, Estimator, Instance, Path
from bilevel.estimators.stochastic.base import (
    Samples,
    added,
    chain_of,
    check_kept,
    inner_in_outer,
    kept_of,
    narrowed,
    wide,
)
from bilevel.outcome import Solution
from bilevel.space import tree
from bilevel.space.tree import PartialLeaves, Tree


@dataclasses.dataclass(frozen=True)
class Covariance(Estimator):
    """dE[f]/dx as a covariance over the samples of a Langevin chain.

    F is the expectation of f, so that `hg.outer_loss` is the mean over the samples, not f at `hg.inner`, which is where
    the chain ends (the next call goes on from there). The temperature and the step size are those of the dynamics. The
    start is taken for a constant, also with Problem.init: a distribution forgets it.

    Args:
        burn_in: steps before the first sample.
        thinning: steps from one sample to the next; K = burn_in + thinning * samples.

    Stats: `samples`; `outer_loss_std`, the standard deviation of f over them, per task; `drift`, per task: how far the
    mean of g over the first tenth of the samples is above that over their last half, in standard deviations. Well above
    1, the burn-in is too short, and its descent is in the estimate.

    Bias: Monte Carlo noise, and O(step_size).

    Memory: constant in K and in the samples; see the module.

    Raises:
        ValueError: an argument is out of range; (when used) the inner solver is no `Descent` of a
            `bilevel.inner.Langevin` of positive temperature, or it leaves fewer than 2 samples.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: x.exp() * y**2 / 2, lambda y, x, b: y**2 / 2)
        >>> seed = torch.manual_seed(0)
        >>> hg = bl.hypergradient(problem, torch.tensor(0.3), torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.inner.Langevin(step_size=0.2, temperature=0.5), steps=2000),
        ...     estimator=bl.estimators.stochastic.Covariance(burn_in=20, thinning=2))
        >>> abs(hg.grad + 0.5 * torch.tensor(-0.3).exp() / 2) < 0.1  # -tau exp(-x) / 2
        tensor(True)
    """

    burn_in: int = 0
    thinning: int = 1

    def __post_init__(self) -> None:
        check_kept("Covariance", self.burn_in, self.thinning)

    sees = frozenset({Path.INNER_LOSS, Path.OUTER_LOSS})

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        return "of the expectation of f: Monte Carlo noise, and O(step_size) of the chain"

    @property
    def unlike_a_layer(self) -> str:
        return "its outer loss is a mean over many iterates"

    def estimate(self, instance: Instance, state: Any) -> Estimate:
        temperature = chain_of(self, instance).temperature
        if temperature == 0:
            raise ValueError(
                "Covariance divides by the temperature, and that of Langevin is 0. Give it a positive one, or use "
                "Pathwise or Unrolled"
            )
        kept = kept_of("Covariance", instance.solver.max_steps, self.burn_in, self.thinning, least=2)
        oracles = instance.oracles
        start = oracles.start()
        if not isinstance(instance.batches.inner, PerStep):
            oracles.embedding(0)  # drawn once, for both chains
        means = None
        if instance.tasks is not None:
            # The covariance of each task, summed, needs the mean of f of each before the sum.
            before, first = oracles.generators.peek(), _Means(instance, kept)
            instance.solve(start, visit=first.visit)
            oracles.generators.set(before)
            means = first.means()
        moments = _Moments(instance, kept, means)
        found = instance.solve(start, visit=moments.visit)
        return moments.finish(found, temperature)


class _Means:
    """The mean of f over the samples, per task."""

    def __init__(self, instance: Instance, kept: range) -> None:
        self._oracles, self._kept = instance.oracles, kept
        self._losses: list[Tensor] = []

    def visit(self, step: int, inner: Tree, state: Any) -> None:
        """One iterate of the chain."""
        if step in self._kept:
            with spans.span(spans.HYPERGRADIENT):
                self._losses.append(wide(self._oracles.outer_gradient_in_outer(inner)[0]))

    def means(self) -> Tensor:
        """The means of all samples."""
        total = self._losses[0]
        for loss in self._losses[1:]:
            total = total + loss
        return total / len(self._losses)


class _Moments:
    """Running moments of f and s = dg/dx.

    Without `means` (one task): the mean of s, and the sum of (f - mean f) (s - mean s), each brought up to date by one
    sample. With the means of f of each task: the sum of (f - mean f) s, whose mean is that covariance, too.
    """

    def __init__(self, instance: Instance, kept: range, means: Tensor | None) -> None:
        self._instance, self._oracles, self._kept, self._means = instance, instance.oracles, kept, means
        count = len(tree.tensors(instance.outer))
        self._direct: list[Tensor | None] = [None] * count
        self._scores: list[Tensor | None] = [None] * count
        self._joint: list[Tensor | None] = [None] * count
        self._samples, self._seen = Samples(len(kept)), 0

    def visit(self, step: int, inner: Tree, state: Any) -> None:
        """One iterate of the chain."""
        if step not in self._kept:
            return
        with spans.span(spans.HYPERGRADIENT):
            f, direct = self._oracles.outer_gradient_in_outer(inner)
            off = None if self._means is None else wide(f) - self._means
            g, scores = inner_in_outer(self._oracles, inner, step, off)
            added(self._direct, 1.0, direct)
            self._seen += 1
            if off is None:
                self._bring_up_to_date(wide(f) - self._samples.mean, scores)
            else:
                added(self._joint, 1.0, scores)
            self._samples.add(f, g)

    def _bring_up_to_date(self, off: Tensor, scores: PartialLeaves) -> None:
        for i, score in enumerate(scores):
            known = self._scores[i]
            if score is None and known is None:
                continue
            s = 0.0 if score is None else wide(score)
            before = 0.0 if known is None else known
            mean = before + (s - before) / self._seen
            assert isinstance(mean, Tensor), "one of the two is a tensor"
            joint = self._joint[i]
            self._scores[i], self._joint[i] = mean, off * (s - mean) if joint is None else joint + off * (s - mean)

    def finish(self, found: Solution, temperature: float) -> Estimate:
        """The estimate; `found` is the end of the chain."""
        count = len(self._kept)
        total: list[Tensor | None] = [None] * len(self._direct)
        added(total, 1 / count, tuple(self._direct))
        added(total, -1 / (temperature * (count - 1)), tuple(self._joint))
        return self._instance.finish(
            dataclasses.replace(found, first_loss=None, promised=None),
            narrowed(total, tree.tensors(self._instance.outer)),
            self._samples.outer_loss,
            codes=[self._samples.code(self._instance, found.inner, temperature)],
            stats=self._samples.figures(),
        )
