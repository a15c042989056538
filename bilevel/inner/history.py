"""A memory of pairs of vectors, kept per task: what quasi-Newton and Anderson steps remember.

A memory is a tuple of m pairs, the oldest first. Empty ones are zero, so that its structure never changes; a task whose
new pair is not accepted keeps the old ones.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bilevel.space.inner_product import Leaves, Space

Pair = tuple[Leaves, Leaves]
Pairs = tuple[Pair, ...]


def empty(like: Sequence[Tensor], memory: int) -> Pairs:
    """A memory of m empty pairs."""
    zeros = tuple(torch.zeros_like(leaf) for leaf in like)
    return ((zeros, zeros),) * memory


def pushed(space: Space, accepted: Tensor, pairs: Pairs, new: Pair) -> Pairs:
    """The memory with `new` as its latest pair and without its oldest, for the tasks where it is accepted."""
    following = (*pairs[1:], new)
    return tuple(
        (space.where(accepted, a, c), space.where(accepted, b, d))
        for (a, b), (c, d) in zip(following, pairs, strict=True)
    )


def minus(a: Sequence[Tensor], b: Sequence[Tensor]) -> Leaves:
    """The difference, leaf by leaf."""
    return tuple(one - other for one, other in zip(a, b, strict=True))


def inverse(value: Tensor, where: Tensor) -> Tensor:
    """1 / value where that is asked for, else 0; a derivative that is never NaN."""
    return torch.where(where, 1 / torch.where(where, value, 1.0), 0.0)


def check_memory(owner: str, memory: object) -> None:
    """Raise ValueError unless the number of pairs is a positive integer."""
    if not isinstance(memory, int) or isinstance(memory, bool) or memory < 1:
        raise ValueError(f"{owner} was given memory={memory!r}; an integer of at least 1 was needed")
