"""Task weights from the similarity of the tasks' gradients, and given ones.

    gbar = 1/T sum_i g_i     s_i = cos(g_i, gbar)     w = softmax(s / temperature), or max(s, 0) / sum max(s, 0)

Our reading of the abstract of Park and Kang, arXiv 2411.00404 (O-AMFS), whose formulas are not public to us: tasks
whose gradients conflict with the others count less. That may suppress rare tasks that matter: watch
`stats["effective_tasks"]`, 1 / sum w^2.

| | compute | memory |
| --- | --- | --- |
| GradientSimilarity() | 2 T inner products of Q numbers | T Q numbers more |
| GradientSimilarity(pairwise=True) | T^2 / 2 inner products | T Q numbers more |
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.space.inner_product import PLAIN, Leaves
from bilevel.tasks.base import TaskResults, TaskWeights


@dataclasses.dataclass(frozen=True)
class GradientSimilarity(TaskWeights):
    """Weights that grow with the cosine between a task's hypergradient and those of all tasks.

    A gradient of zero is similar to nothing: its cosine is 0.

    Args:
        temperature: of the softmax over the cosines, positive; math.inf for the plain mean. None for rectified cosines
            in place of a softmax: the weights are max(cosine, 0), normalized (plain if no cosine is positive), so that
            tasks that point away from the mean are left out.
        pairwise: take the mean of the cosines with each other task in place of the cosine with the mean gradient, which
            one task with a large gradient draws to itself.
        over: the outer tensors that enter the cosines: names or prefixes up to a dot, with dots between the levels of x
            ("parameters.17"), or a function of the name; None for all.

    Raises:
        ValueError: the temperature is not positive; (when used) `over` selects no outer tensor.

    Example:
        Three tasks that agree and one against them (papers.md 4.5 f):

        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: y**2, lambda y, x, b: b * y, init=lambda x, b: x)
        >>> batches = bl.Batches(inner=torch.ones(4), outer=torch.tensor([1.0, 1.0, 1.0, -1.0]))
        >>> hg = bl.hypergradient(problem, torch.tensor(0.0), None, batches,
        ...     solver=bl.Descent(bl.SGD(lr=0.25), steps=1),
        ...     estimator=bl.TaskMean(bl.Unrolled(), weights=bl.GradientSimilarity(temperature=1.0)))
        >>> hg.stats["task_weights"], hg.stats["effective_tasks"]
        (tensor([0.3189, 0.3189, 0.3189, 0.0432], dtype=torch.float64), tensor(3.2569, dtype=torch.float64))
    """

    temperature: float | None = 1.0
    pairwise: bool = False
    over: str | Collection[str] | Callable[[str], bool] | None = None

    def __post_init__(self) -> None:
        value = self.temperature
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0):
            raise ValueError(
                f"GradientSimilarity was given temperature={value!r}; a positive number was needed (math.inf weights "
                f"all tasks alike), or None for rectified cosines"
            )

    def weigh(self, tasks: TaskResults) -> Tensor:
        gradients = self._chosen(tasks)
        similarity = _to_others(gradients) if self.pairwise else _to_mean(gradients)
        if self.temperature is not None:
            return torch.softmax(similarity / self.temperature, 0)
        positive = similarity.clamp_min(0)
        total = positive.sum()
        return torch.where(total > 0, positive / torch.where(total > 0, total, 1.0), 1 / len(tasks)) + 0 * similarity

    def _chosen(self, tasks: TaskResults) -> list[Leaves]:
        """The gradients in the tensors of `over`, with zeros where nothing reached one."""
        chosen = [i for i, name in enumerate(tasks.names) if self._selects(name)]
        if not chosen:
            raise ValueError(
                f"GradientSimilarity was given over={self.over!r}, which selects none of the outer tensors "
                f"{list(tasks.names)}"
            )
        like = [next((task[i] for task in tasks.gradients if task[i] is not None), None) for i in chosen]
        device = tasks.outer_loss.device
        zero = [torch.zeros(1, device=device) if leaf is None else torch.zeros_like(leaf) for leaf in like]
        return [
            tuple(other if (leaf := task[i]) is None else leaf for i, other in zip(chosen, zero, strict=True))
            for task in tasks.gradients
        ]

    def _selects(self, name: str) -> bool:
        if self.over is None:
            return True
        if callable(self.over):
            return bool(self.over(name))
        entries = [self.over] if isinstance(self.over, str) else self.over
        return any(name == entry or name.startswith(entry.rstrip(".") + ".") for entry in entries)


def _to_mean(gradients: list[Leaves]) -> Tensor:
    """The cosine of each gradient and their mean, in the dtype of norms."""
    sizes = [PLAIN.norm(gradient) for gradient in gradients]
    # Divided by the largest first, so that nothing overflows; a cosine does not see it.
    scale = torch.stack(sizes).amax() * len(gradients)
    total = _unit(gradients[0], scale)
    for gradient in gradients[1:]:
        total = PLAIN.axpy(1.0, _unit(gradient, scale), total)
    mean = _unit(total, PLAIN.norm(total))
    cosines = [PLAIN.dot(_unit(gradient, size), mean) for gradient, size in zip(gradients, sizes, strict=True)]
    return torch.stack(cosines).to(scale.dtype)


def _to_others(gradients: list[Leaves]) -> Tensor:
    """The mean cosine of each gradient with the others, in the dtype of norms; 1 for a task that is alone."""
    sizes = [PLAIN.norm(gradient) for gradient in gradients]
    units = [_unit(gradient, size) for gradient, size in zip(gradients, sizes, strict=True)]
    count = len(units)
    cosines = sizes[0].new_zeros(count, count)
    for i, one in enumerate(units):
        for j in range(i):
            cosines[i, j] = cosines[j, i] = PLAIN.dot(one, units[j]).to(cosines.dtype)
    return cosines.sum(1) / (count - 1) if count > 1 else torch.ones_like(cosines[0])


def _unit(gradient: Leaves, size: Tensor) -> Leaves:
    # In the norm's own dtype: a small norm has no reciprocal in a narrow one.
    size = torch.where(size == 0, 1.0, size)
    return tuple((leaf.to(size.dtype) / size).to(leaf.dtype) for leaf in gradient)


@dataclasses.dataclass(frozen=True)
class GivenWeights(TaskWeights):
    """Weights that are known beforehand, normalized to the sum 1 over the tasks of each outer step.

    Args:
        weights: T numbers of at least 0, or a mapping from `Batches.task_ids` to such numbers.

    Raises:
        ValueError: a number is negative or not finite, or all are 0; (when used) there are not T of them, a task is
            not in the mapping, or the tasks of a step have the weight 0 altogether.

    Example:
        >>> import bilevel as bl
        >>> bl.GivenWeights([1, 1, 2]).weights
        (1.0, 1.0, 2.0)
    """

    weights: Sequence[float] | Tensor | Mapping[Any, float]

    def __post_init__(self) -> None:
        given = self.weights
        if isinstance(given, Mapping):
            fixed: Any = {task: float(weight) for task, weight in given.items()}
            numbers = list(fixed.values())
        else:
            numbers = given.detach().double().reshape(-1).tolist() if isinstance(given, Tensor) else list(given)
            fixed = tuple(float(number) for number in numbers)
        if not all(0 <= number < math.inf for number in numbers) or not sum(numbers) > 0:
            raise ValueError(
                f"GivenWeights was given {given!r}; finite numbers of at least 0 were needed, one of them above 0"
            )
        object.__setattr__(self, "weights", fixed)

    def weigh(self, tasks: TaskResults) -> Tensor:
        numbers = self._of_ids(self.weights, tasks) if isinstance(self.weights, Mapping) else self.weights
        if len(numbers) != len(tasks):
            raise ValueError(
                f"GivenWeights holds {len(numbers)} weights, and there are {len(tasks)} tasks; one each was needed, or "
                f"a mapping from Batches.task_ids to weights"
            )
        total = math.fsum(numbers)
        if not total > 0:
            raise ValueError("GivenWeights holds the weight 0 for every task of this step; one above 0 was needed")
        return torch.tensor([number / total for number in numbers], dtype=torch.float64)

    def _of_ids(self, known: Mapping[Any, float], tasks: TaskResults) -> list[float]:
        missing = [task for task in tasks.task_ids or () if task not in known]
        if tasks.task_ids is None or missing:
            found = "no task_ids" if tasks.task_ids is None else f"the tasks {missing}, which are not among its keys"
            raise ValueError(
                f"GivenWeights holds weights by task id, and Batches has {found}; write Batches(..., task_ids=...) "
                f"with ids of {list(known)}"
            )
        return [known[task] for task in tasks.task_ids]
