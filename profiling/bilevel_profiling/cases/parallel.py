"""How the work of a case is split over ranks: which part of the problem each of them has."""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

import bilevel as bl
from bilevel.distributed import Ranks
from bilevel.space import tree
from bilevel_profiling.cases import standin


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
        inner: of the inner variable.
        estimator: of the estimator.

    Example:
        >>> Parallel("nothing").inner(3, Ranks())
        3
    """

    name: str
    problem: Callable[[bl.Problem, Ranks], bl.Problem] = _whole
    batches: Callable[[bl.Batches, Ranks], bl.Batches] = _whole
    inner: Callable[[Any, Ranks], Any] = _whole
    estimator: Callable[[bl.Estimator, Ranks], bl.Estimator] = _whole


def _rows(value: Any, ranks: Ranks) -> Any:
    """The rows of this rank of every tensor; the first ranks have one more where they cannot all have as many."""
    return tree.tree_map(
        lambda leaf: leaf.tensor_split(ranks.size)[ranks.rank] if isinstance(leaf, Tensor) else leaf, value
    )


def _tasks(batches: bl.Batches, ranks: Ranks) -> bl.Batches:
    return bl.Batches(_rows(batches.inner, ranks), _rows(batches.outer, ranks))


def _mean(estimator: bl.Estimator, ranks: Ranks) -> bl.Estimator:
    return dataclasses.replace(estimator, group=ranks)


TASKS = Parallel("tasks", batches=_tasks, inner=_rows, estimator=_mean)
"""Each rank has a part of the tasks; the estimators are means over tasks."""
DATA = Parallel("data", problem=standin.data_parallel, batches=standin.split)
"""Each rank has a part of the rows of every batch; the losses are means over rows."""
