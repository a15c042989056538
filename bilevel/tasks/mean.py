"""The mean over tasks, as one problem whose inner variable has a leading task dimension.

    F(x) = 1/T sum_i f_i(y_i*(x), x)

Only the user's losses are vmapped and summed; derivatives are taken of the sum, and tasks stay independent because each
loss touches its own slice of y. So estimators need no vmap of their own. MAML with 8 tasks of a 4-conv net, K = 5: half
the memory of vmap over torch.func.grad and 1.35 times as fast.

| | compute | memory |
| --- | --- | --- |
| TaskMean(estimator, chunk=c) | T times the estimator's | c times the estimator's, plus T P for `hg.inner` |
| TaskMean(estimator, weights=w) | that, and the weights' | the estimator's, plus T P, plus T Q for gradients |

With weights the hypergradient is sum_i w_i dF_i/dx of the tasks one by one. The losses that are reported stay plain
means over tasks, so that they mean the same whatever the weights.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel.batches import Batches, PerStep
from bilevel.estimators.base import EVERYWHERE, Estimate, Estimator, Instance
from bilevel.estimators.run import estimated
from bilevel.estimators.state import State
from bilevel.outcome import worst
from bilevel.space import tree
from bilevel.space.tree import PartialLeaves, Tree
from bilevel.tasks.base import TaskResults, TaskWeights, checked


@dataclasses.dataclass(frozen=True)
class TaskMean(Estimator):
    """Mean of an estimator over a leading task dimension.

    The problem's functions are written for one task. Every tensor in the batches has a leading dimension T, and so has
    `inner`, unless the problem has an `init`, which is called for each task.

    Args:
        estimator: how the hypergradient of one task is estimated.
        chunk: tasks at once: vmap within a chunk, a loop over chunks. None for all at once; 1 for a plain loop without
            vmap, which works for losses that vmap cannot map. With `weights`, and for an estimator that asks for it
            (`one_by_one`), always one task after another.
        weights: how tasks are weighted, such as GradientSimilarity(); None for the plain mean. Weights are constants,
            and reported: `stats["task_weights"]` of shape (T,), in the order of the tasks, and
            `stats["effective_tasks"]`, 1 / sum w^2. `outer_loss` and `inner_loss` of the result are plain means.

    State: that of `estimator`, its fields per task with a leading dimension T, in the order of the tasks; with
    `Batches(task_ids=)` it goes with the tasks, in whatever order they come back.

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
    weights: TaskWeights | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.estimator, Estimator) or isinstance(self.estimator, TaskMean):
            raise TypeError(
                f"TaskMean was given {type(self.estimator).__name__}; an estimator for one task was needed, such as "
                f"TaskMean(Unrolled())"
            )
        if self.chunk is not None and (not isinstance(self.chunk, int) or self.chunk < 1):
            raise ValueError(f"TaskMean was given chunk={self.chunk!r}; None or an integer of at least 1 was needed")
        if self.weights is not None and not isinstance(self.weights, TaskWeights):
            raise TypeError(
                f"TaskMean was given weights={self.weights!r}; None or task weights such as GradientSimilarity() were "
                f"needed. For numbers write GivenWeights([...])"
            )
        if self.weights is not None and self.chunk not in (None, 1):
            raise ValueError(
                f"TaskMean was given weights and chunk={self.chunk}; weighted tasks are taken one by one, because the "
                f"gradient of each is needed. Leave chunk out, or write chunk=1"
            )

    sees = EVERYWHERE  # the estimator of one task is asked for its own

    @property
    def delegates(self) -> bool:
        return True

    @property
    def memory_growth(self) -> str:
        return self.estimator.memory_growth

    @property
    def bias(self) -> str:
        return self.estimator.bias

    def admit_state(self, instance: Instance, state: Any) -> Any:
        if isinstance(state, Mapping):
            one_task = _Rows(slice(0, 1), single=True).of_instance(instance, _count(instance, None))
            generators = one_task.oracles.generators
            before = generators.peek()
            template = self.estimator.init_state(one_task)
            generators.set(before)  # a run that goes on from what was saved draws what it would have drawn
            if template is not None and state.get("owner") == ByTask.__name__:
                return ByTask(type(template).from_dict(state["state"]), tuple(state["task_ids"]))
            return state if template is None else type(template).from_dict(state)
        if not isinstance(state, State):
            raise ValueError(
                f"TaskMean was given a state of type {type(state).__name__}; the state of its own last call was needed "
                f"(hg.state), or state=None to start afresh"
            )
        return state

    def parts(self, instance: Instance) -> list[Instance]:
        """The instance, chunk by chunk: each one problem without a task dimension, or of several tasks."""
        tasks = _count(instance, None)
        size = tasks if self.chunk is None else min(self.chunk, tasks)
        return [
            _Rows(slice(low, min(low + size, tasks)), single=size == 1).of_instance(instance, tasks)
            for low in range(0, tasks, size)
        ]

    def joined(self, parts: list[Instance], trees: list[Tree]) -> Tree:
        """Trees of the parts, such as their inner variables, as one with a leading task dimension."""
        return _join(trees, single=parts[0].tasks is None)

    @property
    def unlike_a_layer(self) -> str:
        own = "its weights are of the tasks' losses, and a layer returns the variables of all tasks"
        return self.estimator.unlike_a_layer if self.weights is None else own

    def estimate(self, instance: Instance, state: Any) -> Estimate:
        ids = _ids(instance.batches)
        state = state.rows_of(ids) if isinstance(state, ByTask) else state
        tasks = _count(instance, state)
        chunk = 1 if self.weights is not None or self.estimator.one_by_one else self.chunk
        size = tasks if chunk is None else min(chunk, tasks)
        total: PartialLeaves = (None,) * len(tree.tensors(instance.outer))
        parts: list[Estimate] = []
        gradients: list[PartialLeaves] = []
        for low in range(0, tasks, size):
            rows = _Rows(slice(low, min(low + size, tasks)), single=size == 1)
            part = estimated(self.estimator, rows.of_instance(instance, tasks), rows.of_state(state))
            state = _handed_on(state, part.state)
            if self.weights is None:
                total = tree.accumulate(total, part.grad)
            else:
                gradients.append(tuple(None if leaf is None else leaf.detach() for leaf in part.grad))
            parts.append(dataclasses.replace(part, grad=()))
        single = size == 1
        outer_loss, inner_loss = (_losses([getattr(part, name) for part in parts]) for name in _LOSSES)
        grad, figures = tuple(None if leaf is None else leaf / tasks for leaf in total), dict[str, Any]()
        if self.weights is not None:
            names = tuple(_dotted(name) for name in tree.names(instance.outer))
            results = TaskResults(tuple(gradients), names, outer_loss.detach(), inner_loss.detach(), ids)
            with torch.no_grad():
                weights = checked(self.weights, self.weights.weigh(results), results)
                grad = _weighted(gradients, weights)
                figures = {"task_weights": weights, "effective_tasks": 1 / weights.square().sum()}
        carried = _join_states([part.state for part in parts], single=single)
        return Estimate(
            grad=grad,
            inner=_join([part.inner for part in parts], single=single),
            outer_loss=outer_loss,
            inner_loss=inner_loss,
            code=worst(*(part.code for part in parts)),
            stats={"tasks": tasks, **_merge([part.stats for part in parts]), **figures},
            state=carried if carried is None or ids is None else ByTask(carried, ids),
            next_inner=None
            if parts[0].next_inner is None
            else _join([part.next_inner for part in parts], single=single),
            unused=frozenset.intersection(*(part.unused for part in parts)),
        )


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
            for field in _per_task_fields(self.state)
        }
        return dataclasses.replace(self.state, **fields)


