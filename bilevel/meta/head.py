"""What adapts in function space, on top of a module's features."""

import abc
from collections.abc import Callable
from typing import Any

from torch import Tensor

from bilevel._strategy import Strategy
from bilevel.space.tree import Tree


class Head(Strategy):
    """placeholder until the kernels arrive"""

    @abc.abstractmethod
    def variables(self, like: Tensor) -> dict[str, Tensor]: ...
    @abc.abstractmethod
    def fit(
        self, features: Any, targets: Tensor, variables: dict[str, Tensor], embed: Callable[[Any], Any]
    ) -> Tree: ...
    @abc.abstractmethod
    def predict(
        self, fitted: Tree, features: Any, variables: dict[str, Tensor], embed: Callable[[Any], Any]
    ) -> Tensor: ...
    def penalty(self, fitted: Tree, features: Any, targets: Tensor, variables: dict[str, Tensor]) -> Tensor | None:
        return None
