"""LV-HBA: a lower level with constraints, by the value function of its proximal Lagrangian. Single loop.

    min_x f(x, y)   with y in argmin { g(x, y): G(x, y) <= 0 }
    v(x, y, z) = min_w max_{l in L} g(x, w) + l G(x, w) + |w - y|^2 / (2 gamma) - |l - z|^2 / (2 gamma_dual)
    w: K steps on it
    l <- clip(l + rate_dual (G(x, w) - (l - z) / gamma_dual)),    z <- clip(z + rate_dual (l - z) / gamma_dual)
    p = y - rate (df/dy / c + dg/dy(x, y) - (y - w) / gamma),    y <- P(p, x), the nearest point with G <= 0
    x's direction: df/dx + c (dg/dx(x, y) - dg/dx(x, w) - l dG/dx(x, w) + m dG/dx(x, y))
    where m dG/dy = (p - P(p, x)) / rate

| | inner gradients | outer gradients | HVPs | mixed | memory |
| --- | --- | --- | --- | --- | --- |
| LVHBA | K + 2 | 1 | 0 | 0 | y, w, p, a gradient, l and z, one graph; independent of K |

and K + 2 gradients of the constraint, and three projections.

Wins: constraints of the lower level that x enters, where the solution has no derivative that an implicit method finds
without the active set. First derivatives alone.
Fails: four step sizes; a projection on the constraint must be at hand; the bias is that of `MEHA`.

Reference: Yao, Yu, Zeng and Zhang 2024, Constrained Bi-Level Optimization: Proximal Lagrangian Value Function Approach
and Hessian-free Algorithm, arXiv 2401.16164; the steps as in the released toy (SUSTech-Optimization/LV-HBA).
Differences from peers: there (x, y) is projected on {G <= 0} jointly. Here x belongs to your outer optimizer: y is
projected at the x of the call, and the pressure m of the constraint on y, which the projection takes up, is passed on
to x through the derivative of |p - P(p, x)|^2 / 2, so that both rest at the same points. x's direction is c times the
paper's: an estimate of dF/dx.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel.batches import PerStep
from bilevel.engine import spans
from bilevel.engine.oracles import Oracles
from bilevel.engine.point import At
from bilevel.estimators.base import Estimate, Estimator, Instance, Path
from bilevel.estimators.penalty.base import (
    Schedule,
    apart,
    at_call,
    check_positive,
    check_schedule,
    combined,
    digits_left,
    first_call,
    moved,
    rest,
    start_of,
    step_rate,
    unsettled,
)
from bilevel.estimators.state import State, per_task
from bilevel.outcome import Solution, Status, code_if, readable, worst
from bilevel.space import tree
from bilevel.space.inner_product import Space
from bilevel.space.tree import PartialLeaves, Tree


@dataclasses.dataclass(frozen=True)
class LVHBAState(State):
    """The moved y and the proximal copy w, like the inner variable; the multipliers l and their proximal center z, like
    the constraint; the number of calls that made them; how far all of it moved in the last one, and how many more
    calls moved it farther than the one before than did not.
    """

    inner: Tree = per_task()
    proximal: Tree = per_task()
    multipliers: Tensor = per_task()
    center: Tensor = per_task()
    calls: Tensor = per_task(host=True)
    motion: Tensor = per_task()
    growths: Tensor = per_task()


@dataclasses.dataclass(frozen=True)
class LVHBA(Estimator):
    """Lower-level constraints by multipliers and a projection; one joint step of y and x a call.

    The solver moves w: K steps of its optimizer from where it was left (the paper: 1), the multipliers with it. y is
    moved by one plain gradient step a call, and projected, to `hg.next_inner`; x by your outer optimizer.

    Args:
        constraint: G, called like a loss as `constraint(inner, outer, batch)`; returns a tensor of any shape, <= 0
            where y is allowed (= 0 with `equality`), differentiable in y and x.
        projection: called as `projection(inner, outer, batch)`: the nearest y that is allowed, differentiable in
            `outer` where G is.
        c: the penalty: a number, or a function of the call such as `Polynomial(start=0.025, power=0.3)`.
        gamma: of the proximal term in w.
        gamma_dual: of that in the multipliers.
        rate: step size of y; None for that of the solver's optimizer, which must be SGD with a number and neither
            momentum nor decay.
        rate_dual: step size of the multipliers and of z; None for `rate`.
        limit: multipliers lie in [0, limit], or [-limit, limit] with `equality`.
        equality: the constraint is G = 0.

    Bias: O(1 / c) once y, w and l have settled; where no constraint is active, that of `MEHA`.

    State: `LVHBAState`. Its copies take the place of `inner` and of Problem.init.

    The adapted `hg.inner` is the y that the direction was taken at, which is allowed, and the losses are those at it.
    Stats: `c`; `violation`, the largest G at w (its absolute value with `equality`), per task; `digits`, the decimal
    digits that rounding leaves; `unsettled`, in [0, 1]: 0 where y rests, near 1 where it is the lag of y that is seen,
    and no hypergradient.

    Memory: independent of K; linear in T and in the number of constraints.

    Raises:
        TypeError: the constraint returned something else than a floating tensor.
        ValueError: an argument is out of range, no step size is known, the solver stops by itself, x enters the
            constraint and not the projection, the projection ends off the constraint, the solver's dynamics is no
            optimizer that says where it rests, or x enters only through Problem.init or a hyper-parameter.

    Example:
        y in argmin (y - x)^2 / 2 with y <= 1 is 1 at x = 3, and no longer moves with x: dF/dx = x - 2.

        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: (y - x) ** 2 / 2, lambda y, x, b: y**2 / 2 + (x - 2) ** 2 / 2)
        >>> estimator = bl.estimators.LVHBA(lambda y, x, b: y - 1, lambda y, x, b: y.clamp_max(1.0), c=100.0)
        >>> x, state = torch.tensor(3.0), None
        >>> for _ in range(200):
        ...     hg = bl.hypergradient(problem, x, torch.tensor(0.0), bl.Batches(None, None), state=state,
        ...         solver=bl.Descent(bl.SGD(lr=0.3), steps=1), estimator=estimator)
        ...     state = hg.state
        >>> hg.inner, state.multipliers, round(hg.grad.item(), 3)
        (tensor(1.), tensor(2.0000), 1.0)
    """

    sharded = True

    constraint: Callable[[Tree, Tree, Any], Tensor]
    projection: Callable[[Tree, Tree, Any], Tree]
    c: Schedule
    gamma: float = 1.0
    gamma_dual: float = 1.0
    rate: float | None = None
    rate_dual: float | None = None
    limit: float = 1e6
    equality: bool = False

    def __post_init__(self) -> None:
        for name in ("constraint", "projection"):
            if not callable(getattr(self, name)):
                raise TypeError(f"LVHBA was given {name}={getattr(self, name)!r}; a function was needed")
        check_schedule("LVHBA", "c", self.c)
        for name, none in (("gamma", False), ("gamma_dual", False), ("rate", True), ("rate_dual", True)):
            check_positive("LVHBA", name, getattr(self, name), none=none)
        check_positive("LVHBA", "limit", self.limit)

    sees = frozenset({Path.INNER_LOSS, Path.OUTER_LOSS})

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        return "off by O(1 / c) once y and the multipliers have settled, and before by how far they are from there"

    def init_state(self, instance: Instance) -> LVHBAState:
        start = instance.oracles.start()
        zeros = torch.zeros_like(self._values(instance, start))
        still = instance.oracles.space.norm([torch.zeros_like(leaf) for leaf in tree.tensors(start)])
        return LVHBAState(start, start, zeros, zeros, first_call(instance), still, still)

    def estimate(self, instance: Instance, state: LVHBAState | None) -> Estimate:
        self._check(instance)
        start_of(instance, self)
        oracles, steps = instance.oracles, instance.solver.max_steps
        if not isinstance(instance.batches.inner, PerStep):
            oracles.embedding(0)
        state = self.init_state(instance) if state is None else state
        c, rate = at_call("LVHBA", "c", self.c, state.calls), step_rate(self, instance, self.rate)
        at = oracles.point(max(steps - 1, 0))
        y = _like(at.apply(self.projection, tree.detach(state.inner)), state.inner)
        with spans.span(spans.INNER):
            w, multipliers = self._saddle(instance, tree.detach(state.proximal), y, state, rate)
        with spans.span(spans.HYPERGRADIENT):
            before = oracles.generators.peek()
            _, w_x = oracles.inner_gradient_in_outer(w, steps)
            oracles.generators.set(before)
            loss, g_y, g_x = oracles.inner_gradients(y, steps)
            outer_loss, f_y, f_x = oracles.outer_gradient(y)
            g = rest(instance, y, g_y)
            direction = combined(1 / c, f_y, combined(-1.0, apart(y, w, 1 / self.gamma), g))
            free = moved(y, direction, rate)
            after = _like(tree.detach(at.apply(self.projection, free)), free)
            held = self._in_outer(instance, _Held, {"inner": w, "multipliers": multipliers}, steps)
            pressed = self._in_outer(instance, _Distance, free, steps)
            self._check_projection(instance, free, after, pressed)
            between = combined(1 / rate, pressed, combined(-1.0, held, combined(-1.0, w_x, g_x)))
            grad = combined(c, between, f_x)
            center = self._clipped(
                state.center + self._rate_dual(rate) / self.gamma_dual * (multipliers - state.center)
            )
            lag = unsettled(oracles.space, y, after, rate / c, f_y)
            motion, growths, restless = self._growth(oracles.space, state, after, w, multipliers)
            digits, rounded = digits_left(c, w_x, grad)
            return instance.finish(
                Solution(y, steps, 0),
                grad,
                outer_loss,
                inner_loss=loss,
                codes=[code_if(~tree.finite([*tree.tensors(after), multipliers]), Status.DIVERGED), restless, rounded],
                stats={"c": c, "violation": self._violation(instance, w), "unsettled": lag, "digits": digits},
                state=LVHBAState(after, w, multipliers, center, state.calls + 1, motion, growths),
                next_inner=after,
            )

    def _growth(
        self, space: Space, state: LVHBAState, inner: Tree, w: Tree, multipliers: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """How far y, w and the multipliers moved, and how many more calls that has grown in, or was most of them,
        than not, per task; and INNER_UNSTABLE where that goes on and on, or a multiplier is held by `limit` alone.
        """
        pairs = [(inner, state.inner), (w, state.proximal)]
        ends = [leaf for end, _ in pairs for leaf in tree.tensors(end)] + [multipliers]
        begins = [leaf for _, begin in pairs for leaf in tree.tensors(begin)] + [state.multipliers]
        motion = space.norm([a - b for a, b in zip(ends, begins, strict=True)]).to(state.motion.dtype)
        grown = (motion > state.motion) & (state.motion > 0) & (motion > _NOTABLE * space.norm(ends))
        growths = torch.where(grown, state.growths + 1, 0.0)
        held = multipliers.detach().abs() >= self.limit
        return (
            motion,
            growths,
            worst(code_if(growths >= _RUNAWAY, Status.INNER_UNSTABLE), code_if(held, Status.INNER_UNSTABLE)),
        )

    def _saddle(self, instance: Instance, w: Tree, y: Tree, state: LVHBAState, rate: float) -> tuple[Tree, Tensor]:
        """K steps down in w and up in the multipliers."""
        oracles, constraint, multipliers = instance.oracles, self._oracles(instance, _Held), state.multipliers
        moving, count = oracles.begin(w), len(tree.tensors(w))
        for step in range(instance.solver.max_steps):
            loss, g = oracles.inner_gradient(w, step)
            with spans.unheard(), oracles.generators.kept():
                _, held = constraint.inner_gradient({"inner": w, "multipliers": multipliers}, step)
            away = combined(1.0, apart(w, y, 1 / self.gamma), held[:count])
            idle = [a is None and b is None for a, b in zip(g, held[:count], strict=True)]
            down = tuple(None if i else d for i, d in zip(idle, combined(1.0, g, away), strict=True))
            value, pull = held[count], (multipliers - state.center) / self.gamma_dual
            w, moving = oracles.step(w, moving, _known(oracles, step, loss, down))
            # Of a tensor that neither uses, the nearest point to y is y.
            three = zip(idle, tree.tensors(w), tree.tensors(y), strict=True)
            w = tree.like(w, [b if i else a for i, a, b in three]) if any(idle) else w
            up = -pull if value is None else value - pull
            multipliers = self._clipped(multipliers + self._rate_dual(rate) * up)
        return w, multipliers

    def _rate_dual(self, rate: float) -> float:
        return rate if self.rate_dual is None else self.rate_dual

    def _clipped(self, multipliers: Tensor) -> Tensor:
        return multipliers.clamp(-self.limit if self.equality else 0.0, self.limit)

    def _values(self, instance: Instance, y: Tree) -> Tensor:
        """G at y, with a leading task dimension where there are tasks."""
        value = instance.oracles.point(0).apply(self.constraint, y)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            given = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise TypeError(f"LVHBA's constraint returned {given}; a floating tensor, <= 0 where allowed, was needed")
        return value.detach()

    def _violation(self, instance: Instance, w: Tree) -> Tensor:
        value = self._values(instance, w)
        value = value.abs() if self.equality else value
        return value.reshape(value.shape[0], -1).amax(1) if instance.tasks is not None else value.amax()

    def _check(self, instance: Instance) -> None:
        if not instance.solver.fixed:
            raise ValueError(
                f"LVHBA moves y and its multipliers together, and {type(instance.solver).__name__} would stop by the "
                f"gradient of y alone. Write Descent(optimizer, steps)"
            )

    def _check_projection(self, instance: Instance, free: Tree, after: Tree, pressed: PartialLeaves) -> None:
        """Raise ValueError where x moves the constraint and not the projection, or where the projection ends off the
        constraint; asked once per problem.
        """
        asked = instance.problem.memo.setdefault(("projections", id(self.projection)), [])
        if asked:
            return
        acts = self._in_outer(instance, _Total, free, 1)
        names = tree.names(instance.outer)
        lost = [name for name, a, b in zip(names, acts, pressed, strict=True) if a is not None and b is None]
        if lost:
            raise ValueError(
                f"LVHBA's projection does not depend on the outer variable {', '.join(lost)}, and its constraint does: "
                f"how the constraint presses on x would be lost. Project on the constraint at `outer`, with torch's "
                f"own operators, without .detach() or torch.no_grad()"
            )
        with instance.oracles.generators.kept():
            off, size = self._violation(instance, after), self._values(instance, free).abs()
        wrong = off.max() > 1e-3 * (1 + size.max())
        if readable(wrong) and bool(wrong):
            raise ValueError(
                f"LVHBA's projection ends where its constraint is {float(off.max()):.3g}; at most 0 "
                f"({'in absolute value, ' if self.equality else ''}up to rounding) was needed. It must return the "
                f"nearest y with constraint(y, outer, batch) <= 0"
            )
        asked.append(self.projection)  # (kept, so that its id stays its own)

    def _oracles(self, instance: Instance, loss: type["_Derived"]) -> Oracles:
        """The oracles of a loss made of the constraint; remembered with the problem, as an engine's work is."""
        key = (loss.__name__, id(self.constraint), id(self.projection))
        if key not in instance.problem.memo:
            made = loss(self.constraint, self.projection)
            instance.problem.memo[key] = dataclasses.replace(instance.problem, inner_loss=made, init=None)
        problem, start = instance.problem.memo[key], instance.oracles.start()
        return dataclasses.replace(instance, problem=problem, inner=start).oracles

    def _in_outer(self, instance: Instance, loss: type["_Derived"], point: Tree, steps: int) -> PartialLeaves:
        """The gradient in x of a loss made of the constraint."""
        with spans.unheard(), instance.oracles.generators.kept():
            return self._oracles(instance, loss).inner_gradient_in_outer(point, steps)[1]


