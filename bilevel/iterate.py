"""iterate(): the optional outer loop, as a generator, so that the loop body stays the user's."""

import itertools
import time
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch

from bilevel.batches import Batches
from bilevel.engine.base import Engine
from bilevel.estimators.base import Estimator
from bilevel.inner.base import InnerSolver
from bilevel.loop.checks import check_optimizer
from bilevel.loop.step import Step
from bilevel.loop.stepping import Carried, Stepping
from bilevel.outcome import Status
from bilevel.problem import Problem
from bilevel.space.tree import Tree


def iterate(
    problem: Problem,
    outer: Tree,
    inner: Tree | None,
    loader: Iterable[Batches],
    *,
    solver: InnerSolver,
    estimator: Estimator,
    optimizer: torch.optim.Optimizer,
    carry: bool = True,
    state: Any = None,
    tolerate: Collection[Status] = (Status.NEGATIVE_CURVATURE,),
    engine: Engine | None = None,
) -> Iterator[Step]:
    """Hypergradient, outer step, repeat: one step for each item of `loader`.

    `OuterLoop` makes the same steps, and can stop, be saved and go on.

    Args:
        problem: the two losses.
        outer: leaves that require grad; changed in place by `optimizer`, by nothing else.
        inner: the start of y, or None with Problem.init.
        loader: yields `Batches`; the loop ends with it.
        solver: how y moves.
        estimator: how the hypergradient is estimated.
        optimizer: any torch.optim optimizer over the tensors of `outer`.
        carry: True (the default) lets y continue from where the last outer step left it; False restarts it from `inner`
            every time. With Problem.init every step starts at init(x). The estimator's state is carried either way.
        state: estimator state to begin with.
        tolerate: failed statuses that are stepped through with a warning. By default negative curvature: nets that are
            not converged have it now and then, and conjugate gradients that stop there still give a direction. A
            non-finite hypergradient is never tolerated.
        engine: how derivatives are computed, as in `hypergradient`; what it compiles is shared by all steps.

    Yields:
        A `Step` after each outer step.

    Raises:
        BilevelError: the hypergradient failed (see `Status.failed`) or is not finite; x has not been moved by it, and
            all earlier steps stand.
        TypeError: `loader` yields something else than Batches, `optimizer` is no torch.optim optimizer; otherwise as
            `hypergradient`.
        ValueError: `optimizer` holds none of the tensors of `outer`.

    Warns:
        UserWarning: a tolerated failure, each time; an unstable inner loop, once.

    Example:
        >>> import itertools, torch, bilevel as bl
        >>> x = torch.tensor(1.0, requires_grad=True)
        >>> problem = bl.Problem(lambda y, x, b: (y - x) ** 2, lambda y, x, b: (y - 3) ** 2)
        >>> loop = bl.iterate(problem, x, torch.tensor(0.0), itertools.repeat(bl.Batches(None, None), 30),
        ...     solver=bl.Descent(bl.SGD(lr=0.25), steps=5), estimator=bl.Implicit(bl.CG(1)),
        ...     optimizer=torch.optim.SGD([x], lr=0.25))
        >>> for step in loop: pass
        >>> step.index, round(x.item(), 3)
        (29, 3.0)
    """
    check_optimizer("iterate", outer, optimizer)
    parts = (problem, outer, solver, estimator, optimizer, carry, frozenset(tolerate), engine)
    return _steps(Stepping("iterate", *parts), Carried(inner, state), loader)


def _steps(stepping: Stepping, carried: Carried, loader: Iterable[Batches]) -> Iterator[Step]:
    """`OuterLoop`'s steps, without what it takes to stop and go on."""
    take = iter(loader).__next__
    for index in itertools.count():
        begun, lr = time.perf_counter(), stepping.rates()
        made = stepping.group(take, carried, index)
        if made is None:
            return
        carried = made.left
        stepping.show(made.hypergradient)
        stepping.move(made)
        yield Step(index, made.hypergradient, lr, time.perf_counter() - begun)
