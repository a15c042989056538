"""Bilevel descent aggregation (BDA): the inner steps follow both losses, and the outer one less and less.

    d_t = (1 - a/t) c_l dg/dy + (a/t) c_u df/dy,    t = 1, 2, ...        y <- optimizer.step(d_t, y)

| | inner gradients | outer gradients | memory |
| --- | --- | --- | --- |
| step | 1 | 1 (0 where a = 0) | P and a second graph |

Where g has many minimizers, descent on g alone ends at the one that the start chose; with f in the direction it ends at
one that f likes. Reference: BOML, arXiv 2009.13357, whose code has this direction as its inner method "Aggr".
Differences: any inner optimizer takes the step; a weight a that is a function of the outer variable is differentiated.
The code has a vector form of a, too, which is not here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from bilevel.inner.dynamics import Dynamics, Point
from bilevel.inner.gradient import GradientDynamics
from bilevel.optim.base import Optimizer
from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class Aggregated(Dynamics):
    """Steps of an optimizer along a mixture of the inner and the outer gradient.

    `Unrolled` (all of it, or its last steps) differentiates what ran, also through the outer gradients. Where it rests
    is not known, so that estimators at the solution refuse it; with share=0 and inner_scale=1 it is plain descent, bit
    for bit, and nothing is refused. The outer gradient of every step is that of `Batches.outer`: the adapted variable
    has seen those data. t counts the steps of one call, also where y is carried from call to call.

    Args:
        optimizer: how a direction moves y.
        share: a, from 0 to 1, the part of the outer gradient in the first step; or a function of outer that returns a
            number or a 0-dim tensor (whose range is not checked).
        inner_scale: c_l, at least 0.
        outer_scale: c_u, at least 0.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range; (when used) the estimator is at the
            solution.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: (y - x) ** 2 / 2, lambda y, x, b: y**2 / 2)
        >>> hg = bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(2.0), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.inner.Aggregated(bl.SGD(lr=0.5), share=0.5), steps=1), estimator=bl.Unrolled())
        >>> hg.inner, hg.grad  # 2 - 0.5 (0.5 * 1 + 0.5 * 2) = 1.25, and 1.25 * 0.25
        (tensor(1.2500), tensor(0.3125))
    """

    sharded = True

    optimizer: Optimizer
    share: float | Callable[[Tree], Any] = 0.5
    inner_scale: float = 1.0
    outer_scale: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.optimizer, Optimizer):
            raise TypeError(
                f"Aggregated was given the optimizer {type(self.optimizer).__name__}; an inner optimizer was needed, "
                f"such as Aggregated(bilevel.SGD(lr=0.1), share=0.5)"
            )
        if not callable(self.share) and not (_is_number(self.share) and 0 <= self.share <= 1):
            raise ValueError(
                f"Aggregated was given share={self.share!r}; a number from 0 to 1, or a function of outer, was needed"
            )
        for name in ("inner_scale", "outer_scale"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < float("inf"):
                raise ValueError(f"Aggregated was given {name}={value!r}; a number of at least 0 was needed")

    @property
    def _plain(self) -> GradientDynamics | None:
        """What this is where f has no part in it."""
        alone = not callable(self.share) and self.share == 0 and self.inner_scale == 1
        return GradientDynamics(self.optimizer) if alone else None

    @property
    def symmetric(self) -> bool:
        return self._plain is not None

    @property
    def update(self) -> Optimizer | None:
        return None if self._plain is None else self.optimizer

    def init(self, inner: Tree, outer: Tree) -> Any:
        return self.optimizer.init(inner)

    def step(self, inner: Tree, state: Any, outer: Tree, at: Point) -> tuple[Tree, Any]:
        if self._plain is not None:
            return self._plain.step(inner, state, outer, at)
        share = self.share(outer) if callable(self.share) else self.share
        if isinstance(share, Tensor) and share.dim():
            raise ValueError(
                f"the share of Aggregated returned a tensor of shape {tuple(share.shape)}; a number or a 0-dim tensor "
                f"was needed"
            )
        part = share / (at.step + 1)
        below, above = (1 - part) * self.inner_scale, part * self.outer_scale
        g, f = tree.flatten(at.gradient(inner))[0], None
        if not _is_zero(above):
            f = tree.flatten(at.outer_gradient(inner))[0]
        direction = [
            _mixed(below, g_leaf, above, f_leaf) for g_leaf, f_leaf in zip(g, f or [None] * len(g), strict=True)
        ]
        return self.optimizer.step(tree.like(inner, direction), state, inner, outer)

    def stationarity(self, inner: Tree, outer: Tree, at: Point) -> Tree | None:
        return None if self._plain is None else self._plain.stationarity(inner, outer, at)


def _mixed(below: Any, g: Tensor | None, above: Any, f: Tensor | None) -> Tensor | None:
    """below g + above f, where None is a tensor that a loss does not use."""
    if f is None:
        return None if g is None else below * g
    return above * f if g is None else below * g + above * f


def _is_zero(value: Any) -> bool:
    return not isinstance(value, Tensor) and value == 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
