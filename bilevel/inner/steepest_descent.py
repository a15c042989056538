"""Steepest descent with an exact line search, for objectives that are sums of squared residuals.

    g = 1/2 |r(y)|^2 + h(y)       d = dg/dy       alpha = |d|^2 / (max(|J d|^2 + c(y, d), floor) + damping |d|^2)
    y <- y - alpha d              J = dr/dy,      c: the curvature of h along d

| | inner gradients | products J d | memory |
| --- | --- | --- | --- |
| step | 1 | 1 (one call of r and two backwards) | 2 P + one graph; with a graph, the tape of both |

With h = 0, floor = damping = 0 and residuals linear in y this is the minimizer along d. Residuals that are not linear
make it a Gauss-Newton step length. It is differentiated through: x may enter the loss, the residuals and the curvature.

Reference: Tripathi, Danelljan, Van Gool, Timofte 2020, Few-Shot Classification By Few-Iteration Meta-Learning, arXiv
2010.00511 (floor 1e-8, damping 0.05). It differs from gradient descent with a step size by having none to choose.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel.inner.dynamics import Dynamics, Point
from bilevel.optim.base import gradients
from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class SteepestDescent(Dynamics):
    """Steps along the negative gradient of the inner loss, as long as its residuals say, per task.

    Args:
        residuals: r, called as `residuals(inner, outer, batch)` for one task, with the batch as the losses receive it;
            returns floating tensors (a pytree). The inner loss is 1/2 of the sum of their squares (`half_square`
            writes that), or has that as one part: the loss says where a step goes, the residuals how far. A loss that
            is the mean of squares has residuals divided by sqrt(n / 2).
        curvature: the curvature along a direction of what else the inner loss holds, called as `curvature(inner,
            direction, outer, batch)`; returns a 0-dim tensor. None: there is nothing else.
        damping: of the step length, at least 0.
        floor: the least curvature, absolute, at least 0.

    Where gradient and curvature vanish the step is zero.

    Raises:
        TypeError: residuals or curvature are no functions, or (when used) return something else.
        ValueError: damping or floor is negative; (when used) the residuals do not depend on the inner variable.

    Example:
        The residuals of a linear least-squares problem, methods.md A6: alpha = 17 / 65.

        >>> import torch, bilevel as bl
        >>> def residuals(w, x, batch):
        ...     return batch[0] @ w - batch[1]
        >>> problem = bl.Problem(bl.inner.half_square(residuals), lambda w, x, batch: w.sum())
        >>> batch = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([1.0, 2.0])
        >>> bl.adapt(problem, torch.zeros(1), torch.zeros(2), bl.Batches(batch, batch),
        ...     solver=bl.Descent(bl.inner.SteepestDescent(residuals), steps=1)).inner
        tensor([0.2615, 1.0462])
    """

    residuals: Callable[[Tree, Tree, Any], Tree]
    curvature: Callable[[Tree, Tree, Tree, Any], Tensor] | None = None
    damping: float = 0.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        for name in ("residuals", "curvature"):
            value = getattr(self, name)
            if not callable(value) and not (name == "curvature" and value is None):
                raise TypeError(f"SteepestDescent was given {name}={value!r}; a function was needed")
        for name in ("damping", "floor"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < float("inf"):
                raise ValueError(f"SteepestDescent was given {name}={value!r}; a number of at least 0 was needed")

    @property
    def symmetric(self) -> bool:
        return True

    def step(self, inner: Tree, state: Any, outer: Tree, at: Point) -> tuple[Tree, Any]:
        given = gradients(at.gradient(inner), inner)
        used = [leaf for leaf in given if leaf is not None]
        slope = at.space.dot(used, used)
        pushed = at.pushforward(self.residuals, inner, tree.like(inner, given))
        bend = at.space.dot(pushed, pushed)
        if self.curvature is not None:
            filled = [torch.zeros_like(y) if d is None else d for y, d in zip(tree.tensors(inner), given, strict=True)]
            bend = bend + at.apply(_scalar(self.curvature), inner, tree.like(inner, filled))
        total = bend.clamp_min(self.floor) + self.damping * slope
        # (Two wheres: a division by zero in the branch not taken would make its derivative NaN.) A curvature that
        # overflows must not pass for a step of length zero.
        still = total <= 0
        rate = torch.where(still, 0.0, slope / torch.where(still, 1.0, total))
        rate = torch.where(total.isinf(), torch.nan, rate)
        taken = iter(
            at.space.axpy(-rate, used, [y for y, d in zip(tree.tensors(inner), given, strict=True) if d is not None])
        )
        moved = [y if d is None else next(taken) for y, d in zip(tree.tensors(inner), given, strict=True)]
        return tree.like(inner, moved), state

    def stationarity(self, inner: Tree, outer: Tree, at: Point) -> Tree | None:
        return at.gradient(inner)


def _scalar(curvature: Callable[..., Any]) -> Callable[..., Tensor]:
    """The same, whose result for one task is looked at."""

    def checked(*arguments: Any) -> Tensor:
        found = curvature(*arguments)
        if not isinstance(found, Tensor) or found.dim():
            given = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(f"SteepestDescent's curvature returned {given} for one task; a 0-dim tensor was needed")
        return found

    return checked


def half_square(residuals: Callable[[Tree, Tree, Any], Tree]) -> Callable[[Tree, Tree, Any], Tensor]:
    """The inner loss that belongs to residuals: half the sum of their squares.

    Args:
        residuals: as for `SteepestDescent`.

    Example:
        >>> import torch
        >>> half_square(lambda y, x, batch: y - batch)(torch.ones(2), None, torch.zeros(2))
        tensor(1.)
    """

    def inner_loss(inner: Tree, outer: Tree, batch: Any) -> Tensor:
        return torch.stack([each.square().sum() for each in tree.tensors(residuals(inner, outer, batch))]).sum() / 2

    return inner_loss
