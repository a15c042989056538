"""First derivatives in x, and in y and x at once, of a loss as it comes."""

from typing import Any

from torch import Tensor

from bilevel.engine import autodiff, spans
from bilevel.engine.base import Derivatives, Losses
from bilevel.space import tree
from bilevel.space.tree import PartialLeaves, Tree


def in_outer(name: str, loss: Losses, inner: Tree, attached: Tree, batch: Any) -> tuple[Tensor, PartialLeaves]:
    """The loss and its gradient in an attached x at a fixed y, in a span; eager. None where there is no path."""
    with spans.span(name):
        value = loss(tree.detach(inner), attached, batch)
        return value.detach(), autodiff.grad([value.sum()], tree.tensors(attached))


def in_both(
    name: str, loss: Losses, inner: Tree, attached: Tree, batch: Any, weights: Tensor | None = None
) -> tuple[Tensor, PartialLeaves, PartialLeaves]:
    """The loss and its gradients in y and in an attached x, in a span; `weights`: of the tasks in their sum."""
    with spans.span(name):
        y = tree.attach(inner)
        value, ys = loss(y, attached, batch), tree.tensors(y)
        total = value.sum() if weights is None else (weights.to(value.dtype) * value).sum()
        found = autodiff.grad([total], [*ys, *tree.tensors(attached)])
        return value.detach(), found[: len(ys)], found[len(ys) :]


def with_graph(
    engine: Derivatives, loss: Losses, inner: Tree, attached: Tree, batch: Any
) -> tuple[Tensor, PartialLeaves, PartialLeaves]:
    """The inner loss and its gradients in y and in an attached x, with a graph, by an engine."""

    def at_both(both: tuple[Tree, Tree], _: Tree, batch: Any) -> Tensor:
        return loss(*both, batch)

    with spans.span(spans.INNER_GRADIENT):
        count = len(tree.tensors(inner))
        value, found = engine.differentiable_gradient(at_both, (inner, attached), (), batch)
        return value, found[:count], found[count:]
