"""The contract of a proximal operator.

    prox_{c h}(v) = argmin over u of  h(u, x) + |u - v|^2 / (2 c)

It is written for one task, runs under torch.func.vmap, and is differentiable in v, c and x. At a tie, where v lies on
the edge of two pieces (a coordinate that would be held with a multiplier of exactly zero), its derivative is that of
the piece that holds: zero for a coordinate that is held at zero, that of the bound for one that is held there.
"""

import abc
from typing import Any

import torch
from torch import Tensor

from bilevel._strategy import Strategy
from bilevel.optim.base import Hyper, check_hyper, spread, value_of
from bilevel.space import tree
from bilevel.space.tree import Tree


class Prox(Strategy):
    """A proximal operator: a frozen dataclass with `apply`, and with `value` where the loop is to be judged by it.

    Example:
        One of the user's own, of h = x |y|^2 / 2:

        >>> import dataclasses, torch, bilevel as bl
        >>> @dataclasses.dataclass(frozen=True)
        ... class HalfSquare(bl.inner.proximal.Prox):
        ...     def apply(self, point, rate, outer):
        ...         return point / (1 + rate * outer)
        >>> problem = bl.Problem(lambda y, x, b: (y - 2) ** 2 / 2, lambda y, x, b: y)
        >>> hg = bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.inner.ProximalGradient(HalfSquare(), rate=0.5), steps=60),
        ...     estimator=bl.Implicit(bl.Dense()))
        >>> hg.inner, hg.grad  # y = 2 / (1 + x)
        (tensor(1.), tensor(-0.5000))
    """

    @abc.abstractmethod
    def apply(self, point: Tree, rate: Any, outer: Tree) -> Tree:
        """prox_{c h}(v), for one task: pure and differentiable.

        Args:
            point: v, a tree like the inner variable.
            rate: c, a number or a 0-dim tensor.
            outer: x.
        """

    def value(self, point: Tree, outer: Tree) -> Tensor | None:
        """The penalty h at a point, for one task, 0 for the indicator of a set; None, the answer of this base, where
        that is not known: then nothing is said of a loop that goes up.
        """
        return None


def strength(penalty: Hyper, inner: Tree, outer: Tree) -> list[Any]:
    """A penalty at x, one value per tensor of one task's y; NaN where it is negative, which has no minimum."""
    return [
        torch.where(one < 0, torch.nan, one) if isinstance(one, Tensor) else one if one >= 0 else float("nan")
        for one in spread(value_of(penalty, outer), inner, "penalty")
    ]


def check_penalty(owner: str, penalty: Hyper) -> None:
    """Raise ValueError unless a penalty is at least 0, or a function of outer."""
    check_hyper(owner, "penalty", penalty, 0.0)


def total(parts: list[Tensor]) -> Tensor:
    """The sum of some 0-dim tensors."""
    return torch.stack(parts).sum()


def leafwise(point: Tree, moved: list[Tensor]) -> Tree:
    """The leaves in the structure and the dtypes of a point."""
    return tree.like(point, [new.to(old.dtype) for new, old in zip(moved, tree.tensors(point), strict=True)])
