"""Memory-based MAML: a moving average of adaptations per task, so that small batches of tasks and data suffice.

    u_i <- (1 - b) u_i + b y_i,    y_i = w - a grad L_i(w; S1)         (one step of descent; any K steps do)
    paper:     D = 1/B sum_i (I - a H_i(w; S2)) grad L_i(u_i; S3)
    released:  D = b/B sum_i grad L_i(u_i; S3)
    tasks that are not sampled keep u_i; with a population of n they move, too:
        sampled  u_i <- (1 - b) u_i + b (w + n/B (y_i - w)),    others  u_i <- (1 - b) u_i + b w

| form | inner gradients | outer gradients | HVPs | memory |
| --- | --- | --- | --- | --- |
| "paper", per task | K (2 K with a curvature batch) | 1 | K | K tapes (K P and one tape); n P for all u_i |
| "released", "plain", per task | K | 1 | 0 | 2 P + one graph; n P for all u_i |

Reference: Wang, Yuan, Ying and Yang, MOML, arXiv 2106.04911. The paper form is from memory; "released" is what its
code computes (the inner gradient has no graph, so that D is of first order and carries the factor b), "plain" is the
same without that factor, as in its federated code. S1 is `Batches.inner`, S2 `Batches.curvature` (None: S1), S3
`Batches.outer`. Differences: u_i begins at the first visit, at y_i, where the code begins all of them before the first
step; so nothing is run for tasks that are not met.

It is an estimator that holds the tasks itself, in the place of TaskMean, because what it carries is of all tasks ever
met, not of those of one call.
"""

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel.batches import Batches
from bilevel.estimators.base import EVERYWHERE, Estimate, Estimator, Instance
from bilevel.estimators.run import estimated
from bilevel.estimators.state import State
from bilevel.meta.moving_average import MovingAverage, Personal, check_blend
from bilevel.space import tree
from bilevel.space.tree import Tree
from bilevel.tasks.mean import TaskMean
from bilevel.tasks.rows import ByTask


@dataclasses.dataclass(frozen=True)
class Memories(State):
    """The personal models u_i, by the identity of their task.

    Example:
        >>> import torch, bilevel as bl
        >>> saved = bl.meta.Memories({"ada": torch.tensor(0.5)}).to_dict()
        >>> bl.meta.Memories.from_dict(saved).of["ada"]
        tensor(0.5000)
    """

    of: dict[Any, Tree]


