"""The cosine kernel: k(a, b) = a'b / (|a| |b|), bounded by 1 whatever the size of the embeddings."""

import dataclasses

import torch
from torch import Tensor

from bilevel.meta.head import Variables
from bilevel.meta.kernels.base import ExplicitKernel


@dataclasses.dataclass(frozen=True)
class Cosine(ExplicitKernel):
    """The cosine of the angle between two embeddings; 0, with the derivative 0, where one of them is zero.

    Example:
        >>> import torch
        >>> Cosine().map(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), {})
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """

    def map(self, z: Tensor, variables: Variables) -> Tensor:
        # Divided by the largest entry first, so that the square neither overflows nor vanishes.
        largest = z.detach().abs().amax(dim=1, keepdim=True)
        z = z / torch.where(largest > 0, largest, 1.0)
        squared = z.square().sum(dim=1, keepdim=True)
        return torch.where(squared > 0, z * torch.where(squared > 0, squared, 1.0).rsqrt(), 0.0)
