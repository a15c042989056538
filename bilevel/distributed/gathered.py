"""The whole weights of an inner variable that is sharded, for losses that compute with plain tensors."""

from bilevel.engine.shards import plain
from bilevel.space import tree
from bilevel.space.shards import spread
from bilevel.space.tree import Tree


def gathered(value: Tree) -> Tree:
    """The DTensors of a tree as whole plain tensors, differentiable to any order.

    Operators then never see a DTensor: what DTensor has no rule for, or no second derivative, works, and so do the
    batches and the outer variable as they are. Every rank must compute the same from them, on the same batch.

    Args:
        value: any pytree; what is no DTensor passes through.

    Memory: the whole tensors, for as long as the graph needs them. Inside a rematerialized block they are gathered when
        the block is reached, forward and backward, and freed behind it: write
        `block = bl.rematerialize(lambda hidden, weights: layer(gathered(weights), hidden))`, and give it the DTensors.

    Communication: an all-gather of each tensor; none in a gradient, one more in a product with second derivatives.

    Example:
        Under torchrun, y being a dict of DTensors::

            call, weights = bl.functional(net)
            problem = bl.Problem(
                lambda y, x, batch: (x["weights"] * losses(call(gathered(y), batch.rows), batch.labels)).mean(), ...)

        >>> import torch
        >>> gathered({"w": torch.ones(2)})
        {'w': tensor([1., 1.])}
    """
    return tree.tree_map(lambda leaf: plain(leaf) if spread(leaf) else leaf, value)
