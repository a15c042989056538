"""What a user's own optimizer says of itself, held against what it does, once per problem.

The library's optimizers are tested. One that a user wrote may claim to rest where the inner gradient vanishes and yet
move there (a hidden weight decay), or may mix tasks (a clip by the norm over all of them). Either would be a wrong
number without a word.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.batches import Batches, PerStep
from bilevel.engine import spans
from bilevel.engine.replay import State
from bilevel.estimators.base import Estimator, Instance, Path
from bilevel.optim.base import Optimizer, held, trusted
from bilevel.optim.groups import Groups
from bilevel.space import tree
from bilevel.space.inner_product import NARROW
from bilevel.space.tree import Tree


def check(estimator: Estimator, instance: Instance) -> None:
    """Raise if a user's optimizer does not do what is asked of it on this instance.

    Raises:
        ValueError: it moves y where its stationarity() is zero, keeps a state of its own, or mixes tasks.
    """
    if estimator.delegates:
        return  # (the functions of one task cannot be called on a batch of many)
    dynamics = instance.solver.dynamics
    update = dynamics.update
    if trusted(update or dynamics):
        return  # (functions that a dynamics of ours was given are mapped over tasks, and so cannot mix them)
    key = ("admitted", instance.tasks is None, bool(estimator.sees & {Path.STATIONARITY, Path.INNER_LOSS}))
    if any(seen is (update or dynamics) for seen in instance.problem.memo.get(key, ())):
        return
    oracles = instance.oracles
    y = oracles.start()
    if type(tree.tensors(y)[0]) is not Tensor:
        return  # nothing can be compared on tensors without data
    generators = oracles.generators
    before = generators.peek()
    if update is not None:
        with torch.enable_grad():
            _, gradient = oracles.engine.gradient(oracles.inner, y, oracles.x, oracles.embedding(0).value)
        with torch.no_grad():
            g = tree.like(y, gradient)
            whole = update if instance.tasks is None else update.over(instance.tasks)
            for each, slope, at in _looked_at(whole, g, y):
                _check_purity(each, slope, at, oracles.x)
                if Path.HYPERPARAMETER not in estimator.sees:
                    _check_rest(each, slope, _elsewhere(at), oracles.x)
    _check_repeats(instance, before)
    if instance.tasks is not None and instance.tasks > 1:
        _check_tasks(instance, before)
    generators.set(before)
    instance.problem.memo.setdefault(key, []).append(update or dynamics)


def check_rest(estimator: Estimator, instance: Instance, end: Tree) -> None:
    """Raise if a user's dynamics came to rest where its stationarity() is not zero. (Its steps are known only where the
    loop went: an optimizer is asked beforehand.)

    Raises:
        ValueError: it did.
    """
    dynamics, (oracles, tried) = instance.solver.dynamics, (instance.oracles, instance.problem.memo)
    if estimator.delegates or dynamics.update is not None or trusted(dynamics) or not instance.steady:
        return
    if Path.STATIONARITY not in estimator.sees or Path.HYPERPARAMETER in estimator.sees:
        return
    seen = tried.setdefault("rests", [])
    start = oracles.start()
    if sum(each is dynamics for each in seen) >= _LOOKS or type(tree.tensors(start)[0]) is not Tensor:
        return
    seen.append(dynamics)
    before, motions, conditions = oracles.generators.peek(), [], []
    with spans.unheard(), torch.no_grad():
        for y in (start, end):
            point = oracles.point(0)
            value = dynamics.stationarity(y, oracles.x, point)
            if value is None:
                return
            moved, _ = oracles.step(y, oracles.begin(y), point)
            motions.append(_distance(moved, y))
            conditions.append(sum(float(leaf.double().square().sum()) for leaf in tree.tensors(value)) ** 0.5)
    oracles.generators.set(before)
    if motions[1] <= 1e-6 * motions[0] and conditions[1] > 1e-2 * conditions[0]:
        raise ValueError(
            f"{type(dynamics).__name__}.step() comes to rest where its stationarity() is not zero "
            f"({conditions[1]:.2g}, after {conditions[0]:.2g} at the start), so an estimator at the solution "
            f"would differentiate another condition. Let stationarity() return what step() brings to zero, or None, or "
            f"use Unrolled()"
        )


def _looked_at(update: Optimizer, gradient: Tree, y: Tree) -> Iterator[tuple[Optimizer, Tree, Tree]]:
    """An optimizer, and those that ours hold, with what each is given: one that a schedule or an accumulation holds may
    move nothing at the first step. What a user's optimizer does with those that it holds is not known.
    """
    if trusted(update):
        return
    yield update, gradient, y
    if not type(update).__module__.startswith("bilevel."):
        return
    if isinstance(update, Groups):
        for part in update.parts(gradient, y):
            yield from _looked_at(*part)
    else:
        for each in held(update):
            yield from _looked_at(each, gradient, y)


def _check_purity(update: Optimizer, gradient: Tree, y: Tree, x: Tree) -> None:
    """A step must leave what it is given as it is; asked of copies, so that the caller's tensors are not lost."""
    copies = [tree.tree_map(lambda leaf: None if leaf is None else leaf.clone(), each) for each in (gradient, y)]
    before = [leaf._version for each in copies for leaf in tree.flatten(each)[0] if leaf is not None]
    update.step(copies[0], update.init(copies[1]), copies[1], x)
    if before != [leaf._version for each in copies for leaf in tree.flatten(each)[0] if leaf is not None]:
        raise ValueError(
            f"{type(update).__name__}.step() changes its arguments in place. Steps are pure: write y = y - rate * g "
            f"instead "
            f"of y.sub_(rate * g), and return the new tensors"
        )


