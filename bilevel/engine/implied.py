"""The implicit function theorem as a part of a graph: its product can be differentiated again, any number of times.

    x_bar = -(dc/dx)' v,    (H + damping I)' v = w,    H = dc/dy at (y, x)
    a cotangent u of v:    (H + damping I) z = u,    w_bar = z,    (y_bar, x_bar) = -d<H z, v>/d(y, x)

| | inner gradients | products | memory |
| --- | --- | --- | --- |
| product | 2 | those of one solve, 1 mixed | a graph of dc/dx, which the result keeps |
| its derivative | 3 | those of one solve, 1 of third order | the same |

y and x are taken as they come: y has its own graph, to x, through the layer whose solution it is.
"""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from bilevel.engine import autodiff, spans
from bilevel.engine.again import connected
from bilevel.engine.oracles import Oracles
from bilevel.engine.refusals import restless
from bilevel.engine.replay import State
from bilevel.linear.base import LinearSolver
from bilevel.linear.operator import LinearOperator
from bilevel.outcome import LinearSolution, readable
from bilevel.space import tree
from bilevel.space.tree import Leaves, PartialLeaves, Tree


@dataclasses.dataclass(frozen=True)
class Condition:
    """The stationarity condition c(y, x) at the end of an inner loop, and how systems with its H are solved.

    Args:
        oracles: of the instance.
        inner: y, for its structure.
        steps: that the loop took.
        linear: the solver.
        random: the generators' states that each evaluation begins with.
        modes: opens the modes (autocast) of the forward.
        told: hears of each solve.
    """

    oracles: Oracles
    inner: Tree
    steps: int
    linear: LinearSolver
    random: State
    modes: Callable[[], AbstractContextManager[None]]
    told: Callable[[LinearSolution], None]

    def __call__(self, ys: Sequence[Tensor], xs: Sequence[Tensor]) -> list[Tensor]:
        """c with its graph in y and x; zeros where nothing enters."""
        generators, inner = self.oracles.generators, tree.like(self.inner, ys)
        oracles = connected(self.oracles, tree.like(self.oracles.x, xs))
        step, now = max(self.steps - 1, 0), generators.peek()
        apart, batch = oracles.batches.curvature is not None, oracles.batches.curvature_at(step)
        generators.set(self.random)
        try:
            with self.modes():
                embedded = (
                    oracles.evaluation.embed(oracles.attached, batch)
                    if apart
                    else oracles.differentiable_embedding(step)
                )
                at = oracles.differentiable_point(step, embedded)
                value = oracles.dynamics.stationarity(inner, oracles.attached, at)
        finally:
            generators.set(now)
        if value is None:
            raise ValueError(restless(oracles.dynamics, "an estimator at the solution"))
        return list(autodiff.filled(tuple(tree.flatten(tree.ordered(value, inner))[0]), ys))


