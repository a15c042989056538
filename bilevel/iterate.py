"""iterate(): the optional outer loop, as a generator, so that the loop body stays the user's."""

import dataclasses
import inspect
import warnings
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from bilevel.batches import Batches
from bilevel.engine import spans
from bilevel.engine.base import Engine
from bilevel.estimators.base import Estimator
from bilevel.hypergradient import check_movable, hypergradient, set_grad
from bilevel.inner.base import InnerSolver
from bilevel.outcome import BilevelError, Hypergradient, Status, readable
from bilevel.problem import Problem
from bilevel.space import tree
from bilevel.space.tree import Tree


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
        """The outer loss before the step."""
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
    tolerate: Collection[Status] = (Status.NEGATIVE_CURVATURE,),
    engine: Engine | None = None,
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
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"iterate() was given a {type(optimizer).__name__} as optimizer; a torch.optim optimizer over outer was "
            f"needed, such as torch.optim.Adam(outer.values(), lr=0.01) (bilevel.SGD and its kin are for the inner "
            f"variable)"
        )
    if inspect.signature(optimizer.step).parameters["closure"].default is inspect.Parameter.empty:
        raise TypeError(
            f"iterate() was given {type(optimizer).__name__} as optimizer, whose step needs a closure that evaluates "
            f"the loss again; iterate() makes one hypergradient a step. Use torch.optim.Adam or SGD, or call "
            f"hypergradient() and set_grad() in a closure of your own"
        )
    check_movable(outer)
    held = {id(x) for group in optimizer.param_groups for x in group["params"]}
    if not any(id(x) in held for x in tree.tensors(outer)):
        raise ValueError(
            "iterate() was given an optimizer that holds none of the tensors of outer, so outer would never move; make "
            "it over outer.values()"
        )
    return _steps(problem, outer, inner, loader, solver, estimator, optimizer, carry, state, tolerate, engine)


def _steps(
    problem: Problem,
    outer: Tree,
    inner: Tree | None,
    loader: Iterable[Batches],
    solver: InnerSolver,
    estimator: Estimator,
    optimizer: torch.optim.Optimizer,
    carry: bool,
    state: Any,
    tolerate: Collection[Status],
    engine: Engine | None,
) -> Iterator[Step]:
    warned = False
    for index, batches in enumerate(loader):
        if not isinstance(batches, Batches):
            raise TypeError(
                f"iterate()'s loader yielded a {type(batches).__name__}; write (bilevel.Batches(inner=a, outer=b) for "
                f"a, b in zip(train, valid))"
            )
        found = hypergradient(
            problem, outer, inner, batches, solver=solver, estimator=estimator, state=state, engine=engine
        )
        with spans.span(spans.OUTER):
            # Without data nothing can be seen to fail: a forecast takes the step that a sound hypergradient would.
            status = found.status if not isinstance(found.code, Tensor) or readable(found.code) else Status.OK
            if status.failed and (
                status not in tolerate
                or status in (Status.NONFINITE, Status.DIVERGED)
                or not bool(tree.finite(found.grad))
            ):
                raise BilevelError(
                    f"outer step {index}: {status.name}: {status.value} The outer variable was not moved by this step.",
                    status,
                )
            if status.failed or (status is Status.INNER_UNSTABLE and not warned):
                warnings.warn(f"iterate() stepped through {status.name}: {status.value}", stacklevel=2)
                warned = True
            set_grad(outer, found.grad)
            optimizer.step()
        state = found.state
        if carry and problem.init is None:
            inner = tree.detach(found.inner if found.next_inner is None else found.next_inner)
        yield Step(index, found)
