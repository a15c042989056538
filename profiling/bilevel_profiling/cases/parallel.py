"""How the work of a case is split over ranks: which part of the problem each of them has."""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

import bilevel as bl
from bilevel.distributed import Ranks, data_parallel, share, split
from bilevel.space import tree


def _whole(value: Any, ranks: Ranks) -> Any:
    return value


@dataclasses.dataclass(frozen=True)
class Parallel:
    """What a rank makes of what `setup` made for one process; every rank makes the same first.

    Each part is a function `(value, ranks) -> value`; one that is left out leaves its value whole.

    Args:
        name: in the record, such as "data".
        problem: of the bl.Problem.
        batches: of the bl.Batches, those of each outer step included.
        outer: of the outer variable.
        inner: of the inner variable.
        estimator: of the estimator.

    Example:
        >>> Parallel("nothing").inner(3, Ranks())
        3
    """

    name: str
    problem: Callable[[bl.Problem, Ranks], bl.Problem] = _whole
    batches: Callable[[bl.Batches, Ranks], bl.Batches] = _whole
    outer: Callable[[Any, Ranks], Any] = _whole
    inner: Callable[[Any, Ranks], Any] = _whole
    estimator: Callable[[bl.Estimator, Ranks], bl.Estimator] = _whole


def _rows(inner: Any, ranks: Ranks) -> Any:
    """The tasks of this rank of every tensor."""

    def part(leaf: Any) -> Any:
        return leaf[share(len(leaf), ranks)] if isinstance(leaf, Tensor) else leaf

    return tree.tree_map(part, inner)


def _mean(estimator: bl.Estimator, ranks: Ranks) -> bl.Estimator:
    if not isinstance(estimator, bl.TaskMean):
        raise TypeError(f"TASKS splits the tasks of a TaskMean, and the estimator is a {type(estimator).__name__}")
    return dataclasses.replace(estimator, group=ranks)


DATA = Parallel("data", problem=data_parallel, batches=split)
"""Each rank has a part of the rows of every batch; the losses are means over rows."""
TASKS = Parallel("tasks", batches=split, inner=_rows, estimator=_mean)
"""Each rank has a part of the tasks; the estimators are means over tasks."""
