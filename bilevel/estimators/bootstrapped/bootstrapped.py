"""Bootstrapped hypergradients: what the inner loop leaves undone is learned from where it would go next.

    z = a point ahead of y_K(x), held fixed              (more steps, a gradient step, an optimizer step)
    found = d mu(z, y_K(x)) / dx + df/dx(y_K, x)         z a constant: no gradient passes through the target

The cotangent df/dy of another estimator is replaced by dmu/dy; all else is that estimator's. With z = y_K - c df/dy and
mu = |z - y|^2 / (2 c) the two are equal, so the plain hypergradient is a special case; z = y_K - df/dy + (a guess of
the next gradient) is optimism. The direct part df/dx is kept, so that a regularizer of x in f goes on acting; the
papers have no such part.

| | inner gradients | outer gradients | HVPs | memory |
| --- | --- | --- | --- | --- |
| Bootstrapped(estimator, target) | K + L more | 1 more, and the target's | the estimator's | the estimator's + 2 P |

The K steps run twice, the first time without a graph, so that any estimator may follow; random numbers are replayed, so
that z lies ahead of the very y_K that is matched.

Wins: few differentiated steps are to learn what many would do; optimistic targets.
Fails: as a gradient of F: it is that of a matching loss.
Reference: Flennerhag et al. 2022, Bootstrapped Meta-Learning, arXiv 2109.04504; 2023, arXiv 2301.03236. Published code
differs from one another in where the target's last step comes from; here that is the target's choice.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel.batches import PerStep
from bilevel.engine import spans
from bilevel.engine.evaluation import Evaluation
from bilevel.estimators.base import Estimate, Estimator, Instance, Path
from bilevel.estimators.bootstrapped.base import Ahead, Aimed, Matching, Target
from bilevel.estimators.bootstrapped.matchings import SquaredDistance
from bilevel.inner.descent import Descent
from bilevel.outcome import Status, code_if, worst
from bilevel.problem import Problem
from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class Bootstrapped(Estimator):
    """The gradient of the distance to a target ahead, by another estimator.

    `hg.outer_loss` is F, as always; what was differentiated is `stats["matching_loss"]`, per task. `hg.inner` is y_K:
    with `iterate(carry=True)` the next call goes on from there, not from the target.

    Args:
        estimator: how the gradient is estimated, for one task; one that carries no state.
        target: where y should have gone.
        matching: how far that is, 1/2 |z - y|^2 by default.

    Bias: it is the gradient of mu(z, y_K(x)) with z held fixed, not that of F; equal to it for OneStep(SGD(c)) and
    SquaredDistance(1 / (2 c)).

    Memory: that of `estimator`, and the target: P.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: the estimator's outer loss is one of many iterates (step_weights, the samples of a chain); (when
            used) the estimator carries a state, PerStep holds too few batches for the further steps, or
            the target is not like the inner variable.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
        >>> arguments = problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(None, None)
        >>> solver = bl.Descent(bl.SGD(lr=0.25), steps=4)
        >>> ahead = bl.Bootstrapped(bl.Unrolled(), bl.estimators.FurtherSteps(2))
        >>> bl.hypergradient(*arguments, solver=solver, estimator=ahead).grad  # x should grow, to speed y up
        tensor(-0.0110)
        >>> plain = bl.Bootstrapped(bl.Unrolled(), bl.estimators.OneStep(bl.SGD(lr=1.0)))
        >>> bl.hypergradient(*arguments, solver=solver, estimator=plain).grad  # as by Unrolled()
        tensor(0.2197)
    """

    estimator: Estimator
    target: Target
    matching: Matching = dataclasses.field(default_factory=SquaredDistance)

    def __post_init__(self) -> None:
        for name, kind, write in (
            ("estimator", Estimator, "bilevel.Unrolled()"),
            ("target", Target, "bilevel.estimators.FurtherSteps(5)"),
            ("matching", Matching, "bilevel.estimators.SquaredDistance()"),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind):
                given = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
                raise TypeError(f"Bootstrapped was given {given} as {name}; {write} or its kin was needed")
        if isinstance(self.estimator, Bootstrapped) or hasattr(self.estimator, "chunk"):
            raise TypeError(
                f"Bootstrapped was given {type(self.estimator).__name__}; an estimator of one task was needed. Write "
                f"TaskMean(Bootstrapped(estimator, target))"
            )
        if hasattr(self.estimator, "burn_in") or getattr(self.estimator, "step_weights", None) is not None:
            raise ValueError(
                f"Bootstrapped was given {self.estimator}, whose outer loss is one of many iterates, and a target lies "
                f"ahead of the last one alone. Use it by itself, or bilevel.Unrolled() here"
            )

    @property
    def sees(self) -> frozenset[Path]:  # type: ignore[override]  # its estimator's
        return self.estimator.sees

    def sees_after(self, steps: int) -> frozenset[Path]:
        return self.estimator.sees_after(steps)

    @property
    def memory_growth(self) -> str:
        return self.estimator.memory_growth

    @property
    def bias(self) -> str:
        own = "the gradient of the matching loss mu(z, y_K(x)) with the target z held fixed, not that of F"
        return f"{own}; {self.estimator.bias}" if self.estimator.bias else own

    @property
    def unlike_a_layer(self) -> str:
        return "its estimate is the gradient of a distance to a target"

    def estimate(self, instance: Instance, state: Any) -> Estimate:
        oracles = instance.oracles
        before = oracles.generators.peek()  # first of all: an init_state may draw the start
        if self.estimator.init_state(instance) is not None:
            raise ValueError(
                f"Bootstrapped was given {self.estimator}, which carries a state from call to call; where its inner "
                f"loop starts is then not where the target's does. Use it without warm starts"
            )
        aimed = self._aimed(instance)
        oracles.generators.set(before)
        batches = dataclasses.replace(instance.batches, outer=_Towards(aimed, instance.batches.outer))
        # (A dynamics that follows f goes on following f, not the distance.)
        posed = instance.problem, instance.batches.outer
        towards = dataclasses.replace(instance, problem=self._matched(instance.problem), batches=batches, posed=posed)
        found = self.estimator.estimate(towards, None)
        with spans.span(spans.HYPERGRADIENT):
            outer_loss, direct = oracles.outer_gradient_in_outer(found.inner)
        return dataclasses.replace(
            found,
            grad=tree.accumulate(found.grad, direct),
            outer_loss=outer_loss,
            code=worst(
                found.code,
                code_if(~tree.finite(found.outer_loss), Status.NONFINITE),
                code_if(~tree.finite(aimed.inner), Status.DIVERGED),
            ),
            stats=found.stats | {"matching_loss": found.outer_loss},
            unused=frozenset(),
        )

    def _aimed(self, instance: Instance) -> Aimed:
        """The target, and the slope of the matching's potential there."""
        with torch.no_grad():
            ahead = _ahead(instance, self.target.further)
            given = [*tree.tensors(ahead.inner), *tree.tensors(instance.outer)]
            versions = [leaf._version for leaf in given]
            point = self.target.point(ahead)
        if versions != [leaf._version for leaf in given]:
            raise ValueError(
                f"{type(self.target).__name__}.point() changed its arguments in place; write z = ahead.inner - d, "
                f"not ahead.inner.sub_(d)"
            )
        leaves, wanted = tree.aligned(point, ahead.inner), tree.tensors(ahead.inner)
        if leaves is None or [leaf.shape for leaf in leaves] != [leaf.shape for leaf in wanted]:
            raise ValueError(
                f"{type(self.target).__name__}.point() returned tensors of shapes "
                f"{[tuple(leaf.shape) for leaf in tree.tensors(point)]}; a tree like the inner variable, with "
                f"{[tuple(leaf.shape) for leaf in wanted]}, was needed"
            )
        z = tree.like(ahead.inner, [leaf.detach().to(like) for leaf, like in zip(leaves, wanted, strict=True)])
        if self.matching.potential is None:
            return Aimed(z, ())
        height = _Height(type(self.matching).__name__, self.matching.potential)
        loss = Evaluation(Problem(height, height), instance.tasks).inner
        _, slope = instance.oracles.engine.gradient(loss, z, instance.oracles.x, ())
        filled = [torch.zeros_like(leaf) if s is None else s for s, leaf in zip(slope, tree.tensors(z), strict=True)]
        return Aimed(z, tree.like(z, filled))

    def _matched(self, problem: Problem) -> Problem:
        """The problem whose outer loss is the distance; the last one made is kept, with what was learned about it."""
        matching, made = problem.memo.get("bootstrapped", (None, None))
        if matching is not self.matching:
            features = None if problem.features is None else _Features(problem.features)
            made = dataclasses.replace(problem, outer_loss=_Distance(self.matching), features=features)
            problem.memo["bootstrapped"] = self.matching, made
        assert made is not None
        return made


