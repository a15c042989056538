"""Products with the generalized Gauss-Newton matrix of an inner loss that is written as a loss of outputs.

    g(y) = l(z(y)) + r(y):    G v = J' (d2l/dz2) J v + (d2r/dy2) v + D v,    J = dz/dy

D v is what weight decay and a proximal pull add. J v is the derivative of u -> J' u (the double-backward trick).

| | cost | memory |
| --- | --- | --- |
| made | 1 forward and 1 backward of z, 1 gradient of l | their graphs, kept while the object lives |
| matvec | 2 backwards of z, 1 of l; those of r | 2 P |
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel.engine import autodiff, spans
from bilevel.engine.eager import Graph
from bilevel.engine.oracles import Oracles
from bilevel.linear.operator import LinearOperator
from bilevel.problem import Pulled, distance
from bilevel.space import tree
from bilevel.space.tree import Leaves, PartialLeaves, Tree

Outputs = Callable[[Tree, Tree, Any], Tree]
"""(inner, outer, batch) -> a tree of floating tensors."""
LossOfOutputs = Callable[[Tree, Tree, Any], Tensor]
"""(outputs, outer, batch) -> a 0-dim tensor."""
Rest = Callable[[Tree, Tree, Any], Tensor]
"""(inner, outer, batch) -> a 0-dim tensor."""


class Composed:
    """An inner loss as l(z(y)) + r(y), for all tasks at once where there are tasks."""

    def __init__(self, oracles: Oracles, outputs: Outputs, loss: LossOfOutputs, rest: Rest | None) -> None:
        self._oracles, self._outputs, self._loss, self._rest = oracles, outputs, loss, rest

    def outputs(self, inner: Tree, batch: Any) -> Tree:
        """z(y)."""
        found = self._oracles.evaluation.mapped(self._outputs, (inner,), self._oracles.x, batch)
        _floating(found)
        return found

    def loss(self, outputs: Tree, batch: Any) -> Tensor:
        """l(z), per task."""
        found: Tensor = self._oracles.evaluation.mapped(self._loss, (outputs,), self._oracles.x, batch)
        return found

    def rest(self, inner: Tree, batch: Any) -> Tensor | None:
        """r(y) and a proximal pull, per task; None where there is neither."""
        oracles, parts = self._oracles, list[Tensor]()
        if self._rest is not None:
            parts.append(oracles.evaluation.mapped(self._rest, (inner,), oracles.x, batch))
        loss = oracles.problem.inner_loss
        if isinstance(loss, Pulled):
            parts.append(distance(loss.strength, inner, oracles.start(), oracles.space.tasks))
        return sum(parts[1:], parts[0]) if parts else None

    def value(self, inner: Tree, batch: Any) -> Tensor:
        """The whole, per task."""
        loss, rest = self.loss(self.outputs(inner, batch), batch), self.rest(inner, batch)
        return loss if rest is None else loss + rest

    def differs(self, inner: Tree, batch: Any) -> str | None:
        """How far value and gradient are from those of the inner loss at a point, as a clause; None if they agree.

        Both draw the same random numbers.
        """
        oracles = self._oracles
        before = oracles.generators.peek()
        results = []
        for function in (lambda y: oracles.inner(y, oracles.x, batch), lambda y: self.value(y, batch)):
            oracles.generators.set(before)
            y = tree.attach(inner)
            with torch.enable_grad():
                loss = function(y)
                gradient = autodiff.filled(autodiff.grad([loss.sum()], tree.tensors(y)), tree.tensors(y))
            results.append((loss.detach(), gradient))
        oracles.generators.set(before)
        (loss, gradient), (other, other_gradient) = results
        if loss.shape != other.shape:
            return f"a tensor of shape {tuple(other.shape)} where inner_loss is of shape {tuple(loss.shape)}"
        bound = 1e3 * max(torch.finfo(leaf.dtype).eps for leaf in (loss, *gradient))
        size = torch.maximum(loss.abs(), other.abs()).double()
        if bool(((loss - other).abs().double() > bound * size).any()):
            return f"{other.flatten()[0].item():.6g} where inner_loss is {loss.flatten()[0].item():.6g}"
        space = oracles.space
        apart = space.norm([a - b for a, b in zip(gradient, other_gradient, strict=True)])
        length = torch.maximum(space.norm(gradient), space.norm(other_gradient))
        if bool((apart > 10 * bound * length).any()):
            return (
                f"a gradient that differs from that of inner_loss by {float((apart / length).max()):.2g} of its length"
            )
        return None


class GaussNewtonProducts(LinearOperator):
    """The operator v -> G v at one point.

    Args:
        oracles: of the instance; its dynamics is an optimizer that says where it rests.
        composed: the inner loss.
        inner: y.
        batch: as the losses receive it.
    """

    symmetric = True

    def __init__(self, oracles: Oracles, composed: Composed, inner: Tree, batch: Any) -> None:
        update = oracles.dynamics.update
        assert update is not None, "the estimator has looked"
        y, batch = tree.attach(inner), tree.detach(batch)
        self._ys = tree.tensors(y)
        with torch.enable_grad():
            found = composed.outputs(y, batch)
            outputs = _floating(found)
            at = tree.attach(found)
            self._at = _floating(at)
            loss = composed.loss(at, batch)
            self._slope = autodiff.grad([loss.sum()], self._at, create_graph=True)
            self._weights = [torch.zeros_like(each).requires_grad_() for each in outputs]
            self._pulled = autodiff.grad(outputs, self._ys, self._weights, create_graph=True)
            self._outputs = [autodiff.root(each) for each in outputs]
        values = [loss.detach()]

        def remainder(y: Tree, x: Tree, batch: Any) -> tuple[None, Tree]:
            rest, leaves = composed.rest(y, batch), tree.tensors(y)
            gradient: PartialLeaves = (None,) * len(leaves)
            if rest is not None:
                values.append(rest.detach())
                gradient = autodiff.grad([rest.sum()], leaves, create_graph=True)
            slope = tree.like(y, autodiff.filled(gradient, leaves))
            return None, tree.ordered(update.stationarity(slope, y, oracles.x), y)

        self._rest = Graph(remainder, inner, oracles.x, batch, ())
        self.loss = sum(values[1:], values[0])

    def matvec(self, v: Leaves) -> Leaves:
        """G v."""
        with spans.span(spans.HVP):
            pairs = [(pull, w) for pull, w in zip(self._pulled, v, strict=True) if pull is not None]
            pushed = autodiff.filled(
                autodiff.grad([a for a, _ in pairs], self._weights, [w for _, w in pairs], retain_graph=True),
                self._weights,
            )
            curved = autodiff.filled(autodiff.grad(*_kept(self._slope, self._at, pushed), retain_graph=True), self._at)
            pulled = autodiff.filled(autodiff.grad(self._outputs, self._ys, curved, retain_graph=True), self._ys)
            return tuple(a + b for a, b in zip(pulled, self._rest.transposed(v), strict=True))


def _kept(
    outputs: PartialLeaves, inputs: list[Tensor], weights: Leaves
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    pairs = [(out, w) for out, w in zip(outputs, weights, strict=True) if out is not None]
    return [out for out, _ in pairs], inputs, [w for _, w in pairs]


def _floating(value: Tree) -> list[Tensor]:
    leaves = tree.flatten(value)[0]
    for leaf in leaves or [None]:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            given = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(
                f"GaussNewton's outputs() returned {given}; floating tensors were needed, as a tree of them"
            )
    return leaves
