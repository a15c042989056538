"""The contract of an inner optimizer: a pure pair (init, step), and where it rests."""

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel._strategy import Strategy
from bilevel.space import tree
from bilevel.space.tree import PartialLeaves, Tree

Hyper = float | Tree | Callable[[Tree], Any]
"""A hyper-parameter: a number, a tree like `inner`, or a function of `outer` that returns a number, a 0-dim tensor or a
tree like `inner`. The leaves of a tree are one number, or one 0-dim tensor, per tensor of `inner`, or a tensor that
broadcasts to its shape (learned element-wise step sizes).

Numbers and trees are checked when the optimizer is made. What a function returns is checked for its shape, not for its
range: to look at a tensor's value at every step would stop a GPU."""


class Optimizer(Strategy):
    """How a gradient moves the inner variable.

    A step is a differentiable function of gradient, state, inner and outer, computed out of place, so that an estimator
    may backpropagate through it or not.
    """

    @abc.abstractmethod
    def init(self, inner: Tree) -> Any:
        """The state before the first step: a pytree of tensors, plain numbers and None, no larger than it must be.

        Its structure must stay the same over the steps, None where a tensor comes later: derivatives of a state are
        matched to its leaves by their place.
        """

    @abc.abstractmethod
    def step(self, grad: Tree, state: Any, inner: Tree, outer: Tree) -> tuple[Tree, Any]:
        """One step, computed out of place and differentiable in all four arguments.

        Args:
            grad: a tree like `inner`. A leaf may be None: the loss of this step does not use that tensor. It is then
                left alone with its state, as torch.optim does: no weight decay, no momentum, no step counted.
            state: what `init` or the last step returned.
            inner: the tensors to move.
            outer: for hyper-parameters that are functions of it.

        Returns:
            the new inner variable and the new state. An unused tensor may be handed on as it is.
        """

    def stationarity(self, grad: Tree, inner: Tree, outer: Tree) -> Tree | None:
        """The condition for rest: a differentiable tree like `inner`, zero where steps with this gradient do not move
        `inner` any more; None, the answer of this base, where that is not known.

        For gradient descent it is the gradient, with coupled weight decay grad + weight_decay * inner. Step sizes and
        momentum do not enter. Estimators that differentiate the solution instead of the path (implicit and corrected
        ones) refuse an optimizer that answers None. None leaves of `grad` stay None.
        """
        return None

    @property
    def plain_rate(self) -> float | None:
        """The number c when a step is y - c g and nothing else: its derivative then needs no algebra. None
        otherwise.
        """
        return None

    @property
    def step_limit(self) -> int | None:
        """The most steps it can make, where it is made for a number of them; None for any number."""
        return None


def held(owner: object) -> list[Optimizer]:
    """The optimizers that an optimizer or a dynamics holds in its fields."""
    return [value for value in tree.flatten(getattr(owner, "__dict__", {}))[0] if isinstance(value, Optimizer)]


def value_of(hyper: Hyper, outer: Tree) -> Any:
    """The value of a hyper-parameter at `outer`."""
    return hyper(outer) if callable(hyper) else hyper


def gradients(grad: Tree, inner: Tree) -> PartialLeaves:
    """The leaves of a gradient, None where the loss does not use a tensor.

    Raises:
        ValueError: it has not one leaf per tensor of `inner`.
    """
    leaves, count = tree.tensors(grad), len(tree.tensors(inner))
    if len(leaves) != count:
        leaves = tree.flatten(grad)[0]
        if len(leaves) != count:
            raise ValueError(
                f"an inner optimizer was given a gradient of {len(leaves)} leaves for an inner variable of {count}; "
                f"one per tensor was needed, None where the loss does not use it"
            )
    return tuple(leaves)


def coupled(grad: Sequence[Tensor | None], decay: Any, inner: Tree) -> PartialLeaves:
    """grad + decay * inner; None stays None."""
    if off(decay):
        return tuple(grad)
    rates = spread(decay, inner, "weight_decay")
    return tuple(
        g if g is None else plus(g, rate, y) for g, rate, y in zip(grad, rates, tree.tensors(inner), strict=True)
    )


def coupled_rest(grad: Tree, lr: Hyper, weight_decay: Hyper, inner: Tree, outer: Tree) -> Tree | None:
    """Where descent along the gradient rests: grad + weight_decay * inner.

    None where some tensors are held fixed by a step size of 0: those rest anywhere.
    """
    rates = spread(value_of(lr, outer), inner, "lr")
    fixed = [off(rate) for rate in rates]
    if (any(fixed) and not all(fixed)) or any(_partly_zero(rate) for rate in rates):
        return None
    return tree.like(inner, coupled(gradients(grad, inner), value_of(weight_decay, outer), inner))


