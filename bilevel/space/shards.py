"""An inner variable that is spread over processes: DTensors outside the library, this rank's parts inside.

Inside, y is a tuple of plain tensors, and every number of it is on exactly one rank: so sums over y are sums over the
parts, then over ranks (`Space`). A tensor that the caller keeps whole on every rank (Replicate) is cut along its first
dimension, one without dimensions is rank 0's.
"""

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bilevel.space import tree
from bilevel.space.ranks import Ranks
from bilevel.space.tree import Tree

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the numbers of one tensor are: its size, and the dimension that is cut; `whole` where the caller's own is
    on every rank.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    dim: int
    whole: bool


@dataclasses.dataclass(frozen=True)
class Sharding:
    """How the tensors of an inner variable lie on a mesh of processes.

    Args:
        mesh: of one dimension.
        places: one for each tensor.
        ranks: its processes.
    """

    mesh: "DeviceMesh"
    places: tuple[Place, ...]
    ranks: Ranks

    @classmethod
    def of(cls, who: str, inner: Tree) -> "Sharding | None":
        """That of the DTensors of an inner variable; None where there are none.

        Raises:
            ValueError: some are plain, lie on several meshes or on one of several dimensions, or are sums to be made.
        """
        leaves = tree.tensors(inner)
        if not any(map(spread, leaves)):
            return None
        names = tree.names(inner)
        plain = [name for name, leaf in zip(names, leaves, strict=False) if not spread(leaf)]
        if plain:
            raise ValueError(
                f"{who}() was given DTensors as inner and plain tensors beside them ({', '.join(plain)}); all must be "
                f"DTensors: write torch.distributed.tensor.distribute_tensor(tensor, mesh, [Replicate()])"
            )
        mesh = leaves[0].device_mesh  # type: ignore[attr-defined]
        if any(leaf.device_mesh != mesh for leaf in leaves) or mesh.ndim != 1:  # type: ignore[attr-defined]
            raise ValueError(
                f"{who}() was given inner tensors on "
                f"{'a mesh of several dimensions' if mesh.ndim != 1 else 'several meshes'}; one mesh of one dimension "
                f"was needed, such as init_device_mesh('cuda', (world_size,)), or the part of a larger one over which "
                f"the parameters are sharded"
            )
        if mesh.get_coordinate() is None:
            raise ValueError(f"{who}() was called on a process that is not in the mesh of the inner tensors")
        places = tuple(_place(who, name, leaf) for name, leaf in zip(names, leaves, strict=True))
        return cls(mesh, places, Ranks(mesh.get_group()))

    def parts(self, inner: Tree) -> Tree:
        """This rank's part of each DTensor, sharing its memory where it can; without a graph."""
        leaves = [
            self._part(leaf.detach(), place) for leaf, place in zip(tree.tensors(inner), self.places, strict=True)
        ]
        return tree.like(inner, leaves)

    def joined(self, parts: Tree) -> Tree:
        """The DTensors of these parts, placed as the caller's were; without a graph.

        Communication: the tensors that are whole on every rank.
        """
        from torch.distributed.tensor import Replicate

        found = []
        for part, place in zip(tree.tensors(parts), self.places, strict=True):
            whole = self.dtensor(part.detach(), place)
            whole = whole.redistribute(placements=[Replicate()]) if place.whole else whole
            found.append(whole if whole.shape == place.shape else whole.reshape(place.shape))
        return tree.like(parts, found)

    def dtensor(self, part: Tensor, place: Place) -> Any:
        """The DTensor of a part, cut along a dimension; a number without dimensions as a vector of one."""
        from torch.distributed.tensor import DTensor, Shard

        scalar = not place.shape
        shape, stride = (torch.Size([1]), (1,)) if scalar else (place.shape, place.stride)
        return DTensor.from_local(part, self.mesh, [Shard(place.dim)], run_check=False, shape=shape, stride=stride)

    def _part(self, leaf: Any, place: Place) -> Tensor:
        from torch.distributed.tensor import Shard

        if not place.whole:
            part: Tensor = leaf.to_local()
        else:
            flat = leaf if place.shape else leaf.reshape(1)
            part = flat.redistribute(placements=[Shard(place.dim)]).to_local()
        return part.detach()


def spread(leaf: Any) -> bool:
    """Whether it is a DTensor. (Without the module that defines it, nothing is.)"""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(leaf, module.DTensor)


def _place(who: str, name: str, leaf: Any) -> Place:
    from torch.distributed.tensor import Replicate, Shard

    (placement,) = leaf.placements
    if type(placement) is Replicate:
        return Place(leaf.shape, leaf.stride(), 0, whole=True)
    if type(placement) is Shard:
        return Place(leaf.shape, leaf.stride(), placement.dim % leaf.dim(), whole=False)
    raise ValueError(
        f"{who}() was given inner {name} placed as {placement}; Shard(dim) or Replicate() was needed: write "
        f".redistribute(placements=[Shard(0)])"
    )
