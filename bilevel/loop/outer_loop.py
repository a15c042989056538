"""OuterLoop: hypergradient, outer step, repeat, as an object that can stop."""

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from bilevel.batches import Batches
from bilevel.engine import spans
from bilevel.engine.base import Engine
from bilevel.estimators.base import Estimator
from bilevel.hypergradient import check_movable, hypergradient, set_grad
from bilevel.inner.base import InnerSolver
from bilevel.loop.step import Step
from bilevel.outcome import BilevelError, Hypergradient, Status, readable
from bilevel.problem import Problem
from bilevel.space import tree
from bilevel.space.tree import Tree


class OuterLoop:
    """Skeleton; the seams are final: scheduler, accumulate, clip, epochs, generators, also."""

    def __init__(
        self,
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
        epochs: int | None = 1,
        scheduler: LRScheduler | Sequence[LRScheduler] = (),
        accumulate: int = 1,
        clip: float | Callable[[list[Tensor]], Any] | None = None,
        generators: Sequence[Any] = (),
        also: Mapping[str, Any] | None = None,
    ) -> None:
        check_optimizer("OuterLoop", outer, optimizer)
        self.problem, self.outer, self.inner, self.loader = problem, outer, inner, loader
        self.solver, self.estimator, self.optimizer, self.engine = solver, estimator, optimizer, engine
        self.carry, self.state, self.tolerate = carry, state, tolerate
        self.epochs, self.accumulate, self.clip = epochs, accumulate, clip
        self.schedulers = tuple(scheduler) if isinstance(scheduler, Sequence) else (scheduler,)
        self.generators, self.also = tuple(generators), dict(also or {})
        self.index = 0
        self._iterator = iter(loader)
        self._warned = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Step:
        found = self._group()
        with spans.span(spans.OUTER):
            self._move(found)
        self.index += 1
        return Step(self.index - 1, found)

    def _group(self) -> Hypergradient:
        """The mean over `accumulate` batches, each begun where the one before ended."""
        found, inner, state = list[Hypergradient](), self.inner, self.state
        for _ in range(self.accumulate):
            try:
                batches = next(self._iterator)
            except StopIteration:
                if found:
                    break  # what a pass leaves over is a smaller group
                raise
            one = self._one(batches, inner, state)
            state = one.state
            if self.carry and self.problem.init is None:
                inner = tree.detach(one.inner if one.next_inner is None else one.next_inner)
            found.append(one)
        self.inner, self.state = inner, state
        return _mean(found)

    def _one(self, batches: Any, inner: Tree | None, state: Any) -> Hypergradient:
        if not isinstance(batches, Batches):
            raise TypeError(
                f"iterate()'s loader yielded a {type(batches).__name__}; write (bilevel.Batches(inner=a, outer=b) for "
                f"a, b in zip(train, valid))"
            )
        found = hypergradient(
            self.problem,
            self.outer,
            inner,
            batches,
            solver=self.solver,
            estimator=self.estimator,
            state=state,
            engine=self.engine,
        )
        with spans.span(spans.OUTER):
            # Without data nothing can be seen to fail: a forecast takes the step that a sound hypergradient would.
            status = found.status if not isinstance(found.code, Tensor) or readable(found.code) else Status.OK
            if status.failed and (
                status not in self.tolerate
                or status in (Status.NONFINITE, Status.DIVERGED)
                or not bool(tree.finite(found.grad))
            ):
                raise BilevelError(
                    f"outer step {self.index}: {status.name}: {status.value} The outer variable was not moved by this "
                    f"step.",
                    status,
                )
            if status.failed or (status is Status.INNER_UNSTABLE and not self._warned):
                warnings.warn(f"iterate() stepped through {status.name}: {status.value}", stacklevel=4)
                self._warned = True
        return found

    def _move(self, found: Hypergradient) -> None:
        set_grad(self.outer, found.grad)
        if self.clip is not None:
            self._clipped(tree.tensors(self.outer))
        self.optimizer.step()
        for scheduler in self.schedulers:
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(found.outer_loss)
            else:
                scheduler.step()

    def _clipped(self, xs: list[Tensor]) -> None:
        if callable(self.clip):
            self.clip(xs)
        elif self.clip is not None:
            torch.nn.utils.clip_grad_norm_(xs, self.clip)


def _mean(found: list[Hypergradient]) -> Hypergradient:
    if len(found) == 1:
        return found[0]
    count = len(found)
    grad = tree.tree_map(lambda *leaves: sum(leaves[1:], leaves[0]) / count, *(one.grad for one in found))
    losses = {name: sum(getattr(one, name) for one in found) / count for name in ("outer_loss", "inner_loss")}
    return dataclasses.replace(found[-1], grad=grad, **losses)


def check_optimizer(who: str, outer: Tree, optimizer: Any) -> None:
    """Raise TypeError or ValueError unless `optimizer` can move `outer`."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"{who}() was given a {type(optimizer).__name__} as optimizer; a torch.optim optimizer over outer was "
            f"needed, such as torch.optim.Adam(outer.values(), lr=0.01) (bilevel.SGD and its kin are for the inner "
            f"variable)"
        )
    if inspect.signature(optimizer.step).parameters["closure"].default is inspect.Parameter.empty:
        raise TypeError(
            f"{who}() was given {type(optimizer).__name__} as optimizer, whose step needs a closure that evaluates "
            f"the loss again; {who}() makes one hypergradient a step. Use torch.optim.Adam or SGD, or call "
            f"hypergradient() and set_grad() in a closure of your own"
        )
    check_movable(outer)
    held = {id(x) for group in optimizer.param_groups for x in group["params"]}
    if not any(id(x) in held for x in tree.tensors(outer)):
        raise ValueError(
            f"{who}() was given an optimizer that holds none of the tensors of outer, so outer would never move; make "
            f"it over outer.values()"
        )
