"""The losses of a caller who has DTensors, as functions of this rank's parts; differentiable to any order.

Two operators cross the border, and each is the other's transpose:

    whole(part)    the DTensor of the parts of all ranks; its transpose brings a cotangent to the same placement
    local(tensor)  the plain tensor of a DTensor that is the same on every rank

(DTensor.from_local and to_local do so to the first derivative. In torch 2.13 from_local's own backward is not
differentiable where it must move numbers between ranks, and says nothing: tests/bilevel/test_shards.py.)
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bilevel._strategy import Strategy, unsharded
from bilevel.engine.collectives import vary
from bilevel.linear.base import LinearSolver
from bilevel.outcome import readable
from bilevel.problem import Problem
from bilevel.space import bits, tree
from bilevel.space.ranks import Ranks
from bilevel.space.shards import Sharding, spread
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class OnParts:
    """A loss of DTensors as a function of parts of y and of a plain x.

    Args:
        loss: the caller's, called as `loss(inner, outer, batch)`.
        sharding: of y.
        spread_outer: which tensors of x the caller gave as DTensors.
    """

    loss: Callable[[Tree, Tree, Any], Tensor]
    sharding: Sharding
    spread_outer: tuple[bool, ...]

    def __call__(self, inner: Tree, outer: Tree, batch: Any) -> Tensor:
        """The loss, the same plain tensor on every rank."""
        with advised(
            "a loss was given inner as DTensors and other tensors as plain ones: pass outer and the tensors of the "
            "batches as distribute_tensor(tensor, mesh, [Replicate()]) (made before the call: inside a loss it cuts "
            "the graph), or let the loss use bilevel.distributed.gathered(inner)"
        ):
            found = self.loss(joined(self.sharding, inner), wrapped(self.sharding, outer, self.spread_outer), batch)
        return plain(found) if spread(found) else found


@dataclasses.dataclass(frozen=True)
class Whole:
    """An outer variable, which every rank has whole.

    Args:
        plain: it, as plain tensors.
        spread: which of them the caller has as DTensors.
        sharding: of y.
    """

    plain: Tree
    spread: tuple[bool, ...]
    sharding: Sharding

    @classmethod
    def of(cls, who: str, outer: Tree, sharding: Sharding) -> "Whole":
        """That of the caller's.

        Raises:
            ValueError: a tensor of it is itself sharded, or on another mesh.
        """
        from torch.distributed.tensor import Replicate

        leaves, names = tree.tensors(outer), tree.names(outer)
        for name, leaf in zip(names, leaves, strict=False):
            if spread(leaf) and (
                leaf.device_mesh != sharding.mesh or any(type(each) is not Replicate for each in leaf.placements)  # type: ignore[attr-defined]
            ):
                raise ValueError(
                    f"{who}() was given outer {name} placed as {leaf.placements} on {leaf.device_mesh}; "  # type: ignore[attr-defined]
                    f"the outer variable must be whole on every rank of the mesh of inner: a plain tensor, or "
                    f"distribute_tensor(tensor, mesh, [Replicate()])"
                )
        plain = tree.tree_map(lambda leaf: leaf.detach().to_local().detach() if spread(leaf) else leaf, outer)
        return cls(plain, tuple(spread(leaf) for leaf in leaves), sharding)

    def like(self, leaves: Tree) -> Tree:
        """A tree of plain tensors with DTensors where the caller has them."""
        with torch.no_grad():
            return wrapped(self.sharding, leaves, self.spread)


@contextlib.contextmanager
def advised(advice: str) -> Iterator[None]:
    """Turn torch's error about plain tensors among DTensors into one that says what to write."""
    try:
        yield
    except RuntimeError as error:
        if "mixed torch.Tensor and DTensor" not in str(error):
            raise
        raise ValueError(f"{advice} ({error})") from error


