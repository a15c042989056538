"""The inner batch as the losses receive it, and the way of its cotangents back to x."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from bilevel.engine import autodiff
from bilevel.engine.along import Along
from bilevel.engine.evaluation import Evaluation
from bilevel.engine.replay import Generators, State
from bilevel.space import tree
from bilevel.space.tree import PartialLeaves, Tree


@dataclasses.dataclass(frozen=True)
class Source:
    """What functions of x are evaluated with: the problem's functions, x as it is and attached, and the generators."""

    evaluation: Evaluation
    generators: Generators
    x: Tree
    attached: Tree

    def along(self, *, graph: bool) -> Along:
        """Functions of a dynamics' own at x."""
        return Along(self.evaluation, self.attached if graph else self.x, graph=graph)

    def replayed(self, before: State | None, function: Callable[[Tree, Any], Any], batch: Any) -> Any:
        """A function of the attached x, drawing what it drew before, if it did."""
        if before is None:
            return function(self.attached, batch)
        now = self.generators.peek()
        self.generators.set(before)
        value = function(self.attached, batch)
        self.generators.set(now)
        return value


class Embedding:
    """What the losses receive in place of a batch, made once and without a graph.

    Its cotangents go through the features in one plain backward. Without `Problem.features` it is the batch itself and
    costs nothing.
    """

    def __init__(self, source: Source, batch: Any, made: tuple[State | None, Any] | None = None) -> None:
        self._source, self._batch, self._before = source, batch, None
        self.value, self.leaves = batch, list[Tensor]()
        if source.evaluation.problem.features is not None:
            if made is None:
                evaluation, before = source.evaluation, source.generators.peek()
                made = before, evaluation.without_graph(evaluation.embed, source.x, batch)
            self._before, self.value = made[0], tree.attach(made[1])
            self.leaves = [leaf for leaf in tree.tensors(self.value) if leaf.requires_grad]

    def again(self) -> Any:
        """The embedded batch with its graph in the attached x, from the same random numbers."""
        return self._source.replayed(self._before, self._source.evaluation.embed, self._batch)

    def moved(self, source: Source) -> "Embedding":
        """The same embedding, whose way back leads to another attached x."""
        other = copy.copy(self)
        other._source = source
        return other

    def pull(self, cotangents: PartialLeaves) -> PartialLeaves:
        """Cotangents of `leaves` to cotangents of x, replaying the features' random numbers."""
        xs = tree.tensors(self._source.attached)
        if not self.leaves or all(cotangent is None for cotangent in cotangents):
            return (None,) * len(xs)
        outputs = [leaf for leaf in tree.tensors(self.again()) if leaf.is_floating_point()]
        pairs = [(z, w) for z, w in zip(outputs, cotangents, strict=True) if w is not None]
        return autodiff.grad([z for z, _ in pairs], xs, [w for _, w in pairs])


class Unset:
    """In the place of an embedding that is shared, before it is made."""
