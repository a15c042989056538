"""Matchings: how far the inner variable y is from its target z.

| matching | mu(z, y) | dmu/dy |
| --- | --- | --- |
| SquaredDistance(c) | c |z - y|^2 | 2 c (y - z) |
| Bregman(h) | h(y) - h(z) - <grad h(z), y - z> | grad h(y) - grad h(z) |
| KL(predict) | mean of KL(softmax predict(z), softmax predict(y)) | that of the cross-entropy with soft labels |
| KL(predict, first="inner") | mean of KL(softmax predict(y), softmax predict(z)) | |

Reference: Flennerhag et al. 2022, arXiv 2109.04504 (squared distance; KL of predictions), and 2023, arXiv 2301.03236
(mirror coordinates: a target with grad h(z) = grad h(y) - v makes the cotangent v).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel.estimators.bootstrapped.base import Aimed, Matching
from bilevel.space import tree
from bilevel.space.tree import Tree

_FIRST = ("target", "inner")


@dataclasses.dataclass(frozen=True)
class SquaredDistance(Matching):
    """scale |z - y|^2 over all numbers of the inner variable.

    Args:
        scale: positive.

    Raises:
        ValueError: scale is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> from bilevel.estimators import Aimed
        >>> bl.estimators.SquaredDistance().distance(Aimed(torch.ones(4), ()), torch.zeros(4), None, None)
        tensor(2.)
    """

    scale: float = 0.5

    def __post_init__(self) -> None:
        _check_positive("SquaredDistance", "scale", self.scale)

    def distance(self, target: Aimed, inner: Tree, outer: Tree, batch: Any) -> Tensor:
        pairs = zip(tree.tensors(inner), tree.tensors(target.inner), strict=True)
        return self.scale * torch.stack([(y - z).square().sum() for y, z in pairs]).sum()


@dataclasses.dataclass(frozen=True)
class Bregman(Matching):
    """The Bregman divergence h(y) - h(z) - <grad h(z), y - z> of a convex function h, its first argument y.

    Args:
        of: h, a function of the inner variable that returns a 0-dim tensor.

    Raises:
        TypeError: `of` is no function.

    Example:
        >>> import torch, bilevel as bl
        >>> from bilevel.estimators import Aimed
        >>> half = bl.estimators.Bregman(lambda y: y.square().sum() / 2)  # the squared distance again
        >>> half.distance(Aimed(torch.ones(4), torch.ones(4)), torch.zeros(4), None, None)
        tensor(2.)
    """

    of: Callable[[Tree], Tensor]

    def __post_init__(self) -> None:
        if not callable(self.of):
            raise TypeError(f"Bregman was given {self.of!r}; a function of the inner variable was needed")

    @property
    def potential(self) -> Callable[[Tree], Tensor]:
        return self.of

    def distance(self, target: Aimed, inner: Tree, outer: Tree, batch: Any) -> Tensor:
        trios = zip(tree.tensors(target.slope), tree.tensors(inner), tree.tensors(target.inner), strict=True)
        return self.of(inner) - self.of(target.inner) - torch.stack([(s * (y - z)).sum() for s, y, z in trios]).sum()


@dataclasses.dataclass(frozen=True)
class KL(Matching):
    """The mean Kullback-Leibler divergence between predictions, on the outer batch.

    Args:
        predict: called as `predict(inner, outer, batch)` with the outer batch, as the losses receive it; returns
            logits, classes in the last dimension.
        first: "target" for KL(target, inner), in which classes that the target thinks likely must be so for y;
            "inner" for KL(inner, target), in which y is to stay where the target is likely.
        temperature: divides the logits, positive.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> from bilevel.estimators import Aimed
        >>> kl = bl.estimators.KL(lambda y, x, batch: y)
        >>> kl.distance(Aimed(torch.tensor([0.0, 50.0]), ()), torch.zeros(2), None, None)  # log 2
        tensor(0.6931)
    """

    predict: Callable[[Tree, Tree, Any], Tensor]
    first: str = "target"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not callable(self.predict):
            raise TypeError(f"KL was given {self.predict!r}; a function (inner, outer, batch) -> logits was needed")
        if self.first not in _FIRST:
            raise ValueError(f"KL was given first={self.first!r}; one of {', '.join(map(repr, _FIRST))} was needed")
        _check_positive("KL", "temperature", self.temperature)

    def distance(self, target: Aimed, inner: Tree, outer: Tree, batch: Any) -> Tensor:
        z, y = (self._log_probabilities(point, outer, batch) for point in (target.inner, inner))
        p, q = (z, y) if self.first == "target" else (y, z)
        # A class whose logit is -inf is left out: 0 log 0 = 0, also where both leave it out.
        out = p == -math.inf
        return (p.exp() * (p.masked_fill(out, 0.0) - q.masked_fill(out, 0.0))).sum(-1).mean()

    def _log_probabilities(self, inner: Tree, outer: Tree, batch: Any) -> Tensor:
        logits = self.predict(inner, outer, batch)
        if not isinstance(logits, Tensor) or logits.dim() == 0 or logits.shape[-1] < 2:
            given = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"KL's predict returned {given}; logits with at least two classes last were needed")
        return (logits / self.temperature).log_softmax(-1)


def _check_positive(owner: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{owner} was given {name}={value!r}; a positive number was needed")