def _partly_zero(rate: Any) -> bool:
    """Whether some entries of an element-wise step size are 0, where that can be read."""
    return type(rate) is Tensor and rate.dim() > 0 and bool((rate.detach() == 0).any())


def spread(value: Any, inner: Tree, name: str) -> list[Any]:
    """One value per leaf: a scalar for all of them, or the leaves of a tree like `inner`.

    Args:
        value: a number, a 0-dim tensor, or a tree of numbers and tensors.
        inner: the inner variable.
        name: of the hyper-parameter, for error messages.

    Raises:
        ValueError: the structure is another, or a leaf has a shape that does not broadcast to that of its tensor.
    """
    y = tree.tensors(inner)
    if isinstance(value, (int, float)):
        return [value] * len(y)
    if isinstance(value, Tensor) and value.dim() == 0:
        # A 0-dim tensor widens nothing but a 0-dim tensor.
        return [value if leaf.dim() or leaf.dtype == value.dtype else value.to(leaf.dtype) for leaf in y]
    needed = "a number, a 0-dim tensor or a tree like inner was needed"
    if isinstance(value, dict) and isinstance(inner, dict):
        # Dicts match by key, not by position.
        inner = dict(inner)
        value = {key: value[key] for key in inner} if set(value) == set(inner) else value
    values, structure = tree.flatten(value)
    if len(values) != len(y):
        raise ValueError(f"{name} has {len(values)} leaves where the inner variable has {len(y)}; {needed}")
    if structure != tree.flatten(inner)[1]:
        raise ValueError(
            f"{name} is a {type(value).__name__} whose structure is not that of the inner variable; {needed}"
        )
    return [
        _fitting(one, leaf, f"{name} of inner{place}")
        for one, leaf, place in zip(values, y, tree.names(inner), strict=True)
    ]


def _fitting(value: Any, leaf: Tensor, name: str) -> Any:
    if isinstance(value, (int, float)):
        return value
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; a number or a tensor was needed")
    given, wanted = value.shape, leaf.shape
    if len(given) > len(wanted) or any(
        a not in (1, b) for a, b in zip(reversed(given), reversed(wanted), strict=False)
    ):
        raise ValueError(
            f"{name} has the shape {tuple(given)}, which does not broadcast to that of its tensor, {tuple(wanted)}; a "
            f"number, a 0-dim tensor or a tensor of that shape was needed"
        )
    # A wider dtype would widen the inner variable.
    return value if torch.result_type(value, leaf) == leaf.dtype else value.to(leaf.dtype)


def complements(values: list[Any]) -> list[Any]:
    """1 - value per leaf, computed once where all leaves share one value."""
    if values and all(value is values[0] for value in values):
        return [1 - values[0]] * len(values)
    return [1 - value for value in values]


def minus(y: Tensor, rate: Any, d: Tensor) -> Tensor:
    """y - rate d, without a temporary where the rate is a number."""
    # add with a negative alpha: the backward of sub negates and scales in two passes, that of add in one.
    return y - rate * d if isinstance(rate, Tensor) else torch.add(y, d, alpha=-rate)


def plus(y: Tensor, rate: Any, d: Tensor) -> Tensor:
    """y + rate d, likewise."""
    return y + rate * d if isinstance(rate, Tensor) else torch.add(y, d, alpha=rate)


def off(value: Any) -> bool:
    """Whether a hyper-parameter is the number 0, so that its term can be left out."""
    return isinstance(value, (int, float)) and value == 0


def check_hyper(owner: str, name: str, value: Hyper, low: float, high: float = math.inf) -> None:
    """Raise ValueError unless every number lies in [low, high). What functions of outer return is not looked at."""
    if callable(value):
        return
    leaves = tree.flatten(value)[0]
    if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
        raise ValueError(
            f"{owner} was given {name}={value!r}, a tensor that requires grad: as a constant of the optimizer no "
            f"hypergradient would reach it. Put it into outer and write {name}=lambda outer: outer['{name}']"
        )
    # One tensor for all leaves is nearly always meant to be learned, which only a function of outer can be.
    scalar = isinstance(value, Tensor) and value.dim() == 0
    if scalar or not leaves or not all(_within(leaf, low, high) for leaf in leaves):
        raise ValueError(
            f"{owner} was given {name}={value!r}; a number in [{low}, {high}) or a function of outer was needed, such "
            f"as {name}=lambda outer: outer['{name}'], or a tree of such numbers like the inner variable"
        )


def _within(value: Any, low: float, high: float) -> bool:
    if isinstance(value, Tensor):
        return not value.is_complex() and value.dtype != torch.bool and bool(((value >= low) & (value < high)).all())
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value < high
