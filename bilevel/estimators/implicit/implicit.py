"""Implicit differentiation at the inner solution.

    dF/dx = df/dx - M v,    (H + damping I) v = df/dy,    at y_K

| | inner gradients | HVPs | mixed products | memory |
| --- | --- | --- | --- | --- |
| Implicit(linear) | K + 1 | m, the solver's products | 1 | the solver's vectors + one graph; independent of K |

Wins: g is strongly convex in y and K reaches the solution; memory is flat in K.
Fails: K stops far from the solution, or the Hessian is singular or indefinite there: see the status.
References: Bengio 2000; Lorraine et al. 2020, arXiv 1911.02590; iMAML, arXiv 1909.04630, is `proximal(problem,
strength)` with this estimator.
Differences from peers: the residual is the true one, and an indefinite Hessian is a status. (The mixed product yields
H v in the same sweep; where CG's own residual is far above the errors of its products, H v is left out.)
"""

import dataclasses
from typing import Any

from bilevel.engine import spans
from bilevel.estimators.base import AT_SOLUTION, Estimate, Estimator, Instance
from bilevel.estimators.implicit.adjoint import adjoint, linear_stats
from bilevel.linear.base import LinearSolver


@dataclasses.dataclass(frozen=True)
class Implicit(Estimator):
    """Implicit function theorem at the inner solution; never keeps a trajectory.

    Bias: exact at y*, with an exact solve. Otherwise c1 |y_K - y*| + c2 |residual|, both geometric in their steps for a
        strongly convex inner loss.

    Args:
        linear: solver of the adjoint system: CG, Neumann, Dense, or one of bilevel.linear.

    Memory: independent of K and of the number of products; P-sized vectors of the solver (CG 4 P), one graph, Q for the
        result; linear in T.

    Raises:
        TypeError: `linear` is no linear solver.
        ValueError: (when used) x enters only through Problem.init or an optimizer's hyper-parameter.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
        >>> hg = bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.25), steps=50), estimator=bl.Implicit(bl.CG(max_steps=5)))
        >>> hg.grad, hg.status.name
        (tensor(0.2500), 'OK')
    """

    sharded = True

    linear: LinearSolver

    def __post_init__(self) -> None:
        if not isinstance(self.linear, LinearSolver):
            raise TypeError(
                f"Implicit was given {type(self.linear).__name__}; a linear solver was needed, such as "
                f"Implicit(bilevel.CG(max_steps=10))"
            )

    sees = AT_SOLUTION

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        return "exact at the inner solution; before it, off by |y_K - y*| and by the linear residual"

    @property
    def adjoint_solver(self) -> LinearSolver:
        return self.linear

    def estimate(self, instance: Instance, state: Any) -> Estimate:
        found = instance.solve()
        with spans.span(spans.HYPERGRADIENT):
            at = adjoint(instance.oracles, found.inner, found.steps, self.linear)
            return instance.finish(
                found,
                at.grad,
                at.outer_loss,
                inner_loss=at.inner_loss if instance.batches.curvature is None else None,
                codes=[at.linear.code],
                stats=linear_stats(at.linear),
            )
