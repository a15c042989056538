"""The contract of an inner optimizer: a pure pair (init, step), and where it rests."""

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self, TypeVar

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


Owner = TypeVar("Owner")


class Optimizer(Strategy):
    """How a gradient moves the inner variable.

    A step is a differentiable function of gradient, state, inner and outer, computed out of place, so that an estimator
    may backpropagate through it or not.
    """

    foreign: ClassVar[bool] = False
    """Whether others wrote the step, so that it is looked at as a user's is before it is trusted."""
    late: ClassVar[bool] = False
    """Whether x may begin to act through it after its second step."""

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

    def over(self, tasks: int) -> Self:
        """The same optimizer where every tensor of `inner` has a leading dimension of that many tasks.

        Itself where a step treats every entry by itself. One that mixes the entries of a task (a norm, a matrix
        product) returns one that mixes no tasks. This base passes the question on to the optimizers held in fields.
        """
        return over_held(self, tasks)


def held(owner: object) -> list[Optimizer]:
    """The optimizers that an optimizer or a dynamics holds in its fields."""
    return [value for value in tree.flatten(getattr(owner, "__dict__", {}))[0] if isinstance(value, Optimizer)]


def over_held(owner: Owner, tasks: int) -> Owner:
    """A dataclass with the optimizers in its fields made for tasks; itself where that changes none of them."""
    if not dataclasses.is_dataclass(owner) or isinstance(owner, type):
        return owner
    changed = {}
    for field in dataclasses.fields(owner):
        value = getattr(owner, field.name)
        leaves, structure = tree.flatten(value)
        made = [leaf.over(tasks) if isinstance(leaf, Optimizer) else leaf for leaf in leaves]
        if any(a is not b for a, b in zip(made, leaves, strict=True)):
            changed[field.name] = tree.unflatten(made, structure)
    return dataclasses.replace(owner, **changed) if changed else owner


def trusted(owner: object) -> bool:
    """Whether the library wrote the steps of an optimizer or a dynamics, and of all optimizers that it holds."""
    ours = type(owner).__module__.startswith("bilevel.") and not getattr(owner, "foreign", False)
    return ours and all(map(trusted, held(owner)))


def same_rest(rest: Tree | None, grad: Tree) -> Tree | None:
    """The rest of an optimizer whose gradient was changed on the way, where that is at gradient zero; else None.

    What is added to a clipped gradient balances another one than what is added to the gradient itself.
    """
    if rest is None:
        return None
    pairs = zip(tree.flatten(rest)[0], tree.flatten(grad)[0], strict=True)
    return rest if all(a is b for a, b in pairs) else None


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
    for leaf in leaves:
        if leaf is not None and leaf.is_complex():
            raise ValueError(
                f"an inner optimizer was given a gradient of dtype {leaf.dtype}; real tensors were needed: let "
                f"inner_loss take torch.view_as_real(z) as its inner variable"
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
