"""Normalized gradient descent with momentum.

    m <- (1 - b) m + b g   (m = g at the first step);   x <- x - lr m / |m|,   |.| over all parameters at once

The smoothness of a meta-objective grows with its gradient (L0 + L1 |grad F|), so no global step size is safe for plain
descent; a step of fixed length is, for lr <= 1 / (2 L1). Reference: Chayti and Jaggi 2024, arXiv 2409.03682 (SNGDM);
the steps do not shrink by themselves, so decay lr to converge.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bilevel.outer.base import Averaging, check_common, check_number


class NormalizedSGD(Averaging):
    """Steps of length lr along the averaged gradient.

    Args:
        params: tensors, or parameter groups; the norm is taken over each group.
        lr: length of a step.
        momentum: weight of the past in the average, m <- momentum m + (1 - momentum) g; 0 for none.
        eps: a norm below it makes no step, instead of a step in the direction of rounding noise.

    Raises:
        ValueError: an argument, or a setting of a group, is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> x.grad = torch.tensor([30.0, 40.0])
        >>> bl.NormalizedSGD([x], lr=1.0).step(); x.data
        tensor([2.4000, 3.2000])
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.0, eps: float = 1e-12) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "eps": eps})

    def check(self, group: dict[str, Any]) -> None:
        check_common("NormalizedSGD", group)
        check_number("NormalizedSGD", "eps", group["eps"], 0.0, float("inf"), "a number of at least 0")

    def scale(self, group: dict[str, Any], norm: Tensor) -> Tensor:
        return torch.where(norm > group["eps"], group["lr"] / norm, 0.0)
