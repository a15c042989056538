"""Adaptation in function space: a predictor on top of an embedding, found in closed form.

A head is what adapts in place of parameters. From a task's support set it makes a few tensors (the inner variable y),
and from those and a query set it predicts. Both are functions of the outer variable, so the outer gradient goes through
the closed form: y_0 = fit(support) is the start of an inner loop of zero steps.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from bilevel._strategy import Strategy
from bilevel.space.tree import Tree

Variables = dict[str, Tensor]
"""Outer tensors of a head or a kernel, by name."""


@dataclasses.dataclass(frozen=True, eq=False)
class Embedded:
    """The inputs of one task, and what the module makes of them at the meta-parameters.

    Args:
        call: the module as a function, `call(parameters, inputs)`, as `bilevel.functional` gives it.
        parameters: the meta-parameters that are learned, attached to the graph where there is one.
        inputs: of n examples.

    Example:
        >>> import torch, bilevel as bl
        >>> call, parameters = bl.functional(torch.nn.Linear(3, 2))
        >>> Embedded(call, parameters, torch.ones(4, 3)).values.shape
        torch.Size([4, 2])
    """

    call: Callable[[dict[str, Tensor], Any], Tensor]
    parameters: dict[str, Tensor]
    inputs: Any

    @functools.cached_property
    def values(self) -> Tensor:
        """The embeddings z = e(inputs), of shape (n, ...): computed when first asked for, then kept."""
        return self.call(self.parameters, self.inputs)


class Head(Strategy):
    """What adapts in function space. A subclass is a frozen dataclass with these three methods.

    All three are pure functions of one task that run under torch.func.vmap. An estimator must follow the start of the
    inner loop (`Path.START`: Unrolled, FirstOrder); through zero steps both give the exact gradient.
    """

    def variables(self, like: Tensor) -> Variables:
        """Fresh outer tensors that belong to the head (a learned regularizer), of the dtype and device of `like`, by
        name; without any, {}.
        """
        return {}

    @abc.abstractmethod
    def fit(self, support: Embedded, targets: Tensor, variables: Variables) -> Tree:
        """The adapted predictor: a tree of floating tensors of the dtype and device of the embeddings.

        Args:
            support: n examples of one task.
            targets: of shape (n,) or (n, c).
            variables: with the names of `variables()`.
        """

    @abc.abstractmethod
    def predict(self, fitted: Tree, query: Embedded, variables: Variables) -> Tensor:
        """Predictions of m queries, of shape (m,) or (m, c), from what `fit` returned."""
