"""Proximal gradient steps: an inner loss g plus a part h that has kinks, or that is a set to stay in.

    y <- prox_{c h}(z - c dg/dy(z))                              z = y
    y* = argmin g(y, x) + h(y, x)  rests where   y - prox_{c h}(y - c dg/dy(y)) = 0
    accelerated (FISTA):  z_k = y_k + (t_{k-1} - 1) / t_k (y_k - y_{k-1}),    t_{k+1} = (1 + sqrt(1 + 4 t_k^2)) / 2

| | inner gradients | memory |
| --- | --- | --- |
| step | 1, and 1 prox | 2 P (accelerated 3 P) + one graph |

Wins: lasso, group lasso, bounds, simplices; both the penalty's strength and the bounds may be outer variables.
Fails: at a tie (a coordinate held with a multiplier of exactly zero) y* has a kink in x, and the number returned is one
of its one-sided derivatives: that of the piece in which the coordinate is held. Off ties the active set does not change
with x, and the hypergradient is that of the smooth problem on it.
References: Beck and Teboulle 2009 (FISTA, recalled); hypergradients of non-smooth inner problems: Bertrand et al. 2022,
arXiv 2105.01637 (recalled).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel.inner.dynamics import Dynamics, Point
from bilevel.inner.proximal.base import Prox
from bilevel.optim.base import gradients, value_of
from bilevel.space import tree
from bilevel.space.tree import Leaves, Tree


@dataclasses.dataclass(frozen=True)
class ProximalGradient(Dynamics):
    """Proximal gradient steps on g + h, with g the inner loss and h given by its proximal operator.

    `Unrolled` differentiates the steps as they ran. Estimators at the solution differentiate the condition above, which
    is not symmetric: `Implicit` with Dense, Neumann(step_size=1), or another solver for such systems; CG is refused,
    and so are estimators that perturb the inner loss. `hg.inner_loss` is g alone; the loop is judged by g + h.

    Args:
        prox: the operator of h: one of `bilevel.inner.proximal`, or the user's own `Prox`.
        rate: c, below 2 / L for a curvature of g of at most L (accelerated: 1 / L): a positive number, or a function of
            outer that returns one or a 0-dim tensor. (It moves no solution; `Unrolled` sees it.)
        accelerated: whether steps are FISTA's.

    `Converge` looks at |y - prox_{c h}(y - c dg/dy)|, which is c times the length of a gradient where h = 0.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: ((y - x) ** 2).sum() / 2, lambda y, x, b: (y - 5).square().sum() / 2)
        >>> bounded = bl.inner.ProximalGradient(bl.inner.proximal.Box(low=0.0, high=1.0), rate=0.5)
        >>> hg = bl.hypergradient(problem, torch.tensor([0.5, 7.0]), torch.zeros(2), bl.Batches(None, None),
        ...     solver=bl.Converge(bounded, tol=1e-6), estimator=bl.Implicit(bl.Neumann(30, step_size=1.0)))
        >>> hg.inner, hg.grad, hg.status.name
        (tensor([0.5000, 1.0000]), tensor([-4.5000, -0.0000]), 'OK')
    """

    prox: Prox
    rate: float | Callable[[Tree], Any]
    accelerated: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.prox, Prox):
            raise TypeError(
                f"ProximalGradient was given prox={self.prox!r}; a proximal operator was needed, such as "
                f"bilevel.inner.proximal.L1(penalty=0.1), or a class of your own with apply(point, rate, outer)"
            )
        number = isinstance(self.rate, (int, float)) and not isinstance(self.rate, bool) and 0 < self.rate < math.inf
        if not callable(self.rate) and not number:
            raise ValueError(
                f"ProximalGradient was given rate={self.rate!r}; a positive number, or a function of outer that "
                f"returns one, was needed"
            )
        if not isinstance(self.accelerated, bool):
            raise ValueError(f"ProximalGradient was given accelerated={self.accelerated!r}; True or False was needed")

    @property
    def autonomous(self) -> bool:
        return True

    def init(self, inner: Tree, outer: Tree) -> Any:
        return {"t": 1.0, "last": tuple(tree.tensors(inner))} if self.accelerated else None

    def step(self, inner: Tree, state: Any, outer: Tree, at: Point) -> tuple[Tree, Any]:
        if not self.accelerated:
            return self._moved(inner, outer, at), state
        t = (1 + math.sqrt(1 + 4 * state["t"] ** 2)) / 2
        y, push = tree.tensors(inner), (state["t"] - 1) / t
        ahead = [torch.add(a, a - b, alpha=push) for a, b in zip(y, state["last"], strict=True)] if push else y
        return self._moved(tree.like(inner, ahead), outer, at), {"t": t, "last": tuple(y)}

    def stationarity(self, inner: Tree, outer: Tree, at: Point) -> Tree | None:
        moved = tree.ordered(self._moved(inner, outer, at), inner)
        return tree.like(inner, _minus(tree.tensors(inner), tree.tensors(moved)))

    def _moved(self, inner: Tree, outer: Tree, at: Point) -> Tree:
        """prox_{c h}(y - c dg/dy)."""
        rate = value_of(self.rate, outer)
        if isinstance(rate, Tensor) and rate.dim():
            raise ValueError(
                f"the rate of ProximalGradient returned a tensor of shape {tuple(rate.shape)}; a number or a 0-dim "
                f"tensor was needed"
            )
        slopes = gradients(at.gradient(inner), inner)
        v = [y if g is None else y - _in(rate, y) * g for y, g in zip(tree.tensors(inner), slopes, strict=True)]
        moved = at.apply(lambda point, outer, batch: self.prox.apply(point, rate, outer), tree.like(inner, v))
        self._report(inner, at)
        return moved

    def _report(self, inner: Tree, at: Point) -> None:
        """Judge the loop by g + h, from the first iterate that a prox has made."""
        # (A start may lie outside of the set, where g is low and h is not a number.)
        point = tree.detach(inner)
        with torch.no_grad():
            found = at.apply(lambda point, outer, batch: self.prox.value(point, outer), point) if at.step else None
        at.report(None if found is None or at.loss is None else at.loss + found.detach())


def _in(rate: Any, y: Tensor) -> Any:
    """A 0-dim tensor in the dtype of the tensor that it multiplies."""
    return rate.to(y.dtype) if isinstance(rate, Tensor) else rate


def _minus(a: list[Tensor], b: list[Tensor]) -> Leaves:
    return tuple(one - other for one, other in zip(a, b, strict=True))
