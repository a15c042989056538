"""SABA: SOBA on a finite sum, with the last direction of every batch kept, so that the noise goes to zero.

    g = 1/n sum_i g_i,   f = 1/m sum_j f_j;      i, j: the batches of this round
    q_i = (dg_i/dy, H_i v, M_i v),   p_j = (df_j/dy, df_j/dx)       at (y, v, x)
    q = q_i - t_i + mean(t),   t_i <- q_i;      p likewise;     D_y, D_v, D_x of SOBA from q and p

| | inner gradients | HVPs | mixed | memory |
| --- | --- | --- | --- | --- |
| SABA(rate, n, m), K steps of y | K (1 for K = 0) | 0 | 1, with H v | 2 P and the tables carried, one graph |

The tables hold (n + 1) (2 P + Q) + (m + 1) (P + Q) numbers, with T tasks T times as many. One outer gradient, and one
evaluation of g at the new y. The sums of the tables are made anew every n rounds, so that rounding does not add up.

Wins: constant step sizes all the way to the solution, at the cost of SOBA's round; small P and Q.
Fails: large P: the tables are the largest thing there is. Batches that are drawn afresh (augmented, from a stream) have
    no table.
Reference: Dagreou, Ablin, Vaiter and Moreau 2022, arXiv 2201.13409 (formulas as in the benchopt implementation).
Differences from peers: batches of one size, and no pass over all of them before the first round (benchopt begins with
zeros, or with such a pass). A batch that is seen for the first time enters
its table first, and the mean is over those seen: the estimate then is the mean of what is known, as stable as SOBA's.
With batches drawn uniformly it has the right mean over draws at a fixed (y, v, x) from the first round on, and is
SAGA's once all have been seen.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bilevel.batches import Batches, PerStep
from bilevel.engine import spans
from bilevel.estimators.base import AT_SOLUTION, Estimate, Estimator, Instance
from bilevel.estimators.single_loop.base import (
    TOL,
    Rate,
    Slopes,
    advanced,
    begun,
    check_rate,
    check_tol,
    counted,
    finished,
    gathered,
    judged,
    made,
    moved,
    plus,
    rate_at,
    slopes,
    spread,
    template,
)
from bilevel.estimators.state import State, per_task
from bilevel.linear.base import check_steps
from bilevel.outcome import readable
from bilevel.space import tree
from bilevel.space.tree import Leaves, PartialLeaves, Tree

Row = tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Tables(State):
    """y, v, the number of rounds; of each batch its last (dg/dy, H v, M v), or (df/dy, df/dx), their sums, and which
    batches were seen. What is of the size of x is in equal parts for each task.
    """

    inner: Tree = per_task()
    adjoint: Tree = per_task()
    rounds: Tensor = per_task(host=True)
    inner_rows: tuple[Row, ...] = per_task()
    outer_rows: tuple[Row, ...] = per_task()
    inner_sum: Row = per_task()
    outer_sum: Row = per_task()
    inner_seen: Tensor = per_task(host=True)
    outer_seen: Tensor = per_task(host=True)


@dataclasses.dataclass(frozen=True)
class SABA(Estimator):
    """One round of SABA. `Batches(index=(i, j))` says which batches these are: 0 <= i < n, 0 <= j < m.

    Draw i and j independently and uniformly. With m = 1, index=i will do; with n = m = 1 it may be left out. Batches
    are minibatches of one size: g is their plain mean. `hg.inner` and the losses are at the y where the direction was
    taken, `hg.next_inner` is the y after the round.

    Bias: none at rest, and no noise there. Before, c1 |y - y*| + c2 |v - v*|.

    Args:
        rate: the step size of v: a number, or a function of the round.
        inner_batches: n.
        outer_batches: m.
        tol: on the relative residual of v, for the status only: above it MAX_STEPS.

    State: `Tables`. As in SOBA, the y of a state goes before `inner`, and the inner optimizer starts anew each round.

    Memory: (n + 1) (2 P + Q) + (m + 1) (P + Q) in the state, independent of K; linear in T.

    Raises:
        ValueError: an argument is out of range, `Batches.index` is missing or names no batch, n > 1 with PerStep
            batches or with `Batches.curvature`, the state does not fit, or x enters only through Problem.init or a
            hyper-parameter.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: b * y**2 - x * y, lambda y, x, b: y**2 / 2)
        >>> state, means = None, torch.tensor([0.5, 1.5])  # of which the mean is 1
        >>> for k in range(80):
        ...     i = (7 * k + k // 3) % 2
        ...     data = bl.Batches(means[i], None, index=i)
        ...     hg = bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), data, state=state,
        ...         solver=bl.Descent(bl.SGD(lr=0.1), steps=1), estimator=bl.estimators.SABA(0.1, inner_batches=2))
        ...     state = hg.state
        >>> hg.grad
        tensor(0.2500)
    """

    sharded = True

    rate: Rate
    inner_batches: int
    outer_batches: int = 1
    tol: float = TOL

    def __post_init__(self) -> None:
        check_rate("SABA", "rate", self.rate)
        check_steps("SABA", "inner_batches", self.inner_batches)
        check_steps("SABA", "outer_batches", self.outer_batches)
        check_tol("SABA", self.tol)

    sees = AT_SOLUTION

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        return "exact once y and v are at rest; before, off by |y - y*| and |v - v*|"

    def init_state(self, instance: Instance) -> Tables:
        y, v, rounds = template(instance)
        zeros, none = tuple(tree.tensors(v)), spread(instance, (None,) * len(tree.tensors(instance.outer)))
        inner, outer = (*zeros, *zeros, *none), (*zeros, *none)
        n, m = self.inner_batches, self.outer_batches
        seen = [torch.zeros((*rounds.shape, count), dtype=torch.bool, device="cpu") for count in (n, m)]
        return Tables(y, v, rounds, (inner,) * n, (outer,) * m, inner, outer, *seen)

    def estimate(self, instance: Instance, state: Tables | None) -> Estimate:
        if self.inner_batches > 1 and instance.solver.dynamics.update is None:
            raise ValueError(
                f"SABA corrects the gradient that y moves along, and {type(instance.solver.dynamics).__name__} need "
                f"not follow one. Use an inner optimizer such as SGD, or SOBA"
            )
        i, j = self._places(instance.batches)
        y, v = begun(instance, state)
        count = made(state)
        rate, space = rate_at("SABA", "rate", self.rate, count), instance.oracles.space
        fresh, kept = state is None, self.init_state(instance) if state is None else state
        with spans.span(spans.HYPERGRADIENT):
            at = _with_gradient(instance, y, slopes(instance, y, v))
            inner = _Table(kept.inner_rows, kept.inner_sum, kept.inner_seen)
            outer = _Table(kept.outer_rows, kept.outer_sum, kept.outer_seen)
            shift, inner = inner.visited(i, self._inner_row(instance, at), count, fresh=fresh)
            reach, outer = outer.visited(j, (*at.right, *spread(instance, at.direct)), count, fresh=fresh)
            size = len(v)
            by_gradient, by_image, by_mixed = shift[:size], shift[size : 2 * size], shift[2 * size :]
            mean = dataclasses.replace(
                at,
                image=space.axpy(1.0, by_image, at.image),
                right=space.axpy(1.0, reach[:size], at.right),
                mixed=_onto(at.mixed, gathered(instance, by_mixed), fresh=fresh),
                direct=_onto(at.direct, gathered(instance, reach[size:]), fresh=fresh),
            )
            after = moved(space, v, rate, mean.residual)
            judgement = judged(space, v, mean, rate, self.tol, after, at.image)
            along = None if self.inner_batches == 1 else by_gradient
        found = advanced(instance, y, at, along)
        with spans.span(spans.HYPERGRADIENT):
            begin = (found.inner, tree.like(y, after), counted(instance, state))
            carried = Tables(*begin, inner.rows, outer.rows, inner.total, outer.total, inner.seen, outer.seen)
            return finished(instance, found, mean, mean.direction, judgement, carried, here=y, shift=along)

    def _inner_row(self, instance: Instance, at: Slopes) -> Row:
        gradient = tree.flatten(at.gradient)[0]
        filled = [torch.zeros_like(b) if a is None else a for a, b in zip(gradient, at.right, strict=True)]
        return (*filled, *at.image, *spread(instance, at.mixed))

    def _places(self, batches: Batches) -> tuple[int, int]:
        """(i, j) of these batches.

        Raises:
            ValueError: they have none.
        """
        n, m = self.inner_batches, self.outer_batches
        if n > 1 and (isinstance(batches.inner, PerStep) or batches.curvature is not None):
            raise ValueError(
                "SABA keeps the directions of each inner batch, and a round has one: Batches.inner was a PerStep, or "
                "Batches.curvature another batch. Pass one minibatch as Batches.inner and no curvature"
            )
        index: Any = (0, 0) if batches.index is None and n == m == 1 else batches.index
        pair = (index, 0) if m == 1 and _whole(index) is not None else index
        places = tuple(map(_whole, pair)) if isinstance(pair, (tuple, list)) and len(pair) == 2 else (None, None)
        i, j = places
        if i is None or j is None or not (0 <= i < n and 0 <= j < m):
            raise ValueError(
                f"SABA(inner_batches={n}, outer_batches={m}) was given Batches(index={batches.index!r}); it keeps the "
                f"directions of each batch, so it needs to know which these are. Write Batches(inner=train[i], "
                f"outer=valid[j], index=(i, j)) with 0 <= i < {n} and 0 <= j < {m}"
            )
        return i, j


def _whole(value: Any) -> int | None:
    """A whole number, or None."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point():
        value = value.item()
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _with_gradient(instance: Instance, y: Tree, at: Slopes) -> Slopes:
    if at.gradient is not None:
        return at
    loss, gradient = instance.oracles.inner_gradient(y, 0)
    return dataclasses.replace(at, inner_loss=loss, gradient=tree.like(y, gradient))


