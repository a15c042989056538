"""The structure of trees of tensors.

User functions see pytrees (dicts, lists, tuples, a bare tensor). Between them the library works on flat tuples of
leaves: `Leaves`. Dot products, norms and linear combinations of leaves are `Space`'s.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel.space.inner_product import Space

Tree = Any
Leaves = tuple[Tensor, ...]
"""The tensors of a tree, in its order."""
PartialLeaves = tuple[Tensor | None, ...]
"""The same with None where nothing contributes (a zero that costs no memory)."""


def flatten(tree: Tree) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves of a tree and what is needed to rebuild it."""
    return pytree.tree_flatten(tree)


def unflatten(leaves: Sequence[Any], structure: pytree.TreeSpec) -> Tree:
    """The tree of these leaves, by what `flatten` returned."""
    return pytree.tree_unflatten(list(leaves), structure)


# Flat containers of tensors are what nearly every caller has. Walking them directly costs a tenth of a general
# traversal, which would otherwise be 2% of an inner step of a small net. The order is pytree's: that of insertion.


def _flat(tree: Tree) -> Sequence[Any] | None:
    """The entries of a bare tensor or of a flat dict, list or tuple of tensors; None for anything else."""
    kind = type(tree)
    if kind is Tensor:
        return (tree,)
    entries = tuple(tree.values()) if kind is dict else tree if kind is list or kind is tuple else None
    if entries is None:
        return None
    for entry in entries:
        if type(entry) is not Tensor:
            return None
    return entries


def like(tree: Tree, leaves: Sequence[Any]) -> Tree:
    """`leaves` in the structure of `tree`."""
    if _flat(tree) is None or (type(tree) is Tensor and len(leaves) != 1):
        return pytree.tree_unflatten(list(leaves), pytree.tree_structure(tree))
    kind = type(tree)
    return leaves[0] if kind is Tensor else dict(zip(tree, leaves, strict=True)) if kind is dict else kind(leaves)


def tree_map(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Apply `function` leaf by leaf."""
    entries = None if rest else _flat(tree)
    return (
        pytree.tree_map(function, tree, *rest)
        if entries is None
        else like(tree, [function(entry) for entry in entries])
    )


def names(tree: Tree) -> list[str]:
    """A readable path for each leaf, for error messages."""
    return [pytree.keystr(path) or "(the tensor itself)" for path, _ in pytree.tree_flatten_with_path(tree)[0]]


def tensors(tree: Tree) -> list[Tensor]:
    """The leaves that are tensors."""
    if tree is None:
        return []
    entries = _flat(tree)
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)] if entries is None else list(entries)


def detach(tree: Tree) -> Tree:
    """The same storage without the graph; leaves that are not tensors pass through."""
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def attach(tree: Tree, constant: Collection[int] = ()) -> Tree:
    """The same storage as fresh graph leaves that require grad; integer tensors and other leaves pass through, and the
    tensors at the positions `constant` have no graph.
    """
    if constant:
        return like(tree, [leaf.detach() if i in constant else attach(leaf) for i, leaf in enumerate(tensors(tree))])
    return tree_map(
        lambda leaf: leaf.detach().requires_grad_() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf,
        tree,
    )


def aligned(tree: Tree, reference: Tree) -> list[Tensor] | None:
    """The tensors of `tree` in the order of `reference`; None if their structures differ. Dicts match by key, not by
    position.
    """
    if isinstance(tree, dict) and isinstance(reference, dict) and set(tree) == set(reference):
        tree = {name: tree[name] for name in reference}
    return tensors(tree) if pytree.tree_structure(tree) == pytree.tree_structure(reference) else None


def ordered(value: Tree, reference: Tree, who: str = "an inner step or its stationarity") -> Tree:
    """`value`, a tree like `reference`, with the entries of a dict in the same order.

    Args:
        value: the tree.
        reference: the other.
        who: returned it, for the message.

    Raises:
        ValueError: its structure is another.
    """
    if isinstance(value, dict) and isinstance(reference, dict) and set(value) == set(reference):
        value = {name: ordered(value[name], reference[name], who) for name in reference}
    if not _alike(value, reference):
        raise ValueError(
            f"{who} returned the structure {pytree.tree_structure(value)}, where that of the inner variable, "
            f"{pytree.tree_structure(reference)}, was needed"
        )
    return value


def _alike(value: Tree, reference: Tree) -> bool:
    """Whether two trees have one structure; a flat list and a flat tuple match by position."""
    if _flat(value) is None or _flat(reference) is None or isinstance(value, dict) != isinstance(reference, dict):
        return bool(pytree.tree_structure(value) == pytree.tree_structure(reference))
    if isinstance(value, Tensor) or isinstance(reference, Tensor):
        return type(value) is type(reference)
    return list(value) == list(reference) if isinstance(value, dict) else len(value) == len(reference)


def accumulate(total: PartialLeaves, new: PartialLeaves) -> PartialLeaves:
    """Sum where None is zero. Out of place: what autograd returns may alias something else."""
    return tuple(b if a is None else a if b is None else a + b for a, b in zip(total, new, strict=True))


def finite(tree: Tree) -> Tensor:
    """Whether every number is finite, as a 0-dim tensor (no synchronization)."""
    # The maximum norm lets NaN and inf through, in one pass; isfinite().all() takes five.
    norms = [
        torch.linalg.vector_norm(leaf, float("inf"))
        for leaf in tensors(tree)
        if leaf.is_floating_point() and leaf.numel()
    ]
    return torch.stack(norms).isfinite().all() if norms else torch.tensor(True)


def size(tree: Tree) -> int:
    """How many numbers the tensors of a tree hold."""
    return sum(leaf.numel() for leaf in tensors(tree))


# To be removed by the lead, with their last callers: inner/converge.py (norm, per_task) and
# estimators/penalty/first_order_corrected.py (axpy) call `Space` instead.


def per_task(number: Tensor, leaf: Tensor) -> Tensor:
    """`Space.per_task`."""
    return Space().per_task(number, leaf)


def axpy(alpha: Tensor | float, x: Sequence[Tensor], y: Sequence[Tensor]) -> Leaves:
    """`Space.axpy`."""
    return Space().axpy(alpha, x, y)


def norm(x: Sequence[Tensor], tasks: int | None = None) -> Tensor:
    """`Space.norm`."""
    return Space(tasks).norm(x)
