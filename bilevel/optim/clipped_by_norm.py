"""The gradient clipped by its norm, then a step of another optimizer.

    n = |(g_1, ..., g_k)|  over all tensors of y;      y <- optimizer.step(min(1, limit / (n + 1e-6)) g)

| | gradients | extra memory |
| --- | --- | --- |
| step | - | P for the clipped gradient |

With tasks the norm is each task's own. The 1e-6 is torch's. At rest: that of the optimizer where it is at g = 0. With
coupled weight decay the clipped gradient, not the gradient, balances the decay, so it does not say.

Wins: inner losses with cliffs (recurrent nets); a bound on what one step, and so its derivative in the rate, can do.
Fails: while it clips, a step is of one length, and its derivative in g has lost the direction of g itself.
Reference: Pascanu, Mikolov and Bengio 2013, arXiv 1211.5063; equal to torch.nn.utils.clip_grad_norm_ in float64 to
1e-12.
Differences from peers: the derivative of the norm is there (torch's clips in place, without it), the limit may be a
function of outer, and 16-bit gradients are measured in float32.
"""

import dataclasses
from typing import Any, Self

import torch
from torch import Tensor

from bilevel.optim.base import Hyper, Optimizer, check_hyper, gradients, off, same_rest, value_of
from bilevel.space import tree
from bilevel.space.inner_product import NARROW, Space
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class ClippedByNorm(Optimizer):
    """Scales the whole gradient to a norm of at most `limit`, then lets another optimizer step.

    Args:
        optimizer: that one.
        limit: the largest norm; a positive number, or a function of outer that returns a number or a 0-dim tensor
            (whose range is not checked).
        tasks: the number of tasks of a leading dimension; `TaskMean` says it, nobody else needs to.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> clipped, y = bl.optim.ClippedByNorm(bl.SGD(lr=1.0), limit=1.0), torch.zeros(2)
        >>> clipped.step(torch.tensor([3.0, 4.0]), clipped.init(y), y, None)[0]
        tensor([-0.6000, -0.8000])
    """

    optimizer: Optimizer
    limit: Hyper
    tasks: int | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.optimizer, Optimizer):
            raise TypeError(
                f"ClippedByNorm was given the optimizer {type(self.optimizer).__name__}; an inner optimizer was "
                f"needed, such as ClippedByNorm(bilevel.SGD(lr=0.1), limit=1.0)"
            )
        check_hyper("ClippedByNorm", "limit", self.limit, 0.0)
        if off(self.limit) or not (callable(self.limit) or isinstance(self.limit, (int, float))):
            raise ValueError(
                f"ClippedByNorm was given limit={self.limit!r}; one positive number was needed, or a function of outer"
            )

    @property
    def step_limit(self) -> int | None:
        return self.optimizer.step_limit

    def over(self, tasks: int) -> Self:
        return dataclasses.replace(self, optimizer=self.optimizer.over(tasks), tasks=tasks)

    def init(self, inner: Tree) -> Any:
        return self.optimizer.init(inner)

    def step(self, grad: Tree, state: Any, inner: Tree, outer: Tree) -> tuple[Tree, Any]:
        leaves = gradients(grad, inner)
        given = [leaf for leaf in leaves if leaf is not None]
        if given:
            limit = value_of(self.limit, outer)
            if isinstance(limit, Tensor) and limit.dim():
                raise ValueError(
                    f"limit of ClippedByNorm returned a tensor of shape {tuple(limit.shape)}; a number or a 0-dim "
                    f"tensor was needed"
                )
            share = (limit / (self._norm(given) + 1e-6)).clamp(max=1.0)
            space = Space(self.tasks)
            leaves = tuple(
                leaf if leaf is None else leaf * space.per_task(share, leaf).to(leaf.dtype) for leaf in leaves
            )
        return self.optimizer.step(tree.like(inner, leaves), state, inner, outer)

    def stationarity(self, grad: Tree, inner: Tree, outer: Tree) -> Tree | None:
        return same_rest(self.optimizer.stationarity(grad, inner, outer), grad)

    def _norm(self, given: list[Tensor]) -> Tensor:
        """The norm of all tensors as one vector, per task, with derivative zero where it is zero."""
        count = 1 if self.tasks is None else self.tasks
        rows = [leaf.reshape(count, leaf.numel() // count) for leaf in given]
        rows = [row.float() if row.dtype in NARROW else row for row in rows]
        norms = torch.stack([torch.linalg.vector_norm(row, dim=1) for row in rows])
        found = torch.linalg.vector_norm(norms, dim=0)
        return found if self.tasks is not None else found.squeeze(0)