def check_whole(value: Tree, ranks: Ranks) -> None:
    """Raise ValueError on every rank where one has other bits in a DTensor that all of them have whole.

    Args:
        value: what the caller gave: inner, and the batches.
        ranks: of the mesh of inner.

    Communication: one all-reduce of two numbers for each such tensor.
    """
    from torch.distributed.tensor import Replicate

    leaves = [
        (name, leaf.to_local())
        for name, leaf in zip(tree.names(value), tree.flatten(value)[0], strict=True)
        if spread(leaf) and any(type(place) is Replicate for place in leaf.placements)
    ]
    if not leaves:
        return
    found = torch.stack([bits.of(leaf) for _, leaf in leaves])
    high, low = ranks.largest([torch.stack([found, -found])])[0]
    if readable(high) and (
        apart := [name for (name, _), off in zip(leaves, (high + low).tolist(), strict=True) if off]
    ):
        raise ValueError(
            f"hypergradient() was given DTensors that are placed as whole on every rank (Replicate) and differ between "
            f"ranks: {', '.join(apart)}. Make them with distribute_tensor(tensor, mesh, [Replicate()]), which sends "
            f"the numbers of one rank to all; rows of each rank's own are DTensor.from_local(rows, mesh, [Shard(0)])"
        )


def check(who: str, problem: Problem, strategies: tuple[Any, ...], *, eager: bool, split: bool) -> None:
    """Raise ValueError unless a problem can be solved on parts of y by these strategies."""
    advice = "with an inner variable that is sharded over processes (DTensors)"
    if problem.init is not None:
        raise ValueError(
            f"{who}() was given a problem with init {advice}; y must begin at DTensors that are given as inner: leave "
            f"init out"
        )
    if split:
        raise ValueError(
            f"{who}() was given a problem of data_parallel() {advice}; let the batches be DTensors that are cut along "
            f"their rows, or take bilevel.distributed.fully_sharded, where each rank has its own rows"
        )
    if not eager:
        raise ValueError(f"{who}() was given an engine that compiles {advice}; leave it out, or write bilevel.Eager()")
    names = dict.fromkeys(name for each in strategies for name in unsharded(each))
    if names:
        raise ValueError(
            f"{who}() was given {', '.join(names)} {advice}; it is not said to be right where each process holds a "
            f"part of y (it may need whole tensors, sum over y by itself, or draw numbers like y). The page "
            f"docs/many_gpus.md lists those that are: FirstOrderCorrected, Darts, Sama, Implicit(CG(10)), Unrolled, "
            f"SGD, Adam, ... A class of your own says so by `sharded = True` in its body"
        )


def check_same(what: str, value: Tree, ranks: Ranks, *, exact: bool = False) -> None:
    """Raise ValueError on every rank unless all have the same numbers (but for rounding, unless `exact`)."""
    leaves = [leaf.detach().reshape(-1).double() for leaf in tree.tensors(value)]
    if not leaves or not (readable(leaves[0]) or ranks.pretended):
        return
    # Two sums of each: one would not see two numbers that have changed places.
    sums = [
        torch.stack([leaf.sum(), (leaf * torch.arange(1, leaf.numel() + 1).to(leaf).rsqrt()).sum()]) for leaf in leaves
    ]
    found = torch.nan_to_num(torch.cat(sums))
    high, low = ranks.largest([torch.stack([found, -found])])[0]
    if not readable(high):
        return
    loose = 0.0 if exact else max(torch.finfo(leaf.dtype).eps for leaf in tree.tensors(value)) ** 0.5
    if bool((high + low > loose * torch.maximum(high.abs(), low.abs())).any()):
        raise ValueError(
            f"{what} differ between the ranks over which inner is sharded, up to {high.tolist()} and down to "
            f"{(-low).tolist()} (sums of entries); they must be the same. Give every rank the same outer variable and "
            f"the same batches, or let the loss return a DTensor, or sum over ranks in it"
        )


def agreed(value: Tree, ranks: Ranks) -> Tree:
    """The mean over ranks, which all have to rounding: so that x stays the same to the bit.

    Raises:
        ValueError: they have different numbers; on every rank.
    """
    leaves, count = tree.tensors(value), ranks.size
    mean = [leaf / count for leaf in ranks.sum(leaves)]
    if readable(mean[0]) or ranks.pretended:
        apart = torch.stack([torch.linalg.vector_norm((a - b).double()) for a, b in zip(leaves, mean, strict=True)])
        size = torch.stack([torch.linalg.vector_norm(each.double()) for each in mean])
        loose = max(torch.finfo(leaf.dtype).eps for leaf in leaves) ** 0.5
        off = torch.linalg.vector_norm(apart) > loose * torch.linalg.vector_norm(size)
        differ = ranks.largest([off.double()])[0]
        if readable(differ) and bool(differ):
            raise ValueError(
                "the ranks over which inner is sharded have different gradients in the outer variable, where each "
                "must have the whole: pass outer as DTensors (distribute_tensor(x, mesh, [Replicate()]) before "
                "the call) and let the losses use them, or compute the same on every rank from gathered weights"
            )
    return tree.like(value, mean)


