"""The lasso's penalty h = sum_i lambda_i |y_i|, whose proximal operator is soft thresholding.

    prox_{c h}(v) = sign(v) max(|v| - c lambda, 0)

On the active set S (y_i not 0), for g = |A y - b|^2 / 2:  dy_S/dlambda = -(A_S' A_S)^{-1} sign(y_S); elsewhere zero.

Reference: Tibshirani 1996; hypergradients on the active set: Bertrand et al. 2020, arXiv 2002.08943 (recalled).
"""

import dataclasses
from typing import Any

from torch import Tensor

from bilevel.inner.proximal.base import Prox, check_penalty, leafwise, strength, total
from bilevel.optim.base import Hyper
from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class L1(Prox):
    """Soft thresholding. At a tie, |v_i| = c lambda_i, the coordinate counts as held at zero.

    Args:
        penalty: lambda, at least 0: a number, a tree like the inner variable of one task, or a function of outer that
            returns one of both, a 0-dim tensor, or tensors that broadcast. A negative one that a function returns gives
            NaN, and so a failed status.

    Raises:
        ValueError: the penalty is negative.

    Example:
        The hypergradient of a lasso in its penalty.

        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: ((y - b) ** 2).sum() / 2, lambda y, x, b: (y**2).sum() / 2)
        >>> lasso = bl.inner.ProximalGradient(bl.inner.proximal.L1(lambda x: x.exp()), rate=0.5)
        >>> b = torch.tensor([3.0, 0.5, -2.0])
        >>> hg = bl.hypergradient(problem, torch.tensor(0.0), torch.zeros(3), bl.Batches(b, None),
        ...     solver=bl.Converge(lasso, tol=1e-6), estimator=bl.Implicit(bl.Dense()))
        >>> hg.inner, hg.grad  # y = (3 - e^x, 0, -2 + e^x)
        (tensor([ 2.0000,  0.0000, -1.0000]), tensor(-3.0000))
    """

    penalty: Hyper

    def __post_init__(self) -> None:
        check_penalty("L1", self.penalty)

    def apply(self, point: Tree, rate: Any, outer: Tree) -> Tree:
        limits = strength(self.penalty, point, outer)
        pairs = zip(tree.tensors(point), limits, strict=True)
        return leafwise(point, [v.sign() * (v.abs() - rate * limit).relu() for v, limit in pairs])

    def value(self, point: Tree, outer: Tree) -> Tensor:
        limits = strength(self.penalty, point, outer)
        return total([(limit * v.abs()).sum() for v, limit in zip(tree.tensors(point), limits, strict=True)])