def _elsewhere(y: Tree) -> Tree:
    """A point beside y: at y = 0 a weight decay does not show."""
    seed = torch.Generator().manual_seed(0)
    return tree.tree_map(
        lambda leaf: leaf + (1 + leaf.abs()) * torch.randn(leaf.shape, generator=seed, dtype=torch.float64).to(leaf), y
    )


def _check_rest(update: Optimizer, gradient: Tree, y: Tree, x: Tree) -> None:
    """At the gradient g0 where stationarity(g0, y, x) = 0, a first step must leave y where it is."""
    at_zero = update.stationarity(tree.tree_map(_zeros, gradient), y, x)
    condition = update.stationarity(gradient, y, x)
    if at_zero is None or condition is None:
        return  # it does not say; estimators at the solution refuse it
    at_zero, condition = tree.ordered(at_zero, y), tree.ordered(condition, y)
    name, loose = type(update).__name__, 4 * _rounding(y)
    for g, added, total in zip(*(tree.flatten(each)[0] for each in (gradient, at_zero, condition)), strict=True):
        if g is None:
            continue
        size = float(g.abs().max())
        slack = 1e-6 * size + loose * (size + float(added.abs().max()))
        if not torch.allclose(total - added, g, rtol=1e-3, atol=slack):
            raise ValueError(
                f"{name}.stationarity() is not the inner gradient plus a term of its own, so an estimator at the "
                f"solution cannot use it. Return grad, or grad plus what the step adds to it (weight decay), or None"
            )
    rest = tree.tree_map(lambda leaf: None if leaf is None else -leaf, at_zero)
    moved, _ = update.step(rest, update.init(y), y, x)
    free, _ = update.step(gradient, update.init(y), y, x)
    moved, free = tree.ordered(moved, y), tree.ordered(free, y)
    if _distance(moved, y) > (1e-3 + loose) * _distance(free, y) + (1e-7 + loose) * _size(y):
        raise ValueError(
            f"{name}.step() moves y where its stationarity() is zero, so the two do not belong together: an estimator "
            f"at the solution would miss what it adds to the gradient (weight decay, a projection, noise). Let "
            f"stationarity(grad, inner, outer) return what step() adds too, or None, or use Unrolled()"
        )


