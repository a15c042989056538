"""Backpropagation through the inner loop: the exact gradient of the K-step program.

    a_K = df/dy(y_K);   a_k, x_bar += VJP of step k at (a_{k+1});   dF/dx = df/dx + x_bar + (dy_0/dx)' a_0

| keep | inner gradients | HVP-class products | memory, S = P + optimizer state |
| --- | --- | --- | --- |
| "graph" | K | K | K tapes of a differentiable step |
| "iterates" | 2 K | K | K S + one tape |
| "segments" | about 3 K - sqrt(2 K) | K | sqrt(2 K) S + one tape |

References: Maclaurin et al. 2015, arXiv 1502.03492; Franceschi et al. 2017, arXiv 1703.01785; multi-step MAML, arXiv
    2002.07836, section 2.2
(the ordered product of I - alpha H); segments after Chen et al. 2016, arXiv 1604.06174. Differences from peers: one
step is split into the gradient and the optimizer's algebra, so a rebuilt step holds no copy of the update; segments
shrink towards the end of the loop (as snapshots pile up), which needs sqrt(2K) iterates at once instead of 2 sqrt(K),
and the last one is never recomputed; random numbers are replayed.
"""

import dataclasses
import itertools
import math
from typing import Any

from torch import Tensor

from bilevel.batches import PerStep
from bilevel.engine import autodiff, oracles, spans
from bilevel.engine.replay import Replay
from bilevel.estimators.base import Estimate, Estimator, Instance, refuse_blind
from bilevel.inner.base import Gradient, check_step, health, move
from bilevel.inner.descent import Descent
from bilevel.outcome import worst
from bilevel.space import tree
from bilevel.space.tree import Tree

_KEEPS = ("graph", "iterates", "segments")


@dataclasses.dataclass(frozen=True)
class Unrolled(Estimator):
    """Backpropagate through the inner loop.

    The three ways of keeping the trajectory give the same gradient to rounding; they trade memory for compute. Which of
    "graph" and "iterates" is smaller depends on the tape of a step against its S numbers: forecast, or measure.

    Args:
        keep: "graph" keeps the tape of every step; "iterates" keeps the iterates and rebuilds one step's graph at a
            time; "segments" keeps about sqrt(2 K) iterates and recomputes the others once.
        segment: a uniform segment length for keep="segments"; None for lengths that shrink towards the end, the least
            memory for one recomputation.
        last: backpropagate through the last steps only; None for all. Truncation drops everything that acted before:
            biased, with an error that decays like (1 - lr mu)^last for a mu-strongly convex inner loss, and it cannot
            see Problem.init.

    Memory: see the table in `bilevel.estimators.reverse.unrolled`; independent of Q but for one copy, linear in T.

    Raises:
        ValueError: an argument is out of range, or (when used) x enters only through Problem.init and `last` cuts that
            path.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
        >>> hg = bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.25), steps=4), estimator=bl.Unrolled(keep="segments"))
        >>> hg.grad
        tensor(0.2197)
    """

    keep: str = "graph"
    segment: int | None = None
    last: int | None = None

    def __post_init__(self) -> None:
        if self.keep not in _KEEPS:
            raise ValueError(f"Unrolled was given keep={self.keep!r}; one of {', '.join(map(repr, _KEEPS))} was needed")
        for name in ("segment", "last"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"Unrolled was given {name}={value!r}; None or an integer of at least 1 was needed")
        if self.segment is not None and self.keep != "segments":
            raise ValueError(
                f'Unrolled was given segment={self.segment} with keep={self.keep!r}; write Unrolled(keep="segments", segment=...)'
            )

    @property
    def memory_growth(self) -> str:
        if self.last is not None:
            return "constant"
        return "sqrt" if self.keep == "segments" and self.segment is None else "linear"

    @property
    def bias(self) -> str:
        return (
            ""
            if self.last is None
            else f"truncated to the last {self.last} steps: an error that decays like (1 - lr mu)^{self.last}"
        )

    def estimate(self, instance: Instance, state: Any) -> Estimate:
        code: Tensor | int = 0
        if not instance.solver.fixed:
            # A solver that stops by itself runs once to learn K; then the program is K plain steps, whichever way they
            # are kept.
            found = instance.solve()
            code = found.code
            instance = dataclasses.replace(instance, solver=Descent(instance.solver.optimizer, found.steps))
        steps = instance.solver.max_steps
        first = 0 if self.last is None else max(steps - self.last, 0)
        result = (
            _through_graph(instance, first)
            if self.keep == "graph"
            else _through_iterates(instance, first, self._starts(first, steps))
        )
        if first > 0:
            sees = f"the last {steps - first} of {steps} inner steps and the outer loss"
            refuse_blind(
                self, instance, result.grad, sees, "Write Unrolled(last=None), which backpropagates to the start."
            )
        return dataclasses.replace(result, code=worst(code, result.code))

    def _starts(self, first: int, steps: int) -> list[int]:
        """The steps at which a segment begins; "iterates" is one segment, kept as it is made."""
        count = steps - first
        if count == 0 or self.keep == "iterates":
            return [first]
        if self.segment is not None:
            return list(range(first, steps, self.segment))
        return list(itertools.accumulate(shrinking(count)[:-1], initial=first))


