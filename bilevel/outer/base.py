"""What the outer optimizers share: the averaged gradient, its norm, and loops over parameter groups."""

import abc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Averaging(torch.optim.Optimizer, abc.ABC):
    """Steps along the averaged gradient, with a length that depends on its norm over a parameter group."""

    @abc.abstractmethod
    def scale(self, group: dict[str, Any], norm: Tensor) -> Tensor:
        """What the averaged gradient of a group is multiplied by, 0-dim, from its norm."""

    @abc.abstractmethod
    def check(self, group: dict[str, Any]) -> None:
        """Raise ValueError for a setting of a group that is out of range."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, its settings checked."""
        super().add_param_group(param_group)
        self.check(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient by one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params, averages = averaged(self, group)
            if not params:
                continue
            scale = self.scale(group, norm_of(averages))
            for x, m in zip(params, averages, strict=True):
                # 0-dim float64 does not promote what it multiplies.
                x.sub_(m * scale.to(m.device))
        return loss


class Elementwise(torch.optim.Optimizer, abc.ABC):
    """Steps that move each number by itself, from its own gradient and the memory of its tensor."""

    @abc.abstractmethod
    def move(self, x: Tensor, gradient: Tensor, memory: dict[str, Any], group: dict[str, Any]) -> None:
        """Move one parameter, in place, and update its memory."""

    @abc.abstractmethod
    def check(self, group: dict[str, Any]) -> None:
        """Raise ValueError for a setting of a group that is out of range."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, its settings checked."""
        super().add_param_group(param_group)
        self.check(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient by one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is not None:
                    gradient = x.grad.to_dense() if x.grad.layout != torch.strided else x.grad
                    self.move(x, gradient, self.state[x], group)
        return loss


def averaged(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters of a group that have a gradient, and their averaged gradients."""
    params, averages = [], []
    for x in group["params"]:
        if x.grad is None:
            continue
        # Of nn.Embedding(sparse=True): an average over steps is dense after all.
        gradient = x.grad.to_dense() if x.grad.layout != torch.strided else x.grad
        memory, momentum = optimizer.state[x], group["momentum"]
        if momentum == 0:
            m = gradient
        elif "average" not in memory:
            m = memory["average"] = gradient.clone()
        else:
            m = memory["average"].mul_(momentum).add_(gradient, alpha=1 - momentum)
        params.append(x)
        averages.append(m)
    return params, averages


def check_number(owner: str, name: str, value: Any, low: float, high: float, needed: str) -> None:
    """Raise ValueError unless a number, or a 0-dim tensor, lies in [low, high)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number or (isinstance(value, Tensor) and value.dim() == 0)) or not low <= value < high:
        raise ValueError(f"{owner} was given {name}={value!r}; {needed} was needed")


def check_common(owner: str, group: dict[str, Any]) -> None:
    """Raise ValueError for a step size or momentum out of range, or complex parameters."""
    check_number(owner, "lr", group["lr"], 0.0, float("inf"), "a number of at least 0")
    if "momentum" in group:
        check_number(owner, "momentum", group["momentum"], 0.0, 1.0, "a number in [0, 1)")
    for x in group["params"]:
        if x.is_complex():
            raise ValueError(f"{owner} was given a parameter of dtype {x.dtype}; use torch.view_as_real(parameter)")


def norm_of(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm over all tensors, 0-dim, on the device of the first."""
    device = tensors[0].device
    # Summed in float64: squares of float32 overflow at 1e19. (Apple GPUs have no float64.)
    wide = torch.float32 if any(tensor.device.type == "mps" for tensor in tensors) else torch.float64
    return torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(tensor, dtype=wide).to(device) for tensor in tensors])
    )
