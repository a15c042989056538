"""A number that tells the bits of tensors apart: what ranks compare in the place of all the numbers."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from bilevel.space import tree
from bilevel.space.tree import Tree

_MASK = (1 << 62) - 1
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9)


def fingerprints(value: Tree) -> list[int]:
    """A number for each tensor of a tree, which another tensor of its shape and dtype has only by chance."""
    found = [of(leaf) for leaf in tree.tensors(value)]
    return numbers(torch.stack(found)) if found else []


def numbers(value: Tensor) -> Any:
    """The numbers of a tensor as a list, or as one; of a tensor without data some that take as many bytes."""
    if isinstance(value, FakeTensor):
        known: Any = 0.0 if value.is_floating_point() else 1 << 62
        for size in reversed(value.shape):
            known = [known] * size
        return known
    return value.detach().tolist()


def of(leaf: Tensor) -> Tensor:
    """A fingerprint, 0-dim of int64 and at least 0, on the tensor's device. No synchronization.

    Cost: six operators on each piece of the tensor, as much as a few passes over it. Memory: 1 MB on the CPU, 96 MB on
    a device.
    """
    leaf = leaf.detach()
    if leaf.layout is not torch.strided:
        leaf = leaf.to_dense()
    if leaf.is_complex():
        leaf = torch.view_as_real(leaf)
    flat, size = leaf.reshape(-1), 1 << (15 if leaf.device.type == "cpu" else 22)
    found = torch.full((), leaf.numel(), dtype=torch.int64, device=leaf.device)
    weights = _weights(min(size, flat.numel()), leaf.device)
    # (Of what has no data, as much as shows the memory that it takes.)
    for low in range(0, flat.numel(), size)[: 2 if isinstance(leaf, FakeTensor) else None]:
        part = flat[low : low + size]
        bits = part.view(_INTEGERS[part.element_size()]).to(torch.int64).mul(_ODD[0])
        bits.bitwise_xor_(bits >> 29).mul_(weights[: len(bits)])
        found = found * _ODD[1] + bits.sum()
    return found & _MASK


@functools.lru_cache(maxsize=8)
def _made(size: int, device: torch.device) -> Tensor:
    place = torch.arange(1, size + 1, device=device) * _ODD[0]
    place.bitwise_xor_(place >> 31).mul_(_ODD[1])
    return place.bitwise_xor_(place >> 29).mul_(2).add_(1)


def _weights(size: int, device: torch.device) -> Tensor:
    """An odd number for each place in a piece."""
    known = 1 << max(10, (size - 1).bit_length())
    with torch.inference_mode(False), _disable_current_modes():  # (they are kept: no meter's, and never without data)
        return _made(known, device)
