"""What the penalty methods share: schedules, the perturbed inner problem, the gap of the inner loss, and moves of y.

    q(x, y) = g(x, y) - g(x, w),   dq/dy = dg/dy(x, y),   dq/dx = dg/dx(x, y) - dg/dx(x, w)      (w is held fixed)

dg/dy stands for the stationarity of the inner optimizer: with coupled weight decay it is dg/dy + decay y.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel.engine.oracles import Oracles
from bilevel.engine.point import At
from bilevel.estimators.base import Estimator, Instance
from bilevel.outcome import Solution, Status, code_if, readable, worst
from bilevel.space import tree
from bilevel.space.inner_product import Space
from bilevel.space.tree import Leaves, PartialLeaves, Tree

Schedule = float | Callable[[int], float]
"""A number, or a function of the call, 0, 1, 2, ..."""


# --- schedules


def check_positive(owner: str, name: str, value: Any, *, none: bool = False) -> None:
    """Raise ValueError unless it is a positive number, or None where that is allowed."""
    if none and value is None:
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(
            f"{owner} was given {name}={value!r}; {'None or ' if none else ''}a positive number was needed"
        )


def check_schedule(owner: str, name: str, value: Any) -> None:
    """Raise ValueError unless it is a positive number or a function."""
    if not callable(value):
        try:
            check_positive(owner, name, value)
        except ValueError as error:
            raise ValueError(
                f"{owner} was given {name}={value!r}; a positive number, or a function of the call (0, 1, 2, ...) that "
                f"returns one, was needed"
            ) from error


def first_call(instance: Instance) -> Tensor:
    """The number of calls before the first, per task; on the host, so that reading it waits for no device."""
    return torch.zeros(() if instance.tasks is None else (instance.tasks,), dtype=torch.int64, device="cpu")


def at_call(owner: str, name: str, schedule: Schedule, calls: Tensor) -> float:
    """The value of a schedule at a call.

    Raises:
        ValueError: it is not positive, or the tasks of the state have been called a different number of times.
    """
    if not callable(schedule):
        return schedule
    seen = sorted(set(calls.reshape(-1).tolist())) if readable(calls) else [0]
    if len(seen) != 1:
        raise ValueError(
            f"{owner} was given a state whose tasks have been called {seen} times, and a schedule of {name} by the "
            f"call; tasks that came together from the start were needed. Pass state=None to start afresh"
        )
    value = schedule(seen[0])
    check_positive(owner, f"{name}({seen[0]})", value)
    return float(value)


# --- leaves


def plus(weight: Tensor | float, a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """b + weight a, where None is a tensor that a loss does not use."""
    if a is None:
        return b
    if b is None or isinstance(weight, Tensor):
        return weight * a if b is None else b + weight * a
    return torch.add(b, a, alpha=weight)


def combined(weight: Tensor | float, a: PartialLeaves, b: PartialLeaves) -> PartialLeaves:
    """b + weight a, leaf by leaf."""
    return tuple(plus(weight, one, other) for one, other in zip(a, b, strict=True))


def times(weight: Tensor | float, leaves: PartialLeaves) -> PartialLeaves:
    """Weight times leaves; the number 0 leaves nothing."""
    nothing = not isinstance(weight, Tensor) and weight == 0
    return tuple(None if leaf is None or nothing else weight * leaf for leaf in leaves)


def apart(inner: Tree, other: Tree, strength: float) -> Leaves:
    """strength (inner - other)."""
    pairs = zip(tree.tensors(inner), tree.tensors(other), strict=True)
    return tuple(strength * (a - b) for a, b in pairs)


def pull_of(inner: Tree, proximal: Tree, strength: float, used: PartialLeaves) -> PartialLeaves:
    """The gradient of the envelope, strength (inner - proximal); None for a tensor that g does not use, where the
    proximal copy is `inner` itself.
    """
    return tuple(None if g is None else a for a, g in zip(apart(inner, proximal, strength), used, strict=True))


def along(space: Space, direction: PartialLeaves, before: Tree, after: Tree) -> Tensor | float:
    """<direction, after - before>, per task."""
    three = zip(direction, tree.tensors(before), tree.tensors(after), strict=True)
    pairs = [(d, b - a) for d, a, b in three if d is not None]
    return space.dot([d for d, _ in pairs], [b for _, b in pairs]) if pairs else 0.0


def present(leaves: PartialLeaves) -> list[Tensor]:
    """The leaves that are there."""
    return [leaf for leaf in leaves if leaf is not None]


# --- inner problems other than g


def perturbed(oracles: Oracles, nu: float) -> Callable[[int], At]:
    """The inner problem of g + nu f."""

    def at(step: int) -> At:
        def gradient(inner: Tree, batch: Any) -> tuple[Tensor, PartialLeaves]:
            loss, g = oracles.inner_gradient(inner, step)
            if nu == 0:
                return loss, g
            # Two graphs one after the other, not one over both losses: the peak stays that of one gradient.
            # f draws without moving the stream, so that g's draws are those of a side that needs no f.
            after = oracles.generators.peek()
            f_loss, f = oracles.outer_gradient_in_inner(inner)
            oracles.generators.set(after)
            return loss + nu * f_loss, combined(nu, f, g)

        def value(inner: Tree, batch: Any) -> Tensor:
            return oracles.inner_value(inner, batch) + nu * oracles.outer_loss(inner)

        return At(step, oracles.embedding(step).value, gradient, value, oracles.source.along(graph=False))

    return at


def pulled(oracles: Oracles, center: Tree, strength: float) -> Callable[[int], At]:
    """The inner problem of g + strength/2 |y - center|^2."""

    def at(step: int) -> At:
        def pull(inner: Tree) -> tuple[Tensor, Leaves]:
            away = apart(inner, center, strength)
            return 0.5 / strength * oracles.space.dot(away, away), away

        def gradient(inner: Tree, batch: Any) -> tuple[Tensor, PartialLeaves]:
            loss, g = oracles.inner_gradient(inner, step)
            distance, away = pull(inner)
            # A tensor that g does not use stays at the center, where the pull has none.
            return loss + distance, tuple(None if a is None else a + b for a, b in zip(g, away, strict=True))

        def value(inner: Tree, batch: Any) -> Tensor:
            return oracles.inner_value(inner, batch) + pull(inner)[0]

        return At(step, oracles.embedding(step).value, gradient, value, oracles.source.along(graph=False))

    return at


def unbounded(
    space: Space, one: Solution, other: Solution, starts: tuple[Tree, Tree], calm: Tensor | None, *, warm: bool
) -> Tensor | int:
    """UNBOUNDED where a side's gradient has grown while the sides went apart: then it is nu that drove them.

    A side that has a minimum near comes to rest, and its gradient shrinks; in a loop whose steps are too long both
    sides run away alike. Where nu just cancels the curvature, the gradient neither grows nor shrinks, while that of
    the side +nu, `calm`, shrinks. Warm sides begin apart and near rest, where a gradient of nearly nothing may grow: of
    those, one must have gone down as its gradient grew.
    """
    if one.grown is None or other.grown is None:
        return 0
    between, both = _between(space, one.inner, other.inner), (one, other)
    moved = [_between(space, side.inner, start) for side, start in zip(both, starts, strict=True)]
    apart = between > 0.5 * torch.maximum(*moved)
    # Beyond rounding: a loop that starts at rest has a gradient of nothing.
    size = space.norm(tree.tensors(one.inner))
    went = [descended(space, side, start) if warm else apart for side, start in zip(both, starts, strict=True)]
    away = ((one.grown > _RUNAWAY) & went[0]) | ((other.grown > _RUNAWAY) & went[1])
    if calm is not None:
        away = away | ((other.grown > _RESTLESS) & (other.grown > _ALONE * calm) & went[1])
    return code_if(away & apart & (between > 1e-3 * size), Status.UNBOUNDED)


def descended(space: Space, found: Solution, start: Tree) -> Tensor:
    """Whether an inner loop has gone some way, and down, per task; not so where it stays near its rest."""
    size = space.norm(tree.tensors(found.inner))
    far = _between(space, found.inner, start) > 1e-3 * size
    if found.first_loss is None or found.last_loss is None:
        return far & False
    rounding = 10 * torch.finfo(found.last_loss.dtype).eps * (found.first_loss.abs() + found.last_loss.abs())
    return far & (found.last_loss < found.first_loss - rounding)


def _between(space: Space, a: Tree, b: Tree) -> Tensor:
    return space.norm([x - y for x, y in zip(tree.tensors(a), tree.tensors(b), strict=True)])


_RUNAWAY = 2.0
"""How many times its first norm the gradient of a perturbed loss must have for its loop to have run away."""
_RESTLESS, _ALONE = 0.3, 10.0
"""The part of its first norm that is left of the gradient of a loop that gets nowhere, and how many times the part of
the side +nu that must be."""


# --- the gap


@dataclasses.dataclass(frozen=True)
class Gap:
    """The gap q between y and a lower point w, with its derivatives.

    `loss` is g(x, y), `floor` g(x, w), `height` g(x, y) with what weight decay adds to it.
    """

    value: Tensor
    height: Tensor
    loss: Tensor
    floor: Tensor
    in_inner: PartialLeaves
    in_outer: PartialLeaves
    lower_in_outer: PartialLeaves


def gap(instance: Instance, inner: Tree, lower: Tree, steps: int) -> Gap:
    """The gap between `inner` and `lower`, a point found after `steps` steps: 2 inner gradients, on the batch of the
    last step, with the same random numbers.
    """
    oracles = instance.oracles
    before = oracles.generators.peek()
    floor, w_x = oracles.inner_gradient_in_outer(lower, steps)
    oracles.generators.set(before)
    loss, g_y, g_x = oracles.inner_gradients(inner, steps)
    height = loss + decay_value(instance, inner)
    value = height - floor - decay_value(instance, lower)
    return Gap(value, height, loss, floor, rest(instance, inner, g_y), combined(-1.0, w_x, g_x), w_x)


def rest(instance: Instance, inner: Tree, gradient: PartialLeaves) -> PartialLeaves:
    """The gradient and what the optimizer adds to it."""
    update = instance.oracles.dynamics.update
    assert update is not None, "require_rest has been asked"
    with torch.no_grad():
        condition = update.stationarity(tree.like(inner, gradient), inner, instance.oracles.x)
    return tuple(tree.flatten(condition)[0])


def decay_value(instance: Instance, inner: Tree) -> Tensor | float:
    """What the optimizer adds to the gradient, as a loss: half its product with y, as it is linear in y; per task."""
    added = rest(instance, inner, tuple(torch.zeros_like(leaf) for leaf in tree.tensors(inner)))
    return 0.5 * instance.oracles.space.dot(present(added), tree.tensors(inner))


def digits_left(weight: Tensor | float, part: PartialLeaves, grad: PartialLeaves) -> tuple[Tensor | None, Tensor | int]:
    """The decimal digits that rounding leaves of an estimate that holds `weight` times a difference to `part`, and
    DIGITS_LOST where there are none.
    """
    parts, whole = present(part), present(grad)
    if not parts or not whole:
        return None, 0
    eps = torch.finfo(parts[0].dtype).eps
    noise, size = eps * weight * Space().norm(parts), Space().norm(whole)
    share = torch.where(noise > 0, size / torch.where(noise > 0, noise, 1.0), 1 / eps)
    digits = torch.log10(share.clamp(1.0, 1 / eps))
    # (A gradient that an outer loop has brought to zero is below rounding as well: a small weight is no cause of that.)
    return digits, code_if((digits < _DIGITS) & torch.as_tensor(eps * weight > _EATEN), Status.DIGITS_LOST)


_DIGITS, _EATEN = 0.5, 1e-6
"""Fewer decimal digits than these are none; the part of a gradient that rounding must take for it to be the cause."""


# --- moves of y


def start_of(instance: Instance, estimator: Estimator) -> Tree:
    """y_0, of an instance whose inner optimizer says where it rests; what steps share is drawn once."""
    instance.require_rest(estimator)
    return instance.oracles.start()


def step_rate(estimator: Estimator, instance: Instance, rate: float | None) -> float:
    """The step size of the plain gradient steps that a method makes itself: its own, or that of the inner optimizer.

    Raises:
        ValueError: neither says one.
    """
    update = instance.solver.dynamics.update
    found = update.plain_rate if rate is None and update is not None else rate
    if found is None:
        name, other = type(estimator).__name__, type(update).__name__
        raise ValueError(
            f"{name} moves y by plain gradient steps, and the {other} of the solver has no one step size for them "
            f"(momentum, moments, weight decay, or a step size that is a function of x). Write {name}(..., rate=0.1)"
        )
    return found


def moved(inner: Tree, direction: PartialLeaves, rate: float) -> Tree:
    """inner - rate direction; None leaves a tensor where it is."""
    pairs = zip(tree.tensors(inner), direction, strict=True)
    return tree.like(inner, [y if d is None else torch.add(y, d, alpha=-rate) for y, d in pairs])


def unsettled(space: Space, inner: Tree, after: Tree, rate: float, f_y: PartialLeaves) -> Tensor:
    """How far y is from rest, in [0, 1], per task: what moves it, d = (inner - after) / rate, as |d| / (|d| + |df/dy|).

    At rest df/dy is held by the penalty; near 1 y lags behind x, and what it lags, times the penalty, is the estimate.
    """
    drive = space.norm(apart(inner, after, 1 / rate))
    whole = drive + space.norm(present(f_y))
    return torch.where(whole > 0, drive / torch.where(whole > 0, whole, 1.0), 0.0)


def move_health(promised: Tensor, before: Tensor, after: Tensor, inner: Tree) -> Tensor:
    """DIVERGED for a y that is not finite; INNER_UNSTABLE where a step gained nothing of what it promised.

    Args:
        promised: rate |direction|^2, what a short step would gain, per task.
        before: the loss that the step goes down on, where it began, per task.
        after: the same where it ended.
        inner: the moved y.
    """
    size = before.abs() + after.abs()
    rounding = torch.finfo(size.dtype).eps * size
    idle = (before - after < _GAINED * promised) & (promised > _NOTABLE * size + 10 * rounding)
    return worst(code_if(~tree.finite(inner), Status.DIVERGED), code_if(idle, Status.INNER_UNSTABLE))


_GAINED, _NOTABLE = 0.05, 0.05
"""Of what a step promised, the least that must come true, where it promised this part of the loss."""


def penalized_value(instance: Instance, inner: Tree, steps: int, weight: Tensor | float) -> Tensor:
    """f + weight g at a point, without gradients, per task."""
    g = instance.oracles.inner_loss(inner, steps) + decay_value(instance, inner)
    return instance.oracles.outer_loss(inner) + weight * g