@dataclasses.dataclass(frozen=True)
class MOML(Estimator):
    """The mean over tasks of hypergradients at their personal models.

    The problem is that of one task, with `init`; batches have a leading task dimension T and `task_ids`. `hg.inner` are
    the u_i of the tasks of this call, `hg.outer_loss` is the mean of f there. It stands where TaskMean does.

    Args:
        blend: b, above 0 and at most 1; 1 forgets (MAML, and FOMAML in the first-order forms).
        form: "paper", of second order; "released", of first order and times b; "plain", of first order.
        population: n, how many tasks there are in all, for the variant in which all of them move at every call; None:
            tasks that are not sampled stay. Problem.init must then not depend on the batch.
        chunk: tasks at once, as for `TaskMean`.
        on_host: keep the memories in the memory of the CPU; those of a call's tasks are moved.

    State: `Memories`. It grows with the tasks that are met; `to_dict` and `from_dict` save it.

    Bias: u_i is of older w; it vanishes where w moves slowly beside b. First-order forms leave out the curvature.

    Memory: P for every task ever met, and that of the tasks of a chunk.

    Raises:
        ValueError: an argument is out of range; (when used) the problem has no init, the batches do not name their
            tasks or name one twice, there are more tasks than the population, or a memory does not fit the problem.

    Example:
        >>> import torch, bilevel as bl
        >>> loss = lambda y, x, b: (y - b) ** 2 / 2
        >>> problem = bl.Problem(loss, loss, init=lambda x, b: x)
        >>> goal = torch.zeros(1)
        >>> hg = bl.hypergradient(problem, torch.tensor(1.0), None, bl.Batches(goal, goal, task_ids=["first"]),
        ...     solver=bl.Descent(bl.SGD(lr=0.1), steps=1), estimator=bl.meta.MOML(blend=0.5))
        >>> hg.grad, hg.state.of["first"]
        (tensor(0.8100), tensor(0.9000))
    """

    blend: float = 0.5
    form: str = "paper"
    population: int | None = None
    chunk: int | None = None
    on_host: bool = False

    def __post_init__(self) -> None:
        check_blend("MOML", self.blend, self.form)
        if self.population is not None and (
            not isinstance(self.population, int) or isinstance(self.population, bool) or self.population < 1
        ):
            raise ValueError(
                f"MOML was given population={self.population!r}; None or how many tasks there are was needed"
            )
        if not isinstance(self.on_host, bool):
            raise ValueError(f"MOML was given on_host={self.on_host!r}; True or False was needed")
        TaskMean(self._one(1), self.chunk)  # checks chunk

    def _one(self, tasks: int) -> "MovingAverage":
        stretch = None if self.population is None else self.population / tasks
        return MovingAverage(self.blend, self.form, stretch)

    sees = EVERYWHERE  # the estimator of one task is asked for its own

    @property
    def delegates(self) -> bool:
        return True

    @property
    def memory_growth(self) -> str:
        return self._one(1).memory_growth

    @property
    def bias(self) -> str:
        return self._one(1).bias

    def admit_state(self, instance: Instance, state: Any) -> Memories:
        if isinstance(state, Mapping):
            state = Memories.from_dict(state)
        if not isinstance(state, Memories) or not isinstance(state.of, dict):
            raise ValueError(
                f"MOML was given a state of type {type(state).__name__}; the Memories of its own last call were needed "
                f"(hg.state), or state=None to start afresh"
            )
        return state

    def estimate(self, instance: Instance, state: Memories | None) -> Estimate:
        if instance.problem.init is None:
            raise ValueError(
                "MOML was given a problem without init: the outer variable is where the tasks start. Write "
                "Problem(..., init=lambda outer, batch: outer)"
            )
        ids, known = identities(instance), {} if state is None else state.of
        all_tasks = known.keys() | set(ids)
        if self.population is not None and len(all_tasks) > self.population:
            raise ValueError(
                f"MOML was given population={self.population}, and has met {len(all_tasks)} tasks: "
                f"{sorted(map(repr, all_tasks.difference(known)))} are new. Raise population, or name tasks alike in "
                f"every call"
            )
        rows = self._rows(instance, ids, known)
        part = estimated(TaskMean(self._one(len(ids)), self.chunk), instance, rows)
        assert isinstance(part.state, ByTask), "the batches name their tasks"
        assert isinstance(part.state.state, Personal), "that of MovingAverage"
        models, kept = part.state.state.inner, self._unsampled(instance, known, ids)
        for row, task in enumerate(ids):
            kept[task] = self._put(tree.tree_map(lambda leaf, row=row: leaf[row].detach().clone(), models))
        return dataclasses.replace(part, state=Memories(kept))

    def _rows(self, instance: Instance, ids: tuple[Any, ...], known: Mapping[Any, Tree]) -> "Personal | None":
        """The memories of the tasks of this call, stacked; zeros for those that are new; None if all are."""
        found = [known.get(task) for task in ids]
        like = next((model for model in found if model is not None), None)
        if like is None:
            return None
        if any(_described(model) != _described(like) for model in found if model is not None):
            raise ValueError(
                f"MOML was given memories of different structures, shapes or dtypes for the tasks {list(ids)}; those "
                f"of one problem were needed. Pass state=None to start afresh"
            )
        device, zeros = tree.tensors(instance.outer)[0].device, tree.tree_map(torch.zeros_like, like)
        stacked = tree.tree_map(
            lambda *leaves: torch.stack(leaves).to(device), *(zeros if model is None else model for model in found)
        )
        return Personal(stacked, torch.tensor([model is not None for model in found], device=device))

    def _unsampled(self, instance: Instance, known: Mapping[Any, Tree], ids: tuple[Any, ...]) -> dict[Any, Tree]:
        """The memories after this call, those of its own tasks yet to be replaced."""
        if self.population is None or not known.keys() - set(ids):
            return dict(known)
        first = tree.tree_map(lambda leaf: leaf[0] if isinstance(leaf, Tensor) else leaf, instance.batches.inner_at(0))
        start = dataclasses.replace(instance, tasks=None, batches=Batches(first, None)).oracles.start()
        w = self._put(start)
        with torch.no_grad():
            return {
                task: model
                if task in ids
                else tree.tree_map(lambda u, y: (1 - self.blend) * u + self.blend * y.to(u), model, w)
                for task, model in known.items()
            }

    def _put(self, model: Tree) -> Tree:
        return tree.tree_map(lambda leaf: leaf.cpu(), model) if self.on_host else model


def _described(model: Tree) -> Any:
    return tree.names(model), [(leaf.shape, leaf.dtype) for leaf in tree.tensors(model)]


def identities(instance: Instance) -> tuple[Any, ...]:
    """The tasks of a call, each once: integers, strings, or tuples.

    Raises:
        ValueError: they are not named, one is named twice, or a name is of another kind.
    """
    given = instance.batches.task_ids
    if (
        instance.tasks is not None
        or not isinstance(given, (list, tuple, Tensor))
        or (isinstance(given, Tensor) and given.dim() != 1)
    ):
        raise ValueError(
            f"MOML was given task_ids={given!r}; it holds the tasks itself and needs their names, one for each row: "
            f"Batches(inner, outer, task_ids=[...]), and no TaskMean around it"
        )
    ids = tuple(_plain(task) for task in (given.tolist() if isinstance(given, Tensor) else given))
    twice = sorted({repr(task) for task in ids if ids.count(task) > 1})
    if twice:
        raise ValueError(f"MOML was given the task {', '.join(twice)} more than once in one call; name each row once")
    return ids


def _plain(task: Any) -> Any:
    """An identity that means the same in the next call and in a file."""
    if isinstance(task, str):
        return task
    if isinstance(task, tuple):
        return tuple(_plain(part) for part in task)
    try:
        return operator.index(task)
    except TypeError:
        raise ValueError(
            f"Batches.task_ids holds {task!r}; integers, strings or tuples of these were needed, which mean the same "
            f"in every call"
        ) from None
