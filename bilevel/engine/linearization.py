"""The stationarity condition at one point, as a linear operator with a mixed product."""

from typing import Any

from bilevel.engine import spans
from bilevel.engine.base import Linearized
from bilevel.engine.embedding import Embedding
from bilevel.linear.operator import LinearOperator
from bilevel.space import tree
from bilevel.space.tree import Leaves, PartialLeaves, Tree


class Linearization(LinearOperator):
    """The stationarity condition at one point: the operator v -> (d stationarity / dy)' v, its transpose, and the mixed
    product.

    With `Problem.features` the graph holds the losses' part only; the mixed product goes through the features as a
    plain first-order backward.

    Attributes:
        loss: g at the point, where the condition takes a gradient of it.
        gradient: dg/dy at the point without its graph, where it was asked for and the condition takes it there.
    """

    def __init__(
        self,
        condition: Linearized,
        embedding: Embedding,
        point: Leaves,
        *,
        symmetric: bool,
        gradient: Tree | None = None,
    ) -> None:
        self._condition, self._embedding, self.symmetric = condition, embedding, symmetric
        self._point = point
        self.loss, self.gradient = condition.loss, gradient

    @property
    def batch(self) -> Any:
        """The batch as the losses receive it."""
        return self._embedding.value

    @property
    def point(self) -> Leaves:
        """The y where the condition was linearized."""
        return self._point

    def matvec(self, v: Leaves) -> Leaves:
        """H' v: H v where the condition is the gradient of a loss."""
        with spans.span(spans.HVP):
            return self._condition.transposed(v)

    def rmatvec(self, v: Leaves) -> Leaves:
        """H v: the transposed product of the adjoint system. The first one costs two, and keeps the graph of one."""
        with spans.span(spans.HVP):
            return self._condition.transposed(v) if self.symmetric else self._condition.product(v)

    def mixed(self, v: Leaves) -> tuple[Leaves, PartialLeaves]:
        """(H' v, M v) in one sweep; frees the graph, so it is the last product."""
        with spans.span(spans.MIXED):
            image, in_outer, in_batch = self._condition.last(v)
            return image, tree.accumulate(in_outer, self._embedding.pull(in_batch))

    def mixed_alone(self, v: Leaves) -> PartialLeaves:
        """M v without H' v: for a v whose residual is known. Frees the graph likewise."""
        with spans.span(spans.MIXED):
            in_outer, in_batch = self._condition.outside(v)
            return tree.accumulate(in_outer, self._embedding.pull(in_batch))
