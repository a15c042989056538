"""The processes that compute one thing together, and what they say to each other.

All collectives of the library are here. Each is called by every rank of the group, in the same order; each runs in a
span, so that a profiler sees its time.
"""

import contextlib
import dataclasses
import pickle
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from bilevel.engine import spans

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Ranks:
    """A group of processes.

    Args:
        group: a torch.distributed process group, or None for that of all processes.

    Raises:
        RuntimeError: (when used) torch.distributed was not initialized; start the program with torchrun, and call
            torch.distributed.init_process_group() first.
    """

    group: "dist.ProcessGroup | None" = None

    def __repr__(self) -> str:
        return "Ranks()" if self.group is None else f"Ranks({dist.get_process_group_ranks(self.group)})"

    def __deepcopy__(self, memo: Any) -> "Ranks":
        return self

    def __getstate__(self) -> Any:
        if self.group is not None:
            raise TypeError(
                f"{self!r} belongs to this process and cannot be pickled: a process group is made by each process for "
                f"itself. Pickle what holds it without it; Ranks() of all processes can be"
            )
        return {"group": None}

    @property
    def size(self) -> int:
        """How many processes there are."""
        _check_initialized()
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """The place of this process among them, from 0."""
        _check_initialized()
        return dist.get_rank(self.group)

    @property
    def pretended(self) -> bool:
        """Whether nothing is sent, as in a forecast, where one process stands for all: torch's "fake" group."""
        return dist.is_available() and dist.is_initialized() and dist.get_backend(self.group) == "fake"

    @property
    def members(self) -> list[int]:
        """The processes by their ranks among all, in the order of this group's."""
        _check_initialized()
        return dist.get_process_group_ranks(dist.group.WORLD if self.group is None else self.group)

    def sum(self, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The sum over ranks of each tensor, the same bits on every rank; one all-reduce for each dtype.

        Memory: a copy of the tensors in one piece.
        """
        return self._reduced(leaves, dist.ReduceOp.SUM)

    def largest(self, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The maximum over ranks of each number, likewise."""
        return self._reduced(leaves, dist.ReduceOp.MAX)

    def gathered(self, value: Value) -> list[Value]:
        """What every rank has for a small picklable value, in the order of the ranks."""
        size = self.size
        found: list[Any] = [None] * size
        with spans.span(spans.COLLECTIVE), spans.span(spans.ASIDE), _told():
            dist.all_gather_object(found, pickle.dumps(value), group=self.group)
        return [pickle.loads(one) for one in found]

    def agree(self, error: BaseException | None, what: str) -> None:
        """Raise on every rank if any rank has an error: its own where it has one, else one that names the others.

        Args:
            error: what this rank's part raised, or None.
            what: the part, for the message.

        Raises:
            RankError: another rank failed.
        """
        failures = self.gathered(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        failed = [(rank, said) for rank, said in enumerate(failures) if said is not None]
        if failed:
            raise RankError(f"{what} failed on rank {', '.join(f'{rank} ({said})' for rank, said in failed)}")

    def _reduced(self, leaves: Sequence[Tensor], operation: Any) -> tuple[Tensor, ...]:
        _check_initialized()
        if any(without_data(leaf) for leaf in leaves) and not self.pretended:
            return tuple(leaf.clone() for leaf in leaves)
        found: list[Tensor | None] = [None] * len(leaves)
        kinds = {(leaf.dtype, leaf.device): None for leaf in leaves}
        for kind in kinds:
            places = [i for i, leaf in enumerate(leaves) if (leaf.dtype, leaf.device) == kind]
            flat = torch.cat([leaves[i].detach().reshape(-1) for i in places])
            with spans.span(spans.COLLECTIVE), _told():
                dist.all_reduce(flat, operation, group=self.group)
            parts = flat.split([leaves[i].numel() for i in places])
            for i, part in zip(places, parts, strict=True):
                found[i] = part.view(leaves[i].shape)
        return tuple(leaf for leaf in found if leaf is not None)


class RankError(RuntimeError):
    """Another rank of the group failed, so that what all of them compute together cannot be had."""


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What torch says where a rank is gone, as the error of the other ranks."""
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            f"a sum over ranks was not taken: another process of the group has ended, or has not come in time; its own "
            f"output says why. torch says: {error}"
        ) from error


def without_data(leaf: Tensor) -> bool:
    """Whether a tensor has no numbers to send: a forecast, or a look at what is used."""
    return isinstance(leaf, FakeTensor) or leaf.device.type == "meta"


def ranks_of(who: str, group: Any) -> Ranks:
    """The ranks of what was given as a group.

    Args:
        who: was given it, for the message.
        group: Ranks, or a process group of torch.distributed.

    Raises:
        TypeError, ValueError: it is neither, or one that this process is no member of.
    """
    if isinstance(group, Ranks):
        return group
    if dist.is_available():
        if isinstance(group, dist.ProcessGroup):
            return Ranks(group)
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                f"{who} was given a group that this process is no member of (what torch.distributed.new_group returns "
                f"there); make the call on its members alone"
            )
    hint = ". Of a device mesh write mesh.get_group('name')" if hasattr(group, "get_group") else ""
    raise TypeError(
        f"{who} was given group={group!r}; None, bilevel.distributed.Ranks() or a process group was needed{hint}"
    )


def _check_initialized() -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "a group of processes was asked for, and torch.distributed is not initialized; start the program with "
            "torchrun --nproc-per-node N program.py, and call torch.distributed.init_process_group() in it first"
        )
