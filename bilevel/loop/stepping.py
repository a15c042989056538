"""How one outer step is made: the hypergradient of its batches, and x moved by it."""

import dataclasses
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
from bilevel.hypergradient import hypergradient, set_grad
from bilevel.inner.base import InnerSolver
from bilevel.outcome import BilevelError, Hypergradient, Status, readable
from bilevel.problem import Problem
from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class Carried:
    """What one hypergradient leaves to the next: y, and the estimator's state."""

    inner: Tree | None
    state: Any


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

    def group(self, take: Callable[[], Any], carried: Carried, index: int) -> tuple[Hypergradient | None, Carried]:
        """The mean hypergradient of the next batches, fewer at the end, and what is left; None after the last batch."""
        found, company = list[Hypergradient](), getattr(self.estimator, "company", ALONE)
        ranks = split_over(self.problem)
        while len(found) < self.accumulate:
            with company.guarded(), guarded(ranks, self.outer):
                batches = self._taken(take)
            if batches is None:
                break
            one = self._one(batches, carried, index)
            inner = carried.inner
            if self.carry and self.problem.init is None:
                inner = tree.detach(one.inner if one.next_inner is None else one.next_inner)
            carried = Carried(inner, one.state)
            found.append(one)
        if not found:
            with company.guarded():
                ended(ranks, self.outer)
            company.ended()
        return (_mean(found) if found else None), carried

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

    def _one(self, batches: Batches, carried: Carried, index: int) -> Hypergradient:
        found = hypergradient(
            self.problem,
            self.outer,
            carried.inner,
            batches,
            solver=self.solver,
            estimator=self.estimator,
            state=carried.state,
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
                    f"outer step {index}: {status.name}: {status.value} The outer variable was not moved by this step.",
                    status,
                )
            if status.failed or (status is Status.INNER_UNSTABLE and not self.warned):
                warnings.warn(f"{self.who}() stepped through {status.name}: {status.value}", stacklevel=self.frames)
                self.warned = True
        return found

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

    def move(self, found: Hypergradient) -> None:
        """Move x, and the learning rates on."""
        with spans.span(spans.OUTER):
            self.optimizer.step()
            for scheduler in self.schedulers:
                if isinstance(scheduler, ReduceLROnPlateau):
                    scheduler.step(found.outer_loss)
                else:
                    scheduler.step()


def _mean(found: list[Hypergradient]) -> Hypergradient:
    """The last one, with the means over all of them: of the gradient and of both losses."""
    if len(found) == 1:
        return found[0]
    count = len(found)
    return dataclasses.replace(
        found[-1],
        grad=tree.tree_map(lambda *leaves: sum(leaves[1:], leaves[0]) / count, *(one.grad for one in found)),
        outer_loss=torch.stack([one.outer_loss for one in found]).mean(),
        inner_loss=torch.stack([one.inner_loss for one in found]).mean(),
    )
