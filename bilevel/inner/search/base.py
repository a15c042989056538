"""The contract of a line search.

Lengths are found per task, by masks, as multiples of a first one: both searches here try a fixed grid of multiples
(halves, doubles, middles), so that the chosen one does not change with x but at jumps. It is a constant of the
derivative, which is right almost everywhere.
"""

import abc

import torch
from torch import Tensor

from bilevel._strategy import Strategy
from bilevel.inner.dynamics import Point
from bilevel.space import tree
from bilevel.space.tree import Leaves, Tree


class LineSearch(Strategy):
    """How far a step goes: y + m t d with m from `multiple`."""

    @abc.abstractmethod
    def multiple(self, inner: Tree, direction: Leaves, slope: Tensor, first: Tensor, at: Point) -> Tensor:
        """The multiple m of the first length t, per task, without a graph; 0 where none that is good enough was found.

        Args:
            inner: y.
            direction: d, like the tensors of y.
            slope: <dg/dy, d> per task.
            first: the length to try first, per task.
            at: the inner problem.
        """


def along(inner: Tree, direction: Leaves, length: Tensor, at: Point) -> Tree:
    """The point y + t d, with nothing of the graphs of y and d."""
    y, d = [leaf.detach() for leaf in tree.tensors(inner)], [leaf.detach() for leaf in direction]
    return tree.attach(tree.like(inner, at.space.axpy(length, d, y)))


def allowance(value: Tensor) -> Tensor:
    """How much a loss may go up by rounding alone."""
    return 4 * torch.finfo(value.dtype).eps * value.abs()


def check_trials(owner: str, trials: object) -> None:
    """Raise ValueError unless the number of trials is a positive integer."""
    if not isinstance(trials, int) or isinstance(trials, bool) or trials < 1:
        raise ValueError(f"{owner} was given trials={trials!r}; an integer of at least 1 was needed")


def check_part(owner: str, name: str, value: object) -> None:
    """Raise ValueError unless a constant lies strictly between 0 and 1."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1:
        raise ValueError(f"{owner} was given {name}={value!r}; a number between 0 and 1 was needed")
