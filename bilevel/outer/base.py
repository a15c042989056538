"""What the outer optimizers share: the averaged gradient and its norm."""

from typing import Any

import torch
from torch import Tensor


def averaged(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters of a group that have a gradient, and their averaged gradients."""
    params, averages = [], []
    for x in group["params"]:
        if x.grad is None:
            continue
        memory, momentum = optimizer.state[x], group["momentum"]
        if momentum == 0:
            m = x.grad
        elif "average" not in memory:
            m = memory["average"] = x.grad.clone()
        else:
            m = memory["average"].mul_(momentum).add_(x.grad, alpha=1 - momentum)
        params.append(x)
        averages.append(m)
    return params, averages


def check(owner: str, lr: float, momentum: float) -> None:
    """Raise ValueError for a step size or momentum out of range."""
    if not lr >= 0:
        raise ValueError(f"{owner} was given lr={lr!r}; a number of at least 0 was needed")
    if not 0 <= momentum < 1:
        raise ValueError(f"{owner} was given momentum={momentum!r}; a number in [0, 1) was needed")


def norm_of(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm over all tensors, 0-dim."""
    # Summed in float64: squares of float32 overflow at 1e19.
    return torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors])
    )
