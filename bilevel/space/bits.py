"""Whether tensors are the same to the bit, told from one number each: for processes that must hold the same ones."""

import torch
from torch import Tensor

from bilevel.space import tree
from bilevel.space.tree import Tree

_WIDTHS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
_PIECE = 1 << 20


def fingerprints(value: Tree) -> list[int]:
    """A number for each tensor of a tree, which another tensor of its shape and dtype has only by chance.

    Cost: one pass. Memory: that of a million integers.
    """
    found = [_fingerprint(leaf) for leaf in tree.tensors(value)]
    return torch.stack(found).tolist() if found else []


def _fingerprint(leaf: Tensor) -> Tensor:
    """Of bits, taken as integers, times odd numbers that differ from place to place: exact in any order of summing."""
    flat = leaf.detach().contiguous().view(-1)
    bits = flat.view(torch.uint8 if leaf.dtype == torch.bool else _WIDTHS[leaf.element_size()])
    total = torch.zeros((), dtype=torch.long, device=leaf.device)
    for piece in bits.split(_PIECE):
        odd = 2 * torch.arange(1, len(piece) + 1, device=leaf.device) + 1
        total = 31 * total + (piece.long() * odd).sum()
    return total
