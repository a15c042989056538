"""torch.utils.checkpoint inside a module that is called with other parameters: found, and refused.

It recomputes a layer in the backward, when the parameters of the call are out of their places again: the gradient would
be that at the module's own parameters, without a word.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class Checkpoints:
    """Looks for checkpoints in the first call that has a graph, in either mode of a module; then no more."""

    def __init__(self) -> None:
        self._seen: set[bool] = set()

    @contextlib.contextmanager
    def refused(self, module: nn.Module) -> Iterator[None]:
        """Raise ValueError if a layer is called in a torch.utils.checkpoint that is inside this block."""
        if module.training in self._seen or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            yield
            return
        around = _packs()

        def look(layer: nn.Module, _: Any) -> None:
            packs = _packs()
            if packs is not around and getattr(packs, "__module__", "") == "torch.utils.checkpoint":
                raise ValueError(
                    f"the module runs a {type(layer).__name__} inside torch.utils.checkpoint, which runs it again in "
                    f"the backward, when the module has its own parameters again: the gradient would be that of those. "
                    f"Take the checkpoint out (gradient_checkpointing_disable() in transformers); "
                    f"Unrolled(keep='segments') saves memory over the steps instead"
                )

        handle = torch.nn.modules.module.register_module_forward_pre_hook(look)
        try:
            yield
        finally:
            handle.remove()
        self._seen.add(module.training)


def _packs() -> Any:
    """What packs the tensors that autograd saves now; None for nothing."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else hooks[0]
