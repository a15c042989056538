"""Several hypergradients as one: the mean over the batches of an outer step."""

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from bilevel.outcome import Hypergradient, worst
from bilevel.space import tree


def mean(found: Sequence[Hypergradient]) -> Hypergradient:
    """One hypergradient of several, in the order they were made.

    `grad` and the losses are means, the oracle calls and the inner steps sums, the status is the worst; the inner
    variable, the state and the other stats are the last one's.
    """
    if len(found) == 1:
        return found[0]
    last, count = found[-1], len(found)
    grad = tree.tree_map(lambda *leaves: _sum(leaves) / count, found[0].grad, *(one.grad for one in found[1:]))
    calls: dict[str, int] = {}
    for one in found:
        for name, number in one.stats.get("calls", {}).items():
            calls[name] = calls.get(name, 0) + number
    steps = [one.stats["inner_steps"] for one in found if "inner_steps" in one.stats]
    return dataclasses.replace(
        last,
        grad=grad,
        outer_loss=_sum([one.outer_loss for one in found]) / count,
        inner_loss=_sum([one.inner_loss for one in found]) / count,
        stats=last.stats | {"calls": calls} | ({"inner_steps": sum(steps)} if steps else {}),
        code=worst(*(one.code for one in found)),
    )


def _sum(leaves: Sequence[Tensor]) -> Tensor:
    total = leaves[0]
    for leaf in leaves[1:]:
        total = total + leaf
    return total
