"""(Until bilevel.distributed has them.)"""

from typing import Any

from torch import Tensor

import bilevel as bl
from bilevel.distributed import Ranks
from bilevel.engine.collectives import total, vary
from bilevel.space import tree


def _rows(value: Any, ranks: Ranks) -> Any:
    return tree.tree_map(
        lambda leaf: leaf.tensor_split(ranks.size)[ranks.rank] if isinstance(leaf, Tensor) else leaf, value
    )


def split(batches: bl.Batches, ranks: Ranks) -> bl.Batches:
    return bl.Batches(inner=_share(batches.inner, ranks), outer=_share(batches.outer, ranks))


def _share(value: Any, ranks: Ranks) -> Any:
    if isinstance(value, bl.PerStep):
        return bl.PerStep([_share(value[step], ranks) for step in range(len(value))])
    whole = tree.tensors(value)[0].shape[0]
    mine = _rows(value, ranks)
    return mine, tree.tensors(mine)[0].shape[0] / whole


def data_parallel(problem: bl.Problem, ranks: Ranks) -> bl.Problem:
    def over(loss: Any) -> Any:
        def summed(y: Any, x: Any, batch: Any) -> Tensor:
            part, share = batch
            return total(ranks, share * loss(vary(ranks, y), vary(ranks, x), part))[0]

        return summed

    return bl.Problem(over(problem.inner_loss), over(problem.outer_loss))
