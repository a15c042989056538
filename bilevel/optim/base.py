"""The contract of an inner optimizer: a pure pair (init, step)."""

import abc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel._strategy import Strategy
from bilevel.space import tree
from bilevel.space.tree import Tree

Hyper = float | Callable[[Tree], Any]
"""A hyper-parameter: a number, or a function of `outer` that returns a 0-dim tensor, or a tree like `inner` with one
value for each leaf or each number (learned element-wise step sizes)."""


class Optimizer(Strategy):
    """How a gradient moves the inner variable.

    A step is a differentiable function of gradient, state, inner and outer, computed out of place, so that an estimator
    may backpropagate through it or not.
    """

    @abc.abstractmethod
    def init(self, inner: Tree) -> Any:
        """The state before the first step: a pytree, no larger than it must be."""

    @abc.abstractmethod
    def step(self, grad: Tree, state: Any, inner: Tree, outer: Tree) -> tuple[Tree, Any]:
        """One step. Returns the new inner variable and the new state, both new objects."""

    @property
    def plain_rate(self) -> float | None:
        """The number c when a step is y - c g and nothing else: its derivative then needs no algebra. None
        otherwise.
        """
        return None

    def depends_on_outer(self) -> bool:
        """Whether a hyper-parameter is a function of outer."""
        return any(callable(hyper) for hyper in tree.flatten(vars(self))[0])


def value_of(hyper: Hyper, outer: Tree) -> Any:
    """The value of a hyper-parameter at `outer`."""
    return hyper(outer) if callable(hyper) else hyper


def spread(value: Any, inner: Tree) -> list[Any]:
    """One value a leaf: a scalar for all of them, or the leaves of a tree like `inner`."""
    count = len(tree.tensors(inner))
    if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.dim() == 0):
        return [value] * count
    values = tree.aligned(value, inner)
    if len(tree.tensors(value)) != count:
        raise ValueError(
            f"a hyper-parameter has {len(tree.tensors(value))} leaves where the inner variable has {count}; a number, "
            f"a 0-dim tensor or a tree like inner was needed"
        )
    if values is None:
        raise ValueError(
            f"a hyper-parameter is a {type(value).__name__} whose structure is not that of the inner variable; a "
            f"number, a 0-dim tensor or a tree like inner "
            f"was needed"
        )
    return values


def minus(y: Tensor, rate: Any, d: Tensor) -> Tensor:
    """Y - rate d, without a temporary where the rate is a number."""
    # add with a negative alpha: the backward of sub negates and scales in two passes, that of add in one.
    return y - rate * d if isinstance(rate, Tensor) else torch.add(y, d, alpha=-rate)


def plus(y: Tensor, rate: Any, d: Tensor) -> Tensor:
    """Y + rate d, likewise."""
    return y + rate * d if isinstance(rate, Tensor) else torch.add(y, d, alpha=rate)


def off(value: Any) -> bool:
    """Whether a hyper-parameter is the number 0, so that its term can be left out."""
    return isinstance(value, (int, float)) and value == 0


def check_hyper(owner: str, name: str, value: Hyper, low: float, high: float = float("inf")) -> None:
    """Raise ValueError unless a number lies in [low, high); functions of outer are checked by what they return."""
    if callable(value):
        return
    if not isinstance(value, (int, float)) or not low <= value < high:
        raise ValueError(
            f"{owner} was given {name}={value!r}; a number in [{low}, {high}) or a function of outer was needed, such "
            f"as {name}=lambda outer: outer['{name}']"
        )
