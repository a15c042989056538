"""A schedule over inner steps: another optimizer of one kind at each step.

    y_{k+1}, s_{k+1} = optimizers[k].step(g_k, s_k, y_k, x),   k = 0, 1, ...

| | gradients | extra memory |
| --- | --- | --- |
| step | - | that of one of the optimizers, and the number of the step |

Per-layer per-step learning rates are SGD(lr=a function of outer) at each step: Antoniou et al. 2019 (MAML++), arXiv
1810.09502, section 4. The state goes on from step to step, as in torch.optim when a scheduler changes a setting.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

from bilevel.optim.base import Optimizer, held
from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class Scheduled(Optimizer):
    """Step k is that of optimizers[k].

    The optimizers differ in their settings only: they are of one class, and keep the same state (all with a momentum,
    or all without), which goes on from one to the next.

    Args:
        optimizers: one per step, such as [SGD(lr=0.1 / (k + 1)) for k in range(5)].
        hold: the last optimizer makes all later steps, too. Without it, a solver that takes more steps than there are
            optimizers is refused.

    At rest: the condition that all share. Where they do not agree (other weight decays), where one does not say, and
    where optimizers of your own differ at all, it does not say; estimators at the solution then refuse it.

    Tasks that rest by themselves (Converge with TaskMean) leave the count alone: it is that of the steps made together.

    Raises:
        TypeError: no optimizers, of several classes, or nested schedules.
        ValueError: there are none; in `init`, their states differ in structure; in `step`, there is none for it.

    Example:
        >>> import torch, bilevel as bl
        >>> optimizer = bl.Scheduled([bl.SGD(lr=1.0), bl.SGD(lr=0.5)])
        >>> y, state = torch.zeros(1), optimizer.init(torch.zeros(1))
        >>> for _ in range(2):
        ...     y, state = optimizer.step(torch.ones(1), state, y, None)
        >>> y, state["step"]
        (tensor([-1.5000]), 2)
    """

    sharded = True

    optimizers: tuple[Optimizer, ...]
    hold: bool = False

    late: ClassVar[bool] = True

    def __post_init__(self) -> None:
        write = "write Scheduled([SGD(lr=0.1), SGD(lr=0.05)]), one per step"
        if isinstance(self.optimizers, Optimizer) or not isinstance(self.optimizers, Iterable):
            raise TypeError(
                f"Scheduled was given {type(self.optimizers).__name__}; a sequence of inner optimizers was needed: "
                f"{write}"
            )
        object.__setattr__(self, "optimizers", tuple(self.optimizers))
        if not self.optimizers:
            raise ValueError(f"Scheduled was given no optimizers; at least one was needed: {write}")
        for step, optimizer in enumerate(self.optimizers):
            if not isinstance(optimizer, Optimizer) or isinstance(optimizer, Scheduled):
                raise TypeError(
                    f"Scheduled was given {type(optimizer).__name__} for step {step}; an inner optimizer such as "
                    f"SGD(lr=0.1) was needed, and no schedule of schedules: {write}"
                )
        kinds = sorted({type(optimizer).__name__ for optimizer in self.optimizers})
        if len({type(optimizer) for optimizer in self.optimizers}) > 1:
            raise TypeError(
                f"Scheduled was given optimizers of the classes {', '.join(kinds)}; one class was needed, since the "
                f"state of one step is the next one's"
            )
        if not isinstance(self.hold, bool):
            raise TypeError(f"Scheduled was given hold={self.hold!r}; True or False was needed")

    @property
    def step_limit(self) -> int | None:
        return None if self.hold else len(self.optimizers)

    @property
    def plain_rate(self) -> float | None:
        rates = {optimizer.plain_rate for optimizer in self.optimizers}
        return rates.pop() if len(rates) == 1 else None

    def init(self, inner: Tree) -> Any:
        state = self.optimizers[0].init(inner)
        first = tree.flatten(state)[1]
        for step, optimizer in enumerate(self.optimizers[1:], start=1):
            if not _equal(optimizer, self.optimizers[0]) and tree.flatten(optimizer.init(inner))[1] != first:
                raise ValueError(
                    f"Scheduled was given optimizers whose states differ: that of step {step} keeps another state than "
                    f"that of step 0, which it is to go on with. Give all of them a momentum, or none: a momentum of 0 "
                    f"for a step is written lambda outer: 0.0"
                )
        return {"step": 0, "inside": state}

    def step(self, grad: Tree, state: Any, inner: Tree, outer: Tree) -> tuple[Tree, Any]:
        count = state["step"]
        if count >= len(self.optimizers) and not self.hold:
            raise ValueError(
                f"Scheduled holds {len(self.optimizers)} optimizers and was asked for step {count}, counted from 0; "
                f"one per step was needed. Give it more, take fewer steps, or write Scheduled(optimizers, hold=True), "
                f"with which the last one goes on"
            )
        now = self.optimizers[min(count, len(self.optimizers) - 1)]
        moved, inside = now.step(grad, state["inside"], inner, outer)
        return moved, {"step": count + 1, "inside": inside}

    def stationarity(self, grad: Tree, inner: Tree, outer: Tree) -> Tree | None:
        first, *others = self.optimizers
        if not all(_agree(first, other) for other in others):
            return None
        rest = [optimizer.stationarity(grad, inner, outer) for optimizer in self.optimizers]
        return None if any(condition is None for condition in rest) else rest[0]


def _agree(one: Optimizer, other: Optimizer) -> bool:
    """Whether two optimizers of one class rest at the same points, where both say.

    Of ours only the weight decay says where; of those that hold others, and of a user's, nothing is known.
    """
    if type(one).__module__.startswith("bilevel.optim.") and not one.foreign and not held(one):
        return _equal(getattr(one, "weight_decay", None), getattr(other, "weight_decay", None))
    return _equal(one, other)


def _equal(one: Any, other: Any) -> bool:
    try:
        return one is other or bool(one == other)
    except (RuntimeError, ValueError, TypeError):  # a comparison of tensors has no single answer
        return False