def shrinking(count: int) -> list[int]:
    """Segment lengths M, M-1, ... that add up to `count`, with M as small as possible.

    When segment j is recomputed, j + 1 snapshots and its own iterates are alive: j + (M - j) = M throughout, with M =
    sqrt(2 count).

    Example:
        >>> shrinking(10), shrinking(12)
        ([4, 3, 2, 1], [5, 4, 3])
    """
    longest = math.ceil((math.sqrt(8 * count + 1) - 1) / 2)
    lengths: list[int] = []
    while count > 0:
        lengths.append(min(longest - len(lengths), count))
        count -= lengths[-1]
    return lengths


def _through_graph(instance: Instance, first: int) -> Estimate:
    problem, optimizer, batches = instance.problem, instance.solver.optimizer, instance.batches
    steps, x = instance.solver.max_steps, tree.attach(instance.outer)
    with spans.span(spans.INNER):
        batch = batches.inner_at(0)
        y = _attached(instance.start() if problem.init is None or first > 0 else problem.start(x, batch))
        comparable = not isinstance(batches.inner, PerStep)
        state, first_loss, direction = optimizer.init(y), None, None
        gradient, embedded = instance.gradient(), None
        for step in range(steps):
            if step < first:
                loss, direction = gradient(y, step)
                y, state = move(optimizer, direction, state, tree.detach(y), instance.outer)
                y = _attached(y) if step == first - 1 else y
            else:
                if embedded is None or isinstance(batches.inner, PerStep):
                    embedded = problem.embed(x, batches.inner_at(step))
                loss, direction = oracles.inner_gradient(problem, y, x, embedded, create_graph=True)
                before = y
                y, state = optimizer.step(tree.like(y, direction), state, y, x)
                check_step(optimizer, before, y)
                del before
            first_loss = loss if first_loss is None and comparable else first_loss
        # The tape keeps what it needs; the last gradient would be one P more at the peak.
        del state, embedded, direction, gradient
    with spans.span(spans.HYPERGRADIENT):
        with spans.span(spans.OUTER_GRADIENT), spans.span(spans.HVP, count=steps - first):
            loss = problem.outer(y, x, batches.outer)
            grad = autodiff.grad([loss], tree.tensors(x))
        y = tree.detach(y)
        inner_loss = instance.inner_loss(y, steps)
        code = health(y, first_loss, inner_loss, comparable=comparable)
        return Estimate(grad, y, loss.detach(), inner_loss, code, {"inner_steps": steps})


def _attached(value: Tree) -> Tree:
    """Leaves that carry a graph get a node of their own (init may return x itself, or one tensor twice), the others
    become graph leaves.
    """
    return tree.tree_map(
        lambda leaf: leaf.view_as(leaf) if leaf.requires_grad else leaf.detach().requires_grad_(), value
    )


def _through_iterates(instance: Instance, first: int, starts: list[int]) -> Estimate:
    problem, solver, batches = instance.problem, instance.solver, instance.batches
    device, steps = tree.tensors(instance.outer)[0].device, solver.max_steps
    before_start, replay = Replay(device), Replay(device)
    before_start.record()
    y0 = instance.start()
    embedding = instance.embedding()
    gradient = instance.gradient(embedding)
    snapshots, kept = list[tuple[Tree, Any]](), list[tuple[Tree, Any]]()

    def visit(step: int, y: Tree, s: Any) -> None:
        replay.record()
        if step >= starts[-1]:
            kept.append((y, s))
        elif step in starts:
            snapshots.append((y, s))

    found = instance.solve(y0, visit=visit, gradient=gradient)
    comparable = not isinstance(batches.inner, PerStep)
    y_end, first_loss = found.inner, found.first_loss if comparable else None
    del y0, found
    with spans.span(spans.HYPERGRADIENT):
        outer_loss, gradient_y, total = oracles.outer_gradient(problem, y_end, instance.outer, batches.outer)
        replay.finish()
        cotangents: list[Tensor | None] = list(gradient_y)
        del gradient_y
        to_start, pending = problem.init is not None and first == 0, None
        for begin, end in reversed(list(itertools.pairwise([*starts, steps]))):
            if begin < end and not kept:
                kept = _recompute(instance, gradient, replay, snapshots.pop(), begin, end)
            for step in reversed(range(begin, end)):
                y, s = kept.pop()
                replay.seek(step)
                here = embedding(step)
                cotangents, to_outer, to_embedding = oracles.step_vjp(
                    problem, solver.optimizer, y, s, instance.outer, here, cotangents, to_inner=step > first or to_start
                )
                total = tree.accumulate(total, to_outer)
                if isinstance(batches.inner, PerStep):
                    total = tree.accumulate(total, here.pull(to_embedding))
                else:
                    pending = to_embedding if pending is None else tree.accumulate(pending, to_embedding)
        if pending is not None:
            total = tree.accumulate(total, embedding(0).pull(pending))
        if to_start:
            count = len(tree.tensors(y_end))
            before_start.seek(0)
            total = tree.accumulate(
                total, oracles.start_vjp(problem, instance.outer, batches.inner_at(0), cotangents[:count])
            )
        replay.end()
        inner_loss = instance.inner_loss(y_end, steps)
    code = health(y_end, first_loss, inner_loss, comparable=comparable)
    return Estimate(total, y_end, outer_loss, inner_loss, code, {"inner_steps": steps})


def _recompute(
    instance: Instance, gradient: Gradient, replay: Replay, snapshot: tuple[Tree, Any], begin: int, end: int
) -> list[tuple[Tree, Any]]:
    """The iterates of a segment, from its first."""
    kept = [snapshot]
    for step in range(begin, end - 1):
        y, s = kept[-1]
        replay.seek(step)
        _, direction = gradient(y, step)
        kept.append(move(instance.solver.optimizer, direction, s, y, instance.outer))
    return kept
