"""Functions of a dynamics' own at one step: their values, and how they change along a direction.

    J d = d/du <d<r(y), u>/dy, d>          (r the function; the double-backward trick: J' u is linear in u)

| | cost | memory |
| --- | --- | --- |
| value | 1 call of the function, for all tasks at once | its graph, where one is wanted |
| pushforward | 1 call and 2 backwards | its graph, freed unless one is wanted |
| jacobian; a product J d or J' w | 1 call and 1 backward; 1 backward | its graph, kept while the object lives |
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.engine import autodiff, spans
from bilevel.engine.evaluation import Evaluation
from bilevel.linear.operator import LinearOperator
from bilevel.space import tree
from bilevel.space.inner_product import Space
from bilevel.space.tree import Leaves, PartialLeaves, Tree


class Along:
    """What a dynamics may ask of functions written for one task.

    Args:
        evaluation: maps functions over tasks.
        outer: x, attached where `graph`.
        graph: whether results are differentiable in y, in the direction, in x and in the batch.
    """

    def __init__(self, evaluation: Evaluation, outer: Tree, *, graph: bool) -> None:
        self._evaluation, self._outer, self._graph = evaluation, outer, graph
        self.space = Space(evaluation.tasks, evaluation.ranks)

    def value(self, function: Callable[..., Any], trees: tuple[Tree, ...], batch: Any) -> Any:
        """function(*trees, outer, batch), for each task."""
        with torch.set_grad_enabled(self._graph):
            return self._evaluation.mapped(function, trees, self._outer, batch)

    def pushforward(self, function: Callable[..., Any], inner: Tree, direction: Tree, batch: Any) -> list[Tensor]:
        """J d of function(inner, outer, batch) with respect to inner, for each task, as a list of tensors.

        `direction` is a tree like inner; None in the place of a tensor stands for zero.

        Raises:
            TypeError: the function returned something else than floating tensors.
            ValueError: it does not depend on the inner variable.
        """
        with torch.enable_grad(), spans.span(spans.HVP):
            y = tree.tree_map(lambda leaf: leaf if self._graph and leaf.requires_grad else _leaf(leaf), inner)
            found = tree.tensors(self._evaluation.mapped(_floating(function), (y,), self._outer, batch))
            weights = [torch.zeros_like(each).requires_grad_() for each in found]
            pulled = autodiff.grad(found, tree.tensors(y), weights, create_graph=True)
            if all(leaf is None for leaf in pulled):
                raise ValueError(
                    f"{_name(function)} does not depend on the inner variable: no gradient of it has a path there. "
                    f"Compute it from the `inner` argument, without .detach(), .item() or torch.no_grad()"
                )
            pairs = [
                (leaf, d)
                for leaf, d in zip(pulled, tree.flatten(direction)[0], strict=True)
                if leaf is not None and d is not None
            ]
            outputs = [leaf for leaf, _ in pairs if leaf is not None]
            pushed = autodiff.grad(outputs, weights, [d for _, d in pairs], create_graph=self._graph)
            return list(autodiff.filled(pushed, found))

    def jacobian(self, function: Callable[..., Any], inner: Tree, batch: Any) -> "Jacobian":
        """The derivative in inner of function(inner, outer, batch), which returns a tree like inner, for each task.

        Raises:
            TypeError: the function returned something else than floating tensors.
            ValueError: they are not shaped like inner.
        """
        with torch.enable_grad():
            y = tree.tree_map(lambda leaf: leaf if self._graph and leaf.requires_grad else _leaf(leaf), inner)
            found = tree.tensors(self._evaluation.mapped(_floating(function), (y,), self._outer, batch))
            return Jacobian(_name(function), tree.tensors(y), found, graph=self._graph)


class Jacobian(LinearOperator):
    """The derivative J of some tensors in others of the same shapes, each product a backward.

    Args:
        name: of the function that made them.
        inputs: what is differentiated in.
        outputs: what is differentiated.
        graph: whether products are differentiable.

    Raises:
        ValueError: the shapes differ.
    """

    def __init__(self, name: str, inputs: list[Tensor], outputs: list[Tensor], *, graph: bool) -> None:
        if [leaf.shape for leaf in inputs] != [leaf.shape for leaf in outputs]:
            raise ValueError(
                f"{name} returned tensors of shapes {[tuple(leaf.shape) for leaf in outputs]}; those of the inner "
                f"variable, {[tuple(leaf.shape) for leaf in inputs]}, were needed: one equation for each number"
            )
        self._inputs, self._outputs, self._graph = inputs, outputs, graph
        self._weights = [torch.zeros_like(leaf).requires_grad_() for leaf in outputs]
        self._pulled = autodiff.grad(outputs, inputs, self._weights, create_graph=True)

    def matvec(self, v: Leaves) -> Leaves:
        pairs = [(leaf, d) for leaf, d in zip(self._pulled, v, strict=True) if leaf is not None]
        return self._product([leaf for leaf, _ in pairs], self._weights, [d for _, d in pairs])

    def rmatvec(self, v: Leaves) -> Leaves:
        return self._product(self._outputs, self._inputs, v)

    def _product(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Leaves:
        with torch.enable_grad(), spans.span(spans.HVP):
            found = autodiff.grad(outputs, inputs, weights, create_graph=self._graph, retain_graph=True)
            return autodiff.filled(found, inputs)


class Hessian(LinearOperator):
    """d2g/dy2 from a gradient with a graph; the identity in tensors that the loss does not use, so that a solver leaves
    them alone where it might call the whole singular.

    Args:
        inner: the tensors that the gradient was taken in.
        gradient: with a graph; None for tensors that the loss does not use.
        graph: whether products are differentiable.
    """

    symmetric = True

    def __init__(self, inner: Sequence[Tensor], gradient: PartialLeaves, *, graph: bool) -> None:
        self._inner, self._gradient, self._graph = inner, gradient, graph

    def matvec(self, v: Leaves) -> Leaves:
        pairs = [(leaf, d) for leaf, d in zip(self._gradient, v, strict=True) if leaf is not None]
        outputs, weights = [leaf for leaf, _ in pairs], [d for _, d in pairs]
        with torch.enable_grad(), spans.span(spans.HVP):
            found = autodiff.grad(outputs, self._inner, weights, create_graph=self._graph, retain_graph=True)
        images = autodiff.filled(found, self._inner)
        return tuple(d if g is None else image for g, d, image in zip(self._gradient, v, images, strict=True))


def _leaf(leaf: Any) -> Any:
    return leaf.detach().requires_grad_() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _floating(function: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    """The same, as a list of floating tensors."""

    def checked(*arguments: Any) -> list[Tensor]:
        found = tree.flatten(function(*arguments))[0]
        for each in found:
            if not isinstance(each, Tensor) or not each.is_floating_point():
                given = each.dtype if isinstance(each, Tensor) else type(each).__name__
                raise TypeError(
                    f"{_name(function)} returned {given}; floating tensors were needed, whose change along a direction "
                    f"can be taken"
                )
        return found

    return checked


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def curvature(
    gradient: Callable[[Tree], tuple[Tensor, PartialLeaves]], inner: Tree
) -> tuple[Tensor, PartialLeaves, Hessian]:
    """A loss, its gradient and the products with its Hessian at a point, without a graph, of a differentiable
    gradient.
    """
    y = tree.attach(inner)
    loss, found = gradient(y)
    return (
        loss,
        tuple(None if leaf is None else leaf.detach() for leaf in found),
        Hessian(tree.tensors(y), found, graph=False),
    )
