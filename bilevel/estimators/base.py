"""The contract of an estimator, and what it is given."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel._strategy import Strategy
from bilevel.batches import Batches, PerStep
from bilevel.engine import autodiff, oracles, spans
from bilevel.inner.base import Gradient, InnerSolver, Visit
from bilevel.outcome import NotTwiceDifferentiableError, Solution
from bilevel.problem import Problem
from bilevel.space import tree
from bilevel.space.tree import PartialLeaves, Tree


@dataclasses.dataclass(frozen=True)
class Instance:
    """One bilevel problem with its data: what `hypergradient` was given, checked and detached."""

    problem: Problem
    outer: Tree
    inner: Tree | None
    batches: Batches
    solver: InnerSolver

    def start(self) -> Tree:
        """y_0, without a graph."""
        return oracles.start(self.problem, self.outer, self.batches.inner_at(0)) if self.inner is None else self.inner

    def embedding(self) -> Callable[[int], oracles.Embedding]:
        """The embedded batch of a step: made once when every step sees the same batch."""
        if isinstance(self.batches.inner, PerStep):
            return lambda step: oracles.Embedding(self.problem, self.outer, self.batches.inner_at(step))
        once = oracles.Embedding(self.problem, self.outer, self.batches.inner)
        return lambda step: once

    def gradient(self, embedding: Callable[[int], oracles.Embedding] | None = None) -> Gradient:
        """dg/dy at a step's batch."""
        at = embedding or self.embedding()
        return lambda y, step: oracles.inner_gradient(self.problem, y, self.outer, at(step).value)

    def solve(
        self, start: Tree | None = None, visit: Visit | None = None, gradient: Gradient | None = None
    ) -> Solution:
        """Run the inner solver; keeps no trajectory unless `visit` does."""
        with spans.span(spans.INNER):
            y = self.start() if start is None else start
            found = self.solver.solve(gradient or self.gradient(), y, self.outer, tasks=self.problem.tasks, visit=visit)
            return dataclasses.replace(found, inner=tree.detach(found.inner))

    def inner_loss(self, inner: Tree, steps: int) -> Tensor:
        """G at the solution, without a graph."""
        with torch.no_grad():
            return self.problem.inner(inner, self.outer, self.batches.inner_at(max(steps - 1, 0)))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What an estimator returns: sums over tasks where the problem has tasks, and None for outer tensors that nothing
    reached.
    """

    grad: PartialLeaves
    inner: Tree
    outer_loss: Tensor
    inner_loss: Tensor
    code: Tensor | int
    stats: dict[str, Any] = dataclasses.field(default_factory=dict)
    state: Any = None


class Estimator(Strategy):
    """How dF/dx is estimated from one instance."""

    @property
    def memory_growth(self) -> str:
        """How peak memory grows with the inner steps K: "constant", "sqrt" or "linear"; "" promises nothing. Profilers
        hold it to the promise.
        """
        return ""

    @property
    def bias(self) -> str:
        """What separates the estimate from the gradient of the K-step program, as a clause; "" when nothing does."""
        return "of unknown bias"

    @abc.abstractmethod
    def estimate(self, instance: Instance, state: Any) -> Estimate:
        """The estimate; `state` is what the last call returned as its state, or None."""


AT_SOLUTION = "the inner loss and the outer loss at the inner solution"
UNROLL_OR_PROXIMAL = "Use Unrolled(), which sees every path (a start can also be made visible, with bilevel.proximal(problem, strength))."


def refuse_blind(estimator: Estimator, instance: Instance, grad: PartialLeaves, sees: str, remedy: str) -> None:
    """Raise if an outer tensor that the estimator did not reach does influence the problem, along a path that the
    estimator cannot see.

    A tensor on no path at all is left to `hypergradient`, which warns.

    Raises:
        ValueError: naming the tensors, the path, what the estimator sees, and the remedy.
    """
    missed = [i for i, leaf in enumerate(grad) if leaf is None]
    if not missed:
        return
    x = tree.attach(instance.outer)
    names, xs, paths = tree.names(x), tree.tensors(x), dict[str, set[int]]()
    with torch.enable_grad():
        batch = instance.batches.inner_at(0)
        y0 = instance.start() if instance.problem.init is None else instance.problem.start(x, batch)
        paths["the start of the inner loop (Problem.init)"] = _reached(tree.tensors(y0), xs)
        y = tree.attach(y0)
        # Two steps: momentum acts from the second on.
        ones, moved, state = (
            tree.tree_map(torch.ones_like, tree.detach(y0)),
            tree.detach(y0),
            instance.solver.optimizer.init(y),
        )
        for _ in range(2):
            moved, state = instance.solver.optimizer.step(ones, state, moved, x)
        paths["a hyper-parameter of the inner optimizer"] = _reached(tree.tensors(moved), xs)
        # What moves y is dg/dy: an x that only shifts g has no influence through it.
        loss = instance.problem.inner(y, x, batch)
        gradient = [leaf for leaf in autodiff.grad([loss], tree.tensors(y), create_graph=True) if leaf is not None]
        try:
            paths["the inner loss"] = _reached(gradient, xs)
        except NotTwiceDifferentiableError:
            paths["the inner loss"] = _reached([instance.problem.inner(y, x, batch)], xs)
    found = [f"{names[i]} through {path}" for path, reached in paths.items() for i in missed if i in reached]
    if found:
        raise ValueError(
            f"{type(estimator).__name__} cannot see how the outer variable acts here: it sees {sees}, but x enters as "
            f"{'; '.join(found)}. Its hypergradient would be zero, which is wrong. {remedy}"
        )


def _reached(outputs: list[Tensor], inputs: list[Tensor]) -> set[int]:
    found = autodiff.grad(outputs, inputs, [torch.ones_like(output) for output in outputs])
    return {i for i, leaf in enumerate(found) if leaf is not None}
