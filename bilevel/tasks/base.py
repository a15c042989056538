"""The contract of task weights: sum_i w_i g_i in place of the plain mean of the tasks' hypergradients g_i."""

import abc
import dataclasses
from typing import Any

import torch
from torch import Tensor

from bilevel._strategy import Strategy
from bilevel.outcome import readable
from bilevel.space.tree import PartialLeaves


@dataclasses.dataclass(frozen=True, eq=False)
class TaskResults:
    """What is known of the tasks of one outer step when they are weighted, all without a graph.

    Attributes:
        gradients: of each task, one entry for each outer tensor: its hypergradient, or None where nothing reached it.
        names: of the outer tensors, with dots: "parameters.0.weight"; "" for a bare tensor.
        outer_loss: f of each task, shape (T,).
        inner_loss: g of each task, shape (T,).
        task_ids: `Batches.task_ids` as a tuple, or None.
    """

    gradients: tuple[PartialLeaves, ...]
    names: tuple[str, ...]
    outer_loss: Tensor
    inner_loss: Tensor
    task_ids: tuple[Any, ...] | None

    def __len__(self) -> int:
        return len(self.gradients)


class TaskWeights(Strategy):
    """How the tasks of one outer step are weighted. A subclass is a frozen dataclass with `weigh`.

    Weights are constants: they are never differentiated.

    Example:
        Tasks with a larger outer loss count more:

        >>> import dataclasses, torch, bilevel as bl
        >>> @dataclasses.dataclass(frozen=True)
        ... class Hard(bl.TaskWeights):
        ...     def weigh(self, tasks):
        ...         return torch.softmax(tasks.outer_loss, 0)
        >>> problem = bl.Problem(lambda y, x, b: y**2, lambda y, x, b: b * y, init=lambda x, b: x)
        >>> batches = bl.Batches(inner=torch.ones(2), outer=torch.tensor([0.0, 1.0]).log1p())
        >>> hg = bl.hypergradient(problem, torch.tensor(1.0), None, batches,
        ...     solver=bl.Descent(bl.SGD(lr=0.25), steps=0), estimator=bl.TaskMean(bl.Unrolled(), weights=Hard()))
        >>> hg.stats["task_weights"]
        tensor([0.3333, 0.6667], dtype=torch.float64)
    """

    @abc.abstractmethod
    def weigh(self, tasks: TaskResults) -> Tensor:
        """A floating tensor of shape (T,) of numbers of at least 0 with the sum 1."""


def checked(owner: TaskWeights, weights: Any, tasks: TaskResults) -> Tensor:
    """The weights in float64 (float32 on Apple GPUs, which have no other), without a graph.

    Raises:
        TypeError, ValueError: they are not what is needed. (Where they are not finite, neither is the hypergradient,
            and its status says so.)
    """
    name = type(owner).__name__
    if not isinstance(weights, Tensor) or weights.shape != (len(tasks),) or not weights.is_floating_point():
        given = (
            f"a tensor of shape {tuple(weights.shape)} and dtype {weights.dtype}"
            if isinstance(weights, Tensor)
            else f"a {type(weights).__name__}"
        )
        raise ValueError(f"{name}.weigh() returned {given}; a floating tensor of shape ({len(tasks)},) was needed")
    device = tasks.outer_loss.device
    weights = weights.detach().to(device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
    own = type(owner).__module__.startswith("bilevel.")
    if own or not readable(weights) or not bool(weights.isfinite().all()):
        return weights
    if bool((weights < 0).any()) or abs(float(weights.sum()) - 1) > 1e-3:
        raise ValueError(
            f"{name}.weigh() returned {weights.tolist()}; numbers of at least 0 with the sum 1 were needed. Write "
            f"weights / weights.sum()"
        )
    return weights