def product(
    condition: Condition, ys: Sequence[Tensor], xs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> PartialLeaves:
    """-(dc/dx)' (H + damping I)'^-1 w, with its graph in y, x and w; None for an x that does not enter."""
    with torch.enable_grad():
        v = _Solved.apply(condition, True, len(ys), *cotangents, *ys, *xs)
        _, around, value = _here(condition, ys, xs)
        with spans.span(spans.MIXED):
            found = autodiff.grad(value, around, v, create_graph=True)
        return tuple(None if leaf is None else -leaf for leaf in found)


def rows(
    condition: Condition, ys: Sequence[Tensor], xs: Sequence[Tensor], cotangents: Sequence[Sequence[Tensor]]
) -> list[PartialLeaves]:
    """The numbers of `product` for many w, at one graph and with one preparation of the solver."""
    space = condition.oracles.space
    with torch.enable_grad():
        y, x = ([leaf.detach().requires_grad_(leaf.requires_grad) for leaf in each] for each in (ys, xs))
        operator = _Jacobian(condition, y, x, transposed=True)
    solver, found = condition.linear.prepare(operator, space), list[PartialLeaves]()
    for b in cotangents:
        solved = solver.solve(tuple(b))
        condition.told(solved)
        with spans.span(spans.MIXED):
            mixed = autodiff.grad(operator.condition, x, solved.value, retain_graph=True)
        found.append(tuple(None if leaf is None else -leaf for leaf in mixed))
    return found


def _here(
    condition: Condition, ys: Sequence[Tensor], xs: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """y, x and c there, in which one can be moved without the other: y is a function of x in the caller's graph."""
    y, x = [leaf.view_as(leaf) for leaf in ys], [leaf.view_as(leaf) for leaf in xs]
    return y, x, condition(y, x)


class _Solved(torch.autograd.Function):
    """(H + damping I)'^-1 b, or without the transpose, as a function of b, y and x."""

    @staticmethod
    def forward(ctx: Any, condition: Condition, transposed: bool, count: int, *given: Tensor) -> tuple[Tensor, ...]:
        ctx.condition, ctx.transposed, ctx.count = condition, transposed, count
        b, y, x = given[:count], given[count : 2 * count], given[2 * count :]
        with torch.enable_grad():
            ys = [leaf.detach().requires_grad_() for leaf in y]
            operator = _Jacobian(condition, ys, [leaf.detach() for leaf in x], transposed=transposed)
        space = condition.oracles.space
        if readable(b[0]) and not any(bool(leaf.any()) for leaf in b):
            value: Leaves = tuple(torch.zeros_like(leaf) for leaf in b)
        else:
            found = condition.linear.solve(operator, tuple(leaf.detach() for leaf in b), tasks=space.tasks)
            condition.told(found)
            value = tuple(leaf.detach() for leaf in found.value)
        ctx.save_for_backward(*y, *x, *value)
        return value

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        saved, count, again = ctx.saved_tensors, ctx.count, torch.is_grad_enabled()
        y, x, v = saved[:count], saved[count:-count], saved[-count:]
        z = _Solved.apply(ctx.condition, not ctx.transposed, count, *cotangents, *y, *x)
        left, right = (v, z) if ctx.transposed else (z, v)
        with torch.enable_grad(), spans.span(spans.HVP):
            ys, xs, value = _here(ctx.condition, y, x)
            row = autodiff.grad(value, ys, left, create_graph=True)
            pairs = [(leaf, w) for leaf, w in zip(row, right, strict=True) if leaf is not None]
            found = autodiff.grad([leaf for leaf, _ in pairs], [*ys, *xs], [w for _, w in pairs], create_graph=again)
        return (None, None, None, *z, *(None if leaf is None else -leaf for leaf in found))


class _Jacobian(LinearOperator):
    """v -> H' v, or v -> H v by the double-backward trick (H' u is linear in u)."""

    def __init__(self, condition: Condition, ys: list[Tensor], xs: list[Tensor], *, transposed: bool) -> None:
        self.symmetric, self._transposed = condition.oracles.dynamics.symmetric, transposed
        self.condition = condition(ys, xs)
        self._back: tuple[Sequence[Tensor], Sequence[Tensor]] = self.condition, ys
        self._there: tuple[Sequence[Tensor], Sequence[Tensor]] | None = self._back if self.symmetric else None

    def matvec(self, v: Leaves) -> Leaves:
        """The product; 1 sweep."""
        return self._product(v, back=self._transposed)

    def rmatvec(self, v: Leaves) -> Leaves:
        """The transposed product; 1 sweep."""
        return self._product(v, back=not self._transposed)

    def _product(self, v: Leaves, *, back: bool) -> Leaves:
        with spans.span(spans.HVP):
            outputs, inputs = self._back if back else self._pushing()
            return autodiff.filled(autodiff.grad(outputs, inputs, v, retain_graph=True), inputs)

    def _pushing(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        if self._there is None:
            with torch.enable_grad():
                value, ys = self._back
                weights = [torch.zeros_like(leaf).requires_grad_() for leaf in ys]
                rows = autodiff.grad(value, ys, weights, create_graph=True)
                self._there = autodiff.filled(rows, ys), weights
        return self._there
