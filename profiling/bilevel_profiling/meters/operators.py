"""Every operator on tensors, as it reaches the dispatcher: the one dispatch mode of the meters."""

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

Run = Callable[[Any, Any, Any], Any]
"""(operator, arguments, keywords) -> what the operator returns; called in place of the operator, with the mode off."""


class Operators(TorchDispatchMode):
    """Hands operators to `run`. Compilation must be switched off around it.

    An operator on sharded tensors (DTensor) arrives as what it is made of: operators on this rank's shards, and
    collectives.

    Example:
        >>> import torch
        >>> with Operators(lambda operator, args, kwargs: print(operator) or operator(*args, **kwargs)):
        ...     _ = torch.ones(2) * 3
        aten.ones.default
        aten.mul.Tensor
    """

    supports_higher_order_operators = True

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the wrapper that torch would put around each operation costs more than a meter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _wraps(types):
            return NotImplemented  # the wrapper is asked, and what it does arrives here
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked by autograd more often than anything is computed
        # A span opening or closing, or another question: no operator on tensors.
        if func.namespace in ("profiler", "prim"):
            return func(*args, **(kwargs or {}))
        if torch.is_inference_mode_enabled() and isinstance(func, OpOverload):  # composite operators arrive whole
            with self:
                parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        return self._run(func, args, kwargs or {})


def _wraps(types: Any) -> bool:
    """Whether tensors are among the arguments that are made of others by torch.distributed."""
    return any(kind.__module__ in _DISTRIBUTED for kind in types)


_DISTRIBUTED = {
    "torch.distributed.tensor",
    "torch.distributed.tensor._api",
    "torch.distributed._functional_collectives",
}