def _like(nearest: Tree, inner: Tree) -> Tree:
    """What the projection returned, in the order of y: the entries of a dict match by key."""
    return tree.ordered(nearest, inner, "LVHBA's projection")


@dataclasses.dataclass(frozen=True, eq=False)
class _Derived:
    constraint: Callable[[Tree, Tree, Any], Tensor]
    projection: Callable[[Tree, Tree, Any], Tree]

    def __call__(self, inner: Tree, outer: Tree, batch: Any) -> Tensor:
        """The loss."""
        raise NotImplementedError


class _Held(_Derived):
    """l G as a loss of the pair (w, l): its gradient in l is G."""

    def __call__(self, inner: Tree, outer: Tree, batch: Any) -> Tensor:
        return (inner["multipliers"] * self.constraint(inner["inner"], outer, batch)).sum()


class _Distance(_Derived):
    """|p - P(p, x)|^2 / 2: its derivative in x is the pressure of the constraint times that of the constraint."""

    def __call__(self, inner: Tree, outer: Tree, batch: Any) -> Tensor:
        near = tree.tensors(_like(self.projection(inner, outer, batch), inner))
        return torch.stack([(a - b).square().sum() for a, b in zip(tree.tensors(inner), near, strict=True)]).sum() / 2


class _Total(_Derived):
    """The sum of the constraint, to see what it depends on."""

    def __call__(self, inner: Tree, outer: Tree, batch: Any) -> Tensor:
        return self.constraint(inner, outer, batch).sum()


def _known(oracles: Oracles, step: int, loss: Tensor, gradient: PartialLeaves) -> At:
    """A point whose gradient is at hand."""

    def given(inner: Tree, batch: Any) -> tuple[Tensor, PartialLeaves]:
        return loss, gradient

    return At(step, None, given, lambda inner, batch: loss, oracles.source.along(graph=False))


_RUNAWAY, _NOTABLE, _LEAP = 8, 0.01, 0.5
"""Calls, less others, whose motion is longer than the one before; the part of the whole that such a motion must be;
and the part that no motion of a loop that settles is call after call."""
