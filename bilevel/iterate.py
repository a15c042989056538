"""iterate(): the optional outer loop, as a generator, so that the loop body stays the user's."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from bilevel import _spans, _tree
from bilevel._tree import Tree
from bilevel.estimators.base import Estimator
from bilevel.hypergradient import hypergradient, set_grad
from bilevel.inner.base import InnerSolver
from bilevel.outcome import BilevelError, Hypergradient, Status
from bilevel.problem import Batches, Problem


@dataclasses.dataclass(frozen=True)
class Step:
    """One outer step, after x was moved.

    Attributes:
        index: 0, 1, 2, ...
        hypergradient: the hypergradient the step was made with.
    """

    index: int
    hypergradient: Hypergradient

    @property
    def outer_loss(self) -> Tensor:
        """f before the step."""
        return self.hypergradient.outer_loss


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
) -> Iterator[Step]:
    """Hypergradient, outer step, repeat: one step for each item of `loader`.

    Args:
        problem: the two losses.
        outer: leaves that require grad; changed in place by `optimizer`, by nothing else.
        inner: the start of y, or None with Problem.init.
        loader: yields `Batches`; the loop ends with it.
        solver: how y moves.
        estimator: how the hypergradient is estimated.
        optimizer: any torch.optim optimizer over the tensors of `outer`.
        carry: True (the default) lets y continue from where the last outer step left it; False restarts it from `inner` every time. With
            Problem.init every step starts at init(x). The estimator's state is carried either way.
        state: estimator state to begin with.

    Yields:
        A `Step` after each outer step.

    Raises:
        BilevelError: the hypergradient is not finite; x has not been moved by it, and all earlier steps stand.
        TypeError: `loader` yields something else than Batches; otherwise as `hypergradient`.

    Example:
        >>> import itertools, torch, bilevel as bl
        >>> x = torch.tensor(1.0, requires_grad=True)
        >>> problem = bl.Problem(lambda y, x, b: (y - x) ** 2, lambda y, x, b: (y - 3) ** 2)
        >>> loop = bl.iterate(problem, x, torch.tensor(0.0), itertools.repeat(bl.Batches(None, None), 30),
        ...     solver=bl.Descent(bl.SGD(lr=0.25), steps=5), estimator=bl.Implicit(bl.CG(1)), optimizer=torch.optim.SGD([x], lr=0.25))
        >>> for step in loop: pass
        >>> step.index, round(x.item(), 3)
        (29, 3.0)
    """
    for index, batches in enumerate(loader):
        if not isinstance(batches, Batches):
            raise TypeError(f"iterate()'s loader yielded a {type(batches).__name__}; write (bilevel.Batches(inner=a, outer=b) for a, b in zip(train, valid))")
        found = hypergradient(problem, outer, inner, batches, solver=solver, estimator=estimator, state=state)
        with _spans.span(_spans.OUTER):
            if found.status in (Status.NONFINITE, Status.DIVERGED):
                raise BilevelError(f"outer step {index}: {found.status.name}: {found.status.value} The outer variable was not moved by this step.")
            set_grad(outer, found.grad)
            optimizer.step()
        state = found.state
        if carry and problem.init is None:
            inner = _tree.detach(found.inner)
        yield Step(index, found)
