"""The gamma-decay closure: what the product of the steps' Jacobians would be if each were gamma. Biased.

    dF/dx ~ df/dx + sum_{k<K} gamma^(K-1-k) B_k' df/dy(y_K) + gamma^K (dy_0/dx)' df/dy(y_K),    B_k = d step_k / dx
    running:  r <- gamma r + B_k' df/dy(y_{k+1})                                   in one pass, with what is known then

The exact sum has the product of I - lr H over the later steps in the place of gamma^(K-1-k).

| | inner gradients | outer gradients | mixed products | memory |
| --- | --- | --- | --- | --- |
| GammaDecay(gamma) | 3 K - 1 | 1 | K | 3 P + Q + one tape |
| GammaDecay(gamma, running=True) | 2 K | K + 1 | K | 3 P + Q + one tape |

Steps of weight 0 are left out: with gamma = 0 the last step alone is differentiated, as Unrolled("iterates", last=1)
does.

Wins: one knob instead of a linear system; memory flat in K and no product with H. Right where H is near a multiple of
the identity, gamma = 1 - lr h.
Fails: spread curvature: no gamma serves all directions; gamma near 1 adds up what the steps would have forgotten.
Reference: the closure is folklore (seen in a fragment without its paper; the same idea as the `decay` closure of
bilevel.estimators.stochastic.pathwise). The formula is our reading.
Differences from peers: none of the libraries compared has it.
"""

import dataclasses
from typing import Any

from torch import Tensor

from bilevel.batches import PerStep
from bilevel.engine import spans
from bilevel.engine.cotangents import Cotangents, floating
from bilevel.engine.replay import State as Random
from bilevel.estimators.base import EVERYWHERE, Estimate, Estimator, Instance, Program
from bilevel.estimators.state import State
from bilevel.space import tree
from bilevel.space.tree import PartialLeaves, Tree


@dataclasses.dataclass(frozen=True)
class GammaDecay(Estimator):
    """Weigh the steps by powers of one number.

    Args:
        gamma: what a step keeps of an earlier change of y, from 0 to 1; 1 - lr h for a curvature h.
        running: whether each step is weighed with df/dy as it is after it, in one pass, instead of that at the end.

    Bias: that of gamma^k for the product of k Jacobians, in every direction of y; running, that of df/dy on the way,
        too.

    Memory: 3 P + Q + one tape: constant in K, linear in T.

    Raises:
        ValueError: an argument is out of range; (when used) tasks take numbers of steps of their own, or the optimizer
            carries a state (momentum, moments), through which the steps depend on each other besides y.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
        >>> hg = bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.25), steps=4), estimator=bl.estimators.GammaDecay(gamma=0.5))
        >>> hg.grad  # exact, as 1 - lr h = 0.5
        tensor(0.2197)
    """

    gamma: float
    running: bool = False

    def __post_init__(self) -> None:
        number = isinstance(self.gamma, (int, float)) and not isinstance(self.gamma, bool)
        if not number or not 0 <= self.gamma <= 1:
            raise ValueError(
                f"GammaDecay was given gamma={self.gamma!r}; a number from 0 to 1 was needed, about 1 - lr * curvature"
            )
        if not isinstance(self.running, bool):
            raise ValueError(f"GammaDecay was given running={self.running!r}; True or False was needed")

    sees = EVERYWHERE

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        return f"the product of the Jacobians of k steps is taken for {self.gamma:g}^k"

    def estimate(self, instance: Instance, state: State | None) -> Estimate:
        program = instance.program()
        if program.masks is not None:
            raise ValueError(
                f"GammaDecay was given {type(instance.solver).__name__} under TaskMean, which lets every task take as "
                f"many steps as it needs; a fixed number was needed: Descent(optimizer, steps), or "
                f"TaskMean(estimator, chunk=1)"
            )
        return self._running(instance, program) if self.running else self._at_end(instance, program)

    def _at_end(self, instance: Instance, program: Program) -> Estimate:
        oracles, steps = instance.oracles, program.solver.steps
        start = _begun(instance, steps)
        before = oracles.generators.peek()
        found = instance.solve(start, solver=program.solver, visit=lambda step, y, s: _check(instance, s))
        with spans.span(spans.HYPERGRADIENT):
            loss, slope, total = oracles.outer_gradient(found.inner)
            after = oracles.generators.peek()
            oracles.generators.set(before)
            products, y = _Products(instance), start
            s = oracles.begin(y) if steps else None
            for step in range(steps):
                weight = self.gamma ** (steps - 1 - step)
                here = oracles.generators.peek()
                if weight > 0:
                    total = tree.accumulate(total, products.of(y, s, step, [weight * leaf for leaf in slope], here))
                if step + 1 < steps:
                    oracles.generators.set(here)
                    y, s = oracles.step(y, s, oracles.point(step))
            del y, s
            total = tree.accumulate(total, products.pending())
            if instance.problem.init is not None and self.gamma**steps > 0:
                total = tree.accumulate(total, oracles.start_vjp([self.gamma**steps * leaf for leaf in slope]))
            oracles.generators.set(after)
            return instance.finish(program.ended(found), total, loss)

    def _running(self, instance: Instance, program: Program) -> Estimate:
        oracles = instance.oracles
        start, products = _begun(instance, program.solver.steps), _Products(instance)
        run = _Run(self.gamma, (None,) * len(tree.tensors(instance.outer)))
        if instance.problem.init is not None:
            slope = oracles.outer_gradient_in_inner(start)[1]
            run.total = oracles.start_vjp(slope)

        def visit(step: int, y: Tree, s: Any) -> None:
            if step > 0:
                _check(instance, s)
                with spans.span(spans.HYPERGRADIENT):
                    self._add(instance, products, run, y)
            run.last = y, s, step, oracles.generators.peek()

        found = instance.solve(start, solver=program.solver, visit=visit)
        with spans.span(spans.HYPERGRADIENT):
            if program.solver.steps:
                self._add(instance, products, run, found.inner)
            loss, _, direct = oracles.outer_gradient(found.inner)
            total = tree.accumulate(direct, tree.accumulate(run.total, products.pending()))
            return instance.finish(program.ended(found), total, loss)

    def _add(self, instance: Instance, products: "_Products", run: "_Run", after: Tree) -> None:
        """What the step from the last visited iterate to `after` adds."""
        assert run.last is not None
        oracles, (y, s, step, random) = instance.oracles, run.last
        run.last = None
        slope = oracles.outer_gradient_in_inner(after)[1]
        now = oracles.generators.peek()
        products.scale(run.gamma)
        run.total = tree.accumulate(_scaled(run.gamma, run.total), products.of(y, s, step, list(slope), random))
        oracles.generators.set(now)


