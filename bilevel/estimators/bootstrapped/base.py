"""What a bootstrapped hypergradient is made of: where to go (Target), and how far that still is (Matching)."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel._strategy import Strategy
from bilevel.estimators.base import Instance
from bilevel.space import tree
from bilevel.space.tree import PartialLeaves, Tree


@dataclasses.dataclass(frozen=True)
class Ahead:
    """The inner loop some steps on, as a target sees it. Nothing here has a graph.

    Attributes:
        instance: the problem with its data.
        inner: y after K + further steps; with tasks, every tensor has a leading task dimension.
        steps: K + further.
    """

    instance: Instance
    inner: Tree
    steps: int

    @property
    def outer(self) -> Tree:
        """x."""
        return self.instance.oracles.x

    def outer_gradient(self) -> Tree:
        """df/dy at `inner`; 1 outer gradient."""
        with torch.enable_grad():
            return self._like_inner(self.instance.oracles.outer_gradient_in_inner(self.inner)[1])

    def inner_gradient(self) -> Tree:
        """dg/dy at `inner`, at the batch of the last step; 1 inner gradient."""
        with torch.enable_grad():
            return self._like_inner(self.instance.oracles.inner_gradient(self.inner, max(self.steps - 1, 0))[1])

    def _like_inner(self, gradient: PartialLeaves) -> Tree:
        return tree.like(self.inner, [None if leaf is None else leaf.detach() for leaf in gradient])


class Target(Strategy):
    """Where the inner variable should have gone: a point that is held fixed, whatever it was made of.

    Example:
        A target of the user's own, halfway to zero:

        >>> import dataclasses, torch, bilevel as bl
        >>> @dataclasses.dataclass(frozen=True)
        ... class Halfway(bl.estimators.Target):
        ...     def point(self, ahead):
        ...         return ahead.inner / 2
        >>> problem = bl.Problem(lambda y, x, b: (y - x) ** 2, lambda y, x, b: y**2)
        >>> bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.25), steps=1),
        ...     estimator=bl.Bootstrapped(bl.Unrolled(), Halfway())).grad
        tensor(0.1250)
    """

    @property
    def further(self) -> int:
        """How many more steps of the same inner loop are taken before `point` is asked; their batches too."""
        return 0

    @abc.abstractmethod
    def point(self, ahead: Ahead) -> Tree:
        """The target, a tree like inner; called without a graph."""


class Aimed(NamedTuple):
    """A target as a matching sees it. `slope` is the gradient of the matching's potential there, () without one."""

    inner: Tree
    slope: Tree


class Matching(Strategy):
    """How far the inner variable is from its target, as a differentiable function of the inner variable."""

    @property
    def potential(self) -> Callable[[Tree], Tensor] | None:
        """A function of the inner variable whose gradient at the target is needed; None for none."""
        return None

    @abc.abstractmethod
    def distance(self, target: Aimed, inner: Tree, outer: Tree, batch: Any) -> Tensor:
        """mu(z, y) for one task, 0-dim. `outer` and `batch` (the outer one, as the losses receive it) have no graph."""
