"""Cotangents of a step: of the inner variable, and of the dynamics' state leaf by leaf."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass
class Cotangents:
    """Cotangents of (y, s): one for each tensor of y, and one for each leaf of s (None where zero); None for all of s.

    The state's leaves are counted with those that are no tensors, so that a moment that only appears at a tensor's
    first use cannot be mistaken for another's.
    """

    inner: list[Tensor | None]
    state: list[Tensor | None] | None

    def take(self, inner: Tree, state: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs of a step that have a cotangent, and those cotangents, which are let go of here.

        A state that is dropped at a step (a sum that starts anew) takes those of tasks at rest with it.
        """
        leaves, weights = tree.flatten(inner)[0], self.inner
        if self.state is not None:
            leaves, weights = [*leaves, *tree.flatten(state)[0]], [*weights, *self.state]
        pairs = [
            (leaf, weight)
            for leaf, weight in zip(leaves, weights, strict=True)
            if weight is not None and isinstance(leaf, Tensor)
        ]
        self.inner, self.state = [], None
        return [leaf for leaf, _ in pairs], [weight for _, weight in pairs]

    @classmethod
    def of(cls, inner: Tree, state: Any, pulled: Sequence[Tensor | None]) -> "Cotangents":
        """Cotangents of a step's start, from those of its floating tensors."""
        count, leaves = len(tree.tensors(inner)), tree.flatten(state)[0]
        rest = iter(pulled[count:])
        return cls(list(pulled[:count]), [next(rest) if _is_floating(leaf) else None for leaf in leaves])


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def floating(state: Any) -> list[Tensor]:
    """The floating tensors of a state, in which it is differentiable."""
    return [leaf for leaf in tree.tensors(state) if leaf.is_floating_point()]
