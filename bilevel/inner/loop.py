"""The loop of every inner solver: the dynamics moves y, the stopping rule looks on.

| | inner gradients | memory |
| --- | --- | --- |
| run | one per step, one more where a rule looks at the residual | y, its gradient, the state, one graph |
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from bilevel.inner.base import InnerSolver
from bilevel.inner.dynamics import Dynamics, Point
from bilevel.outcome import Solution, Status, code_if, settled, worst
from bilevel.space import tree
from bilevel.space.inner_product import NARROW, Space
from bilevel.space.tree import Tree

# On a GPU the test waits for the device; between tests tasks that rest are already frozen, so only work is lost, never
# accuracy.
_CHECK_EVERY_ON_GPU = 10


class Moves(Protocol):
    """What the loop needs of the oracles."""

    space: Space
    dynamics: Dynamics

    def begin(self, inner: Tree) -> Any:
        """The state before the first step."""

    def step(self, inner: Tree, state: Any, at: Any) -> tuple[Tree, Any]:
        """One step of the dynamics."""

    def stationarity(self, inner: Tree, at: Any) -> list[Tensor]:
        """The tensors that are zero where the dynamics rests."""


class Seen(Point, Protocol):
    """A point that remembers what a loop is judged by there."""

    @property
    def shown(self) -> Tensor | None:
        """What was reported, else the loss at the first gradient taken, per task and without a graph; None before."""

    @property
    def reported(self) -> bool:
        """Whether that is another number than the loss."""

    @property
    def vanishing(self) -> bool:
        """Whether it is half the square of a residual that is zero where the loop rests."""

    @property
    def code(self) -> Tensor | int:
        """What the step that was made says of itself."""


Visit = Callable[[int, Tree, Any], None]
"""Called with (step, y, state) before anything of a step is computed, also of the one at which a rule stops."""
Moving = Callable[[Tensor], None]
"""Called with the tasks that a step moves, where a rule lets tasks rest."""
Ended = Callable[[Tree, Any], None]
"""Called with (y, state) at the end."""


def run(
    solver: InnerSolver,
    moves: Moves,
    start: Tree,
    at: Callable[[int], Seen],
    *,
    visit: Visit | None = None,
    moving: Moving | None = None,
    masks: Sequence[Tensor] | None = None,
    steady: bool = True,
    ended: Ended | None = None,
) -> Solution:
    """Move y from `start` until the rule is content.

    Args:
        solver: the rule.
        moves: the oracles; with or without a graph is theirs to choose.
        start: y_0.
        at: the inner problem of a step.
        visit: sees every iterate before it is moved.
        moving: sees which tasks are moved.
        masks: the tasks that each step moves, where an earlier pass has found them out.
        ended: sees the last iterate and the state that belongs to it.
        steady: whether the losses of all steps are of one batch, so that they say how the loop moves; else nobody asks.
    """
    y, state = start, moves.begin(start)
    every = _CHECK_EVERY_ON_GPU if tree.tensors(start)[0].is_cuda else 1
    first = last = rise = residual = promised = entered = left = moving_on = None
    code: Tensor | int = 0
    said: Tensor | int = 0
    reported = False
    for step in range(solver.max_steps + (0 if solver.fixed else 1)):
        if visit is not None:
            visit(step, y, state)
        point, live = at(step), None
        if not solver.fixed:
            residual = moves.space.norm(moves.stationarity(y, point)).detach()
            live = ~torch.as_tensor(solver.solved(residual), device=residual.device)
            first = point.shown if first is None else first
            entered = residual if entered is None else entered
            if step == solver.max_steps or (step % every == 0 and settled(live)):
                code = code_if(live, Status.INNER_MAX_STEPS)
                if ended is not None:
                    ended(y, state)
                return Solution(
                    y,
                    step,
                    worst(code, _rose(point, first, point.shown) if steady else 0),
                    None if point.reported else first,
                    point.shown,
                    residual,
                    *_motion(rise, first, point.shown, state, _remains(point, first, point.shown)),
                    grown=torch.where(live, residual / torch.where(entered > 0, entered, 1.0), 0.0),
                )
        if moving is not None and live is not None:
            moving(live)
        live = live if masks is None else masks[step]
        moved, next_state = moves.step(y, state, point)
        if live is not None and moves.space.tasks is not None:
            moved = where(moves.space, live, moved, y)
            next_state = next_state if step == 0 else where(moves.space, live, next_state, state)
        sloped = solver.fixed and point.loss is not None and not point.reported
        if sloped and step == 0:
            entered = _slope(moves, point, y)
        if sloped and step == solver.max_steps - 1:
            left = entered if step == 0 and entered is not None else _slope(moves, point, y)
            if steady and last is not None:  # of one step, nothing below asks for it
                moving_on = _moves_on(moves, left, y, moved)
                promised = _promised(moves, left, moving_on)
        y, state, loss, reported = moved, next_state, point.shown, point.reported
        if loss is not None:
            if steady and last is not None:
                up = (loss - last).clamp_min(0)
                rise = up if rise is None else rise + up
            first, last = loss if first is None else first, loss
            code = _rose(point, first, last) if steady else 0
            if point.vanishing and solver.fixed:
                residual, moving_on = (2 * loss).sqrt(), _remains(point, first, last)
                if steady and step == solver.max_steps - 1 >= _PATIENCE:
                    code = worst(code, _stuck(moves.space, first, last, y))
        said = point.code
        del point, moved, next_state, loss
    if ended is not None:
        ended(y, state)
    return Solution(
        y,
        solver.max_steps,
        code if isinstance(said, int) else worst(code, said),
        None if reported else first,
        last,
        residual,
        *_motion(rise, first, last, state, moving_on),
        promised,
        _grown(entered, left),
    )


def _rose(point: Seen, first: Tensor | None, last: Tensor | None) -> Tensor | int:
    """INNER_ROSE where what a dynamics reports has more than doubled. (Of the loss itself, `health` says so.)"""
    if not point.reported or first is None or last is None:
        return 0
    return code_if(last > first + first.abs(), Status.INNER_ROSE)


def _remains(point: Seen, first: Tensor | None, last: Tensor | None) -> Tensor | None:
    """Where a residual that is to vanish has not: one that has may have gone up on the way."""
    return None if not point.vanishing or first is None or last is None else ~(last < _VANISHED * first)


def _stuck(space: Space, first: Tensor, last: Tensor, inner: Tree) -> Tensor:
    """INNER_UNSTABLE where a residual that is to vanish did not shrink, and is no rounding error."""
    leaves = _numbers(inner)
    noise = _ROUNDING * max(torch.finfo(leaf.dtype).eps for leaf in leaves) * space.norm(leaves)
    return code_if(~(last < _STUCK * first) & ~(2 * last <= noise.square()), Status.INNER_UNSTABLE)


def _slope(moves: Moves, point: Seen, inner: Tree) -> Tensor:
    """The norm of the gradient that a step was made with, per task."""
    return moves.space.norm(_numbers(point.gradient(inner)))


def _numbers(value: Tree) -> list[Tensor]:
    """The tensors of a tree without their graph."""
    return [leaf.detach() if leaf.requires_grad else leaf for leaf in tree.tensors(value)]


def _plain_rate(moves: Moves) -> float | None:
    """The number c where a step is y - c dg/dy and nothing else."""
    update = moves.dynamics.update
    return None if update is None else update.plain_rate


def _grown(entered: Tensor | None, left: Tensor | None) -> Tensor | None:
    """The norm of the last gradient over that of the first, per task."""
    return None if entered is None or left is None else left / torch.where(entered > 0, entered, 1.0)


def _moves_on(moves: Moves, slope: Tensor, before: Tree, after: Tree) -> Tensor:
    """Where a step moved y by more than the last digits, per task; less says nothing about its length."""
    space, rate = moves.space, _plain_rate(moves)
    if rate is not None and all(leaf.dtype not in NARROW for leaf in tree.tensors(after)):
        # What y - rate g moves is known without another look at y. (16 bits may be too few to move at all.)
        return (rate * slope).square() > _STILL**2 * space.norm(_numbers(after)).square()
    moved = size = None
    for a, b in zip(tree.tensors(before), tree.tensors(after), strict=True):  # one by one: no second y is made
        part, whole = space.norm([(b - a).detach()]).square(), space.norm([b.detach()]).square()
        moved, size = (part, whole) if moved is None or size is None else (moved + part, size + whole)
    assert moved is not None, "an inner variable has tensors"
    assert size is not None
    return moved > _STILL**2 * size


def _promised(moves: Moves, slope: Tensor, moving_on: Tensor) -> Tensor | None:
    """What a plain step of length c lets the loss fall by where its curvature is small: c |dg/dy|^2, per task."""
    rate = _plain_rate(moves)
    return None if rate is None else torch.where(moving_on, rate * slope.square(), 0.0)


def _motion(
    rise: Tensor | None, first: Tensor | None, last: Tensor | None, state: Any, moving_on: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Of all that the inner loss moved, the part that went up, and whether that says that steps are too long; per task.

    Along plain gradient steps shorter than 2 / L the loss never rises, so a tenth is too much. A momentum overshoots by
    design: there the loop is unsteady when its loss has gone up by several times its size without getting anywhere.
    """
    if rise is None or first is None or last is None:
        return None, None
    fell, size = rise + first - last, first.abs() + last.abs()
    share = rise / (rise + fell).clamp_min(torch.finfo(first.dtype).tiny)
    # Small motion is rounding, or the last turns around a solution.
    unsteady = (
        (rise > _IN_PLACE * (first - last).abs()) & (rise > _TURNS * size)
        if tree.tensors(state)
        else (share > _PLAIN_RISE) & (rise > _MOTION * size)
    )
    return share, unsteady if moving_on is None else unsteady & moving_on


# Held against convergent and divergent loops in tests/bilevel/test_wrong_numbers_stability.py.
_PLAIN_RISE, _MOTION = 0.1, 0.05
_VANISHED = 0.01
_PATIENCE, _STUCK, _ROUNDING = 10, 0.81, 1e3
"""Steps after which a residual that is to vanish must have lost a tenth, or be this many rounding errors of y."""
_IN_PLACE, _TURNS, _STILL = 5.0, 2.0, 1e-5


def where(space: Space, live: Tensor, new: Any, old: Any) -> Any:
    """`new` for the tasks that are live, `old` for the others, leaf by leaf of two trees."""

    def choose(a: Any, b: Any) -> Any:
        per_task = isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim() > 0
        return torch.where(space.per_task(live, a), a, b) if per_task else a

    return tree.tree_map(choose, new, old)
