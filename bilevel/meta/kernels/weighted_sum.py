"""A weighted sum of kernels: k = sum_i w_i k_i with positive weights, which may be learned."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from bilevel.meta.head import Embedded, Variables
from bilevel.meta.kernels.base import Kernel, own_dtype
from bilevel.meta.positive import check_positive, fresh, part, prefixed, value_of
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class Sum(Kernel):
    """k = sum_i w_i k_i.

    Args:
        kernels: at least one; those that are the same for every output and those that are not may be mixed.
        weights: a positive number for each; None for all 1.
        learn: whether the weights are outer variables (`weight.0`, `weight.1`, ...).

    Raises:
        TypeError, ValueError: not kernels, none of them, or not one positive weight for each.

    Example:
        >>> from bilevel.meta.kernels import Linear, RBF
        >>> sorted(Sum([Linear(), RBF(learn=True)], learn=True).variables(torch.zeros(())))
        ['1.gamma', 'weight.0', 'weight.1']
    """

    kernels: Sequence[Kernel]
    weights: Sequence[float] | None = None
    learn: bool = False

    def __post_init__(self) -> None:
        given = tuple(self.kernels) if isinstance(self.kernels, Sequence) else ()
        if not given or not all(isinstance(kernel, Kernel) for kernel in given):
            raise TypeError(
                f"Sum was given kernels={self.kernels!r}; a list of kernels was needed, such as Sum([Linear(), RBF()])"
            )
        weights = (1.0,) * len(given) if self.weights is None else tuple(self.weights)
        if len(weights) != len(given):
            raise ValueError(f"Sum was given {len(weights)} weights and {len(given)} kernels; one each was needed")
        for weight in weights:
            check_positive("Sum", "weights", weight)
        object.__setattr__(self, "kernels", given)
        object.__setattr__(self, "weights", weights)

    def variables(self, like: Tensor) -> Variables:
        found: Variables = {}
        for i, (kernel, weight) in enumerate(self._weighted()):
            found |= prefixed(kernel.variables(like), str(i))
            if self.learn:
                found[f"weight.{i}"] = fresh(weight, like)
        return found

    def _weighted(self) -> list[tuple[Kernel, float]]:
        assert self.weights is not None
        return list(zip(self.kernels, self.weights, strict=True))

    def gram(self, support: Embedded, variables: Variables) -> Tensor:
        grams = [
            value_of(weight, f"weight.{i}", variables) * kernel.gram(support, part(variables, str(i)))
            for i, (kernel, weight) in enumerate(self._weighted())
        ]
        size = max(gram.shape[0] for gram in grams)
        return torch.stack([_for_every_output(gram, size) for gram in grams]).sum(0)

    def carry(self, support: Embedded, coefficients: Tensor, variables: Variables) -> Tree:
        return [kernel.carry(support, coefficients, part(variables, str(i))) for i, kernel in enumerate(self.kernels)]

    def evaluate(self, carried: Tree, query: Embedded, variables: Variables) -> Tensor:
        values = [
            value_of(weight, f"weight.{i}", variables)
            * kernel.evaluate(carried[i], query, part(variables, str(i))).double()
            for i, (kernel, weight) in enumerate(self._weighted())
        ]
        return torch.stack(values).sum(0).to(own_dtype(query))


def _for_every_output(gram: Tensor, size: int) -> Tensor:
    """A matrix of examples as one of examples and outputs."""
    outputs = size // max(gram.shape[0], 1)
    return gram if outputs == 1 else torch.kron(gram, torch.eye(outputs, dtype=gram.dtype, device=gram.device))
