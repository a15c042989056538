"""The contract of an inner solver: it sees a gradient, never a problem, and keeps no trajectory of its own.

An estimator that needs the trajectory passes `visit` and keeps what it wants.
"""

import abc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel._strategy import Strategy
from bilevel.optim.base import Optimizer
from bilevel.outcome import Solution, Status, code_if, worst
from bilevel.space import tree
from bilevel.space.tree import Leaves, Tree

Gradient = Callable[[Tree, int], tuple[Tensor, Leaves]]
"""(y, step) -> loss and its gradient in y, both without a graph."""
Visit = Callable[[int, Tree, Any], None]
"""Called with (step, y, optimizer state) before each step."""


class InnerSolver(Strategy):
    """How y is moved from its start towards argmin g."""

    optimizer: Optimizer

    @property
    @abc.abstractmethod
    def max_steps(self) -> int:
        """The most steps it may take; a PerStep must hold that many batches."""

    @property
    @abc.abstractmethod
    def fixed(self) -> bool:
        """Whether it always takes `max_steps` steps, so that the K-step program is known beforehand."""

    @abc.abstractmethod
    def solve(
        self, gradient: Gradient, inner: Tree, outer: Tree, *, tasks: int | None = None, visit: Visit | None = None
    ) -> Solution:
        """Find y.

        Args:
            gradient: the first-order oracle of the inner loss.
            inner: the start.
            outer: for optimizers whose hyper-parameters are functions of it.
            tasks: number of tasks, when the leaves of `inner` have a leading task dimension.
            visit: sees every iterate before it is moved.
        """


def move(optimizer: Optimizer, gradient: Leaves, state: Any, inner: Tree, outer: Tree) -> tuple[Tree, Any]:
    """One optimizer step without a graph.

    Raises:
        ValueError: the step changed the shape of the inner variable.
    """
    with torch.no_grad():
        moved, state = optimizer.step(tree.like(inner, gradient), state, inner, outer)
    check_step(optimizer, inner, moved)
    return moved, state


def check_step(optimizer: Optimizer, inner: Tree, moved: Tree) -> None:
    """Raise ValueError if an optimizer step changed a shape or dtype."""
    for before, after in zip(tree.tensors(inner), tree.tensors(moved), strict=True):
        if before.shape != after.shape or before.dtype != after.dtype:
            raise ValueError(
                f"an inner step changed a tensor of shape {tuple(before.shape)} and dtype {before.dtype} into "
                f"{tuple(after.shape)} and {after.dtype}. "
                f"A hyper-parameter of {type(optimizer).__name__} has a shape that broadcasts against y; give a 0-dim "
                f"tensor or a tree like inner"
            )


def health(inner: Tree, first_loss: Tensor | None, last_loss: Tensor | None, *, comparable: bool = True) -> Tensor:
    """Status code of an inner loop: DIVERGED when y is not finite, INNER_ROSE when the loss more than doubled."""
    diverged = code_if(~tree.finite(inner), Status.DIVERGED)
    if not comparable or first_loss is None or last_loss is None:
        return diverged
    rose = last_loss > first_loss + first_loss.abs()
    return worst(diverged, code_if(rose, Status.INNER_ROSE))


def check_optimizer(owner: str, optimizer: object) -> None:
    """Raise TypeError for anything but a differentiable inner optimizer."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"{owner} was given the optimizer {type(optimizer).__name__}; an inner optimizer such as "
            f"bilevel.SGD(lr=0.1) was needed (torch.optim optimizers "
            f"work in place and are for the outer variable)"
        )
