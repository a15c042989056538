"""The inner problem at one step, as a dynamics sees it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel.engine.along import Along
from bilevel.linear.operator import LinearOperator
from bilevel.space import tree
from bilevel.space.inner_product import Space
from bilevel.space.tree import PartialLeaves, Tree


class At:
    """The inner problem at one step; remembers the last gradient taken, and the loss at the first.

    Args:
        step: its number, from 0.
        batch: as the losses receive it.
        gradient: (inner, batch) -> the loss and dg/dy, with a graph or without.
        value: (inner, batch) -> the loss likewise.
        along: functions of the dynamics' own.
        outer: inner -> the outer loss and df/dy likewise; None where an estimator moves y by g alone.
        hessian: (inner, batch) -> the loss, dg/dy and the products with d2g/dy2; None likewise.
    """

    def __init__(
        self,
        step: int,
        batch: Any,
        gradient: Callable[[Tree, Any], tuple[Tensor, PartialLeaves]],
        value: Callable[[Tree, Any], Tensor],
        along: Along,
        outer: Callable[[Tree], tuple[Tensor, PartialLeaves]] | None = None,
        hessian: Callable[[Tree, Any], tuple[Tensor, PartialLeaves, LinearOperator]] | None = None,
    ) -> None:
        self.step, self.batch = step, batch
        self.loss: Tensor | None = None
        self.reported = self.vanishing = False
        self.code: Tensor | int = 0
        self._shown: Tensor | None = None
        self._gradient, self._value, self._along, self._outer, self._hessian = gradient, value, along, outer, hessian
        self._last: tuple[Tree, Tree] | None = None

    def gradient(self, inner: Tree) -> Tree:
        """dg/dy at `inner`; asked twice of the same object, it is computed once."""
        if self._last is not None and self._last[0] is inner:
            return self._last[1]
        with torch.enable_grad():
            loss, gradient = self._gradient(inner, self.batch)
        self.loss = loss.detach() if self.loss is None else self.loss
        found = tree.like(inner, gradient)
        self._last = (inner, found)
        return found

    @property
    def last(self) -> tuple[Tree, Tree] | None:
        """Where the last gradient was taken, and what it was."""
        return self._last

    def told(self, inner: Tree, loss: Tensor | None, gradient: Tree) -> "At":
        """This point, which knows dg/dy at `inner` from elsewhere and need not take it."""
        self.loss = loss if self.loss is None else self.loss
        self._last = (inner, gradient)
        return self

    def shifted(self, by: PartialLeaves) -> "At":
        """The same point with constants added to its gradient; its losses stay as they are."""

        def gradient(inner: Tree, batch: Any) -> tuple[Tensor, PartialLeaves]:
            loss, found = self._gradient(inner, batch)
            return loss, tree.accumulate(found, by)

        return At(self.step, self.batch, gradient, self._value, self._along, self._outer)

    def value(self, inner: Tree) -> Tensor:
        """The inner loss at `inner`."""
        with torch.enable_grad():
            return self._value(inner, self.batch)

    def report(self, shown: Tensor | None, *, vanishing: bool = False) -> None:
        """What the loop is to be judged by in the place of g."""
        self.reported, self.vanishing, self._shown = True, vanishing, None if shown is None else shown.detach()

    def fail(self, code: Tensor) -> None:
        """The step is not what it should be; 0 for nothing."""
        self.code = code.detach()

    @property
    def shown(self) -> Tensor | None:
        """What the loop is judged by: what was reported, else g."""
        return self._shown if self.reported else self.loss

    @property
    def space(self) -> Space:
        """Dot products and norms, per task."""
        return self._along.space

    def apply(self, function: Callable[..., Any], *trees: Tree) -> Any:
        """function(*trees, outer, batch), for each task."""
        return self._along.value(function, trees, self.batch)

    def pushforward(self, function: Callable[..., Any], inner: Tree, direction: Tree) -> list[Tensor]:
        """The change of function(inner, outer, batch) along a direction of inner, for each task."""
        return self._along.pushforward(function, inner, direction, self.batch)

    def jacobian(self, function: Callable[..., Any], inner: Tree) -> LinearOperator:
        """The derivative of function(inner, outer, batch) in inner, for each task, by its products."""
        return self._along.jacobian(function, inner, self.batch)

    def hessian(self, inner: Tree) -> LinearOperator:
        """d2g/dy2 at `inner` by its products.

        Raises:
            ValueError: the estimator moves y by first derivatives alone.
        """
        if self._hessian is None:
            raise ValueError(
                "the inner dynamics asks for second derivatives of the inner loss, and this estimator moves y by first "
                "ones alone. Use Unrolled(), or Implicit with a linear solver"
            )
        with torch.enable_grad():
            loss, gradient, products = self._hessian(inner, self.batch)
        self.loss = loss.detach() if self.loss is None else self.loss
        self._last = (inner, tree.like(inner, gradient))
        return products

    def outer_gradient(self, inner: Tree) -> Tree:
        """df/dy at `inner`.

        Raises:
            ValueError: the estimator moves y by g alone.
        """
        if self._outer is None:
            raise ValueError(
                "the inner dynamics asks for the gradient of the outer loss, and this estimator perturbs the inner "
                "loss alone. Use Unrolled()"
            )
        with torch.enable_grad():
            return tree.like(inner, self._outer(inner)[1])
