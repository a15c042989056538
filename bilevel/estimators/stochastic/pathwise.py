"""The gradient of an expectation along the chain: how each sample depends on x, with the noise held fixed.

    y_{i+1} = y_i - eps_i dg/dy(y_i) + noise;    dF/dx ~ mean over the samples of df/dx(y_i) + Z_i' df/dy(y_i)
    exact:     Z_{i+1} = (I - eps_i H_i) Z_i - eps_i C_i'                    (P x Q numbers, Z = dy/dx)
    decay:     r_{i+1} = gamma r_i - eps_i d/dx <dg/dy(y_i), df/dy(y_i)>     in place of Z_i' df/dy(y_i)
    identity:  decay with gamma = 1: H is left out, and nothing is forgotten

| closure | inner gradients | outer gradients | products | memory |
| --- | --- | --- | --- | --- |
| "exact" | K | M | Q forward products a step | P Q, and the graph of three derivatives of a step |
| "decay", "identity" | K | K at most | 1 mixed product a step | Q, P |

r is linear in the increments, so that the sum over the samples is a sum over the steps with weights that are known
beforehand, and a window costs no memory. Steps that no sample looks back to cost a plain inner gradient.

Reference: Kim and Hospedales, arXiv 2410.10417, whose published description is such a recursion with a first-order
closure and memory P + Q. Its formulas were not public to us: the three closures are our reading. On a quadratic g of
curvature a, decay with gamma = (1 - eps a)^2 is exact as eps goes to 0.
"""

import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor

from bilevel.engine import autodiff, spans
from bilevel.engine.point import At
from bilevel.estimators.base import Estimate, Estimator, Instance, Path
from bilevel.estimators.stochastic.base import Samples, added, chain_of, check_kept, kept_of, narrowed, wide
from bilevel.inner.langevin import Langevin
from bilevel.outcome import Solution
from bilevel.space import tree
from bilevel.space.tree import Leaves, PartialLeaves, Tree

_CLOSURES = ("exact", "decay", "identity")
_LARGEST = 10**9
"""The most numbers that the exact closure carries."""


