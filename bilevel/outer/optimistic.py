"""Optimistic gradient steps: descent along the gradient and a guess of the next one.

    x <- x - lr (alpha_t g_t + h_{t+1} - h_t),   h_{t+1} = optimism alpha_{t+1} g_t,   alpha_t = t^power,   h_1 = 0

The guess is added before its gradient is known and taken back when it is: with optimism = 1 and equal weights the step
is 2 g_t - g_{t-1}. It is the incremental form of optimistic follow-the-regularized-leader for a constant lr (that of
`DualAveraging`, which is the form for lr that changes). optimism = 0 and power = 0 is torch.optim.SGD. Reference:
Flennerhag et al. 2023, arXiv 2301.03236 (its form as remembered); the step itself is Popov 1980.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from bilevel.outer.base import Elementwise, check_common, check_number


class OptimisticSGD(Elementwise):
    """Gradient steps with the last gradient as a hint of the next.

    Memory: one tensor per parameter (the last hint), none with optimism=0.

    Args:
        params: tensors, or parameter groups.
        lr: step size.
        optimism: how much of the last gradient is expected again; 0 for none.
        power: the weights of gradients are t^power: 0 for equal ones, 1 for weights that grow like t. t counts the
            steps of each parameter.

    Raises:
        ValueError: an argument, or a setting of a group, is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> x = torch.tensor([1.0], requires_grad=True)
        >>> optimizer = bl.OptimisticSGD([x], lr=0.25)
        >>> for _ in range(2):
        ...     x.grad = torch.ones(1)
        ...     optimizer.step()
        >>> x.data  # 1 - 0.25 (2 g) - 0.25 (2 g - g)
        tensor([0.2500])
    """

    def __init__(self, params: Iterable[Any], lr: float, optimism: float = 1.0, power: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "optimism": optimism, "power": power})

    def check(self, group: dict[str, Any]) -> None:
        check_common("OptimisticSGD", group)
        for name in ("optimism", "power"):
            check_number("OptimisticSGD", name, group[name], 0.0, float("inf"), "a number of at least 0")

    def move(self, x: Tensor, gradient: Tensor, memory: dict[str, Any], group: dict[str, Any]) -> None:
        t = memory["step"] = memory.get("step", 0) + 1
        change = gradient if t == 1 and group["power"] == 0 else t ** group["power"] * gradient
        last = memory.get("hint")
        if group["optimism"] != 0:
            hint = memory["hint"] = group["optimism"] * (t + 1) ** group["power"] * gradient
            change = change + hint
        elif last is not None:
            del memory["hint"]
        x.add_(change if last is None else change - last, alpha=-group["lr"])