def posed(problem: Problem, sharding: Sharding, spread_outer: tuple[bool, ...]) -> Problem:
    """The problem with its losses as functions of parts; what is learned of it is kept with the caller's."""
    found = dataclasses.replace(
        problem,
        inner_loss=OnParts(problem.inner_loss, sharding, spread_outer),
        outer_loss=OnParts(problem.outer_loss, sharding, spread_outer),
    )
    kept = problem.memo.setdefault(("on parts", sharding.places, sharding.ranks.size, spread_outer), {})
    vars(found)["memo"] = kept
    return found


def shared(strategy: Any, ranks: Ranks) -> Any:
    """A solver whose hyper-parameters, where they are functions of x, say that each rank uses x for its own part: what
    comes back to x through them is summed over ranks.
    """
    if not dataclasses.is_dataclass(strategy) or isinstance(strategy, type):
        return strategy
    changed = {}
    for field in dataclasses.fields(strategy):
        value = getattr(strategy, field.name)
        made = _shared(value, ranks)
        if made is not value:
            changed[field.name] = made
    return dataclasses.replace(strategy, **changed) if changed else strategy


def _shared(value: Any, ranks: Ranks) -> Any:
    if isinstance(value, Strategy):
        return value if isinstance(value, LinearSolver) else shared(value, ranks)
    if isinstance(value, tuple):
        made = tuple(_shared(each, ranks) for each in value)
        return value if all(a is b for a, b in zip(made, value, strict=True)) else made
    if callable(value) and not isinstance(value, type):
        return lambda outer: value(tree.tree_map(lambda leaf: vary(ranks, leaf), outer))
    return value


def joined(sharding: Sharding, inner: Tree) -> Tree:
    """The DTensors of parts, with their graph."""
    from torch.distributed.tensor import Replicate, Shard

    found = []
    for part, place in zip(tree.tensors(inner), sharding.places, strict=True):
        scalar = not place.shape
        shape, stride = (torch.Size([1]), (1,)) if scalar else (place.shape, place.stride)
        leaf = _Whole.apply(part, sharding.mesh, Shard(place.dim), shape, stride)
        if place.whole:
            # (As a plain tensor on the way: DTensor's view of a vector as a number has no derivative on a cut one.)
            full = plain(leaf).reshape(place.shape)
            leaf = _Whole.apply(full, sharding.mesh, Replicate(), place.shape, place.stride)
        found.append(leaf)
    return tree.like(inner, found)


def wrapped(sharding: Sharding, outer: Tree, which: tuple[bool, ...]) -> Tree:
    """x with the tensors that are to be DTensors as such, whole on every rank."""
    from torch.distributed.tensor import Replicate

    if not any(which):
        return outer
    leaves = [
        _Whole.apply(leaf, sharding.mesh, Replicate(), leaf.shape, leaf.stride()) if there else leaf
        for leaf, there in zip(tree.tensors(outer), which, strict=True)
    ]
    return tree.like(outer, leaves)


def local(value: Any) -> Tensor:
    """This rank's part of a DTensor, with its graph."""
    found: Tensor = _Local.apply(value)
    return found


def plain(value: Any) -> Tensor:
    """A DTensor as the whole plain tensor, the same on every rank."""
    from torch.distributed.tensor import Replicate

    found: Tensor = _Local.apply(value.redistribute(placements=[Replicate()] * value.device_mesh.ndim))
    return found


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, mesh: Any, placement: Any, shape: torch.Size, stride: tuple[int, ...]) -> Any:
        from torch.distributed.tensor import DTensor

        ctx.placement = placement
        return DTensor.from_local(part.view_as(part), mesh, [placement], run_check=False, shape=shape, stride=stride)

    @staticmethod
    def backward(ctx: Any, cotangent: Any) -> Any:
        return _Local.apply(cotangent.redistribute(placements=[ctx.placement])), None, None, None, None


class _Local(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Any) -> Tensor:
        ctx.mesh, (ctx.placement,) = value.device_mesh, value.placements
        ctx.shape, ctx.stride = value.shape, value.stride()
        part: Tensor = value.to_local()
        return part.view_as(part)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return _Whole.apply(cotangent, ctx.mesh, ctx.placement, ctx.shape, ctx.stride)