@dataclasses.dataclass(frozen=True)
class Pathwise(Estimator):
    """dE[f]/dx along a Langevin chain, with the noise held fixed.

    F is the expectation of f, so that `hg.outer_loss` is the mean over the samples, not f at `hg.inner`, which is where
    the chain ends. The start is taken for a constant, also with Problem.init: a distribution forgets it.

    Args:
        closure: "exact" carries dy/dx, for an x of few numbers; it is the exact gradient of the mean of f over the
            samples of this chain. "decay" and "identity" are of first order in memory and biased.
        gamma: of "decay", above 0 and at most 1: how much of r is kept by a step.
        window: steps after which an increment of r is forgotten; None for never.
        burn_in: steps before the first sample. The recursion begins at zero in every call: some 2 / (eps a) steps, for
            a curvature a, let it build up, also where the chain goes on from the last call.
        thinning: steps from one sample to the next; K = burn_in + thinning * samples.

    Stats: `samples`; `outer_loss_std`, the standard deviation of f over them, per task; `drift`, per task: how far the
    mean of g over the first tenth of the samples is above that over their last half, in standard deviations. Well above
    1, the burn-in is too short, and its descent is in the estimate.

    Bias: Monte Carlo noise and O(step_size); that of the closure, which no number of samples removes.

    Memory: constant in K and in the samples; see the module.

    Raises:
        ValueError: an argument is out of range or does not go with the closure; (when used) the inner solver is no
            `Descent` of a `bilevel.inner.Langevin`, it leaves no sample, or P Q is too large for "exact".

    Warns:
        UserWarning: "identity" without a window, whose r grows with the length of the chain.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: x.exp() * y**2 / 2, lambda y, x, b: y**2 / 2)
        >>> seed = torch.manual_seed(0)
        >>> hg = bl.hypergradient(problem, torch.tensor(0.3), torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.inner.Langevin(step_size=0.1, temperature=0.5), steps=1000),
        ...     estimator=bl.estimators.stochastic.Pathwise(burn_in=20))
        >>> abs(hg.grad + 0.5 * torch.tensor(-0.3).exp() / 2) < 0.1  # -tau exp(-x) / 2
        tensor(True)
    """

    closure: str = "exact"
    gamma: float | None = None
    window: int | None = None
    burn_in: int = 0
    thinning: int = 1

    def __post_init__(self) -> None:
        check_kept("Pathwise", self.burn_in, self.thinning)
        if self.closure not in _CLOSURES:
            raise ValueError(
                f"Pathwise was given closure={self.closure!r}; one of {', '.join(map(repr, _CLOSURES))} was needed"
            )
        number = isinstance(self.gamma, (int, float)) and not isinstance(self.gamma, bool)
        if self.closure == "decay" and not (number and self.gamma is not None and 0 < self.gamma <= 1):
            raise ValueError(
                f'Pathwise was given closure="decay" and gamma={self.gamma!r}; a number above 0 and at most 1 was '
                f"needed, about (1 - step_size * curvature)**2"
            )
        if self.closure != "decay" and self.gamma is not None:
            raise ValueError(f'Pathwise was given gamma={self.gamma!r} with closure={self.closure!r}; write "decay"')
        if self.window is not None and (
            not isinstance(self.window, int) or isinstance(self.window, bool) or self.window < 1
        ):
            raise ValueError(f"Pathwise was given window={self.window!r}; None or an integer of at least 1 was needed")
        if self.closure == "exact" and self.window is not None:
            raise ValueError(f'Pathwise was given window={self.window} with closure="exact", which forgets by itself')
        if self.closure == "identity" and self.window is None:
            warnings.warn(
                'Pathwise(closure="identity") without a window forgets nothing: its estimate grows with the length of '
                "the chain. Give it a window of about 1 / (2 * step_size * curvature) steps",
                stacklevel=3,
            )

    sees = frozenset({Path.INNER_LOSS, Path.OUTER_LOSS})

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        closure = "" if self.closure == "exact" else f", and that of the closure {self.closure!r}"
        return f"of the expectation of f: Monte Carlo noise, O(step_size) of the chain{closure}"

    @property
    def unlike_a_layer(self) -> str:
        return "its outer loss is a mean over many iterates"

    def estimate(self, instance: Instance, state: Any) -> Estimate:
        dynamics, oracles, steps = chain_of(self, instance), instance.oracles, instance.solver.max_steps
        kept = kept_of("Pathwise", steps, self.burn_in, self.thinning, least=1)
        xs = tree.tensors(instance.outer)
        grad: list[Tensor | None] = [None] * len(xs)
        with spans.span(spans.INNER):
            y = oracles.start()
            chain = _Forward(instance, y) if self.closure == "exact" else _Weighted(self._weights(kept, steps))
            samples = Samples(len(kept))
            for step in range(steps):
                y = self._visit(instance, dynamics, chain, grad, samples, kept, step, y)
        found = Solution(y, steps, 0)
        return instance.finish(
            found,
            narrowed(grad, xs),
            samples.outer_loss,
            codes=[samples.code(instance, y, dynamics.temperature)],
            stats=samples.figures(),
        )

    def _visit(
        self,
        instance: Instance,
        dynamics: Langevin,
        chain: "_Forward | _Weighted",
        grad: list[Tensor | None],
        samples: Samples,
        kept: range,
        step: int,
        y: Tree,
    ) -> Tree:
        """What the sample before a step and the step itself add to the gradient; the next y."""
        oracles, rate = instance.oracles, dynamics.rate(step)
        sampled, follows = step in kept, chain.follows(step, kept)
        loss, slope = None, None
        if sampled:
            loss, slope, direct = oracles.outer_gradient(y)
            added(grad, 1 / len(kept), direct)
            chain.sample(slope, grad, 1 / len(kept))
        elif follows and chain.needs_slope:
            slope = autodiff.filled(oracles.outer_gradient_in_inner(y)[1], tree.tensors(y))
        if not follows:
            at = oracles.point(step)
        else:
            attached = tree.attach(y)
            embedded = oracles.differentiable_embedding(step)
            g, gradient = oracles.differentiable_gradient(attached, embedded)
            chain.advance(step, rate, gradient, tree.tensors(attached), tree.tensors(oracles.attached), slope, grad)
            numbers = tuple(None if leaf is None else leaf.detach() for leaf in gradient)
            along = oracles.source.along(graph=False)
            at = At(step, embedded, lambda inner, batch: (g, numbers), oracles.inner_value, along)
        moved, _ = oracles.step(y, None, at)
        if sampled and loss is not None and at.loss is not None:
            samples.add(loss, at.loss)
        return moved

    def _weights(self, kept: range, steps: int) -> list[float]:
        """What the increment of each step counts for in the mean over the samples.

        c_i = sum over samples k > i of gamma^(k - 1 - i), without those more than `window` steps later.
        """
        gamma, weights = 1.0 if self.gamma is None else float(self.gamma), [0.0] * (steps + 1)
        if self.window is None:
            for step in reversed(range(steps)):
                weights[step] = (1.0 if step + 1 in kept else 0.0) + gamma * weights[step + 1]
        else:
            powers = [gamma**age for age in range(min(self.window, steps))]
            for sample in kept:
                for age in range(min(self.window, sample)):
                    weights[sample - 1 - age] += powers[age]
        return [weight / len(kept) for weight in weights[:steps]]


