"""Persistent evolution strategies: unbiased over truncations of a long inner program, online.

    each call:  e ~ N(0, s^2 I);  y+ and y- go on by K steps at x + e and x - e;  xi <- xi + e
                contribution = 1/N sum_i xi_i (f(y+_i) - f(y-_i)) / (2 s^2)

The objective is the sum of f at the ends of the truncations. xi holds every perturbation that y has felt, so that a
truncation answers for what earlier ones did to it: nothing is cut off.

| | inner gradients | HVPs | mixed products | memory |
| --- | --- | --- | --- | --- |
| PersistentES(pairs=N), a call | (2 N + 1) K | 0 | 0 | N (2 P + Q), independent of K and of the truncations |

Wins: long, chaotic or non-differentiable inner programs with online updates of x.
Fails: the variance grows with the truncations behind it (`perturbations="single"` is flat); x is large.
Reference: Vicol, Metz and Sohl-Dickstein 2021, arXiv 2112.13835; `perturbations="single"` is ES-Single, Vicol 2023,
arXiv 2304.11153. Differences from the released code of PES: that mixes the old accumulator with the new perturbation
in the truncation in which an inner problem ends, and averages losses over a window; here the state starts afresh after
`truncations` calls, and f is evaluated at the end of each.
"""

import dataclasses

import torch
from torch import Tensor

from bilevel.estimators.base import EVERYWHERE, Estimate, Estimator, Instance
from bilevel.estimators.state import State, per_task
from bilevel.estimators.zeroth_order.base import (
    Digits,
    added,
    check_count,
    check_width,
    directions,
    narrowed,
    run_at,
    shifted,
)
from bilevel.outcome import readable
from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class Particles(State):
    """Where the pairs of an inner problem stand, each a list of N trees.

    `felt` are the sums of the perturbations, like x; `round` counts the truncations of the inner problem so far.
    """

    here: Tree = per_task()
    above: list[Tree] = per_task()
    below: list[Tree] = per_task()
    felt: list[Tree] = per_task()
    round: Tensor = per_task()