@dataclasses.dataclass
class _Run:
    gamma: float
    total: PartialLeaves
    last: tuple[Tree, Any, int, Random] | None = None


class _Products:
    """B' a of single steps; what goes through shared features is pulled through them at the end."""

    def __init__(self, instance: Instance) -> None:
        self._oracles = instance.oracles
        self._shared = not isinstance(instance.batches.inner, PerStep)
        self._pending: PartialLeaves | None = None

    def of(
        self, y: Tree, s: Any, step: int, cotangent: list[Tensor | None] | list[Tensor], random: Random
    ) -> PartialLeaves:
        """B' a of a step, rebuilt with the random numbers that it drew."""
        oracles = self._oracles
        oracles.generators.set(random)
        embedding = oracles.embedding(step)
        _, in_outer, in_batch = oracles.step_vjp(
            y, s, step, embedding, Cotangents(list(cotangent), None), to_inner=False
        )
        if not self._shared:
            return tree.accumulate(in_outer, embedding.pull(in_batch))
        self._pending = in_batch if self._pending is None else tree.accumulate(self._pending, in_batch)
        return in_outer

    def scale(self, factor: float) -> None:
        """Scale what waits."""
        if self._pending is not None:
            self._pending = _scaled(factor, self._pending)

    def pending(self) -> PartialLeaves:
        """What waits, through the features."""
        if self._pending is None:
            return (None,) * len(tree.tensors(self._oracles.attached))
        return self._oracles.embedding(0).pull(self._pending)


def _begun(instance: Instance, steps: int) -> Tree:
    """y_0, with what all steps share drawn before the first."""
    start = instance.oracles.start()
    if steps and not isinstance(instance.batches.inner, PerStep):
        instance.oracles.embedding(0)
    return start


def _scaled(factor: float, parts: PartialLeaves) -> PartialLeaves:
    return tuple(None if leaf is None else factor * leaf for leaf in parts)


def _check(instance: Instance, state: Any) -> None:
    """Raise ValueError where steps depend on each other through more than y."""
    if floating(state):
        dynamics = instance.solver.dynamics
        raise ValueError(
            f"GammaDecay weighs what reaches y in a step, and {type(dynamics.update or dynamics).__name__} carries a "
            f"state besides y (momentum, moments), through which it reaches later steps. Use SGD without momentum, or "
            f"Unrolled(), Forward() or ForwardGradient()"
        )
