"""Newton's method on the inner loss, with any linear solver.

    (d2g/dy2 + damping I) d = dg/dy        y <- y - t d

| | inner gradients | HVPs | memory |
| --- | --- | --- | --- |
| step | 1 | the solver's products | the solver's vectors + one graph |
| ... differentiated | 1 | the same, and a backward through them: third derivatives of g | their tape |

With `bilevel.CG` this is Newton-CG: products alone, no matrix. Where CG meets a direction of negative curvature it
stops at its last safe iterate, which descends; where a direction does not descend, the negative gradient takes its
place. With search=None it is plain Newton, which goes to whatever point is stationary, maximum or saddle too.

Wins: few steps to any tolerance; a quadratic inner loss in one step.
Fails: where third derivatives are wanted and are dear (Unrolled); losses with kinks.
Reference: Nocedal and Wright, Numerical Optimization, 2006, chapter 7 (recalled).
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bilevel.inner.dynamics import Dynamics, Point, Solved, Solves
from bilevel.inner.search.armijo import Armijo
from bilevel.inner.search.base import LineSearch
from bilevel.optim.base import gradients
from bilevel.outcome import Status
from bilevel.space import tree
from bilevel.space.inner_product import Leaves, Space
from bilevel.space.tree import Tree

_ROUNDING = 1e3


@dataclasses.dataclass(frozen=True)
class Newton(Dynamics):
    """Newton steps on the inner loss.

    It rests where the inner gradient is zero. `Unrolled` differentiates the step as it ran, through the solver's
    products, which takes third derivatives of the inner loss; estimators at the solution take two. FirstOrderCorrected
    refuses it, and so does a compiled engine where the steps are differentiated.

    Args:
        linear: any linear solver, such as bilevel.CG(50, tol=1e-8) or bilevel.Dense(); its damping is added to the
            Hessian. An inexact d is an inexact step, and Converge looks at the gradient; without a search, a last
            step whose solve failed and gained nothing has the status of that solve.
        search: None for t = 1; `Armijo()` or `Wolfe()`, which begin at 1.

    Raises:
        TypeError: an argument is of the wrong kind.

    Example:
        A quadratic inner loss in one step.

        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: 50 * y**2 - x * y, lambda y, x, b: (y - 1) ** 2)
        >>> hg = bl.hypergradient(problem, torch.tensor(50.0), torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.inner.Newton(bl.CG(5)), steps=1), estimator=bl.Unrolled())
        >>> hg.inner, hg.grad  # y = x / 100
        (tensor(0.5000), tensor(-0.0100))
    """

    sharded = True

    linear: Solves
    search: LineSearch | None = dataclasses.field(default_factory=Armijo)

    def __post_init__(self) -> None:
        if not callable(getattr(self.linear, "prepare", None)) or isinstance(self.linear, type):
            raise TypeError(
                f"Newton was given linear={self.linear!r}; a linear solver was needed, such as Newton(bilevel.CG(50))"
            )
        if self.search is not None and not isinstance(self.search, LineSearch):
            raise TypeError(
                f"Newton was given search={self.search!r}; None, or a line search such as bilevel.inner.Armijo(), was "
                f"needed"
            )

    @property
    def symmetric(self) -> bool:
        return True

    @property
    def autonomous(self) -> bool:
        return True

    @property
    def reads_outer(self) -> bool:
        return False

    def step(self, inner: Tree, state: Any, outer: Tree, at: Point) -> tuple[Tree, Any]:
        y, space = tree.tensors(inner), at.space
        products = at.hessian(inner)
        g = tuple(
            torch.zeros_like(leaf) if slope is None else slope
            for leaf, slope in zip(y, gradients(at.gradient(inner), inner), strict=True)
        )
        found = self.linear.prepare(products, space).found(g)
        d = found.value
        if self.search is None:
            at.fail(self._stuck(space, found, g, y))
            return tree.like(inner, space.axpy(-1.0, d, y)), state
        descends = space.dot(g, d).detach() > 0
        d = space.where(descends, space.scaled(-1.0, d), space.scaled(-1.0, g))
        slope = space.dot(g, d).detach()
        length = self.search.multiple(inner, d, slope, torch.ones_like(slope), at)
        return tree.like(inner, space.axpy(length, d, y)), state

    def _stuck(self, space: Space, found: Solved, g: Leaves, y: list[Tensor]) -> Tensor:
        """The code of a solve that failed and gained nothing, where the gradient is more than rounding errors of y."""
        noise = _ROUNDING * torch.finfo(y[0].dtype).eps * space.norm(y)
        lost = ~(found.residual.detach() < 1) & (space.norm(g) > noise)
        code = torch.as_tensor(found.code, device=lost.device)
        return torch.where(lost.any() & (code >= Status.NOT_CONTRACTIVE.code), code, 0)

    def stationarity(self, inner: Tree, outer: Tree, at: Point) -> Tree | None:
        return at.gradient(inner)
