"""A score over test tasks, with its interval."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from bilevel.outcome import Status, status_of, worst

Scores = tuple[list[float], list[float], list[int]]
"""Scores, losses and codes of some tasks."""


def accuracy(prediction: Tensor, target: Tensor) -> Tensor:
    """The share of rows whose largest entry is at the target.

    Args:
        prediction: scores, shape (n, classes).
        target: class numbers, an integer tensor of shape (n,).

    Raises:
        ValueError: they have other shapes or kinds.

    Example:
        >>> import torch
        >>> accuracy(torch.eye(3), torch.tensor([0, 1, 1]))
        tensor(0.6667, dtype=torch.float64)
    """
    if not isinstance(prediction, Tensor) or not isinstance(target, Tensor):
        raise ValueError("accuracy() needs a tensor of predictions and one of targets; pass score=... for other tasks")
    whole = not target.is_floating_point() and not target.is_complex()
    if prediction.dim() != 2 or target.shape != prediction.shape[:1] or not whole:
        raise ValueError(
            f"accuracy() was given predictions of shape {tuple(prediction.shape)} and targets of shape "
            f"{tuple(target.shape)} and dtype {target.dtype}; (n, classes) and n class numbers were needed. Pass "
            f"score=... for other tasks, such as score=torch.nn.functional.mse_loss"
        )
    return (prediction.argmax(1) == target).double().mean()


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `Learner.evaluate` found.

    Attributes:
        score: mean over tasks.
        interval: half the width of its 95 % confidence interval, 1.96 standard deviations over tasks / sqrt(tasks).
        loss: mean outer loss over tasks.
        tasks: how many.
        scores: of each task.
        status: the worst status of an adaptation.

    Example:
        >>> found = Evaluation.of([0.5, 0.7, 0.6], [1.0, 1.0, 1.0])
        >>> print(found)
        0.600 +- 0.113 (3 tasks)
    """

    score: float
    interval: float
    loss: float
    tasks: int
    scores: tuple[float, ...] = dataclasses.field(repr=False)
    status: Status = Status.OK

    @classmethod
    def of(
        cls,
        scores: Sequence[float],
        losses: Sequence[float],
        codes: Sequence[Tensor | int] = (),
        *,
        wanted: int | None = None,
    ) -> Self:
        """The summary of one score and one loss per task.

        Raises:
            ValueError: fewer than two tasks, or fewer than wanted.
        """
        if wanted is not None and wanted < 2:
            raise ValueError(
                f"evaluate() was given tasks={wanted}; None or at least 2 was needed, because one has no interval"
            )
        if len(scores) < max(2, wanted or 0):
            raise ValueError(
                f"evaluate() met {len(scores)} tasks; at least {max(2, wanted or 0)} were needed"
                + ("" if wanted else ", because one has no interval")
                + ". Let the loader yield more batches"
            )
        mean, deviation = _mean(scores), _deviation(scores)
        code: Any = worst(0, *codes)
        return cls(
            score=mean,
            interval=1.96 * deviation / math.sqrt(len(scores)),
            loss=_mean(losses),
            tasks=len(scores),
            scores=tuple(scores),
            status=status_of(code),
        )

    @classmethod
    def of_all(cls, parts: Sequence[Scores], *, wanted: int | None) -> Self:
        """The summary of what several processes found, `wanted` tasks or more each."""
        scores, losses, codes = ([each for part in parts for each in part[i]] for i in range(3))
        return cls.of(scores, losses, [int(code) for code in codes], wanted=wanted and wanted * len(parts))

    def __str__(self) -> str:
        failed = f", {self.status.name}" if self.status.failed else ""
        return f"{self.score:.3f} +- {self.interval:.3f} ({self.tasks} tasks{failed})"


def number(score: Any) -> float:
    """The score of one task as a number.

    Raises:
        ValueError: it is several.
    """
    if isinstance(score, Tensor) and score.numel() != 1:
        raise ValueError(
            f"the score of a task is a tensor of shape {tuple(score.shape)}; one number was needed. Reduce it with "
            f".mean()"
        )
    return float(score)


def _mean(values: Sequence[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).mean().item()


def _deviation(values: Sequence[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).std().item()
