"""T1 - T2: the implicit hypergradient with a multiple of the identity for the inverse Hessian. Biased.

    dF/dx ~ df/dx - M v,    v = scale * df/dy,    at y_K

| | inner gradients | HVPs | mixed products | memory |
| --- | --- | --- | --- | --- |
| T1T2() | K + 1 | 0 | 1 | 3 P, as plain steps + one graph; independent of K |
| T1T2(difference=True) | K + 2 | 0 | 0 | 3 P + one first-order graph: what the inner loop itself holds |

Wins: the cheapest look at the inner loss; with scale = the inner step size it is backpropagation through the last step.
Fails: where the Hessian is far from a multiple of the identity, whose directions of small curvature count too little by
their condition number.
Reference: Luketina et al. 2016, arXiv 1511.06727 (recalled). Differences from peers: the scale is an argument, with
which the length is right for a Hessian of one curvature; weight decay of the inner optimizer counts to the inner loss.
"""

import dataclasses
from typing import Any

from bilevel.engine import spans
from bilevel.estimators.base import AT_SOLUTION, Estimate, Estimator, Instance, Path
from bilevel.estimators.implicit.base import central_difference, check_scale, minus, step_sizes, times


@dataclasses.dataclass(frozen=True)
class T1T2(Estimator):
    """Implicit differentiation with scale * I in the place of the inverse Hessian.

    Bias: a component of curvature h is off by the factor scale * h, which no budget removes; exact where H = I / scale.

    Args:
        scale: of the identity, one over a curvature; 1 is the original. None: the step size of the inner SGD (also a
            tree, or a function of outer), with which it equals `Unrolled(last=1)` up to where the product is taken, at
            y_K instead of y_{K-1}.

        difference: take the mixed product by a central difference of dg/dx, as `Darts` does: two gradients more, no
            second derivative, the memory of the inner loop alone. Then O(radius^2) is added to the bias, rounding is in
            stats["digits"], and weight decay that depends on x is not seen.

    Memory: independent of K; P for v, one graph, Q for the result (with `difference` P more, and a first-order graph);
        linear in T.

    Raises:
        ValueError: `scale` is not positive; (when used) x enters only through Problem.init or a hyper-parameter, the
            inner loop does not say where it rests, or scale=None with an inner loop that is not plain SGD.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
        >>> hg = bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.25), steps=50), estimator=bl.estimators.T1T2(scale=0.5))
        >>> hg.grad  # the curvature is 2
        tensor(0.2500)
    """

    sharded = True

    scale: float | None = 1.0
    difference: bool = False

    def __post_init__(self) -> None:
        check_scale("T1T2", "scale", self.scale)

    @property
    def sees(self) -> frozenset[Path]:  # type: ignore[override]
        return AT_SOLUTION - {Path.STATIONARITY} if self.difference else AT_SOLUTION

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        return "off by the factor scale * h in each direction of curvature h, which no budget removes"

    def estimate(self, instance: Instance, state: Any) -> Estimate:
        oracles = instance.oracles
        rates = step_sizes(self, instance, "scale") if self.scale is None else None
        found = instance.solve()
        with spans.span(spans.HYPERGRADIENT):
            outer_loss, b, direct = oracles.outer_gradient(found.inner)
            scales = [self.scale] * len(b) if rates is None else rates
            v = b if self.scale == 1 else tuple(leaf for leaf in times(scales, b) if leaf is not None)
            del b
            if self.difference:
                instance.require_rest(self)
                indirect, digits, rounded = central_difference(oracles, found.inner, found.steps, v, None)
                stats = {"digits": digits}
                return instance.finish(found, minus(direct, indirect), outer_loss, codes=[rounded], stats=stats)
            at = oracles.linearize(found.inner, found.steps)
            grad = minus(direct, at.mixed_alone(v))
            return instance.finish(
                found,
                grad,
                outer_loss,
                inner_loss=at.loss if instance.batches.curvature is None else None,
            )