def _check_repeats(instance: Instance, before: State) -> None:
    """A step must be a function of what it is given: what is recomputed would be another one."""
    if not instance.solver.max_steps:
        return
    oracles, ends = instance.oracles, []
    y = oracles.start()
    with spans.unheard():
        for _ in range(2):
            oracles.generators.set(before)
            ends.append(oracles.step(y, oracles.begin(y), oracles.point(0))[0])
    one, other = ends
    if _distance(one, other) > 1e-4 * _distance(one, y) + 1e-7 * _size(y):
        name = type(instance.solver.dynamics.update or instance.solver.dynamics).__name__
        raise ValueError(
            f"{name}.step() gave two answers for the same arguments: it counts, or keeps something, outside of its "
            f"state, and a step that an estimator computes again would be another one. Keep it in the state that "
            f"init() makes and step() returns, and draw random numbers from torch's global generator"
        )


def _check_tasks(instance: Instance, before: State) -> None:
    """The steps of the first task must not depend on the others."""
    oracles, batches = instance.oracles, instance.batches

    def first(value: Tree) -> Tree:
        return tree.tree_map(lambda leaf: leaf[0] if isinstance(leaf, Tensor) else leaf, value)

    alone = dataclasses.replace(
        instance,
        tasks=None,
        inner=None if instance.inner is None else first(instance.inner),
        batches=Batches(PerStep(_First(batches, first)), first(batches.outer)),
    ).oracles
    ends = []
    for each in (oracles, alone):
        oracles.generators.set(before)
        y = each.start()
        state = each.begin(y)
        for step in range(min(_LOOKS, instance.solver.max_steps)):
            y, state = each.step(y, state, each.point(step))
        ends.append(y)
        if not oracles.generators.same(before, oracles.generators.peek()):
            return  # tasks draw their own numbers, and differ by that
    together, single, begun = first(ends[0]), ends[1], alone.start()
    loose = 4 * _rounding(begun)
    if _distance(together, single) > (1e-4 + loose) * _distance(single, begun) + (1e-7 + loose) * _size(begun):
        name = type(instance.solver.dynamics.update or instance.solver.dynamics).__name__
        raise ValueError(
            f"{name}.step() mixes tasks: the steps of a task depend on the others (a norm over the whole of y, where "
            f"y has "
            f"a leading task dimension). Write TaskMean(estimator, chunk=1), which takes one task after "
            f"another, or let over(tasks) of an optimizer return one that mixes none"
        )


_LOOKS = 20
"""Steps of a dynamics not our own that are taken twice, once with and once without the other tasks."""


@dataclasses.dataclass(frozen=True)
class _First(Sequence[Any]):
    """The first task's batch of every step."""

    batches: Batches
    take: Callable[[Tree], Tree]

    def __getitem__(self, step: Any) -> Any:
        return self.take(self.batches.inner_at(step))

    def __len__(self) -> int:
        return _LOOKS


def _zeros(leaf: Tensor | None) -> Tensor | None:
    return None if leaf is None else torch.zeros_like(leaf)


def _distance(one: Tree, other: Tree) -> float:
    pairs = zip(tree.tensors(one), tree.tensors(other), strict=True)
    return sum(float((a - b).double().square().sum()) for a, b in pairs) ** 0.5


def _rounding(y: Tree) -> float:
    """What one rounding of 16 bits may change: tasks together and one alone are not rounded alike. 0 for wider ones."""
    return max((torch.finfo(leaf.dtype).eps for leaf in tree.tensors(y) if leaf.dtype in NARROW), default=0.0)


def _size(value: Tree) -> float:
    return sum(float(leaf.double().square().sum()) for leaf in tree.tensors(value)) ** 0.5
