"""What moves a Betty problem's parameters beside its optimizer, or changes their gradients before it."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

_CALLBACKS = ("grad_callback", "param_callback", "custom_optimizer_step")
_STEPS = ("optimizer_step", "one_step_descent", "get_loss", "backward", "set_grads", "clip_grad")
"""What Betty's own problems do in a step."""


def other_movers(problem: Any, parameters: Iterable[Tensor]) -> list[str]:
    """Their names: callbacks, parts of a step of the user's own, hooks on gradients and on the optimizer's step."""
    found = [name for name in _CALLBACKS if callable(getattr(problem, name, None))]
    for name in _STEPS:
        method = getattr(problem, name, None)
        if method is not None and not getattr(method, "__module__", "").startswith("betty."):
            found.append(name)
    hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
    layers = ("_backward_hooks", "_backward_pre_hooks")
    if any(getattr(leaf, name, None) for leaf in parameters for name in hooks) or any(
        getattr(layer, name, None) for layer in problem.module.modules() for name in layers
    ):
        found.append("hooks on gradients")
    optimizer = problem.optimizer
    if any(getattr(optimizer, f"_optimizer_step_{when}_hooks", None) for when in ("pre", "post")):
        found.append("hooks on the step of its optimizer")
    return found
