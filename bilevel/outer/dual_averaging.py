"""Dual averaging (follow the regularized leader), with a hint and with adaptive rates.

    x_{t+1} = argmin over x of <G_t + h_{t+1}, x> + |x - x_1|^2 / (2 lr) = x_1 - lr (G_t + h_{t+1})
    G_t = sum_{s<=t} alpha_s g_s,   h_{t+1} = optimism alpha_{t+1} g_t,   alpha_t = t^power
    adaptive: lr / sqrt(sum_{s<=t} (alpha_s g_s)^2 + eps) for each number in place of lr (AdaGrad)

With a constant lr and no hint its path is that of gradient descent. When lr changes, all gradients so far are weighted
by the new one, which is what the analysis of decaying rates asks for. Reference: Nesterov 2009; Duchi et al. 2011; as
the meta-optimizer of arXiv 2301.03236 (its form as remembered).
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from bilevel.outer.base import Elementwise, check_common, check_number


class DualAveraging(Elementwise):
    """Steps from the sum of all gradients and the start.

    The start of a parameter is where it is at its first step; changing the parameter in between is undone by the next
    step. Sums are in the dtype of the parameter.

    Memory: two tensors per parameter (start and sum), a third with adaptive.

    Args:
        params: tensors, or parameter groups.
        lr: step size.
        optimism: how much of the last gradient is expected again; 0 for none.
        power: the weights of gradients are t^power: 0 for equal ones, 1 for weights that grow like t. t counts the
            steps of each parameter.
        adaptive: a rate for each number, lr over the root of its sum of squared gradients.
        eps: of the adaptive rates, positive.

    Raises:
        ValueError: an argument, or a setting of a group, is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> x = torch.tensor([1.0], requires_grad=True)
        >>> optimizer = bl.DualAveraging([x], lr=0.25)
        >>> for _ in range(2):
        ...     x.grad = torch.ones(1)
        ...     optimizer.step()
        >>> x.data
        tensor([0.5000])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        optimism: float = 0.0,
        power: float = 0.0,
        *,
        adaptive: bool = False,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "optimism": optimism, "power": power, "adaptive": adaptive, "eps": eps})

    def check(self, group: dict[str, Any]) -> None:
        check_common("DualAveraging", group)
        for name in ("optimism", "power"):
            check_number("DualAveraging", name, group[name], 0.0, float("inf"), "a number of at least 0")
        if not isinstance(group["adaptive"], bool):
            raise ValueError(f"DualAveraging was given adaptive={group['adaptive']!r}; True or False was needed")
        check_number("DualAveraging", "eps", group["eps"], 5e-324, float("inf"), "a positive number")

    def move(self, x: Tensor, gradient: Tensor, memory: dict[str, Any], group: dict[str, Any]) -> None:
        if not memory:
            memory |= {"step": 0, "start": x.detach().clone(), "sum": x.new_zeros(x.shape)}
        t = memory["step"] = memory["step"] + 1
        weighted = t ** group["power"] * gradient
        leaning = memory["sum"].add_(weighted)
        if group["optimism"] != 0:
            leaning = leaning + group["optimism"] * (t + 1) ** group["power"] * gradient
        if group["adaptive"]:
            squares = memory.setdefault("squares", x.new_zeros(x.shape)).addcmul_(weighted, weighted)
            leaning = leaning / (squares + group["eps"]).sqrt()
        x.copy_(memory["start"] - group["lr"] * leaning)
