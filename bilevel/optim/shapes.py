"""Shapes of a hyper-parameter over the steps, for `Schedules`.

    StepDecay  value factor^floor(k / every)            Cosine  low + (value - low) (1 + cos(pi k / steps)) / 2
    WarmUp     (start + (1 - start) k / steps) after(0) for k < steps, then after(k - steps)
    Tabulated  values[k]

| | gradients | extra memory |
| --- | --- | --- |
| value | - | - |

k counts steps from 0. Each is a function of (step, outer), so that one may stand for another, and one's own for any.

Wins: learned: `value` may be a function of outer, and `Tabulated(lambda outer: outer["rates"])` learns K rates.
Fails: a learned value acts along the steps alone, so only estimators that see the steps take it (Unrolled).
Reference: equal to torch.optim.lr_scheduler's StepLR (ExponentialLR with every=1), CosineAnnealingLR up to its end, and
LinearLR followed by another schedule, in float64 to 1e-12.
Differences from peers: after `steps`, Cosine stays at `low`, where torch's CosineAnnealingLR rises again.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from bilevel.optim.base import Hyper, check_hyper, value_of
from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class StepDecay:
    """value * factor ** (step // every); with every=1 an exponential, with factor=1 a constant.

    Args:
        value: a hyper-parameter: a number, a tree like inner, or a function of outer.
        factor: from 0 to 1 for one that falls.
        every: steps until the next factor.

    Example:
        >>> import bilevel as bl
        >>> [bl.optim.StepDecay(1.0, factor=0.5, every=2)(step, None) for step in range(5)]
        [1.0, 1.0, 0.5, 0.5, 0.25]
    """

    value: Hyper
    factor: float = 0.1
    every: int = 1

    def __post_init__(self) -> None:
        check_hyper("StepDecay", "value", self.value, 0.0)
        _check_number("StepDecay", "factor", self.factor)
        _check_count("StepDecay", "every", self.every)

    def __call__(self, step: int, outer: Tree) -> Any:
        return _scaled(self.factor ** (step // self.every), value_of(self.value, outer))


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Half a cosine from `value` at step 0 to `low` at step `steps`, and `low` from there on.

    Args:
        value: a hyper-parameter: a number, a tree like inner, or a function of outer.
        steps: how many.
        low: a number.

    Example:
        >>> import bilevel as bl
        >>> [round(bl.optim.Cosine(1.0, steps=4)(step, None), 4) for step in range(6)]
        [1.0, 0.8536, 0.5, 0.1464, 0.0, 0.0]
    """

    value: Hyper
    steps: int
    low: float = 0.0

    def __post_init__(self) -> None:
        check_hyper("Cosine", "value", self.value, 0.0)
        _check_count("Cosine", "steps", self.steps)
        _check_number("Cosine", "low", self.low)

    def __call__(self, step: int, outer: Tree) -> Any:
        share = (1 + math.cos(math.pi * min(step / self.steps, 1.0))) / 2
        value = value_of(self.value, outer)
        return tree.tree_map(lambda leaf: self.low + (leaf - self.low) * share, value)


@dataclasses.dataclass(frozen=True)
class WarmUp:
    """A straight line up to another schedule's first value, in `steps` steps, and then that schedule.

    Args:
        after: it: a function of (step, outer), such as Cosine(0.1, steps=100).
        steps: of the line.
        start: the part of the first value that the line starts at.

    Example:
        >>> import bilevel as bl
        >>> rule = bl.optim.WarmUp(bl.optim.StepDecay(1.0, factor=0.5), steps=2, start=0.0)
        >>> [rule(step, None) for step in range(5)]
        [0.0, 0.5, 1.0, 0.5, 0.25]
    """

    after: Callable[[int, Tree], Any]
    steps: int
    start: float = 0.0

    def __post_init__(self) -> None:
        if not callable(self.after):
            raise TypeError(
                f"WarmUp was given {self.after!r}; a function of (step, outer) was needed, such as Cosine(0.1, "
                f"steps=100); for a constant write StepDecay(0.1, factor=1.0)"
            )
        _check_count("WarmUp", "steps", self.steps)
        _check_number("WarmUp", "start", self.start)

    @property
    def step_limit(self) -> int | None:
        """The most steps, where the other schedule is made for a number of them."""
        limit = getattr(self.after, "step_limit", None)
        return None if limit is None else self.steps + limit

    def __call__(self, step: int, outer: Tree) -> Any:
        if step >= self.steps:
            return self.after(step - self.steps, outer)
        return _scaled(self.start + (1 - self.start) * step / self.steps, self.after(0, outer))


@dataclasses.dataclass(frozen=True)
class Tabulated:
    """values[step]: a number for each step, or one for each step and tensor.

    Args:
        values: a sequence of numbers, a tensor with a leading dimension of K, a dict of such tensors like inner, or a
            function of outer that returns one of these (learned rates).
        hold: the last value goes on. Without it, a step beyond is refused.

    Raises:
        ValueError: at a step beyond.

    Example:
        >>> import torch, bilevel as bl
        >>> bl.optim.Tabulated(lambda outer: outer["rates"])(1, {"rates": torch.tensor([0.5, 0.25])})
        tensor(0.2500)
    """

    values: Any
    hold: bool = False

    def __post_init__(self) -> None:
        if callable(self.values):
            return
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree.flatten(self.values)[0]):
            raise ValueError(
                "Tabulated was given a tensor that requires grad: as a constant no hypergradient would reach it. Put "
                "it into outer and write Tabulated(lambda outer: outer['rates'])"
            )
        if not isinstance(self.values, (Sequence, Tensor, dict)) or not _length(self.values):
            raise ValueError(
                f"Tabulated was given {self.values!r}; a number for each step was needed: a sequence, a tensor with a "
                f"leading dimension of K, or a function of outer that returns one"
            )

    @property
    def step_limit(self) -> int | None:
        """The most steps; None where the last value goes on, or where a function says the values."""
        return None if self.hold or callable(self.values) else _length(self.values)

    def __call__(self, step: int, outer: Tree) -> Any:
        values = value_of(self.values, outer)
        count = _length(values)
        if step >= count and not self.hold:
            raise ValueError(
                f"Tabulated holds {count} values and was asked for step {step}, counted from 0; one per step was "
                f"needed. Give it more, take fewer steps, or write Tabulated(values, hold=True), with which the last "
                f"one goes on"
            )
        place = min(step, count - 1)
        if isinstance(values, dict):
            return tree.tree_map(lambda leaf: leaf[place], values)
        return values[place]


def _length(values: Any) -> int:
    if isinstance(values, dict):
        return min((_length(leaf) for leaf in tree.flatten(values)[0]), default=0)
    if isinstance(values, Tensor):
        return values.shape[0] if values.dim() else 0
    return len(values)


def _scaled(factor: float, value: Any) -> Any:
    return tree.tree_map(lambda leaf: factor * leaf, value)


def _check_number(owner: str, name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ValueError(f"{owner} was given {name}={value!r}; a number of at least 0 was needed")


def _check_count(owner: str, name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{owner} was given {name}={value!r}; an integer of at least 1 was needed")
