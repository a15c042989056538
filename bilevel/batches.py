"""The data of one hypergradient: which batch an inner step sees, and which the outer loss."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from bilevel.space import tree


class PerStep:
    """One inner batch per step: step k sees `batches[k]`.

    Args:
        batches: indexable and replayable (a list, or any object with `__getitem__` and `__len__`), because estimators
            that recompute visit it again. Not a one-shot iterator.
        ragged: allow batches whose tensor shapes differ. By default they must agree, because a shorter last batch
            silently changes the weight of its examples.

    Raises:
        TypeError: `batches` is an iterator or cannot be indexed.
        ValueError: shapes differ between batches and `ragged` is False.

    Example:
        >>> import torch, bilevel as bl
        >>> len(bl.PerStep(torch.arange(12.0).reshape(6, 2).split(2)))
        3
    """

    def __init__(self, batches: Sequence[Any], *, ragged: bool = False) -> None:
        if not hasattr(batches, "__getitem__") or not hasattr(batches, "__len__"):
            raise TypeError(
                f"PerStep was given a {type(batches).__name__}, which can be read only once or has no length; "
                f"estimators that recompute visit batches again. Write PerStep(list(itertools.islice(loader, K)))."
            )
        self._batches = batches
        if not ragged and isinstance(batches, (list, tuple)):
            self._check_shapes(batches)

    @staticmethod
    def _check_shapes(batches: Sequence[Any]) -> None:
        shapes = [[tuple(leaf.shape) for leaf in tree.tensors(batch)] for batch in batches]
        for step, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise ValueError(
                    f"shapes differ between inner steps: batch {step} of PerStep has tensors of shapes {shape}, batch "
                    f"0 has {shapes[0]}. Drop the short batch (drop_last=True in a DataLoader), or pass PerStep(..., "
                    f"ragged=True) if it is meant."
                )

    def __getitem__(self, step: int) -> Any:
        return self._batches[step]

    def __len__(self) -> int:
        return len(self._batches)


@dataclasses.dataclass(frozen=True)
class Batches:
    """The data of one hypergradient.

    Args:
        inner: one batch that every inner step sees (any object: a DataLoader's list `[x, y]` is one batch), or
            `PerStep(batches)`.
        outer: the batch of the outer loss.
        curvature: the inner batch at which estimators that invert the curvature of g (Implicit, MemoryReduced) take its
            derivatives at the solution: one batch, or `PerStep`, of which they take that of the last step. None:
            `inner` itself, or the last batch of `PerStep`, which the solution has seen least of. Others differentiate
            what ran: `Unrolled` the steps, FirstOrderCorrected the loss that it perturbed. Unrolled(resampled=True)
            takes the derivatives of each step at it: one batch for all, or `PerStep` with one for each. Of a `PerStep`,
            AmIGO and StocBiO take one for each product with the Hessian.
        index: the identity of the batch (rows of a data set, an epoch and a position, ...): any object, handed on to
            whoever needs it (SABA, which keeps a table: the numbers of the inner and of the outer batch); losses do
            not see it.
        task_ids: with `TaskMean`, the identity of each task: a tensor or list of length T, sliced with the tasks.

    Example:
        >>> import bilevel as bl
        >>> bl.Batches(inner=bl.PerStep([1, 2, 3]), outer=4).inner_at(2)
        3
    """

    inner: Any
    outer: Any
    curvature: Any = None
    index: Any = None
    task_ids: Any = None

    def inner_at(self, step: int) -> Any:
        """The inner batch of a step."""
        return self.inner[step] if isinstance(self.inner, PerStep) else self.inner

    def curvature_at(self, step: int) -> Any:
        """The batch of derivatives at the point that a step ends at."""
        if self.curvature is None:
            return self.inner_at(step)
        return self.curvature[step] if isinstance(self.curvature, PerStep) else self.curvature

    def at_solution(self, steps: int) -> Any:
        """The inner batch for derivatives at the solution found after `steps` steps."""
        return self.curvature_at(max(steps - 1, 0))
