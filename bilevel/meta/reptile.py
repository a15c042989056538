"""Reptile: move towards where the tasks went. No gradient of any outer loss.

    "gradient" = (dy_0/dx)' (y_0 - y_K),   averaged over tasks

| | inner gradients | outer gradients | HVPs | memory |
| --- | --- | --- | --- | --- |
| Reptile() | K | 0 | 0 | 2 P + one graph, independent of K |

Reference: Nichol, Achiam and Schulman 2018, arXiv 1803.02999. With torch.optim.SGD(lr=eps) for x this is its batched
update x <- x + eps mean(y_K - x). One step of descent makes it lr times the gradient of the inner loss (joint
training); more steps add half of MAML's second-order term (their section 5). Differences: their code adapts on all of a
task's data, so pass support and query together as `Batches.inner`; the outer loss is evaluated for the record only.
"""

import dataclasses
from typing import Any

from bilevel.engine import spans
from bilevel.estimators.base import Estimate, Estimator, Instance, Path
from bilevel.space import tree


@dataclasses.dataclass(frozen=True)
class Reptile(Estimator):
    """The displacement of the tasks, in the place of a hypergradient.

    Bias: it is no estimate of dF/dx; see the module.

    Memory: that of plain training, independent of K; linear in T.

    Raises:
        ValueError: (when used) an outer tensor does not act through Problem.init.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: (y - b) ** 2, lambda y, x, b: (y - b) ** 2, init=lambda x, b: x)
        >>> bl.hypergradient(problem, torch.tensor(1.0), None, bl.Batches(torch.tensor(0.0), torch.tensor(0.0)),
        ...     solver=bl.Descent(bl.SGD(lr=0.25), steps=1), estimator=bl.meta.Reptile()).grad
        tensor(0.5000)
    """

    sees = frozenset({Path.START})

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        return "no hypergradient: the displacement y_0 - y_K"

    def estimate(self, instance: Instance, state: Any) -> Estimate:
        oracles = instance.oracles
        found = instance.solve()
        with spans.span(spans.HYPERGRADIENT):
            moved = [a - b for a, b in zip(tree.tensors(oracles.start()), tree.tensors(found.inner), strict=True)]
            grad = (
                (None,) * len(tree.tensors(instance.outer))
                if instance.problem.init is None
                else oracles.start_vjp(moved)
            )
            return instance.finish(found, grad, oracles.outer_loss(found.inner))
