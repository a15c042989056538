"""Embeddings under torch.func.vmap: what torch's batching rule leaves out.

Where the table is mapped, too (it adapts to each task), the rule gathers rows and forgets `padding_idx`: the row of the
padding would receive a gradient. It cannot count the indices of one task for `scale_grad_by_freq`, and a sparse
gradient does not come out of it.
"""

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class Lookups(TorchFunctionMode):
    """Within it, lookups under vmap have the derivatives of those without.

    Attributes:
        met: whether there was a lookup.

    Example:
        >>> import torch
        >>> table = torch.ones(2, 3, 1, requires_grad=True)
        >>> with Lookups():
        ...     found = torch.func.vmap(lambda t: F.embedding(torch.tensor([0, 1]), t, padding_idx=0).sum())(table)
        >>> torch.autograd.grad(found.sum(), table)[0][0].tolist()
        [[0.0], [1.0], [0.0]]
    """

    def __init__(self) -> None:
        super().__init__()
        self.met = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.embedding:
            return func(*args, **(kwargs or {}))
        self.met = True
        return _embedding(*args, **(kwargs or {}))


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if scale_grad_by_freq:
        raise ValueError(
            "an embedding with scale_grad_by_freq=True divides by counts of indices, which torch.func.vmap takes over "
            "all tasks."
        )
    found = F.embedding(input, weight, None, max_norm, norm_type)
    if padding_idx is None:
        return found
    padding = padding_idx if padding_idx >= 0 else padding_idx + weight.shape[0]
    return found.where((input != padding).unsqueeze(-1), found.detach())
