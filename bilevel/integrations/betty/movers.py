"""What moves a Betty problem's parameters beside its optimizer, or changes their gradients before it."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

_CALLBACKS = ("grad_callback", "param_callback", "custom_optimizer_step")


def other_movers(problem: Any, parameters: Iterable[Tensor]) -> list[str]:
    """Their names: callbacks, a step of the user's own, hooks on gradients."""
    found = [name for name in _CALLBACKS if callable(getattr(problem, name, None))]
    step = getattr(problem, "optimizer_step", None)
    if not getattr(getattr(step, "__func__", step), "__module__", "").startswith("betty."):
        found.append("optimizer_step")
    hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
    if any(getattr(leaf, name, None) for leaf in parameters for name in hooks):
        found.append("hooks on the gradients of its parameters")
    return found
