"""AmIGO: a few warm steps of y, a few warm steps of the adjoint, one direction of x.

    y <- K steps of the inner solver, from the last y
    v <- J times v - rho (H v - df/dy), from the last v, at the new y
    D_x = df/dx - M v at the new (y, v)

| | inner gradients | HVPs | mixed | memory |
| --- | --- | --- | --- | --- |
| AmIGO(rate, J), K steps of y | K + 1 | J | 1 | 2 P carried (y, v), one graph; flat in K and J |
| the same, `curvature=PerStep` | K + J + 1 | J | 1 | the same |

One outer gradient.

Wins: ill-conditioned H, where one step of y and v a round is too little; no accuracy has to be chosen, as for a linear
    solver.
Fails: J products a round at a rate that has to be chosen. Where H is the same in all of them,
    `MemoryReduced(warm_adjoint=True)` takes conjugate gradients and needs no rate.
Reference: Arbel and Mairal 2022, Amortized Implicit Differentiation for Stochastic Bilevel Optimization, arXiv
2111.14580 (formulas as in the benchopt implementation; identifier recalled).
Differences from peers: the inner solver is any of ours; each step of v sees a batch of its own where
`Batches.curvature` is a PerStep, and all of them one batch otherwise, which then is linearized once.
"""

import dataclasses

from bilevel.batches import PerStep
from bilevel.engine import spans
from bilevel.estimators.base import AT_SOLUTION, Estimate, Estimator, Instance
from bilevel.estimators.single_loop.base import (
    TOL,
    Pair,
    Rate,
    Slopes,
    begun,
    check_products,
    check_rate,
    check_tol,
    counted,
    finished,
    grew,
    judged,
    made,
    mixed_oracles,
    moved,
    rate_at,
    template,
)
from bilevel.linear.base import check_steps
from bilevel.space import tree


@dataclasses.dataclass(frozen=True)
class AmIGO(Estimator):
    """Warm starts of y and of v, with a few gradient steps for each.

    Bias: none at rest. Before, c1 |y - y*| + c2 |residual|, each smaller by its K or J steps a round.

    Args:
        rate: rho, the step size of v: a number, or a function of the round; below 2 / (largest eigenvalue of H).
        steps: J, the steps of v.
        tol: on the relative residual of v after its steps, for the status only: above it MAX_STEPS.

    State: a `Pair` of y and v. The y of a state goes before `inner` and Problem.init.

    Memory: independent of K and J; linear in T.

    Raises:
        ValueError: an argument is out of range, the state does not fit, `Batches.curvature` is a PerStep of fewer than
            J batches, or x enters only through Problem.init or a hyper-parameter.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
        >>> hg = bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.25), steps=30), estimator=bl.estimators.AmIGO(rate=0.25, steps=30))
        >>> hg.grad, hg.state.adjoint
        (tensor(0.2500), tensor(0.2500))
    """

    sharded = True

    rate: Rate
    steps: int = 10
    tol: float = TOL

    def __post_init__(self) -> None:
        check_rate("AmIGO", "rate", self.rate)
        check_steps("AmIGO", "steps", self.steps)
        check_tol("AmIGO", self.tol)

    sees = AT_SOLUTION

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        return "exact once y and v are at rest; before, off by |y - y*| and by the linear residual"

    def init_state(self, instance: Instance) -> Pair:
        return Pair(*template(instance))

    def estimate(self, instance: Instance, state: Pair | None) -> Estimate:
        check_products("AmIGO", instance, self.steps)
        y, v = begun(instance, state)
        rate = rate_at("AmIGO", "rate", self.rate, made(state))
        found = instance.solve(y)
        oracles, apart = instance.oracles, isinstance(instance.batches.curvature, PerStep)
        y, space, first = found.inner, oracles.space, None
        with spans.span(spans.HYPERGRADIENT):
            outer_loss, right, direct = oracles.outer_gradient(y)
            at = None if apart else oracles.linearize(y, found.steps)
            for step in range(self.steps):
                image = (at or oracles.linearize(y, step + 1)).matvec(v)
                residual = tuple(a - b for a, b in zip(image, right, strict=True))
                first = space.norm(residual) if first is None else first
                v = moved(space, v, rate, residual)
            del image
            last = at or mixed_oracles(instance).linearize(y, found.steps)
            image, mixed = last.mixed(v)
            loss = last.loss if apart or instance.batches.curvature is None else None
            end = Slopes(loss, None, image, mixed, outer_loss, right, direct, last.symmetric)
            judgement = judged(space, v, end, rate, self.tol)
            if not apart and last.symmetric:
                judgement = grew(judgement, space, end, first, residual)
            carried = Pair(y, tree.like(y, v), counted(instance, state))
            return finished(instance, found, end, end.direction, judgement, carried)
