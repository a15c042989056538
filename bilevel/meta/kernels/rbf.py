"""The Gaussian kernel: k(a, b) = exp(-gamma |a - b|^2).

On large embeddings k = 0 beside the diagonal and gradients vanish; for small gamma the matrix is nearly constant and
ill-conditioned. The median heuristic, gamma = 1 / median |z_i - z_j|^2 over the pairs of the support, avoids both.
"""

import dataclasses

import torch
from torch import Tensor

from bilevel.meta.head import Variables
from bilevel.meta.kernels.base import FeatureKernel
from bilevel.meta.positive import check_positive, fresh, value_of
from bilevel.outcome import readable


@dataclasses.dataclass(frozen=True)
class RBF(FeatureKernel):
    """The Gaussian kernel.

    Args:
        gamma: a positive number; None for 1 / d with d the dimension of the embeddings; "median" for 1 / (the lower
            median of the squared distances between different examples of the support), without a derivative, so that
            the scale of the embeddings does not matter.
        learn: whether gamma is an outer variable (`gamma` in `variables`). With None or "median" a factor is learned,
            from 1.

    Raises:
        ValueError: gamma is none of these; (when used, with "median") there is one example only, or the median is 0.

    Example:
        >>> import torch
        >>> a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]])
        >>> RBF("median").between(a, b, {})  # gamma = 1/4
        tensor([[1.0000, 0.3679],
                [0.7788, 0.7788]])
    """

    gamma: float | str | None = None
    learn: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.gamma, str):
            if self.gamma != "median":
                raise ValueError(
                    f"RBF was given gamma={self.gamma!r}; a positive number, None for 1/d or 'median' was needed"
                )
        elif self.gamma is not None:
            check_positive("RBF", "gamma", self.gamma)

    def variables(self, like: Tensor) -> Variables:
        start = 1.0 if self.gamma is None or isinstance(self.gamma, str) else float(self.gamma)
        return {"gamma": fresh(start, like)} if self.learn else {}

    def between(self, a: Tensor, b: Tensor, variables: Variables) -> Tensor:
        if self.gamma is None:
            gamma = value_of(1.0, "gamma", variables) / max(b.shape[1], 1)
        elif isinstance(self.gamma, str):
            gamma = value_of(1.0, "gamma", variables) / _median(b.detach())
        else:
            gamma = value_of(float(self.gamma), "gamma", variables)
        return torch.exp(-gamma * _squared_distances(a, b))


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2, by differences: the expansion into squares loses what is left of near duplicates."""
    return (a[:, None] - b[None]).square().sum(dim=2)


def _median(z: Tensor) -> Tensor:
    n = z.shape[0]
    if n < 2:
        raise ValueError(
            f"RBF(gamma='median') was given a support of {n} example; at least 2 were needed for a median of "
            f"distances. Write RBF(gamma=1.0), or RBF() for 1/d"
        )
    row, column = torch.triu_indices(n, n, 1, device=z.device)
    pairs = _squared_distances(z, z)[row, column].sort().values
    median = pairs[(pairs.shape[0] - 1) // 2]
    if readable(median) and bool(median == 0):
        raise ValueError(
            "RBF(gamma='median') met a support in which more than half of the pairs have the same embedding: the "
            "median of the distances is 0. Has the network collapsed? Write RBF(gamma=1.0), or RBF() for 1/d"
        )
    return torch.where(median > 0, median, torch.nan)
