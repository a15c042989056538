"""What single-loop methods share: the directions of one round, how y and v are moved, and what a round says of itself.

    D_y = dg/dy        D_v = H v - df/dy        D_x = df/dx - M v        all at one (y, v, x), on one pair of batches

At rest D_y = 0 and D_v = 0, so that v = H^-1 df/dy and D_x = dF/dx. (The papers carry -v; the house has the sign of the
implicit estimators.)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel.batches import PerStep
from bilevel.engine.oracles import Oracles
from bilevel.engine.point import At
from bilevel.estimators.base import Estimate, Instance
from bilevel.estimators.state import State, per_task
from bilevel.linear.base import SMALL, check_number, epsilon
from bilevel.outcome import Solution, Status, code_if, readable
from bilevel.space import tree
from bilevel.space.inner_product import Space
from bilevel.space.tree import Leaves, PartialLeaves, Tree

Rate = float | Callable[[int], float]
"""A number, or a function of the round (0 for the first that a state knows of) that returns one."""
TOL = SMALL
"""The largest relative residual of v that is called OK where the user does not say."""
_WARM = 10
"""Rounds after which a step that raises the loss it was made on says that it is too long."""
_RISE = 0.01


def check_rate(owner: str, name: str, value: object, high: float = float("inf")) -> None:
    """Raise ValueError unless `value` is a function, or a positive number of at most `high`."""
    if callable(value):
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < float("inf") or value > high:  # type: ignore[operator]
        most = "" if high == float("inf") else f" of at most {high:g}"
        raise ValueError(
            f"{owner} was given {name}={value!r}; a positive number{most} was needed, or a function of the round that "
            f"returns one, such as lambda k: 0.1 / (1 + k) ** 0.5"
        )


def check_tol(owner: str, value: object) -> None:
    """Raise ValueError unless it is a number of at least 0."""
    check_number(owner, "tol", value, 0.0)


def rate_at(owner: str, name: str, rate: Rate, made: int, high: float = float("inf")) -> float:
    """The rate of a round, after `made` rounds.

    Raises:
        ValueError: a function returned something else than a positive number of at most `high`.
    """
    if not callable(rate):
        return rate
    value = rate(made)
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if callable(value) or value is None:
        raise ValueError(f"{owner}'s {name}({made}) returned {value!r}; a positive number was needed")
    check_rate(owner, f"{name}({made})", value, high)
    return float(value)


# --- what is carried


@dataclasses.dataclass(frozen=True)
class Pair(State):
    """Where a round begins: y, v (both like `inner`), and how many rounds were made."""

    inner: Tree = per_task()
    adjoint: Tree = per_task()
    rounds: Tensor = per_task(host=True)


def counted(instance: Instance, state: Any = None) -> Tensor:
    """The number of rounds after this one, one for each task; on the CPU, so that nobody waits for a device."""
    if state is None:
        return torch.ones(() if instance.tasks is None else (instance.tasks,), dtype=torch.long, device="cpu")
    return torch.as_tensor(state.rounds + 1)


def made(state: Any) -> int:
    """The rounds that a state knows of; 0 where its tensors hold no numbers."""
    return 0 if state is None or not readable(state.rounds) else int(state.rounds.max())


def zeros_like(value: Tree) -> Tree:
    """Zeros without memory, for templates and first rounds."""
    return tree.tree_map(lambda leaf: leaf.new_zeros(()).expand(leaf.shape), value)


def begun(instance: Instance, state: Any) -> tuple[Tree, Leaves]:
    """(y, v) of a round; v = 0 at the first."""
    if state is None:
        y = instance.oracles.start()
        return y, tuple(tree.tensors(zeros_like(y)))
    return tree.detach(state.inner), tuple(leaf.detach() for leaf in tree.tensors(state.adjoint))


def template(instance: Instance) -> tuple[Tree, Tree, Tensor]:
    """y, v and the rounds of a state, for comparison."""
    y = instance.oracles.start()
    return y, zeros_like(y), counted(instance)


# What is of the size of x belongs to all tasks together. It is kept in rows, one for each task, so that tasks can be
# taken in other groups the next time: the sum of the rows is what counts.


def spread(instance: Instance, leaves: PartialLeaves) -> tuple[Tensor, ...]:
    """A sum over tasks, as an equal part of it for each; None becomes zero."""
    xs = tree.tensors(instance.outer)
    full = [x.new_zeros(()).expand(x.shape) if leaf is None else leaf for leaf, x in zip(leaves, xs, strict=True)]
    tasks = instance.tasks
    return tuple(full) if tasks is None else tuple((leaf / tasks).expand(tasks, *leaf.shape) for leaf in full)


def gathered(instance: Instance, leaves: Any) -> Leaves:
    """The sum over tasks of what `spread` made."""
    parts = tree.tensors(leaves)
    return tuple(parts) if instance.tasks is None else tuple(leaf.sum(0) for leaf in parts)


def copied(instance: Instance, outer: Tree) -> Tree:
    """x, once for each task."""
    tasks = instance.tasks
    return outer if tasks is None else tree.tree_map(lambda leaf: leaf.expand(tasks, *leaf.shape), outer)


def recovered(instance: Instance, outer: Tree) -> Tree:
    """x from what `copied` made."""
    return tree.detach(outer if instance.tasks is None else tree.tree_map(lambda leaf: leaf[0], outer))


# --- one round


@dataclasses.dataclass(frozen=True)
class Slopes:
    """What a round is made of, at one (y, v, x) and one pair of batches.

    Attributes:
        inner_loss: g, where it is known.
        gradient: dg/dy, a tree like y; None where it was not shared.
        image: H v.
        mixed: M v; None where x does not enter.
        outer_loss: f.
        right: df/dy.
        direct: df/dx; None likewise.
        symmetric: whether H is.
    """

    inner_loss: Tensor | None
    gradient: Tree | None
    image: Leaves
    mixed: PartialLeaves
    outer_loss: Tensor
    right: Leaves
    direct: PartialLeaves
    symmetric: bool = True

    @property
    def residual(self) -> Leaves:
        """D_v."""
        return tuple(a - b for a, b in zip(self.image, self.right, strict=True))

    @property
    def direction(self) -> PartialLeaves:
        """D_x."""
        return minus(self.direct, self.mixed)


def slopes(instance: Instance, y: Tree, v: Leaves) -> Slopes:
    """All of a round from one outer gradient, one inner gradient and one sweep back through it: (H v, M v)."""
    oracles, apart = instance.oracles, instance.batches.curvature is not None
    outer_loss, right, direct = oracles.outer_gradient(y)
    at = oracles.linearize(y, 1, keep=not apart)
    image, mixed = at.mixed(v)
    loss = None if apart else at.loss
    return Slopes(loss, at.gradient, image, mixed, outer_loss, right, direct, at.symmetric)


def check_products(owner: str, instance: Instance, products: int) -> None:
    """Raise ValueError if `Batches.curvature` has batches for fewer products with H than are made."""
    curvature = instance.batches.curvature
    if isinstance(curvature, PerStep) and len(curvature) < products:
        raise ValueError(
            f"{owner} makes {products} products with the inner Hessian, and Batches.curvature is a PerStep of "
            f"{len(curvature)} batches; one for each was needed, or one batch for all"
        )


def mixed_oracles(instance: Instance) -> Oracles:
    """The oracles of an instance whose curvature batches belong to products with H: the mixed one takes the inner."""
    return dataclasses.replace(instance, batches=dataclasses.replace(instance.batches, curvature=None)).oracles


def minus(a: PartialLeaves, b: PartialLeaves) -> PartialLeaves:
    """The difference, where None is zero."""
    return tuple(x if y is None else -y if x is None else x - y for x, y in zip(a, b, strict=True))


def plus(total: PartialLeaves, weight: float, leaves: PartialLeaves) -> PartialLeaves:
    """total + weight leaves, where None is zero."""
    pairs = zip(total, leaves, strict=True)
    return tuple(a if b is None else weight * b if a is None else torch.add(a, b, alpha=weight) for a, b in pairs)


def averaged(carried: PartialLeaves, theta: float, new: PartialLeaves) -> PartialLeaves:
    """(1 - theta) h + theta D; what is at rest stays as it is, to rounding."""
    return plus(carried, theta, minus(new, carried))


def storm(new: PartialLeaves, eta: float, carried: PartialLeaves, old: PartialLeaves) -> PartialLeaves:
    """D(now) + (1 - eta) (d - D(before)), both D on one batch: momentum that takes the motion into account."""
    return new if eta == 1 else plus(new, 1 - eta, minus(carried, old))


def advanced(instance: Instance, y: Tree, at: Slopes, shift: PartialLeaves | None = None) -> Solution:
    """y after the inner solver's steps, the first one along the gradient of `at`.

    Args:
        instance: the problem.
        y: where the round begins.
        at: what is known there.
        shift: added to dg/dy in every step.
    """
    oracles = instance.oracles

    def point(step: int) -> At:
        point = oracles.point(step)
        point = point if shift is None else point.shifted(shift)
        if step or at.gradient is None:
            return point
        gradient = at.gradient if shift is None else _shifted(y, at.gradient, shift)
        return point.told(y, at.inner_loss, gradient)

    found = instance.solve(y, at=point)
    if shift is not None:  # the losses are not those that the steps go down
        found = dataclasses.replace(found, promised=None, unsteady=None, rise=None)
    return found


def _shifted(y: Tree, gradient: Tree, shift: PartialLeaves) -> Tree:
    return tree.like(y, tree.accumulate(tuple(tree.flatten(gradient)[0]), shift))


def moved(space: Space, v: Leaves, rate: float, residual: Leaves) -> Leaves:
    """v - rate D_v."""
    return space.axpy(-rate, residual, v)


# --- what a round says of itself


@dataclasses.dataclass(frozen=True)
class Judged:
    """The relative residual of v per task, and what it and the curvature along v say."""

    residual: Tensor
    codes: tuple[Tensor | int, ...]


def judged(
    space: Space,
    v: Leaves,
    at: Slopes,
    rate: float,
    tol: float,
    after: Leaves | None = None,
    image: Leaves | None = None,
) -> Judged:
    """MAX_STEPS where |H v - df/dy| / |df/dy| is above `tol`; NOT_CONTRACTIVE where a step of v is longer than 2 over
    the curvature along v, so that it grows there, or where `after`, what became of v, is not finite;
    NEGATIVE_CURVATURE where the curvature is negative. `image` is H v where that of `at` is a mean over several v.
    """
    size = space.norm(at.right)
    residual = space.norm(at.residual) / torch.where(size > 0, size, 1.0)
    met = (residual <= max(tol, min(100 * epsilon(at.right), SMALL))) & (residual < 1 - epsilon(at.right))
    codes = [code_if(~met, Status.MAX_STEPS)]
    if after is not None:
        codes.append(code_if(~tree.finite(list(after)), Status.NOT_CONTRACTIVE))
    if at.symmetric:
        length = space.norm(v)
        part = rate * (
            space.dot(v, at.image if image is None else image).to(length.dtype)
            / torch.where(length > 0, length, 1.0).square()
        )
        codes += [
            code_if((part > 2 + _ROUND * epsilon(v) ** 0.5) | ~part.isfinite(), Status.NOT_CONTRACTIVE),
            code_if(part < -_ROUND * epsilon(v) ** 0.5, Status.NEGATIVE_CURVATURE),
        ]
    return Judged(residual, tuple(codes))


_ROUND = 10.0


def grew(judgement: Judged, space: Space, at: Slopes, first: Tensor | None, before: Leaves) -> Judged:
    """What it says where steps on one and the same system made its residual larger than `first`.

    NEGATIVE_CURVATURE where the curvature along `before`, the residual at the last step, is negative, for which no rate
    is short enough; else NOT_CONTRACTIVE.
    """
    size, larger = space.norm(at.residual), 1 + _ROUND * epsilon(at.right)
    if first is None:
        return judgement
    # (What is left of a v that had settled is rounding.)
    above = size > first * larger + _ROUND * epsilon(at.right) * (space.norm(at.image) + space.norm(at.right))
    # A step on the residual r is r - rate H r, so that it gives r'Hr without a product.
    bends = (
        space.dot(before, space.axpy(-1.0, before, at.residual)).to(size.dtype)
        > _ROUND * epsilon(before) * size.square()
    )
    codes = (code_if(above & ~bends, Status.NOT_CONTRACTIVE), code_if(above & bends, Status.NEGATIVE_CURVATURE))
    return dataclasses.replace(judgement, codes=(*judgement.codes, *codes))


def finished(
    instance: Instance,
    found: Solution,
    at: Slopes,
    grad: PartialLeaves,
    judgement: Judged,
    state: Any,
    *,
    here: Tree | None = None,
    shift: PartialLeaves | None = None,
    stats: dict[str, Any] | None = None,
) -> Estimate:
    """The end of a round.

    Args:
        instance: the problem.
        found: y after the round.
        at: the directions.
        grad: the estimate.
        judgement: of v.
        state: what is carried on, with the fields of `Pair`.
        here: where the directions were taken, if not at `found.inner`.
        shift: what was added to dg/dy.
        stats: further figures.
    """
    # (A copy: `here` may be a tensor of the state that was given.)
    y = found.inner if here is None else tree.tree_map(torch.clone, here)
    last = at.inner_loss
    codes = [*judgement.codes]
    if here is not None:
        codes.append(_health(instance, found, here, shift, made(state)))
        found = dataclasses.replace(found, first_loss=None, promised=None)
    figures = {"linear_residual": judgement.residual, "rounds": state.rounds}
    return instance.finish(
        found,
        grad,
        at.outer_loss,
        inner=y,
        inner_loss=last,
        codes=codes,
        stats=figures | (stats or {}),
        state=state,
        next_inner=found.inner if here is not None else None,
    )


def _health(instance: Instance, found: Solution, start: Tree, shift: PartialLeaves | None, rounds: int) -> Tensor:
    """What the loss after the steps says of them, on the batch that they were made on; one evaluation."""
    oracles = instance.oracles
    before = oracles.generators.peek()
    last = oracles.inner_loss(found.inner, found.steps)
    known = found if shift is None else dataclasses.replace(found, first_loss=None)
    code = instance.health(known, found.inner, last)
    update, first = instance.solver.dynamics.update, found.first_loss
    drew = not oracles.generators.same(before, oracles.generators.peek())
    if found.steps != 1 or rounds <= _WARM or drew or first is None or update is None or update.plain_rate is None:
        return code
    # A plain step of length c goes down g + <shift, y> wherever c is below 2 over the curvature along it.
    change = last - first
    if shift is not None:
        ends = zip(tree.tensors(found.inner), tree.tensors(start), shift, strict=True)
        along = [(a - b, s) for a, b, s in ends if s is not None]
        change = change + oracles.space.dot(*zip(*along, strict=True)) if along else change
    rose = change > _RISE * (first.abs() + last.abs())
    return torch.maximum(code, code_if(rose, Status.INNER_UNSTABLE))
