"""Kernel ridge regression: the weights of n examples, in one step.

    (K(x) + lam I) a = t        g = a' (K + lam I) a / 2 - a' t        predictions k(., X) a

| | cost | memory |
| --- | --- | --- |
| step | n^3 / 3 in float64; 2 inner gradients for the check | n^2 per task |

Wins: few examples and any number of features; kernels whose parameters are outer variables.
Fails: n in the tens of thousands.
Reference: Saunders, Gammerman and Vovk 1998 (recalled). As a head that adapts to tasks see `bilevel.meta.KernelRidge`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel.inner.closed_form.base import check_flag, check_function, check_landed
from bilevel.inner.dynamics import Dynamics, Point
from bilevel.optim.base import value_of
from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class KernelRidge(Dynamics):
    """Solve a kernel ridge regression for its weights a, of shape (n,) or (n, c), per task.

    The inner variable is one tensor, a. `loss` is an inner loss whose minimizer it is; any other with the same one,
    such as |t - K a|^2 / 2 + lam a'Ka / 2, will do. Estimators at the solution solve with its second derivative:
    K + lam of `loss`, K (K + lam) of the other, which is singular where K is.

    Args:
        kernel: K of shape (n, n), symmetric, called as `kernel(outer, batch)` for one task.
        targets: t, called as `targets(outer, batch)`.
        regularizer: lam, positive: a number, or a function of outer that returns one or a 0-dim tensor.
        check: hold every step against the inner loss.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range; (when used) shapes do not fit, or the
            inner loss is another. A matrix that is not positive definite gives NaN, and so Status.DIVERGED.

    Example:
        >>> import torch, bilevel as bl
        >>> def kernel(x, b):
        ...     return torch.exp(-x * (b[:, None] - b) ** 2)
        >>> machine = bl.inner.KernelRidge(kernel, targets=lambda x, b: b.sin(), regularizer=0.1)
        >>> problem = bl.Problem(machine.loss, lambda a, x, b: a.square().sum())
        >>> hg = bl.hypergradient(problem, torch.tensor(1.0), torch.zeros(3), bl.Batches(torch.arange(3.0), None),
        ...     solver=bl.Descent(machine, steps=1), estimator=bl.Implicit(bl.CG(5)))
        >>> hg.inner, hg.status.name
        (tensor([-0.2217,  0.6321,  0.6189]), 'OK')
    """

    kernel: Callable[[Tree, Any], Tensor]
    targets: Callable[[Tree, Any], Tensor]
    regularizer: float | Callable[[Tree], Any]
    check: bool = True

    def __post_init__(self) -> None:
        check_function("KernelRidge", "kernel", self.kernel)
        check_function("KernelRidge", "targets", self.targets)
        lam = self.regularizer
        if not callable(lam) and (not isinstance(lam, (int, float)) or isinstance(lam, bool) or not 0 < lam < 1e300):
            raise ValueError(
                f"KernelRidge was given regularizer={lam!r}; a positive number, or a function of outer, was needed"
            )
        check_flag("KernelRidge", self.check)

    @property
    def symmetric(self) -> bool:
        return True

    @property
    def autonomous(self) -> bool:
        return True

    def loss(self, inner: Tensor, outer: Tree, batch: Any) -> Tensor:
        """a'(K + lam I) a / 2 - a't: an inner loss with this solution."""
        matrix, targets = self._system(inner, outer, batch)
        return (inner * (matrix @ inner / 2 - targets)).sum()

    def step(self, inner: Tree, state: Any, outer: Tree, at: Point) -> tuple[Tree, Any]:
        if len(tree.tensors(inner)) != 1:
            raise ValueError("KernelRidge was given an inner variable of several tensors; one was needed, the weights")
        moved = at.apply(self._solved, inner)
        if self.check:
            check_landed("KernelRidge", moved, at)
        return moved, state

    def stationarity(self, inner: Tree, outer: Tree, at: Point) -> Tree | None:
        return at.gradient(inner)

    def _system(self, inner: Tensor, outer: Tree, batch: Any) -> tuple[Tensor, Tensor]:
        """K + lam I and t, for one task."""
        kernel, targets = self.kernel(outer, batch), self.targets(outer, batch)
        if kernel.shape != (len(inner), len(inner)) or targets.shape != inner.shape:
            raise ValueError(
                f"KernelRidge was given a kernel of shape {tuple(kernel.shape)} and targets of shape "
                f"{tuple(targets.shape)} for weights of shape {tuple(inner.shape)} for one task; (n, n), and the shape "
                f"of the weights, (n,) or (n, c), were needed"
            )
        eye = torch.eye(len(inner), dtype=kernel.dtype, device=kernel.device)
        return kernel + value_of(self.regularizer, outer) * eye, targets

    def _solved(self, inner: Tree, outer: Tree, batch: Any) -> Tree:
        (a,) = tree.tensors(inner)
        matrix, targets = self._system(a, outer, batch)
        wide = torch.float32 if a.device.type == "mps" else torch.float64
        factor, info = torch.linalg.cholesky_ex(matrix.to(wide))
        solved = torch.cholesky_solve(targets.to(wide).reshape(len(a), -1), factor).reshape(a.shape)
        return tree.like(inner, [torch.where(info == 0, solved, torch.nan).to(a.dtype)])