def _onto(leaves: PartialLeaves, by: Leaves, *, fresh: bool) -> PartialLeaves:
    """Sum; what nothing has reached at the first round stays None."""
    return leaves if fresh else plus(by, 1.0, leaves)


@dataclasses.dataclass(frozen=True)
class _Table:
    """The last row of each batch, their sum, and which are filled (alike for all tasks)."""

    rows: tuple[Row, ...]
    total: Row
    seen: Tensor

    def _flags(self) -> list[bool]:
        flags = self.seen.reshape(-1, len(self.rows))[0]
        return flags.tolist() if readable(flags) else [True] * len(self.rows)

    def visited(self, index: int, row: Row, count: int, *, fresh: bool) -> tuple[Row, "_Table"]:
        """What turns `row` into SAGA's estimate of the mean row, mean(t) - t_i, and the table with `row` in it."""
        # (Without a state nothing was seen; of a state without numbers, as forecasts have it, all was.)
        flags = [False] * len(self.rows) if fresh else self._flags()
        known, before = flags[index], self.rows[index]
        # What is seen for the first time is in the table already when the mean is taken.
        old = before if known else row
        total = self.total if known else tuple(a + b for a, b in zip(self.total, row, strict=True))
        filled = sum(flags) + (not known)
        shift = tuple(a / filled - b for a, b in zip(total, old, strict=True))
        rows = (*self.rows[:index], row, *self.rows[index + 1 :])
        if count % len(rows) == 0:
            after = tuple(sum(column[1:], column[0]) for column in zip(*rows, strict=True))
        else:
            after = tuple(a + (b - c) for a, b, c in zip(self.total, row, before, strict=True))
        seen = self.seen.clone()
        seen[..., index] = True
        return shift, _Table(rows, after, seen)
