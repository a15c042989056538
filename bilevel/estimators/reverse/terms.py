"""The outer loss along the inner loop: f at the last iterate, or a weighted sum over several.

    F = f(y_K, x)        or        F = sum over k of w_k f(y_k, x)

A sweep back through the steps adds w_k df/dy(y_k) to the cotangent when it passes y_k, so no gradient is kept.

| | outer gradients | memory |
| --- | --- | --- |
| each term with w_k not 0 | 1 | one graph, freed |
"""

import copy
from collections.abc import Sequence

from torch import Tensor

from bilevel.engine.oracles import Oracles
from bilevel.space import tree
from bilevel.space.tree import PartialLeaves, Tree


class Terms:
    """The terms of F, evaluated one by one; collects their sum and its direct gradient in x.

    Args:
        oracles: of the instance.
        weights: w_1, ..., w_K; None for the last iterate alone.
        steps: K.
        first: iterates up to this one are constants to the sweep back.
    """

    def __init__(self, oracles: Oracles, weights: Sequence[float] | None, steps: int, first: int) -> None:
        self._oracles, self._first, self._steps = oracles, first, steps
        self._weights = {steps: 1.0}
        if weights is not None:
            self._weights = {step: weight for step, weight in enumerate(weights, start=1) if weight != 0}
        self.top = max(self._weights)
        """The last step whose iterate has a term."""
        self.direct: PartialLeaves = (None,) * len(tree.tensors(oracles.attached))
        self.final: Tensor | None = None
        self._loss: Tensor | None = None

    def facing(self, oracles: Oracles) -> "Terms":
        """The same terms of another outer loss, of which none was evaluated yet."""
        other = copy.copy(self)
        other._oracles, other.final, other._loss = oracles, None, None
        other.direct = (None,) * len(tree.tensors(oracles.attached))
        return other

    @property
    def loss(self) -> Tensor:
        """F, per task."""
        assert self._loss is not None, "no term was evaluated"
        return self._loss

    def followed(self, step: int) -> bool:
        """Whether the iterate at a step has a term whose gradient in y is of use."""
        return step in self._weights and (step > self._first or step == self._steps)

    def enter(self, step: int, inner: Tree) -> list[Tensor | None]:
        """Add the term at y_k; returns its cotangent, w_k df/dy."""
        loss, in_inner, in_outer = self._oracles.outer_gradient(inner)
        self._add(step, loss, in_outer)
        return list(_scaled(self._weights[step], in_inner))

    def passed(self, step: int, inner: Tree) -> None:
        """Add the term at an iterate that is a constant to the sweep: its value, and its direct gradient in x."""
        if step in self._weights and 0 < step <= self._first:
            self._add(step, *self._oracles.outer_gradient_in_outer(inner))

    def _add(self, step: int, loss: Tensor, in_outer: PartialLeaves) -> None:
        weight = self._weights[step]
        self.final = loss if step == self._steps else self.final
        loss = loss if weight == 1 else weight * loss
        self._loss = loss if self._loss is None else self._loss + loss
        self.direct = tree.accumulate(self.direct, _scaled(weight, in_outer))


def _scaled(weight: float, leaves: PartialLeaves) -> PartialLeaves:
    return leaves if weight == 1 else tuple(None if leaf is None else weight * leaf for leaf in leaves)
