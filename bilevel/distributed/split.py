"""A rank's part of what every process could load whole."""

import dataclasses
from typing import Any

from torch import Tensor

from bilevel.batches import Batches, PerStep
from bilevel.space import tree
from bilevel.space.ranks import Ranks


def share(count: int, ranks: Ranks) -> slice:
    """Which of `count` things are this rank's: the first ranks have one more where they do not divide evenly.

    Args:
        count: of examples, of tasks.
        ranks: the processes.

    Example:
        >>> import torch.distributed as dist, bilevel as bl
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> share(7, bl.distributed.Ranks())
        slice(0, 7, None)
        >>> dist.destroy_process_group()
    """
    each, more = divmod(count, ranks.size)
    low = ranks.rank * each + min(ranks.rank, more)
    return slice(low, low + each + (ranks.rank < more))


def split(batches: Batches, ranks: Ranks, dim: int = 0) -> Batches:
    """This rank's part of whole batches, without a copy.

    Tensors without that dimension, and what is no tensor, stay whole. `PerStep` is split when a step asks.

    Args:
        batches: the same on every rank.
        ranks: the processes.
        dim: which dimension is split: that of the examples, 0 in a plain problem and 1 behind the tasks of `TaskMean`.
            0 splits the tasks of `TaskMean`, and then `task_ids` too.

    Raises:
        ValueError: the tensors of a batch differ in that dimension.

    Example:
        >>> import torch, torch.distributed as dist, bilevel as bl
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> split(bl.Batches(torch.arange(4), torch.arange(6)), bl.distributed.Ranks()).outer
        tensor([0, 1, 2, 3, 4, 5])
        >>> dist.destroy_process_group()
    """
    ids = batches.task_ids
    return dataclasses.replace(
        batches,
        inner=_part(batches.inner, "Batches.inner", ranks, dim),
        outer=_part(batches.outer, "Batches.outer", ranks, dim),
        curvature=_part(batches.curvature, "Batches.curvature", ranks, dim),
        task_ids=ids if ids is None or dim else ids[share(len(ids), ranks)],
    )


def _part(value: Any, name: str, ranks: Ranks, dim: int) -> Any:
    if isinstance(value, PerStep):
        return _Parts(value, name, ranks, dim)
    sizes = sorted({leaf.shape[dim] for leaf in tree.tensors(value) if leaf.dim() > dim})
    if len(sizes) > 1:
        raise ValueError(
            f"split() was given {name} with tensors of {sizes} rows in dimension {dim}; one number was needed. Take "
            f"them apart with share(count, ranks)"
        )
    if not sizes:
        return value
    mine = share(sizes[0], ranks)

    def take(leaf: Any) -> Any:
        split = isinstance(leaf, Tensor) and leaf.dim() > dim
        return leaf.narrow(dim, mine.start, mine.stop - mine.start) if split else leaf

    return tree.tree_map(take, value)


class _Parts(PerStep):
    """A rank's part of each step's batch."""

    def __init__(self, steps: PerStep, name: str, ranks: Ranks, dim: int) -> None:
        self._steps, self._of = steps, (name, ranks, dim)

    def __getitem__(self, step: int) -> Any:
        return _part(self._steps[step], *self._of)

    def __len__(self) -> int:
        return len(self._steps)
