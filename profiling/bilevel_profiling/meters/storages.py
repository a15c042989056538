"""The storages that tensors lie on, each once: what memory is counted by."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

CUDA_BLOCK = 512
"""The CUDA caching allocator serves whole blocks of so many bytes."""
_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)


def storages(tree: Any) -> Iterator[UntypedStorage]:
    """The storages of all tensors in the arguments or the output of an operator."""
    for leaf in tree:
        if isinstance(leaf, Tensor):
            if type(leaf) in _PLAIN and leaf.layout == torch.strided:
                yield leaf.untyped_storage()
            else:
                yield from storages_of(leaf)
        elif isinstance(leaf, (list, tuple)):
            yield from storages(leaf)
        elif isinstance(leaf, dict):
            yield from storages(leaf.values())
        elif isinstance(leaf, UntypedStorage):
            yield leaf


def storages_of(tensor: Tensor) -> Iterator[UntypedStorage]:
    """The storages a tensor lies on: one, or those of the parts of a sparse tensor or of a wrapper."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            if isinstance(part := getattr(tensor, name), Tensor):  # a DTensor names its mesh as well
                yield from storages_of(part)
    elif tensor.layout == torch.strided:
        yield tensor.untyped_storage()
    elif tensor.layout == torch.sparse_coo:
        yield from (part.untyped_storage() for part in (tensor._indices(), tensor._values()))
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (part.untyped_storage() for part in (tensor.crow_indices(), tensor.col_indices(), tensor.values()))
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (part.untyped_storage() for part in (tensor.ccol_indices(), tensor.row_indices(), tensor.values()))


def in_blocks(size: int) -> int:
    """Bytes rounded up to what the CUDA caching allocator serves."""
    return -(-size // CUDA_BLOCK) * CUDA_BLOCK


def storage_bytes(tree: Any) -> int:
    """Bytes of the distinct storages under the tensors of a tree.

    Example:
        >>> import torch
        >>> x = torch.zeros(4)
        >>> storage_bytes({"whole": x, "part": x[:2]})
        16
    """
    return sum(storage_sizes(tree).values())


def storage_sizes(tree: Any) -> dict[int, int]:
    """Bytes of each of them, by the address of the storage."""
    return {storage._cdata: storage.nbytes() for storage in storages(tree_leaves(tree))}
