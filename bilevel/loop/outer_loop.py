"""OuterLoop: hypergradient, outer step, repeat, as an object that can stop."""

import inspect
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from bilevel.batches import Batches
from bilevel.engine import spans
from bilevel.engine.base import Engine
from bilevel.estimators.base import Estimator
from bilevel.hypergradient import check_kind, check_movable
from bilevel.inner.base import InnerSolver
from bilevel.loop.accumulation import checked, mean
from bilevel.loop.computing import Computing, status_seen, usable
from bilevel.loop.early_stopping import EarlyStopping
from bilevel.loop.mixed_precision import MixedPrecision
from bilevel.loop.precision_check import Precision, PrecisionCheck
from bilevel.loop.step import Step
from bilevel.loop.stepping import Stepping, checked_schedulers
from bilevel.outcome import BilevelError, Hypergradient, Status
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
        precision: MixedPrecision | None = None,
        check: PrecisionCheck | None = None,
        stop: EarlyStopping | None = None,
        generators: Sequence[Any] = (),
        also: Mapping[str, Any] | None = None,
    ) -> None:
        check_optimizer("OuterLoop", outer, optimizer)
        self.problem, self.outer, self.inner, self.loader = problem, outer, inner, loader
        self.solver, self.estimator, self.optimizer, self.engine = solver, estimator, optimizer, engine
        self.carry, self.state, self.tolerate = carry, state, tolerate
        self.epochs, self.accumulate = epochs, checked(accumulate)
        self.stepping = Stepping(optimizer, checked_schedulers(scheduler), clip)
        if stop is not None:
            check_kind("OuterLoop", "stop", stop, EarlyStopping, "bilevel.loop.EarlyStopping(patience=10)")
        self.computing = Computing(problem, solver, estimator, engine, precision, check)
        self.precision, self.stop = precision, stop
        self.generators, self.also = tuple(generators), dict(also or {})
        self.index = 0
        self._iterator = iter(loader)
        self._warned = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Step:
        if self.stop is not None and self.stop.stopped:
            raise StopIteration
        begun, lr = time.perf_counter(), self.stepping.rates()
        found, precision, sound = self._group()
        with spans.span(spans.OUTER):
            if self.precision is not None:
                self.precision.update(sound, tree.tensors(self.outer)[0].device)
            if sound and self.stop is not None:
                self.stop.see(found.outer_loss)  # before x moves: it is the loss of this x
            if sound:
                self.stepping.move(self.outer, found)
        self.index += 1
        return Step(
            self.index - 1,
            found,
            lr=lr,
            seconds=time.perf_counter() - begun,
            precision=precision,
            skipped=not sound,
        )

    def _group(self) -> tuple[Hypergradient, Precision | None, bool]:
        """The mean over `accumulate` batches, each begun where the one before ended; how much of the first was kept,
        and whether it may be used.
        """
        found, inner, state = list[Hypergradient](), self.inner, self.state
        looked: Precision | None = None
        for _ in range(self.accumulate):
            try:
                batches = next(self._iterator)
            except StopIteration:
                if found:
                    break  # what a pass leaves over is a smaller group
                raise
            one, precision, sound = self._one(batches, inner, state, look=not found)
            looked = looked or precision
            if not sound:
                return one, looked, False
            state = one.state
            if self.carry and self.problem.init is None:
                inner = tree.detach(one.inner if one.next_inner is None else one.next_inner)
            found.append(one)
        self.inner, self.state = inner, state
        return mean(found), looked, True

    def _one(
        self, batches: Any, inner: Tree | None, state: Any, look: bool
    ) -> tuple[Hypergradient, Precision | None, bool]:
        if not isinstance(batches, Batches):
            raise TypeError(
                f"iterate()'s loader yielded a {type(batches).__name__}; write (bilevel.Batches(inner=a, outer=b) for "
                f"a, b in zip(train, valid))"
            )
        found, precision = self.computing.hypergradient(self.index, look, self.outer, inner, batches, state)
        with spans.span(spans.OUTER):
            if self.computing.overflowed(found):
                return found, precision, False  # torch.amp.GradScaler leaves such a step out, too
            status = status_seen(found)
            if status.failed and (status not in self.tolerate or not usable(found)):
                raise BilevelError(
                    f"outer step {self.index}: {status.name}: {status.value} The outer variable was not moved by this "
                    f"step.",
                    status,
                )
            if status.failed or (status is Status.INNER_UNSTABLE and not self._warned):
                warnings.warn(f"iterate() stepped through {status.name}: {status.value}", stacklevel=4)
                self._warned = True
        return found, precision, True


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
