"""What is made of a start of the inner loop that is a function of x."""

from collections.abc import Sequence

from torch import Tensor

from bilevel.engine import autodiff
from bilevel.space import tree
from bilevel.space.tree import PartialLeaves, Tree


def dense(start: Tree) -> Tree:
    """A start that is x for every task is one tensor expanded: for an engine that compiles, other code than that for
    the next steps.
    """
    return tree.tree_map(lambda leaf: leaf.contiguous() if isinstance(leaf, Tensor) else leaf, start)


def with_nodes(start: Tree) -> Tree:
    """The same with a node of its own for each leaf: init may return x itself, or one tensor twice."""
    return tree.tree_map(
        lambda leaf: leaf.view_as(leaf) if leaf.requires_grad else leaf.detach().requires_grad_(), start
    )


def pull(start: Tree, cotangents: Sequence[Tensor | None], attached: Tree) -> PartialLeaves:
    """d<start, cotangents>/dx; None where x does not enter it."""
    leaves = tree.tensors(start)
    pairs = [(leaf, weight) for leaf, weight in zip(leaves, cotangents, strict=True) if weight is not None]
    return autodiff.grad([leaf for leaf, _ in pairs], tree.tensors(attached), [weight for _, weight in pairs])
