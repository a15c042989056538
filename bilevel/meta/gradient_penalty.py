"""Meta-RKHS I: what one gradient step would gain, to first order, as a loss without an inner loop.

    loss_I = L(theta) - alpha |grad L(theta)|^2,     grad loss_I = (I - 2 alpha H) grad L(theta)

One step of MAML with step size alpha, L(theta - alpha grad L), expanded to first order in alpha. For k steps write
k alpha.

| | compute | memory |
| --- | --- | --- |
| value | 1 gradient | one graph |
| gradient | 1 gradient and 1 HVP | the graph of a gradient |

For alpha above 1 / (2 lambda_max) with lambda_max the largest eigenvalue of the Hessian H, loss_I falls without bound
along an eigenvector: keep alpha below that.

Reference: Zhou et al. 2021, Meta-Learning with Neural Tangent Kernels, arXiv 2102.03909. The bound is derived here.
"""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from bilevel.engine import jacobian
from bilevel.problem import Problem
from bilevel.space import tree
from bilevel.space.tree import Tree


def gradient_penalty(loss: Callable[[Tree, Any], Tensor], alpha: float) -> Problem:
    """The problem of Meta-RKHS I: minimize the mean over tasks of L(x) - alpha |dL/dx|^2.

    An ordinary `Problem` without an inner loop to speak of: use it with `Descent(..., steps=0)` and any estimator that
    sees the start, such as Unrolled or FirstOrder, both of which are exact here, under `TaskMean`. To adapt to a task
    afterwards, take steps of step size alpha on L.

    Args:
        loss: L, called as `loss(x, batch)`; returns a 0-dim tensor. The outer batch of each task is what it sees. It
            must be twice differentiable by torch.func (no torch.autograd.grad inside).
        alpha: at least 0; the step size of the adaptation that is meant, times its steps.

    Raises:
        TypeError, ValueError: loss is no function, alpha is not a number of at least 0; (when used) the loss is not
            0-dim.

    Example:
        L = (x - a)^2 / 2 with tasks a = 1 and -1: the gradient is (1 - 2 alpha) x, that of MAML (1 - alpha)^2 x.

        >>> import torch, bilevel as bl
        >>> problem = bl.meta.gradient_penalty(lambda x, a: (x - a) ** 2 / 2, alpha=0.1)
        >>> a = torch.tensor([1.0, -1.0])
        >>> bl.hypergradient(problem, torch.tensor(1.0), None, bl.Batches(a, a),
        ...     solver=bl.Descent(bl.SGD(lr=0.1), steps=0), estimator=bl.TaskMean(bl.Unrolled())).grad
        tensor(0.8000)
    """
    if not callable(loss):
        raise TypeError(f"gradient_penalty() was given loss={loss!r}; a function loss(x, batch) was needed")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha < math.inf:
        raise ValueError(f"gradient_penalty() was given alpha={alpha!r}; a number of at least 0 was needed")

    def penalized(inner: Tree, outer: Tree, batch: Any) -> Tensor:
        if not alpha:
            return loss(inner, batch)
        value, slope = jacobian.gradient(lambda y: loss(y, batch), inner)
        squares = [leaf.square().sum() for leaf in tree.tensors(slope)]
        return value - alpha * sum(squares[1:], squares[0])

    return Problem(
        inner_loss=lambda inner, outer, batch: loss(inner, batch), outer_loss=penalized, init=lambda outer, batch: outer
    )
