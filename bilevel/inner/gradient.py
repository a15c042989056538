"""The gradient dynamics: an optimizer on the inner loss.

y_{k+1}, s_{k+1} = optimizer.step(dg/dy(y_k, x), s_k, y_k, x)
stationarity = optimizer.stationarity(dg/dy, y, x):   dg/dy + decay y for coupled weight decay, dg/dy without
"""

import dataclasses
from typing import Any

from bilevel.inner.dynamics import Dynamics, Point
from bilevel.optim.base import Optimizer
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class GradientDynamics(Dynamics):
    """Steps of an optimizer along the gradient of the inner loss.

    Args:
        optimizer: how a gradient moves y.

    Example:
        >>> import torch, bilevel as bl
        >>> bl.inner.GradientDynamics(bl.SGD(lr=0.1)).symmetric
        True
    """

    sharded = True

    optimizer: Optimizer

    @property
    def symmetric(self) -> bool:
        return True

    @property
    def update(self) -> Optimizer | None:
        return self.optimizer

    def init(self, inner: Tree, outer: Tree) -> Any:
        return self.optimizer.init(inner)

    def step(self, inner: Tree, state: Any, outer: Tree, at: Point) -> tuple[Tree, Any]:
        return self.optimizer.step(at.gradient(inner), state, inner, outer)

    def stationarity(self, inner: Tree, outer: Tree, at: Point) -> Tree | None:
        return self.optimizer.stationarity(at.gradient(inner), inner, outer)