def _ids(batches: Batches) -> tuple[Any, ...] | None:
    ids = batches.task_ids
    return None if ids is None else tuple(ids.tolist() if isinstance(ids, Tensor) else ids)


def _count(instance: Instance, state: State | None) -> int:
    """T, from the leading dimensions of the batches, inner and state, which must agree."""
    batches, found = instance.batches, dict[str, list[int]]()
    for name, value in (
        ("Batches.inner", batches.inner_at(0)),
        ("Batches.outer", batches.outer),
        ("Batches.curvature", None if batches.curvature is None else batches.curvature_at(0)),
        ("inner", instance.inner),
        ("state", None if state is None else [getattr(state, field.name) for field in _per_task_fields(state)]),
    ):
        if tree.tensors(value):
            found[name] = sorted({leaf.shape[0] if leaf.dim() else 0 for leaf in tree.tensors(value)})
    if batches.task_ids is not None:
        found["Batches.task_ids"] = [len(batches.task_ids)]
    sizes = {size for group in found.values() for size in group}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"TaskMean needs one leading task dimension T on every tensor; leading sizes found: {found}. Stack the "
            f"tasks' batches with torch.stack, and start every task alike with inner = {{name: y.expand(T, *y.shape) "
            f"for name, y in inner.items()}}"
        )
    return sizes.pop()


def _handed_on(state: State | None, after: State | None) -> State | None:
    """The state with the fields that tasks share as a chunk left them."""
    if state is None or after is None:
        return state
    shared = [field.name for field in dataclasses.fields(state) if not field.metadata.get("per_task")]
    return dataclasses.replace(state, **{name: getattr(after, name) for name in shared})


def _per_task_fields(state: State) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(state) if field.metadata.get("per_task")]


@dataclasses.dataclass(frozen=True)
class _Rows:
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
            state, **{field.name: self.of(getattr(state, field.name)) for field in _per_task_fields(state)}
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

    def __init__(self, steps: PerStep, rows: _Rows, total: int) -> None:
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


_LOSSES = ("outer_loss", "inner_loss")


def _dotted(name: str) -> str:
    """A name such as "['parameters']['0.weight']" as parameters.0.weight."""
    return ".".join(next(filter(None, found)) for found in re.findall(r"\['([^']*)'\]|\[(\d+)\]|\.(\w+)", name))


def _weighted(gradients: list[PartialLeaves], weights: Tensor) -> PartialLeaves:
    """sum_i w_i g_i, where None is zero."""
    total: PartialLeaves = (None,) * len(gradients[0])
    for gradient, weight in zip(gradients, weights, strict=True):
        scaled = tuple(None if leaf is None else leaf * weight.to(leaf.dtype) for leaf in gradient)
        total = tree.accumulate(total, scaled)
    return total


def _losses(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def _join(trees: list[Tree], *, single: bool) -> Tree:
    if single:
        return tree.tree_map(lambda *leaves: torch.stack(leaves), *trees)
    return trees[0] if len(trees) == 1 else tree.tree_map(lambda *leaves: torch.cat(leaves), *trees)


def _join_states(states: list[State | None], *, single: bool) -> State | None:
    first = states[0]
    if first is None:
        return None
    fields = {
        field.name: _join([getattr(state, field.name) for state in states], single=single)
        for field in _per_task_fields(first)
    }
    # Shared fields were handed from chunk to chunk: the last has seen all.
    return dataclasses.replace(states[-1] or first, **fields)


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