class _Weighted:
    """r by its increments, each with the weight that the samples give it."""

    needs_slope = True

    def __init__(self, weights: list[float]) -> None:
        self._weights = weights

    def follows(self, step: int, kept: range) -> bool:
        """Whether a sample looks back to this step."""
        return self._weights[step] != 0

    def sample(self, slope: Leaves, grad: list[Tensor | None], weight: float) -> None:
        """Nothing: the increments have gone into the gradient already."""

    def advance(
        self,
        step: int,
        rate: float,
        gradient: PartialLeaves,
        ys: list[Tensor],
        xs: list[Tensor],
        slope: Leaves | None,
        grad: list[Tensor | None],
    ) -> None:
        """Add -eps d/dx <dg/dy, df/dy>."""
        assert slope is not None, "df/dy is there where a step is followed"
        pairs = [(g, v) for g, v in zip(gradient, slope, strict=True) if g is not None]
        with spans.span(spans.MIXED):
            mixed = autodiff.grad([g for g, _ in pairs], xs, [v for _, v in pairs])
        added(grad, -rate * self._weights[step], mixed)


class _Forward:
    """Z = dy/dx, a tree like y for each number of x; None while it is zero."""

    needs_slope = False

    def __init__(self, instance: Instance, start: Tree) -> None:
        self._space, self._xs = instance.oracles.space, tree.tensors(instance.outer)
        numbers = tree.size(start) * tree.size(instance.outer)
        if numbers > _LARGEST:
            raise ValueError(
                f'Pathwise(closure="exact") carries P Q = {numbers} numbers here, which is too many; use '
                f'closure="decay" or Covariance'
            )
        self._columns: list[list[Leaves | None]] = [[None] * leaf.numel() for leaf in self._xs]

    def follows(self, step: int, kept: range) -> bool:
        """Whether a sample comes after this step."""
        return step < max(kept)

    def sample(self, slope: Leaves, grad: list[Tensor | None], weight: float) -> None:
        """Add Z' df/dy."""
        for i, (x, columns) in enumerate(zip(self._xs, self._columns, strict=True)):
            if any(column is not None for column in columns):
                zero = wide(x.new_zeros(()))
                numbers = [zero if z is None else wide(self._space.dot(z, slope).sum()) for z in columns]
                column = torch.stack(numbers).reshape(x.shape)
                known = grad[i]
                grad[i] = weight * column if known is None else known + weight * column

    def advance(
        self,
        step: int,
        rate: float,
        gradient: PartialLeaves,
        ys: list[Tensor],
        xs: list[Tensor],
        slope: Leaves | None,
        grad: list[Tensor | None],
    ) -> None:
        """Z <- Z - eps (H Z + C'), column by column.

        A forward product is the derivative of a backward one: w -> (H w, C w) is linear in w, and its transpose at
        (z, e) is H z + C' e.
        """
        used = [i for i, g in enumerate(gradient) if g is not None]
        outputs = [gradient[i] for i in used]
        dummies = [torch.zeros_like(g).requires_grad_() for g in outputs if g is not None]
        pulled = autodiff.grad([g for g in outputs if g is not None], [*ys, *xs], dummies, create_graph=True)
        count = sum(len(columns) for columns in self._columns)
        with spans.span(spans.HVP, count=count):
            for i, columns in enumerate(self._columns):
                for j, column in enumerate(columns):
                    pairs = self._directions(pulled, i, j, column, len(ys))
                    products = autodiff.grad(
                        [root for root, _ in pairs], dummies, [v for _, v in pairs], retain_graph=True
                    )
                    if all(leaf is None for leaf in products):
                        continue
                    moved = [torch.zeros_like(y) for y in ys] if column is None else list(column)
                    for place, product in zip(used, products, strict=True):
                        if product is not None:
                            moved[place] = moved[place] - rate * product
                    columns[j] = tuple(leaf.detach() for leaf in moved)

    def _directions(
        self, pulled: PartialLeaves, i: int, j: int, column: Leaves | None, count: int
    ) -> list[tuple[Tensor, Tensor]]:
        """The products with w, paired with the direction (z, e) of a number of x."""
        pairs: list[tuple[Tensor, Tensor]] = []
        for place in range(count if column is not None else 0):
            root = pulled[place]
            if root is not None and column is not None:
                pairs.append((root, column[place]))
        root = pulled[count + i]
        if root is not None:
            unit = torch.zeros_like(root).reshape(-1)
            unit[j] = 1.0
            pairs.append((root, unit.reshape(root.shape)))
        return pairs
