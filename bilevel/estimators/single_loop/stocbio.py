"""stocBiO: warm steps of y, and a stochastic Neumann series from scratch in every round.

    y <- K steps of the inner solver, from the last y
    r_0 = df/dy,   r_{j+1} = r_j - rho H_j r_j,   v = rho sum_{j<Q} r_j        H_j on a batch of its own
    D_x = df/dx - M v

| | inner gradients | HVPs | mixed | memory |
| --- | --- | --- | --- | --- |
| StocBiO(rate, Q), K steps of y | K + 1 | Q - 1 | 1 | P carried (y), one graph; flat in K and Q |
| the same, `curvature=PerStep` | K + Q | Q - 1 | 1 | the same |

One outer gradient. With one batch and the rate of the inner optimizer, Q terms are what backpropagation through the
last Q steps makes of a quadratic.

Wins: nothing of v is carried that could be stale; independent batches H_j leave the mean of the series that of H.
Fails: Q starts from scratch: the bias (1 - rho mu)^Q stays, however many rounds are made. AmIGO carries v instead.
Reference: Ji, Yang and Liang 2021, Bilevel Optimization: Convergence Analysis and Enhanced Design, arXiv 2010.07962
(formulas as in the benchopt implementation; identifier recalled).
Differences from peers: y is carried by the state; the true residual of v is reported, from the sweep that yields M v.
"""

import dataclasses

from torch import Tensor

from bilevel.batches import PerStep
from bilevel.engine import spans
from bilevel.estimators.base import AT_SOLUTION, Estimate, Estimator, Instance
from bilevel.estimators.single_loop.base import (
    TOL,
    Rate,
    Slopes,
    check_products,
    check_rate,
    check_tol,
    counted,
    finished,
    grew,
    judged,
    made,
    mixed_oracles,
    rate_at,
)
from bilevel.estimators.state import State, per_task
from bilevel.linear.base import check_steps
from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class Warm(State):
    """Where y goes on, and how many rounds were made."""

    inner: Tree = per_task()
    rounds: Tensor = per_task(host=True)


@dataclasses.dataclass(frozen=True)
class StocBiO(Estimator):
    """Neumann's series of Q terms, each factor on a batch of its own.

    Bias: c1 |y - y*| + c2 (1 - rho mu)^Q, the second part also at rest.

    Args:
        rate: rho, the step size of the series: a number, or a function of the round; below 2 / (largest eigenvalue of
            H).
        terms: Q >= 1. One term is df/dx - rho M df/dy.
        tol: on the relative residual of v, for the status only: above it MAX_STEPS, as the truncation leaves it.

    `Batches.curvature`: a PerStep of Q - 1 batches gives each product its own; one batch, or None, the same to all and
    to the mixed product.

    State: `Warm`, y alone. It goes before `inner` and Problem.init.

    Memory: independent of K and Q; linear in T.

    Raises:
        ValueError: an argument is out of range, the state does not fit, `Batches.curvature` is a PerStep of fewer than
            Q - 1 batches, or x enters only through Problem.init or a hyper-parameter.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
        >>> bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.25), steps=4), estimator=bl.estimators.StocBiO(rate=0.25, terms=2)).grad
        tensor(0.1758)
    """

    sharded = True

    rate: Rate
    terms: int = 10
    tol: float = TOL

    def __post_init__(self) -> None:
        check_rate("StocBiO", "rate", self.rate)
        check_steps("StocBiO", "terms", self.terms)
        check_tol("StocBiO", self.tol)

    sees = AT_SOLUTION

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        return f"off by (1 - rate mu)^{self.terms} of the truncated series, and by |y - y*|"

    def init_state(self, instance: Instance) -> Warm:
        return Warm(instance.oracles.start(), counted(instance))

    def estimate(self, instance: Instance, state: Warm | None) -> Estimate:
        check_products("StocBiO", instance, self.terms - 1)
        rate = rate_at("StocBiO", "rate", self.rate, made(state))
        found = instance.solve(None if state is None else tree.detach(state.inner))
        oracles, apart = instance.oracles, isinstance(instance.batches.curvature, PerStep)
        y, space = found.inner, oracles.space
        with spans.span(spans.HYPERGRADIENT):
            outer_loss, right, direct = oracles.outer_gradient(y)
            at = None if apart else oracles.linearize(y, found.steps)
            r, v = right, space.scaled(rate, right)
            for step in range(self.terms - 1):
                image = (at or oracles.linearize(y, step + 1)).matvec(r)
                r = space.axpy(-rate, image, r)
                v = space.axpy(rate, r, v)
                del image
            last = at or mixed_oracles(instance).linearize(y, found.steps)
            image, mixed = last.mixed(v)
            loss = last.loss if apart or instance.batches.curvature is None else None
            end = Slopes(loss, None, image, mixed, outer_loss, right, direct, last.symmetric)
            judgement = judged(space, v, end, rate, self.tol)
            if not apart and last.symmetric:
                judgement = grew(judgement, space, end, space.norm(right), space.scaled(-1.0, r))
            carried = Warm(y, counted(instance, state))
            return finished(instance, found, end, end.direction, judgement, carried)
