"""Networks as pure functions, with parameters drawn from a seed: the same on every device."""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

import bilevel as bl

Params = Mapping[str, Tensor]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from a seed on the CPU, and leave the global random state as it was."""
    # Not torch.manual_seed: it would also reseed every GPU.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def placed(
    module: nn.Module, dtype: torch.dtype, device: torch.device | str
) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """`(call, params)` as from `functional`, the parameters in a dtype and on a device."""
    call, params = bl.functional(module)
    # The tensors are moved, not the module: under fake tensors Module.to fails.
    return call, {name: tensor.to(device=device, dtype=dtype) for name, tensor in params.items()}
