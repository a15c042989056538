"""adapt(): move the inner variable, without any hypergradient: evaluation on new tasks, final training."""

import dataclasses
from typing import Any

from torch import Tensor

from bilevel.batches import Batches
from bilevel.engine import spans
from bilevel.engine.base import Engine
from bilevel.engine.split import split_over
from bilevel.engine.together import guarded, together
from bilevel.estimators.base import EVERYWHERE, Estimate, Estimator, Instance
from bilevel.hypergradient import Owned, check_arguments, given_in, opened, prepared
from bilevel.inner.base import InnerSolver
from bilevel.outcome import Adapted, Status, code_if, worst
from bilevel.problem import Problem
from bilevel.space import tree
from bilevel.space.tree import Tree
from bilevel.tasks.mean import TaskMean


@dataclasses.dataclass(frozen=True)
class _Solve(Estimator):
    """No estimate: the inner solution and the losses there."""

    evaluate: bool
    sees = EVERYWHERE

    def estimate(self, instance: Instance, state: Any) -> Estimate:
        found, oracles = instance.solve(), instance.oracles
        losses = oracles.inner_loss(found.inner, found.steps)
        outer_loss: Tensor = oracles.outer_loss(found.inner) if self.evaluate else losses
        leaves = tree.tensors(instance.outer)
        finished = instance.finish(found, (None,) * len(leaves), outer_loss, inner_loss=losses)
        return dataclasses.replace(finished, unused=frozenset(range(len(leaves))))


def adapt(
    problem: Problem,
    outer: Tree,
    inner: Tree | None,
    batches: Batches,
    *,
    solver: InnerSolver,
    tasks: bool = False,
    chunk: int | None = None,
    evaluate: bool = True,
    engine: Engine | None = None,
) -> Adapted:
    """Move the inner variable at a fixed outer one.

    Costs the inner solver's gradients, one evaluation of g and one of f; no second derivative, no trajectory. Memory:
    y, its gradient, the optimizer's state and one graph, independent of the number of steps; times the tasks of a
    chunk.

    Args:
        problem: the two losses.
        outer: x, as for `hypergradient`; not changed.
        inner: the start of y, or None with Problem.init; not changed.
        batches: the data.
        solver: how y moves, and when it stops.
        tasks: whether batches (and `inner`) have a leading task dimension, as for `TaskMean`.
        chunk: with `tasks`, how many are adapted at once, as for `TaskMean`.
        evaluate: whether f is evaluated at the end; False leaves `batches.outer` alone.
        engine: how gradients are computed, as for `hypergradient`; what it compiles, `hypergradient` shares.

    Returns:
        The adapted inner variable, the losses there, and a status.

    Raises:
        TypeError, ValueError: an argument is not what is needed; the message says what to write.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: (y - b) ** 2, lambda y, x, b: (y - b) ** 2, init=lambda x, b: x)
        >>> tasks = bl.Batches(inner=torch.tensor([0.0, 4.0]), outer=torch.tensor([0.0, 4.0]))
        >>> found = bl.adapt(problem, torch.tensor(2.0), None, tasks, solver=bl.Descent(bl.SGD(lr=0.25), steps=1),
        ...     tasks=True)
        >>> found.inner, found.outer_loss
        (tensor([1., 3.]), tensor([1., 1.]))
    """
    ranks = split_over(problem)
    with guarded(ranks, outer):
        check_arguments("adapt", problem, outer, inner, batches, solver)
    if chunk is not None and not tasks:
        raise ValueError(f"adapt() was given chunk={chunk} without tasks=True; chunks are of tasks")
    derivatives = opened("adapt", engine)
    start = None if inner is None else tree.detach(inner)
    instance = Instance(problem, tree.detach(outer), start, batches, solver, engine=derivatives)
    estimator: Estimator = TaskMean(_Solve(evaluate), chunk) if tasks else _Solve(evaluate)
    calls = spans.Calls()
    given = (tasks, chunk, evaluate), solver, None
    with prepared(), spans.listen(calls), together("adapt", ranks, instance, given) as same:
        found = estimator.estimate(instance, None)
        same([found.inner, found.outer_loss, found.inner_loss])
    report = derivatives.report()
    own = Owned([*tree.tensors(instance.outer), *tree.tensors(instance.inner), *given_in(batches)])
    sound = tree.finite([found.inner_loss, found.outer_loss])
    return Adapted(
        inner=own.tree(found.inner),
        inner_loss=own.tensor(found.inner_loss),
        outer_loss=own.tensor(found.outer_loss) if evaluate else None,
        stats={
            "calls": calls.calls,
            **{name: value for name, value in found.stats.items() if value is not None},
            **({"engine": report} if report else {}),
        },
        code=worst(found.code, code_if(~sound, Status.NONFINITE)),
    )
