"""How one outer step is made: the hypergradient of its batches, and x moved by it."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from bilevel.batches import Batches
from bilevel.engine import spans
from bilevel.engine.base import Engine
from bilevel.engine.split import split_over
from bilevel.engine.together import ended, guarded
from bilevel.estimators.base import Estimator
from bilevel.estimators.company import ALONE
from bilevel.hypergradient import set_grad
from bilevel.inner.base import InnerSolver
from bilevel.loop.accumulation import mean
from bilevel.loop.computing import Computing, status_seen, usable
from bilevel.loop.early_stopping import EarlyStopping
from bilevel.loop.mixed_precision import MixedPrecision
from bilevel.loop.precision_check import Precision, PrecisionCheck
from bilevel.loop.randomness import Randomness
from bilevel.outcome import BilevelError, Hypergradient, Status, readable
from bilevel.problem import Problem
from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class Carried:
    """What one hypergradient leaves to the next: y, and the estimator's state."""

    inner: Tree | None
    state: Any


@dataclasses.dataclass(frozen=True)
class Made:
    """A hypergradient to move x along, what it leaves, how much of it reduced precision has kept where that was looked
    at, and whether x is left where it is instead, since float16 overflowed.
    """

    hypergradient: Hypergradient
    left: Carried
    precision: Precision | None = None
    skipped: bool = False


@dataclasses.dataclass
class Stepping:
    """The parts of a loop that stay as they are; for their meaning see `OuterLoop`.

    `warned` is whether an unstable inner loop was warned of; `frames` how many frames lie between a warning and the
    user's line.
    """

    who: str
    problem: Problem
    outer: Tree
    solver: InnerSolver
    estimator: Estimator
    optimizer: Optimizer
    carry: bool
    tolerate: frozenset[Status]
    engine: Engine | None
    schedulers: tuple[LRScheduler, ...] = ()
    accumulate: int = 1
    clip: float | Callable[[list[Tensor]], Any] | None = None
    frames: int = 5
    warned: bool = False
    stop: EarlyStopping | None = None
    precision: MixedPrecision | None = None
    check: PrecisionCheck | None = None
    left: bool = False
    random: Randomness = dataclasses.field(default_factory=Randomness)

    @functools.cached_property
    def computing(self) -> Computing:
        """How hypergradients are made."""
        return Computing(
            self.problem, self.solver, self.estimator, self.engine, self.precision, self.check, self.random
        )

    def group(self, take: Callable[[], Any], carried: Carried, index: int) -> Made | None:
        """The mean hypergradient of the next batches, fewer at the end, and what is left; None after the last batch."""
        found, left, precision = list[Hypergradient](), carried, None
        company, ranks = getattr(self.estimator, "company", ALONE), split_over(self.problem)
        while len(found) < self.accumulate:
            with company.guarded(), guarded(ranks, self.outer):
                batches = self._taken(take)
            if batches is None:
                break
            one, looked = self._one(batches, left, index, look=not found)
            precision = precision or looked
            if self.computing.overflowed(one):
                # torch.amp.GradScaler leaves such a step out, too: nothing has moved but the place in the data.
                return Made(one, carried, precision, skipped=True)
            inner = left.inner
            if self.carry and self.problem.init is None:
                inner = tree.detach(one.inner if one.next_inner is None else one.next_inner)
            left = Carried(inner, one.state)
            found.append(one)
        if not found:
            with company.guarded():
                ended(ranks, self.outer)
            company.ended()
        return Made(mean(found), left, precision) if found else None

    def _taken(self, take: Callable[[], Any]) -> Batches | None:
        """The next batch; None after the last."""
        try:
            batches = take()
        except StopIteration:
            return None
        if not isinstance(batches, Batches):
            raise TypeError(
                f"{self.who}()'s loader yielded a {type(batches).__name__}; write (bilevel.Batches(inner=a, outer=b) "
                f"for a, b in zip(train, valid))"
            )
        return batches

    def _one(
        self, batches: Batches, carried: Carried, index: int, look: bool
    ) -> tuple[Hypergradient, Precision | None]:
        found, precision = self.computing.hypergradient(
            index if look else None, self.outer, carried.inner, batches, carried.state
        )
        with spans.span(spans.OUTER):
            status = status_seen(found)
            if self.computing.overflowed(found):
                return found, precision
            if status.failed and (status not in self.tolerate or not usable(found)):
                raise BilevelError(
                    f"outer step {index}: {status.name}: {status.value} The outer variable was not moved by this step.",
                    status,
                )
            if status.failed or (status is Status.INNER_UNSTABLE and not self.warned):
                warnings.warn(f"{self.who}() stepped through {status.name}: {status.value}", stacklevel=self.frames)
                self.warned = True
        if precision is not None and self.computing.check is not None:
            self.computing.check.warn(index, precision, self.frames)
        return found, precision

    @property
    def stopped(self) -> bool:
        """Whether early stopping has said so."""
        return self.stop is not None and self.stop.stopped

    def leave(self) -> None:
        """Early stopping ends the loop: others that make the estimates with this process are told, once."""
        if not self.left:
            self.left = True
            getattr(self.estimator, "company", ALONE).ended()

    def rates(self) -> tuple[float, ...]:
        """The lr of each parameter group of the optimizer; NaN where it has none, or one without data."""
        rates = [group.get("lr", math.nan) for group in self.optimizer.param_groups]
        return tuple(math.nan if isinstance(lr, Tensor) and not readable(lr) else float(lr) for lr in rates)

    def show(self, found: Hypergradient) -> None:
        """Put the hypergradient where the optimizer looks for it, clipped."""
        with spans.span(spans.OUTER):
            set_grad(self.outer, found.grad)
            if self.clip is None:
                return
            xs = list({id(x): x for x in tree.tensors(self.outer)}.values())
            if callable(self.clip):
                self.clip(xs)
            else:
                torch.nn.utils.clip_grad_norm_(xs, self.clip)

    def move(self, made: Made) -> None:
        """Move x, and the learning rates on; nothing of these where the step is skipped."""
        found, precision = made.hypergradient, self.computing.precision
        with spans.span(spans.OUTER):
            if precision is not None:
                precision.update(not made.skipped, tree.tensors(self.outer)[0].device)
            if made.skipped:
                return
            if self.stop is not None:
                self.stop.see(found.outer_loss)  # before x is moved: it is the loss of this x
            self.optimizer.step()
            for scheduler in self.schedulers:
                if isinstance(scheduler, ReduceLROnPlateau):
                    scheduler.step(float(found.outer_loss))
                else:
                    scheduler.step()