@dataclasses.dataclass(frozen=True)
class PersistentES(Estimator):
    """One truncation of K steps a call; the sum of the calls of an inner problem is unbiased for its gradient.

    Bias: that of smoothing, O(std^2); none by truncation. With `perturbations="single"` one perturbation is kept for a
        whole inner problem. Rounding of x and of f over std: stats["digits"] says what that leaves, and
        below one digit the status (DIGITS_LOST).

    Args:
        std: s, in the units of x.
        pairs: N, antithetic pairs.
        truncations: calls after which the inner problem ends and begins again at y_0; None for never.
        perturbations: "fresh" for a new one each truncation (PES), "single" for one an inner problem (ES-Single).

    State: `Particles`. The inner optimizer's own state (momentum) begins afresh in each truncation, in the objective as
    in the estimate. `hg.inner` is y without perturbation.

    Memory: N pairs of y and a sum like x each; independent of K; linear in T.

    Raises:
        ValueError: an argument is out of range, or the state does not fit.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: -(x * y).sum(), lambda y, x, b: y.sum())  # y grows by x a step
        >>> estimator, state, total, seed = bl.estimators.PersistentES(0.1, 1500), None, 0.0, torch.manual_seed(0)
        >>> for truncation in range(2):
        ...     hg = bl.hypergradient(problem, torch.ones(1), torch.zeros(1), bl.Batches(None, None),
        ...         solver=bl.Descent(bl.SGD(lr=1.0), steps=1), estimator=estimator, state=state)
        ...     state, total = hg.state, total + hg.grad.item()
        >>> round(total)  # x + 2 x has the slope 3; truncated ones see 2
        3
    """

    std: float = 0.01
    pairs: int = 1
    truncations: int | None = None
    perturbations: str = "fresh"

    def __post_init__(self) -> None:
        check_width("PersistentES", "std", self.std)
        check_count("PersistentES", "pairs", self.pairs)
        if self.truncations is not None:
            check_count("PersistentES", "truncations", self.truncations)
        if self.perturbations not in ("fresh", "single"):
            raise ValueError(
                f"PersistentES was given perturbations={self.perturbations!r}; 'fresh' or 'single' was needed"
            )

    sees = EVERYWHERE

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        return "unbiased over truncations, off by O(std^2); random, of variance about Q / N"

    def init_state(self, instance: Instance) -> Particles:
        start, tasks = instance.oracles.start(), instance.tasks
        shape = () if tasks is None else (tasks,)

        def nothing(leaf: Tensor) -> Tensor:
            return leaf.new_zeros((), dtype=_felt_dtype(leaf)).expand((*shape, *leaf.shape))

        felt = tree.tree_map(nothing, instance.outer)
        count = torch.zeros(shape, dtype=torch.long, device=tree.tensors(start)[0].device)
        return Particles(start, [start] * self.pairs, [start] * self.pairs, [felt] * self.pairs, count)

    def estimate(self, instance: Instance, state: Particles | None) -> Estimate:
        generators, tasks = instance.oracles.generators, instance.tasks is not None
        drawn = generators.peek()
        here = run_at(instance, None if state is None else state.here)
        after = generators.peek()
        total: list[Tensor | None] = [None] * len(tree.tensors(instance.outer))
        codes, digits = [here.code], Digits(instance)
        ends: tuple[list[Tree], list[Tree], list[Tree]] = ([], [], [])
        for i in range(self.pairs):
            generators.set(after)
            step, felt = self._perturbation(instance, state, i)
            after = generators.peek()
            digits.moved(1.0, step)
            sides = []
            for sign, starts in ((1.0, state and state.above), (-1.0, state and state.below)):
                start = starts[i] if starts else None
                sides.append(run_at(shifted(instance, sign, step), start, draws=drawn))
            slope = (sides[0].outer_loss - sides[1].outer_loss) / (2 * self.std**2 * self.pairs)
            added(total, slope, felt, tasks=tasks)
            for side in sides:
                codes.append(side.code)
                digits.differed([side.outer_loss - here.outer_loss], [here.outer_loss], here.eps)
            for held, value in zip(ends, (sides[0].inner, sides[1].inner, felt), strict=True):
                held.append(value)
        generators.set(after)
        left, rounded = digits.left(still=False)
        count = self.init_state(instance).round if state is None else state.round
        return instance.finish(
            here.found,
            narrowed(total, instance),
            here.outer_loss,
            codes=[*codes, rounded],
            stats={"digits": left},
            state=None if self._ended(count + 1) else Particles(here.inner, *ends, count + 1),
        )

    def _perturbation(self, instance: Instance, state: Particles | None, i: int) -> tuple[Tree, Tree]:
        """How x is shifted in this truncation, and the sum of all shifts, with a task dimension where there is one."""
        (drawn,) = directions(instance, 1)
        step = tree.tree_map(lambda leaf: self.std * leaf, drawn)
        if self.perturbations == "single" and state is not None:
            step = tree.tree_map(lambda leaf: _common(leaf, instance.tasks), state.felt[i])
            return step, state.felt[i]
        felt = self.init_state(instance).felt[i] if state is None else state.felt[i]
        return step, tree.tree_map(lambda known, e: known + e, felt, step)

    def _ended(self, count: Tensor) -> bool:
        """Whether the inner problem ends with this truncation."""
        return self.truncations is not None and readable(count) and int(count.max()) >= self.truncations


def _common(leaf: Tensor, tasks: int | None) -> Tensor:
    """What all tasks of a chunk have been shifted by."""
    if tasks is None:
        return leaf
    if readable(leaf) and not bool((leaf == leaf[:1]).all()):
        raise ValueError(
            "PersistentES(perturbations='single') was given the state of tasks of different chunks, and one chunk "
            "shares one perturbation. Keep TaskMean's chunk and the order of tasks, or pass state=None"
        )
    return leaf[0]


def _felt_dtype(leaf: Tensor) -> torch.dtype:
    return torch.float32 if leaf.dtype.itemsize < 4 else leaf.dtype
