"""Bytes that a collective makes this rank send.

What a ring sends, the algorithm whose traffic is the least that these operations can do with: N ranks, and b bytes that
this rank puts in.

| operator | bytes sent by a rank |
| --- | --- |
| all_reduce | 2 (N - 1) / N b: a reduce-scatter and an all-gather |
| all_gather | (N - 1) b |
| reduce_scatter | (N - 1) / N b |
| all_to_all | b, without the part that it keeps |
| broadcast, reduce | b, handed on from rank to rank; 0 by the last of them |
| gather | b; 0 by the root |
| scatter | 0; by the root b, without the part that it keeps |
| send | b |
| recv, barrier | 0 |

What really goes over the wires is the backend's to choose: NCCL takes trees for small messages, and gloo doubles and
halves; protocols and headers come on top. Objects (`all_gather_object`) are two gathers of tensors: of lengths, and of
bytes padded to the longest.
"""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

_WORDS = ("_coalesced", "_single", "_into_tensor", "_tensor", "_base", "_out", "_any_source")
_NAMES = {"allreduce": "all_reduce", "allgather": "all_gather", "alltoall": "all_to_all"} | {
    "shard_dim_alltoall": "all_to_all",
    "monitored_barrier": "barrier",
    "isend": "send",
    "irecv": "recv",
}
_SPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")
_SILENT = {"check_for_nan", "wait_tensor", "_wrap_tensor_autograd", "mesh_get_process_group"}
_INPUTS = ("input_tensors", "input_tensor", "input_list", "inputs", "input", "tensors", "tensor")
"""What the argument is called that holds what a rank puts in: the first that there is."""
POINT_TO_POINT = ("send", "recv", "batch_p2p_ops")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One call of a collective by this rank.

    Example:
        >>> Collective("all_reduce", bytes=1000, ranks=4, rank=0).sent, Collective("all_gather", 1000, 4, 0).sent
        (1500, 3000)
    """

    name: str
    bytes: int
    """That the rank puts in."""
    ranks: int
    """N, of the group."""
    rank: int
    root: int = 0
    kept: int | None = None
    """Of an all_to_all or a scatter: bytes of the part that stays here; None for one of N equal parts."""

    @property
    def sent(self) -> int | None:
        """Bytes that the rank sends, rounded up to whole ones; None where there is no formula for the operator."""
        others = self.ranks - 1
        share = self.bytes - (self.bytes // self.ranks if self.kept is None else self.kept)
        found = {
            "all_reduce": -(-2 * others * self.bytes // self.ranks),
            "all_gather": others * self.bytes,
            "reduce_scatter": -(-others * self.bytes // self.ranks),
            "all_to_all": share,
            "broadcast": self.bytes if (self.rank + 1) % self.ranks != self.root else 0,
            "reduce": self.bytes if self.rank != self.root else 0,
            "gather": self.bytes if self.rank != self.root else 0,
            "scatter": share if self.rank == self.root else 0,
            "send": self.bytes,
            "batch_p2p_ops": self.bytes,
            "recv": 0,
            "barrier": 0,
        }
        return found.get(self.name)


def collective(operator: Any, args: Any, kwargs: Any) -> Collective | None:
    """What an operator that reached the dispatcher is as a collective; None if it is none."""
    if not isinstance(operator, OpOverload) or operator.namespace not in _SPACES:
        return None
    own = operator._schema.name.partition("::")[2]
    if own in _SILENT:
        return None
    given = dict(zip((argument.name for argument in operator._schema.arguments), args, strict=False)) | kwargs
    name = _name(own)
    group = _group(given)
    value = next((given[each] for each in _INPUTS if each in given), ())
    size, ranks, rank = _bytes(value), dist.get_world_size(group), dist.get_rank(group)
    root, kept = given.get("root_rank", given.get("src", 0)), None
    if name == "all_to_all":
        kept = _stays(value, given.get("input_split_sizes"), rank)
    elif name == "scatter":
        kept = _bytes(given["output_tensors"])
    elif name == "batch_p2p_ops":
        size = sum(_bytes(leaf) for how, leaf in zip(given["op_list"], value, strict=True) if how == "isend")
    elif name == "barrier":
        size = 0
    return Collective(name, size, ranks, rank, root, kept)


def _name(own: str) -> str:
    if own == "batch_p2p_ops":
        return own
    plain = own.strip("_")
    for word in _WORDS:
        plain = plain.removesuffix(word)
    for word in _WORDS:  # some have two of them
        plain = plain.removesuffix(word)
    return _NAMES.get(plain, plain)


def _group(given: dict[str, Any]) -> dist.ProcessGroup:
    named: Any = given.get("process_group", given.get("group_name"))
    if isinstance(named, dist.ProcessGroup):
        return named
    if isinstance(named, str):
        return dist.distributed_c10d._resolve_process_group(dist.GroupName(named))
    return dist.ProcessGroup.unbox(named)


def _bytes(value: Any) -> int:
    return sum(leaf.numel() * leaf.itemsize for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _stays(value: Any, splits: Any, rank: int) -> int | None:
    """Bytes of an all_to_all that stay here."""
    if isinstance(value, (list, tuple)):
        return _bytes(value[rank])
    if not splits or not isinstance(value, Tensor):
        return None
    rows = max(value.shape[0], 1)
    return splits[rank] * (value.numel() // rows) * value.itemsize


def wait(output: Any) -> None:
    """Wait for what a collective returned: for its work, or for its tensors."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, torch.ScriptObject):
            dist.Work.unbox(leaf).wait()
            return
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            torch.ops._c10d_functional.wait_tensor(leaf)
