"""The linear kernel: k(a, b) = a'b + bias.

With it a kernel ridge head is ridge regression on the embeddings (the ridge head of Bertinetto et al. 2019, R2D2,
arXiv 1805.08136).
"""

import dataclasses

import torch
from torch import Tensor

from bilevel.meta.head import Variables
from bilevel.meta.kernels.base import ExplicitKernel


@dataclasses.dataclass(frozen=True)
class Linear(ExplicitKernel):
    """k(a, b) = a'b, plus 1 with a bias (which is then regularized like the weights).

    Args:
        bias: whether a constant feature 1 is added.

    Example:
        >>> import torch
        >>> Linear(bias=True).map(torch.tensor([[2.0, 3.0]]), {})
        tensor([[2., 3., 1.]])
    """

    bias: bool = False

    def map(self, z: Tensor, variables: Variables) -> Tensor:
        return torch.cat([z, torch.ones_like(z[:, :1])], dim=1) if self.bias else z
