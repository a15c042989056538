"""Clipped gradient descent with momentum.

    m <- (1 - b) m + b g;   x <- x - min(lr, radius / |m|) m,   |.| over all parameters at once

Plain descent where the averaged gradient is small, steps of length `radius` where it is large: the other step that (L0,
L1)-smooth meta-objectives allow, with lr <= 1 / (2 L0) and radius <= 1 / (2 L1). Reference: Chayti and Jaggi 2024,
arXiv 2409.03682; Zhang et al. 2020, arXiv 1905.11881. Unlike torch.nn.utils.clip_grad_norm_, the average is clipped,
not the gradient that enters it.
"""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bilevel.outer.base import Averaging, check_common, check_number

SMALLEST = sys.float_info.min


class ClippedSGD(Averaging):
    """Descent along the averaged gradient with steps no longer than `radius`.

    Args:
        params: tensors, or parameter groups; the norm is taken over each group.
        lr: step size.
        radius: the longest step; infinity for none.
        momentum: weight of the past in the average; 0 for none.

    Raises:
        ValueError: an argument, or a setting of a group, is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> x.grad = torch.tensor([30.0, 40.0])
        >>> bl.ClippedSGD([x], lr=1.0, radius=0.5).step(); x.data
        tensor([2.7000, 3.6000])
    """

    def __init__(self, params: Iterable[Any], lr: float, radius: float, momentum: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "radius": radius, "momentum": momentum})

    def check(self, group: dict[str, Any]) -> None:
        check_common("ClippedSGD", group)
        radius = group["radius"]
        if radius != float("inf") or isinstance(radius, bool):
            check_number("ClippedSGD", "radius", radius, SMALLEST, float("inf"), "a positive number")

    def scale(self, group: dict[str, Any], norm: Tensor) -> Tensor:
        return torch.clamp(group["radius"] / norm, max=group["lr"])
