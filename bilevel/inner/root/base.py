"""The contract of a method that finds roots, and how a dynamics steps by one.

    F(y) = 0        F = y - T(y) for a fixed-point map T

A method sees numbers and a space, never the problem; with tasks it works for each by masks. The loop is judged by
|F|^2 / 2: one whose residual grows, or turns in circles, ends with a status that is not OK.
"""

import abc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel._strategy import Strategy
from bilevel.inner.dynamics import Point, Products
from bilevel.space import tree
from bilevel.space.inner_product import Leaves, Space
from bilevel.space.tree import Tree


class Method(Strategy):
    """How y moves towards F(y) = 0: a frozen dataclass with `step`, and `init` where it remembers something."""

    @property
    def needs_jacobian(self) -> bool:
        """Whether it takes products with dF/dy."""
        return False

    def init(self, y: Leaves) -> Any:
        """The state before the first step: a pytree of tensors like y, tensors per task, and plain numbers."""
        return None

    @abc.abstractmethod
    def step(
        self, y: Leaves, residual: Leaves, state: Any, space: Space, jacobian: Callable[[], Products]
    ) -> tuple[Leaves, Any]:
        """One step: pure, out of place, differentiable.

        Args:
            y: where it stands.
            residual: F(y).
            state: what `init` or the last step returned.
            space: dot products and norms, per task where there are tasks.
            jacobian: makes dF/dy at y, by its products.
        """


def check_method(owner: str, method: object, *, jacobian: bool) -> None:
    """Raise TypeError unless `method` is one, and ValueError where it needs a Jacobian and there is none."""
    if not isinstance(method, Method):
        raise TypeError(
            f"{owner} was given method={method!r}; a method was needed, such as bilevel.inner.root.Anderson(), "
            f"bilevel.inner.root.Broyden() or bilevel.inner.root.Plain()"
        )
    if method.needs_jacobian and not jacobian:
        raise ValueError(
            f"{owner} was given {type(method).__name__}, which solves with the Jacobian of the whole inner variable, "
            f"where each example of it is to be found by itself. Use Anderson() or Broyden(), or FixedPoint"
        )


def check_rate(owner: str, rate: object) -> None:
    """Raise ValueError unless a step length is a positive number."""
    if not isinstance(rate, (int, float)) or isinstance(rate, bool) or not 0 < rate < float("inf"):
        raise ValueError(f"{owner} was given rate={rate!r}; a positive number was needed")


def residual_of(owner: str, function: Callable[..., Any], inner: Tree, at: Point) -> tuple[Leaves, Tensor]:
    """F(y) as leaves in the order of inner, and |F|^2 / 2 per task without a graph.

    Raises:
        ValueError: the function returned something that is not like inner.
    """
    found = tuple(tree.tensors(tree.ordered(at.apply(function, inner), inner)))
    for leaf, like in zip(found, tree.tensors(inner), strict=True):
        if leaf.shape != like.shape or leaf.dtype != like.dtype:
            raise ValueError(
                f"the function of {owner} returned a tensor of shape {tuple(leaf.shape)} and dtype {leaf.dtype} for "
                f"one of shape {tuple(like.shape)} and dtype {like.dtype}; a tree like the inner variable was needed"
            )
    with torch.no_grad():
        return found, at.space.norm([leaf.detach() for leaf in found]).square() / 2


def difference(map_: Callable[..., Any]) -> Callable[..., Any]:
    """F = y - T(y) of a map T(inner, ...)."""

    def residual(inner: Tree, *rest: Any) -> Tree:
        moved = tree.ordered(map_(inner, *rest), inner)
        return tree.like(inner, [a - b for a, b in zip(tree.tensors(inner), tree.tensors(moved), strict=True)])

    return residual
