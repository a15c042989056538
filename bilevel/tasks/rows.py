"""Tasks by rows: some of a whole, and wholes made of some.

Every tensor has a leading task dimension. A state says by its fields which of them have one.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bilevel.batches import Batches, PerStep
from bilevel.estimators.base import Instance
from bilevel.estimators.state import State
from bilevel.space import tree
from bilevel.space.tree import PartialLeaves, Tree


@dataclasses.dataclass(frozen=True)
class ByTask(State):
    """A state and the identities of the tasks that its rows belong to, for batches that say which those are."""

    state: State
    task_ids: tuple[Any, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"owner": type(self).__name__, "state": self.state.to_dict(), "task_ids": list(self.task_ids)}

    def rows_of(self, task_ids: tuple[Any, ...] | None) -> State:
        """The state with its rows in the order of these tasks.

        Raises:
            ValueError: they are others.
        """
        if task_ids is None or set(task_ids) != set(self.task_ids) or len(task_ids) != len(self.task_ids):
            raise ValueError(
                f"TaskMean was given a state of the tasks {list(self.task_ids)} and batches of the tasks "
                f"{None if task_ids is None else list(task_ids)}; the same tasks were needed, in any order. Pass "
                f"state=None to start afresh, or Batches(task_ids=...) as in the call that made the state"
            )
        order = torch.tensor([self.task_ids.index(task) for task in task_ids])
        fields = {
            field.name: tree.tree_map(
                lambda leaf: leaf[order.to(leaf.device)] if isinstance(leaf, Tensor) else leaf,
                getattr(self.state, field.name),
            )
            for field in per_task_fields(self.state)
        }
        return dataclasses.replace(self.state, **fields)


@dataclasses.dataclass(frozen=True)
class Tasks:
    """What some tasks came to, detached: `grads` is one sum over them, or with `each` an entry for each."""

    count: int
    each: bool
    grads: tuple[PartialLeaves, ...]
    inner: Tree
    next_inner: Tree | None
    outer_loss: Tensor
    inner_loss: Tensor
    code: Tensor
    stats: list[dict[str, Any]]
    unused: frozenset[int]
    state: State | None
    ids: tuple[Any, ...] | None


def no_tasks(instance: Instance, state: State | None, *, each: bool) -> Tasks:
    """What no task comes to."""
    xs = tree.tensors(instance.outer)
    nothing, everything = xs[0].new_zeros(0), frozenset(range(len(xs)))
    code = torch.zeros((), dtype=torch.long, device=xs[0].device)
    ids = ids_of(instance.batches)
    return Tasks(0, each, (), instance.inner, None, nothing, nothing, code, [], everything, state, ids)


def ids_of(batches: Batches) -> tuple[Any, ...] | None:
    """The identities of the tasks."""
    ids = batches.task_ids
    return None if ids is None else tuple(ids.tolist() if isinstance(ids, Tensor) else ids)


def count(instance: Instance, state: State | None, *, least: int = 1) -> int:
    """T, from the leading dimensions of the batches, inner and state, which must agree."""
    batches, found, bare = instance.batches, dict[str, list[int]](), False
    for name, value in (
        ("Batches.inner", batches.inner_at(0)),
        ("Batches.outer", batches.outer),
        ("Batches.curvature", None if batches.curvature is None else batches.curvature_at(0)),
        ("inner", instance.inner),
        ("state", None if state is None else [getattr(state, field.name) for field in per_task_fields(state)]),
    ):
        if tree.tensors(value):
            found[name] = sorted({leaf.shape[0] if leaf.dim() else 0 for leaf in tree.tensors(value)})
            bare = bare or any(leaf.dim() == 0 for leaf in tree.tensors(value))
    if batches.task_ids is not None:
        found["Batches.task_ids"] = [len(batches.task_ids)]
    sizes = {size for group in found.values() for size in group}
    if len(sizes) != 1 or bare or min(sizes) < least:
        raise ValueError(
            f"TaskMean needs one leading task dimension T on every tensor; leading sizes found: {found}. Stack the "
            f"tasks' batches with torch.stack, and start every task alike with inner = {{name: y.expand(T, *y.shape) "
            f"for name, y in inner.items()}}"
            + (". With a group these are the rank's own tasks, and so are those of its inner and state" * (least == 0))
        )
    return sizes.pop()


def shared_fields(state: Any) -> dict[str, Any]:
    """The fields of a state that are everyone's, by name."""
    if state is None:
        return {}
    shared = [field.name for field in dataclasses.fields(state) if not field.metadata.get("per_task")]
    return {name: getattr(state, name) for name in shared}


