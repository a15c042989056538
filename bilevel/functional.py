"""functional(module): an nn.Module as a pure function of its parameters."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def functional(module: nn.Module) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    """Split a module into a function and its parameters.

    Args:
        module: any module whose forward writes no buffer.

    Returns:
        `(call, params)`: `call(params, *inputs, **keywords)` runs the module with these parameters and its own buffers,
        held fixed; `params` is `dict(module.named_parameters())`, detached copies of nothing: the module's own storage,
        never mutated.

    Raises:
        ValueError: here, when a normalization layer is in a mode that writes its running statistics; in `call`, when
            the forward changed a buffer.

    Example:
        >>> import torch, bilevel as bl
        >>> call, params = bl.functional(torch.nn.Linear(3, 2))
        >>> call(params, torch.ones(4, 3)).shape
        torch.Size([4, 2])
    """
    _refuse_running_statistics(module)
    buffers = dict(module.named_buffers())
    params = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def call(params: dict[str, Tensor], *inputs: Any, **keywords: Any) -> Any:
        from torch.func import functional_call

        _refuse_running_statistics(module)
        versions = {name: buffer._version for name, buffer in buffers.items()}
        output = functional_call(module, (params, buffers), inputs, keywords)
        changed = [name for name, buffer in buffers.items() if buffer._version != versions[name]]
        if changed:
            raise ValueError(
                f"the module wrote its buffers {changed} in its forward; an inner loop needs a pure function of the "
                f"parameters. Switch the layer to a mode "
                f"that does not write (module.eval(), or track_running_stats=False)"
            )
        return output

    return call, params


def _refuse_running_statistics(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if (
            isinstance(layer, nn.modules.batchnorm._NormBase)
            and layer.track_running_stats
            and layer.training
            and layer.running_mean is not None
        ):
            raise ValueError(
                f"{type(layer).__name__} {name or '(the module itself)'} is in training mode with "
                f"track_running_stats=True: every forward of the inner loop "
                f"would write its running statistics. Build it with track_running_stats=False (batch statistics, the "
                f"usual choice in meta-learning), or call "
                f"module.eval() first (running statistics, held fixed), or use GroupNorm"
            )
