"""DARTS: one virtual step, and a central difference. No second derivative. Biased.

    w = y_K - xi dg/dy(y_K)
    dF/dx ~ df/dx(w) - xi [dg/dx(y_K + e v) - dg/dx(y_K - e v)] / (2 e),    v = df/dy(w),   e = radius / |v|

| | inner gradients | outer gradients | HVPs | memory |
| --- | --- | --- | --- | --- |
| Darts(xi) | K + 3 | 1 | 0 | 4 P + 2 Q + one graph; independent of K |
| Darts(xi=0) | K | 1 | 0 | P + one graph |

Wins: no double backward, so fused kernels and torch.compile of the user's model serve; three gradients a call.
Fails: where the solution depends on x through more than its last step; sharp losses, over whose radius g bends.
Reference: Liu et al. 2019, arXiv 1806.09055, equations 7 and 8 (recalled); they take radius = 0.01. Differences from
peers: Betty's `darts` makes no virtual step and takes the identity for the inverse Hessian, which is
`Sama(scale=1 / lr, radius=0.01)` here; both sides draw the same dropout masks; the radius follows the dtype.
"""

import dataclasses
from typing import Any

from bilevel.engine import autodiff, spans
from bilevel.estimators.base import Estimate, Estimator, Instance, Path
from bilevel.estimators.implicit.base import central_difference, check_scale, minus, step_sizes, times
from bilevel.space import tree


@dataclasses.dataclass(frozen=True)
class Darts(Estimator):
    """One virtual gradient step of length xi, differentiated by a finite difference.

    Bias: that of one step (a component of curvature h is off by the factor xi * h at the solution), O(radius^2) of the
        difference, and rounding of order eps / radius: stats["digits"] says what that leaves, and below one
        digit the status (DIGITS_LOST).

    Args:
        xi: length of the virtual step. None: the step size of the inner SGD. 0: the first-order form, df/dx at y_K,
            which sees the outer loss alone.
        radius: how far y is moved to each side; None: eps^(1/3) (|y| + |y - y_0|).

    `hg.inner` is y_K and `hg.outer_loss` is f there; the virtual step is not made.

    Memory: independent of K; linear in T.

    Raises:
        ValueError: an argument is out of range; (when used) x enters on no path that it sees, or xi=None with an inner
            loop that is not plain SGD.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
        >>> hg = bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.25), steps=50), estimator=bl.estimators.Darts(xi=0.5))
        >>> hg.grad  # the curvature is 2
        tensor(0.2500)
    """

    sharded = True

    xi: float | None = None
    radius: float | None = None

    def __post_init__(self) -> None:
        check_scale("Darts", "xi", self.xi, zero=True)
        check_scale("Darts", "radius", self.radius)

    @property
    def sees(self) -> frozenset[Path]:  # type: ignore[override]
        return frozenset({Path.OUTER_LOSS}) if self.xi == 0 else frozenset({Path.INNER_LOSS, Path.OUTER_LOSS})

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        if self.xi == 0:
            return "the direct part alone: how y depends on x is left out"
        return "that of a single step of length xi, and O(radius^2) of the difference"

    def estimate(self, instance: Instance, state: Any) -> Estimate:
        oracles = instance.oracles
        rates = step_sizes(self, instance, "xi") if self.xi is None else None
        found = instance.solve()
        with spans.span(spans.HYPERGRADIENT):
            if self.xi == 0:
                outer_loss, _, direct = oracles.outer_gradient(found.inner)
                return instance.finish(found, direct, outer_loss)
            y = found.inner
            inner_loss, g = oracles.inner_gradient(y, max(found.steps - 1, 0))
            xi = [self.xi] * len(g) if rates is None else rates
            step = times(xi, g)
            w = [a if b is None else a - b for a, b in zip(tree.tensors(y), step, strict=True)]
            del g, step
            _, v, direct = oracles.outer_gradient(tree.like(y, w))
            del w
            along = autodiff.filled(times(xi, v), tree.tensors(y))
            del v
            indirect, digits, rounded = central_difference(oracles, y, found.steps, along, self.radius)
            return instance.finish(
                found,
                minus(direct, indirect),
                oracles.outer_loss(y),
                inner_loss=inner_loss,
                codes=[rounded],
                stats={"digits": digits},
            )
