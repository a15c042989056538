"""What a GPU takes besides tensors, measured on the one at hand before a forecast for it."""

import functools

import torch

from bilevel_profiling.meters.cuda import Cuda

_SIZE = 512


@functools.cache
def workspace_bytes(device: str) -> int:
    """What cuBLAS keeps in the allocator once it has made products with and without a bias, and batched ones, on this
    device.

    cuDNN's workspaces come and go with a call, and depend on its shapes: they are not in this figure.

    Args:
        device: a CUDA device that is there.
    """
    with torch.no_grad(), Cuda(device, workspaces=True) as meter:
        a = torch.ones(2, _SIZE, _SIZE, device=device)
        torch.addmm(a[0, 0], a[0] @ a[1], torch.bmm(a, a)[0])
    found = meter.figures()["cuda_workspace_bytes"]
    return 0 if found is None else int(found)
