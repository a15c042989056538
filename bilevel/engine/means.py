"""Whether a function of a batch is the mean over its examples: what it is on the whole against what it is on two parts.

At y = 0 all examples have the same loss in most classifiers, and at an x of equal entries the same weight; there a
mean by class weights or by a mask looks like one over examples. So it is looked at beside the point that is given, and
on rows of two ranks, which differ where a rank's own are alike; at the point itself where beside it there is no number.
"""

import dataclasses
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel.space import tree
from bilevel.space.ranks import Ranks
from bilevel.space.tree import Tree

NEEDS_GRAPH = "does not require grad"
"""What torch says when a function takes a gradient inside, of an argument that was passed without a graph."""

_TIGHT, _LOOSE = 1e2, 1e3
"""Roundings by which the mean of two parts may differ from the whole, where wider numbers can be asked or not."""
_LOOSEST = 0.05
_NARROW = (torch.bfloat16, torch.float16)
_SAMPLE = 4
"""Rows that a rank shows the others."""
_PERIOD = 4093
"""Of the numbers that move a point."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """A batch, and parts whose mean it should have.

    Args:
        whole: the batch.
        parts: of it.
        shares: of the parts in the whole, which sum to 1.
    """

    whole: Any
    parts: tuple[Any, ...]
    shares: tuple[float, ...]


class Verdict(NamedTuple):
    """The value on the whole, the mean of those on the parts, and whether they agree."""

    agree: bool
    whole: float
    mean: float


@dataclasses.dataclass(frozen=True)
class Mean:
    """A loss and a trial.

    Args:
        function: called as function(y, x, rows).
        name: for messages.
        trial: what it is tried on.
        dtype: of the loss as it is called.
    """

    function: Callable[[Tree, Tree, Any], Tensor]
    name: str
    trial: Trial
    dtype: torch.dtype

    def verdict(self, y: Tree, x: Tree) -> Verdict | None:
        """Whether it is a mean on the trial; None where that cannot be seen.

        Raises:
            ValueError: the loss can be had of the whole and not of a part.
        """
        floats = [leaf.dtype for leaf in tree.tensors((y, x, self.trial.whole)) if leaf.is_floating_point()]
        eps = max(torch.finfo(dtype).eps for dtype in (*floats, self.dtype))
        narrow = any(dtype in _NARROW for dtype in (*floats, self.dtype))
        near, wider = (moved(y), moved(x)), torch.float32 if narrow else None
        single = min(eps, torch.finfo(torch.float32).eps)
        for point in (near, (y, x)):
            found = self._tried(point, wider, single, _TIGHT) if narrow else None
            found = self._tried(point, None, eps, _LOOSE if narrow else _TIGHT) if found is None else found
            if found is not None and not found.agree:
                # (Wider numbers say whether it was rounding.)
                again = self._tried(point, torch.float64, single, _TIGHT) or self._tried(point, None, eps, _LOOSE)
                found = again if again is not None and again.agree else found
            if found is not None:
                return found
        try:
            self._value(y, x, self.trial.whole)
        except Exception:
            return None
        for part in self.trial.parts:
            try:
                self._value(y, x, part)
            except Exception as error:
                raise no_part(self.name, error) from error
        return None

    def _tried(self, point: tuple[Tree, Tree], dtype: torch.dtype | None, eps: float, loose: float) -> Verdict | None:
        try:
            y, x, whole, parts = _cast((*point, self.trial.whole, self.trial.parts), dtype)
            value = self._value(y, x, whole)
            own = [self._value(y, x, part) for part in parts]
            torch.stack([value, *own])
        except Exception:  # (Not everything can be called everywhere and in every dtype.)
            return None
        with torch.no_grad():
            mean = torch.stack([share * each for share, each in zip(self.trial.shares, own, strict=True)]).sum(0)
            size = torch.stack([value.abs(), *(each.abs() for each in own)]).amax(0)
            if not bool(value.isfinite().all()):
                return None
            # (Infinite, or not a number, where the whole is finite: no mean.)
            off = ((mean - value).abs() - min(loose * eps, _LOOSEST) * size).nan_to_num(nan=torch.inf).reshape(-1)
        at = int(off.argmax())
        return Verdict(not bool(off[at] > 0), float(value.reshape(-1)[at]), float(mean.reshape(-1)[at]))

    def _value(self, y: Tree, x: Tree, rows: Any) -> Tensor:
        try:
            with torch.no_grad():
                loss = self.function(y, x, rows)
        except RuntimeError as error:
            if NEEDS_GRAPH not in str(error):
                raise
            with torch.enable_grad():  # (It takes a gradient of its own.)
                loss = self.function(y, x, rows)
        return physical(loss.detach()).double()


def agreed(verdict: Verdict | None, name: str, rows: str, parts: str) -> bool:
    """Whether it is known now that a loss is a mean.

    Raises:
        ValueError: it is none.
    """
    if verdict is None or verdict.agree:
        return verdict is not None
    raise ValueError(
        f"{name} is no mean over the examples of its batch: on {rows} it is {verdict.whole:.6g}, and the mean of its "
        f"values on {parts} is {verdict.mean:.6g} (at the point given or near it). Data in parallel needs a mean: "
        f"write .mean() for .sum(); look up what belongs to an example by an index in the batch, not by its place; "
        f"take GroupNorm for BatchNorm; divide by the number of examples, not by the sum of their weights, or of a "
        f"mask let count=lambda batch: int(batch['mask'].sum()) say what a batch weighs. (If it is one, and this is "
        f"rounding: data_parallel(..., check=False).)"
    )


def halves(batch: Any, count: Callable[[Any], int] | None) -> Trial | None:
    """A batch and two halves of it, or a batch of one row twice and that row; None where it cannot be parted.

    Args:
        batch: of this rank.
        count: how many examples a batch holds; None for its rows. An odd row is left out then: what counts every batch
            as one must not be told from what counts the rows.
    """
    rows = row_count(batch)
    if not rows:
        return None
    if rows == 1:
        twice = tree.tree_map(lambda leaf: torch.cat([leaf] * 2) if _has_rows(leaf) else leaf, batch)
        return Trial(twice, (batch,), (1.0,))
    if count is not None:
        rows -= rows % 2
    parts = (some_rows(batch, 0, rows // 2), some_rows(batch, rows // 2, rows))
    return parted(some_rows(batch, 0, rows), parts, count)


def parted(whole: Any, parts: tuple[Any, ...], count: Callable[[Any], int] | None) -> Trial | None:
    """A batch and its parts with their shares, those without an example left out; None where there is none."""
    sizes = [row_count(part) or 0 if count is None else count(part) for part in parts]
    full = [(part, size) for part, size in zip(parts, sizes, strict=True) if size > 0]
    if not full:
        return None
    return Trial(
        whole,
        tuple(part for part, _ in full),
        tuple(size / sum(sizes) for _, size in full),
    )


def across(batch: Any, ranks: Ranks, count: Callable[[Any], int] | None) -> Trial | None:
    """Rows of this rank and of the next one that shows any, as a batch and its parts; None where there are none.

    Every rank takes part: some rows of each go to all.

    Args:
        batch: of this rank, or None where it has no rows.
        ranks: the processes.
        count: how many examples a batch holds; None for its rows.
    """
    some, shown = None, b""
    try:
        if batch is not None and row_count(batch):
            some = tree.tree_map(lambda leaf: leaf.detach()[:_SAMPLE] if _has_rows(leaf) else leaf, batch)
            shown = pickle.dumps([leaf.cpu() for leaf in tree.tensors(some) if leaf.dim()])
    except Exception:  # (Not every tensor can be sent.)
        shown = b""
    found = ranks.gathered(shown)
    others = next((each for each in found[ranks.rank + 1 :] + found[: ranks.rank] if each), None)
    if not shown or others is None:
        return None
    both = joined(some, pickle.loads(others))
    return None if both is None else parted(both.whole, both.parts, count)


def no_part(name: str, error: Exception) -> ValueError:
    """What is said where a function can be had of a batch, and not of a part of it."""
    return ValueError(
        f"{name} can be had of this rank's rows and not of a part of them ({type(error).__name__}: {error}), so that "
        f"it cannot be seen whether it treats each example by itself. (If it does: data_parallel(..., check=False).)"
    )


def joined(batch: Any, others: list[Tensor]) -> Trial | None:
    """Some rows of a batch and others behind them, as a trial without shares; None where they do not fit."""
    entries, structure = tree.flatten(batch)
    places = [i for i, leaf in enumerate(entries) if _has_rows(leaf)]
    mine = [entries[i] for i in places]
    if [(leaf.shape[1:], leaf.dtype) for leaf in mine] != [(leaf.shape[1:], leaf.dtype) for leaf in others]:
        return None

    def made(leaves: list[Tensor]) -> Any:
        found = list(entries)
        for i, leaf in zip(places, leaves, strict=True):
            found[i] = leaf
        return tree.unflatten(found, structure)

    theirs = [leaf.to(own.device) for own, leaf in zip(mine, others, strict=True)]
    return Trial(made([torch.cat(pair) for pair in zip(mine, theirs, strict=True)]), (batch, made(theirs)), ())


def roundings(dtype: torch.dtype) -> float:
    """How far a number that was summed in another order may be off, relative."""
    return min(_LOOSE * torch.finfo(dtype).eps, _LOOSEST)


def examples(batch: Any, who: str) -> int:
    """The leading dimension of a batch's tensors, those without dimensions left out.

    Raises:
        ValueError: there is none, or they differ.
    """
    sizes = sorted({leaf.shape[0] for leaf in tree.tensors(batch) if leaf.dim()})
    if len(sizes) != 1:
        found = f"tensors with leading dimensions {sizes}" if sizes else "no tensor with a dimension"
        raise ValueError(
            f"{who} was given a batch with {found}, which does not say how many examples this rank has. Write "
            f"data_parallel(problem, ranks, count=lambda batch: len(batch['labels'])); count=lambda batch: 1 where "
            f"every rank's batch weighs the same"
        )
    return sizes[0]


def row_count(batch: Any) -> int | None:
    """The leading dimension that all tensors of a batch share; None where there is none."""
    leaves = [leaf for leaf in tree.tensors(batch) if leaf.dim()]
    sizes = {len(leaf) for leaf in leaves}
    return sizes.pop() if len(sizes) == 1 and all(leaf.layout is torch.strided for leaf in leaves) else None


def some_rows(batch: Any, low: int, high: int) -> Any:
    """A range of rows of a batch."""
    return tree.tree_map(lambda leaf: leaf[low:high] if _has_rows(leaf) else leaf, batch)


def moved(value: Tree) -> Tree:
    """Another point, the same on every rank: each number up to half as large again, and zeros up to 0.1."""

    def other(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        with torch.no_grad():
            count = max(leaf.numel(), 1)
            steps = (torch.arange(1, 1 + min(count, _PERIOD), device=leaf.device) * 0.6180339887) % 1
            by = steps.repeat(-(-count // _PERIOD))[: leaf.numel()].view(leaf.shape).to(leaf.dtype)
            return torch.where(leaf == 0, 0.1 * by, leaf * (1 + by / 2)).detach()

    return tree.tree_map(other, value)


def physical(leaf: Tensor) -> Tensor:
    """The tensor behind those of torch.func.vmap, which may be read."""
    while torch._C._functorch.is_batchedtensor(leaf):
        leaf = torch._C._functorch.get_unwrapped(leaf)
    return leaf


def wrapped(value: Any) -> bool:
    """Whether torch.func stands between a tensor of a tree and its numbers."""
    return any(torch._C._functorch.is_functorch_wrapped_tensor(leaf) for leaf in tree.tensors(value))


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        return value
    floating = lambda leaf: isinstance(leaf, Tensor) and leaf.is_floating_point()  # noqa: E731
    return tree.tree_map(lambda leaf: leaf.to(dtype) if floating(leaf) else leaf, value)