def _ahead(instance: Instance, further: int) -> Ahead:
    """The inner loop, `further` steps beyond its end."""
    solver, oracles, inner = instance.solver, instance.oracles, instance.batches.inner
    if isinstance(inner, PerStep) and len(inner) < solver.max_steps + further:
        raise ValueError(
            f"PerStep holds {len(inner)} batches; the inner solver takes {solver.max_steps} steps and the target of "
            f"Bootstrapped {further} more: one batch a step is needed"
        )
    if solver.fixed:
        steps = solver.max_steps + further
        return Ahead(instance, instance.solve(solver=Descent(solver.dynamics, steps)).inner, steps)
    last: dict[str, Any] = {}
    found = instance.solve(visit=lambda step, y, state: last.update(inner=y, state=state))
    y: Tree = last["inner"]
    with spans.span(spans.INNER):
        for step in range(found.steps, found.steps + further):
            y, last["state"] = oracles.step(y, last["state"], oracles.point(step))
    return Ahead(instance, tree.detach(y), found.steps + further)


class _Towards(NamedTuple):
    """The outer batch beside its target."""

    aimed: Aimed
    batch: Any


@dataclasses.dataclass(frozen=True)
class _Distance:
    """mu as an outer loss. x and the batch are constants of it: how x acts through f is added apart."""

    matching: Matching

    def __call__(self, inner: Tree, outer: Tree, batch: Any) -> Tensor:
        distance = self.matching.distance(batch.aimed, inner, tree.detach(outer), tree.detach(batch.batch))
        return _scalar(f"{type(self.matching).__name__}.distance()", distance)


@dataclasses.dataclass(frozen=True)
class _Height:
    """The potential of a matching, called as a loss is."""

    owner: str
    potential: Callable[[Tree], Tensor]

    def __call__(self, inner: Tree, outer: Tree, batch: Any) -> Tensor:
        return _scalar(f"the potential of {self.owner}", self.potential(inner))


def _scalar(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point():
        return value
    given = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise ValueError(f"{name} returned {given}; a floating 0-dim tensor was needed. Reduce it with .sum()")


@dataclasses.dataclass(frozen=True)
class _Features:
    """The problem's features, of inner batches and of the batch beside a target."""

    features: Any

    def __call__(self, outer: Tree, batch: Any) -> Any:
        if isinstance(batch, _Towards):
            return batch._replace(batch=self.features(outer, batch.batch))
        return self.features(outer, batch)
