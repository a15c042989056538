"""How x is moved once the hypergradient is there: clipped, stepped, and the schedulers after it."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from bilevel.hypergradient import set_grad
from bilevel.outcome import Hypergradient
from bilevel.space import tree
from bilevel.space.tree import Tree

Clip = float | Callable[[list[Tensor]], Any]


@dataclasses.dataclass(frozen=True)
class Stepping:
    """The outer step of a loop.

    Args:
        optimizer: over the tensors of x.
        schedulers: each is stepped once after each outer step, ReduceLROnPlateau with the step's outer loss.
        clip: max_norm of torch.nn.utils.clip_grad_norm_ over all tensors of x, or a function of these tensors that
            changes their .grad in place.

    Raises:
        TypeError, ValueError: an argument is of another kind, out of range, or belongs to another optimizer.
    """

    optimizer: torch.optim.Optimizer
    schedulers: tuple[LRScheduler, ...] = ()
    clip: Clip | None = None

    def __post_init__(self) -> None:
        for scheduler in self.schedulers:
            if not isinstance(scheduler, LRScheduler):
                raise TypeError(
                    f"OuterLoop() was given a {type(scheduler).__name__} as scheduler; one of "
                    f"torch.optim.lr_scheduler was needed, such as CosineAnnealingLR(optimizer, T_max=1000)"
                )
            owner = getattr(scheduler, "optimizer", self.optimizer)
            if owner is not self.optimizer:
                raise ValueError(
                    f"OuterLoop() was given a {type(scheduler).__name__} made for another optimizer, whose lr it would "
                    f"change; make it with the optimizer of the loop"
                )
        if callable(self.clip) or self.clip is None:
            return
        if not isinstance(self.clip, (int, float)) or isinstance(self.clip, bool):
            raise TypeError(
                f"OuterLoop() was given clip={self.clip!r}; a number (max_norm of torch.nn.utils.clip_grad_norm_) or a "
                f"function of the tensors was needed, such as functools.partial(torch.nn.utils.clip_grad_value_, "
                f"clip_value=0.5)"
            )
        if not 0 < self.clip < math.inf:
            raise ValueError(f"OuterLoop() was given clip={self.clip!r}; a positive, finite norm was needed")

    def rates(self) -> tuple[float, ...]:
        """The lr of each parameter group of the optimizer; NaN where it has none."""
        return tuple(float(group.get("lr", math.nan)) for group in self.optimizer.param_groups)

    def move(self, outer: Tree, found: Hypergradient) -> None:
        """Move x along a hypergradient. What `found` holds stays as it was estimated; x.grad is what is clipped."""
        set_grad(outer, found.grad)
        if self.clip is not None:
            # A tensor that stands in x twice has one gradient.
            xs = list({id(x): x for x in tree.tensors(outer)}.values())
            if callable(self.clip):
                self.clip(xs)
            else:
                torch.nn.utils.clip_grad_norm_(xs, self.clip)
        self.optimizer.step()
        for scheduler in self.schedulers:
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(float(found.outer_loss))
            else:
                scheduler.step()


def checked_schedulers(scheduler: LRScheduler | Sequence[LRScheduler] | None) -> tuple[LRScheduler, ...]:
    """One scheduler, several or none, as a tuple."""
    if scheduler is None:
        return ()
    return tuple(scheduler) if isinstance(scheduler, Sequence) else (scheduler,)