def handed_on(state: State | None, after: State | None) -> State | None:
    """The state with the fields that tasks share as a chunk left them."""
    if state is None or after is None:
        return state
    return dataclasses.replace(state, **{name: getattr(after, name) for name in shared_fields(state)})


def per_task_fields(state: State) -> list[dataclasses.Field[Any]]:
    """The fields of a state that have a leading task dimension."""
    return [field for field in dataclasses.fields(state) if field.metadata.get("per_task")]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Some tasks of a whole: a slice of the leading dimension, or the one task itself, without that dimension."""

    rows: slice
    single: bool

    def of(self, value: Tree) -> Tree:
        """The rows of every tensor."""

        def take(leaf: Any) -> Any:
            return (leaf[self.rows.start] if self.single else leaf[self.rows]) if isinstance(leaf, Tensor) else leaf

        return None if value is None else tree.tree_map(take, value)

    def of_state(self, state: State | None) -> State | None:
        """The rows of a state's fields per task; shared fields are everyone's."""
        if state is None:
            return None
        return dataclasses.replace(
            state, **{field.name: self.of(getattr(state, field.name)) for field in per_task_fields(state)}
        )

    def of_batches(self, batch: Any, total: int) -> Any:
        """The rows of a batch, or of each step's when asked for."""
        return _TaskSteps(batch, self, total) if isinstance(batch, PerStep) else self.of(batch)

    def of_instance(self, instance: Instance, total: int) -> Instance:
        """The problem of these tasks, of `total`."""
        batches, ids = instance.batches, instance.batches.task_ids
        tasks = self.rows.stop - self.rows.start
        taken = Batches(
            inner=self.of_batches(batches.inner, total),
            outer=self.of(batches.outer),
            curvature=self.of_batches(batches.curvature, total),
            index=batches.index,
            task_ids=ids if ids is None else ids[self.rows.start] if self.single else ids[self.rows],
        )
        return dataclasses.replace(
            instance, tasks=None if self.single else tasks, inner=self.of(instance.inner), batches=taken
        )


class _TaskSteps(PerStep):
    """The rows of each step's batch, taken when asked for."""

    def __init__(self, steps: PerStep, rows: Rows, total: int) -> None:
        self._steps, self._rows, self._total = steps, rows, total

    def __getitem__(self, step: int) -> Any:
        batch = self._steps[step]
        for leaf in tree.tensors(batch):
            if leaf.dim() == 0 or leaf.shape[0] != self._total:
                raise ValueError(
                    f"batch {step} of PerStep has a tensor of shape {tuple(leaf.shape)}; a leading task dimension of "
                    f"{self._total}, like that of batch 0, was needed"
                )
        return self._rows.of(batch)

    def __len__(self) -> int:
        return len(self._steps)


def losses(parts: list[Tensor]) -> Tensor:
    """The losses of all parts, of shape (T,)."""
    return torch.cat([part.reshape(-1) for part in parts])


def join(trees: list[Tree], *, single: bool) -> Tree:
    """Trees of parts as one with a leading task dimension; `single`: the parts are tasks without one."""
    if single:
        return tree.tree_map(lambda *leaves: torch.stack(leaves), *trees)
    return trees[0] if len(trees) == 1 else tree.tree_map(lambda *leaves: torch.cat(leaves), *trees)


def join_states(states: list[State | None], *, single: bool) -> State | None:
    """Likewise for states."""
    first = states[0]
    if first is None:
        return None
    fields = {
        field.name: join([getattr(state, field.name) for state in states], single=single)
        for field in per_task_fields(first)
    }
    # Shared fields were handed from chunk to chunk: the last has seen all.
    return dataclasses.replace(states[-1] or first, **fields)


def merge(stats: list[dict[str, Any]]) -> dict[str, Any]:
    """Per-task tensors are joined; numbers that all chunks share stay as they are, others become a list."""
    merged: dict[str, Any] = {}
    for name in stats[0]:
        values = [entry[name] for entry in stats if name in entry]
        if all(isinstance(value, Tensor) for value in values) and any(value.dim() for value in values):
            merged[name] = torch.cat([value.reshape(-1) for value in values])
        elif all(isinstance(value, Tensor) for value in values):
            merged[name] = torch.stack(values) if len(values) > 1 else values[0]
        else:
            merged[name] = values[0] if all(value == values[0] for value in values) else values
    return merged
