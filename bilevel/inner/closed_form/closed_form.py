"""A formula for the inner solution: y* in one step, whatever the start.

    y <- solve(y, x, batch)        stationarity = dg/dy, which the step has been held against

| | inner gradients | memory |
| --- | --- | --- |
| step | 2 for the check, else 0 | what solve needs |

Wins: heads that are linear in their parameters, Gaussian processes, any inner problem with a known minimizer.
Fails: where there is no formula.
Reference: Bertinetto et al. 2019, arXiv 1805.08136 (closed-form solvers as inner loops).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from bilevel.inner.closed_form.base import check_flag, check_function, check_landed
from bilevel.inner.dynamics import Dynamics, Point
from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class ClosedForm(Dynamics):
    """The user's formula for the minimizer of the inner loss.

    `Unrolled` differentiates the formula; with one step that is exact. Estimators at the solution differentiate the
    inner gradient, and do not look into the formula. FirstOrderCorrected refuses it.

    Args:
        solve: called as `solve(inner, outer, batch)` for one task, under torch.func.vmap where there are tasks; returns
            a tree like inner.
        check: hold every step against the inner loss. False leaves that out, and believes the formula.

    Raises:
        TypeError: solve is no function.
        ValueError: (when used) the inner gradient is not zero where a step landed, relative to that beside it (to half
            the digits of the dtype); the structure or a shape is another.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: (y - b).square().sum() + x * y**2, lambda y, x, b: (y - 1) ** 2)
        >>> mean = bl.inner.ClosedForm(lambda y, x, b: b.sum() / (len(b) + x))
        >>> hg = bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(torch.ones(3), None),
        ...     solver=bl.Descent(mean, steps=1), estimator=bl.Unrolled())
        >>> hg.inner, hg.grad  # y = 3 / (3 + x)
        (tensor(0.7500), tensor(0.0938))
    """

    solve: Callable[[Tree, Tree, Any], Tree]
    check: bool = True

    def __post_init__(self) -> None:
        check_function("ClosedForm", "solve", self.solve)
        check_flag("ClosedForm", self.check)

    @property
    def symmetric(self) -> bool:
        return True

    @property
    def autonomous(self) -> bool:
        return True

    def step(self, inner: Tree, state: Any, outer: Tree, at: Point) -> tuple[Tree, Any]:
        moved = tree.ordered(at.apply(self.solve, inner), inner)
        for old, new in zip(tree.tensors(inner), tree.tensors(moved), strict=True):
            if old.shape != new.shape or old.dtype != new.dtype:
                raise ValueError(
                    f"solve of ClosedForm returned a tensor of shape {tuple(new.shape)} and dtype {new.dtype} for one "
                    f"of shape {tuple(old.shape)} and dtype {old.dtype}; a tree like the inner variable was needed"
                )
        if self.check:
            check_landed("ClosedForm", moved, at)
        return moved, state

    def stationarity(self, inner: Tree, outer: Tree, at: Point) -> Tree | None:
        return at.gradient(inner)
