"""First order without correction: FOMAML and its kin. Biased.

    dF/dx ~ df/dx + (dy_0/dx)' df/dy(y_K)

| | inner gradients | outer gradients | HVPs | memory |
| --- | --- | --- | --- | --- |
| FirstOrder() | K | 1 | 0 | 2 P + one graph, independent of K |

Wins: a baseline at the cost of plain training; x is the start and steps are few and short.
Fails: x acts through the inner loss: it sees none of that, and refuses.
Reference: Finn et al. 2017, arXiv 1703.03400, section 5.2. The bias does not shrink with K or with the step size of the
outer loop: it takes every factor I - lr H of the ordered product for I, a relative error of order K lr |H|.
"""

import dataclasses
from typing import Any

from bilevel.engine import spans
from bilevel.estimators.base import Estimate, Estimator, Instance, Path
from bilevel.space import tree


@dataclasses.dataclass(frozen=True)
class FirstOrder(Estimator):
    """The uncorrected baseline: treat y_K - y_0 as a constant. Biased, see the module.

    Bias: see the module. A start of a tensor of y that f does not use gets 0: it acts through the steps of the others
        alone, by second derivatives.

    Memory: that of plain training, independent of K; linear in T.

    Raises:
        ValueError: (when used) x enters only through the inner loss or a hyper-parameter, which this estimator cannot
            see.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: y**2, lambda y, x, b: y**2 / 2, init=lambda x, b: x)
        >>> hg = bl.hypergradient(problem, torch.tensor(1.0), None, bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.25), steps=1), estimator=bl.FirstOrder())
        >>> hg.grad  # the exact one is 0.25
        tensor(0.5000)
    """

    sharded = True

    sees = frozenset({Path.START, Path.OUTER_LOSS})

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        return "biased by O(K lr |H|), which no budget removes"

    def estimate(self, instance: Instance, state: Any) -> Estimate:
        oracles = instance.oracles
        found = instance.solve()
        with spans.span(spans.HYPERGRADIENT):
            outer_loss, gradient, grad = oracles.outer_gradient(found.inner)
            inner_loss = oracles.inner_loss(found.inner, found.steps)
            if instance.problem.init is not None:
                grad = tree.accumulate(grad, oracles.start_vjp(gradient))
            return instance.finish(found, grad, outer_loss, inner_loss=inner_loss)
