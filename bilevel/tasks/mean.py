"""The mean over tasks, as one problem whose inner variable has a leading task dimension.

    F(x) = 1/T sum_i f_i(y_i*(x), x)

Only the user's losses are vmapped and summed; derivatives are taken of the sum, and tasks stay independent because each
loss touches its own slice of y. So estimators need no vmap of their own. MAML with 8 tasks of a 4-conv net, K = 5: half
the memory of vmap over torch.func.grad and 1.35 times as fast.

| | compute | memory |
| --- | --- | --- |
| TaskMean(estimator, chunk=c) | T times the estimator's | c times the estimator's, plus T P for the adapted inner variables |
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bilevel.batches import Batches, PerStep
from bilevel.estimators.base import Estimate, Estimator, Instance
from bilevel.outcome import worst
from bilevel.space import tree
from bilevel.space.tree import PartialLeaves, Tree


@dataclasses.dataclass(frozen=True)
class TaskMean(Estimator):
    """Mean of an estimator over a leading task dimension.

    The problem's functions are written for one task. Every tensor in the batches has a leading dimension T, and so has
    `inner`, unless the problem has an `init`, which is called for each task.

    Args:
        estimator: how the hypergradient of one task is estimated.
        chunk: tasks at once: vmap within a chunk, a loop over chunks. None for all at once; 1 for a plain loop without
            vmap, which works for losses that vmap cannot map.

    Memory: that of `estimator` times `chunk`, plus T P for `hg.inner`.

    Raises:
        TypeError, ValueError: the arguments are of the wrong kind, or (when used) the leading dimensions disagree.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: (y - b) ** 2, lambda y, x, b: (y - b) ** 2, init=lambda x, b: x)
        >>> tasks = bl.Batches(inner=torch.tensor([0.0, 1.0, 2.0]), outer=torch.tensor([0.0, 1.0, 2.0]))
        >>> hg = bl.hypergradient(problem, torch.tensor(3.0), None, tasks, solver=bl.Descent(bl.SGD(lr=0.25), steps=1),
        ...     estimator=bl.TaskMean(bl.Unrolled()))
        >>> hg.grad, hg.inner
        (tensor(1.), tensor([1.5000, 2.0000, 2.5000]))
    """

    estimator: Estimator
    chunk: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.estimator, Estimator) or isinstance(self.estimator, TaskMean):
            raise TypeError(
                f"TaskMean was given {type(self.estimator).__name__}; an estimator for one task was needed, such as "
                f"TaskMean(Unrolled())"
            )
        if self.chunk is not None and (not isinstance(self.chunk, int) or self.chunk < 1):
            raise ValueError(f"TaskMean was given chunk={self.chunk!r}; None or an integer of at least 1 was needed")

    @property
    def memory_growth(self) -> str:
        return self.estimator.memory_growth

    @property
    def bias(self) -> str:
        return self.estimator.bias

    def estimate(self, instance: Instance, state: Any) -> Estimate:
        tasks = _count(instance, state)
        size = tasks if self.chunk is None else min(self.chunk, tasks)
        total: PartialLeaves = (None,) * len(tree.tensors(instance.outer))
        parts: list[Estimate] = []
        for low in range(0, tasks, size):
            rows = slice(low, min(low + size, tasks))
            part = self.estimator.estimate(
                _take(instance, rows, single=size == 1), _rows(state, rows, single=size == 1)
            )
            total = tree.accumulate(total, part.grad)
            parts.append(dataclasses.replace(part, grad=()))
        return Estimate(
            grad=tuple(None if leaf is None else leaf / tasks for leaf in total),
            inner=_join([part.inner for part in parts], single=size == 1),
            outer_loss=torch.stack([part.outer_loss for part in parts]).sum() / tasks,
            inner_loss=torch.stack([part.inner_loss for part in parts]).sum() / tasks,
            code=worst(*(part.code for part in parts)),
            stats={"tasks": tasks, **_merge([part.stats for part in parts])},
            state=None if parts[0].state is None else _join([part.state for part in parts], single=size == 1),
        )


def _count(instance: Instance, state: Any) -> int:
    """T, from the leading dimensions of the batches, inner and state, which must agree."""
    inner_batches = instance.batches.inner
    first = inner_batches[0] if isinstance(inner_batches, PerStep) else inner_batches
    found = {
        name: sorted({leaf.shape[0] if leaf.dim() else 0 for leaf in tree.tensors(value)})
        for name, value in (
            ("Batches.inner", first),
            ("Batches.outer", instance.batches.outer),
            ("Batches.curvature", instance.batches.curvature),
            ("inner", instance.inner),
            ("state", state),
        )
        if tree.tensors(value)
    }
    sizes = {size for group in found.values() for size in group}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"TaskMean needs one leading task dimension T on every tensor; leading sizes found: {found}. Stack the "
            f"tasks' batches with torch.stack, and start every task alike with inner = "
            f"{{name: y.expand(T, *y.shape) for name, y in inner.items()}}"
        )
    return sizes.pop()


def _rows(value: Tree, rows: slice, *, single: bool) -> Tree:
    def take(leaf: Any) -> Any:
        return (leaf[rows.start] if single else leaf[rows]) if isinstance(leaf, Tensor) else leaf

    return None if value is None else tree.tree_map(take, value)


class _TaskSteps(PerStep):
    """The rows of each step's batch, taken when asked for."""

    def __init__(self, steps: PerStep, rows: slice, *, single: bool) -> None:
        self._steps, self._rows, self._single = steps, rows, single

    def __getitem__(self, step: int) -> Any:
        batch = self._steps[step]
        for leaf in tree.tensors(batch):
            if leaf.dim() == 0 or leaf.shape[0] < self._rows.stop:
                raise ValueError(
                    f"batch {step} of PerStep has a tensor of shape {tuple(leaf.shape)}; a leading task dimension like "
                    f"that of batch 0 was needed"
                )
        return _rows(batch, self._rows, single=self._single)

    def __len__(self) -> int:
        return len(self._steps)


def _take(instance: Instance, rows: slice, *, single: bool) -> Instance:
    batches = instance.batches
    inner = (
        _TaskSteps(batches.inner, rows, single=single)
        if isinstance(batches.inner, PerStep)
        else _rows(batches.inner, rows, single=single)
    )
    taken = Batches(inner, _rows(batches.outer, rows, single=single), _rows(batches.curvature, rows, single=single))
    problem = dataclasses.replace(instance.problem, tasks=None if single else rows.stop - rows.start)
    return dataclasses.replace(
        instance, problem=problem, inner=_rows(instance.inner, rows, single=single), batches=taken
    )


def _join(trees: list[Tree], *, single: bool) -> Tree:
    if single:
        return tree.tree_map(lambda *leaves: torch.stack(leaves), *trees)
    return trees[0] if len(trees) == 1 else tree.tree_map(lambda *leaves: torch.cat(leaves), *trees)


def _merge(stats: list[dict[str, Any]]) -> dict[str, Any]:
    """Per-task tensors are joined; numbers that all chunks share stay as they are, others become a list."""
    merged: dict[str, Any] = {}
    for name in stats[0]:
        values = [entry[name] for entry in stats]
        if all(isinstance(value, Tensor) for value in values) and any(value.dim() for value in values):
            merged[name] = torch.cat([value.reshape(-1) for value in values])
        elif all(isinstance(value, Tensor) for value in values):
            merged[name] = torch.stack(values) if len(values) > 1 else values[0]
        else:
            merged[name] = values[0] if all(value == values[0] for value in values) else values
    return merged
