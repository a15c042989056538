"""SOBA: one step of y, one of the adjoint v, one of x, all along directions of one point and one pair of batches.

    D_y = dg/dy,   D_v = H v - df/dy,   D_x = df/dx - M v        at (y, v, x)
    y <- y - a D_y,   v <- v - rho D_v,   x <- x - s D_x          together: none sees what another became

| | inner gradients | HVPs | mixed | memory |
| --- | --- | --- | --- | --- |
| SOBA(rate), K steps of y | K (1 for K = 0) | 0 | 1, with H v | 2 P carried (y, v), one graph |

One outer gradient, and one evaluation of g at the new y, by which a step that is too long is seen. With
`Batches(curvature=)` dg/dy is not shared: K + 1 inner gradients.

Wins: streams of minibatches; a round costs two gradients and a sweep, whatever the accuracy asked for.
Fails: where x moves faster than y and v follow: then D_x is of an x that was. Each needs a rate of its own; that of v
    must stay below 2 / (largest eigenvalue of H).
Reference: Dagreou, Ablin, Vaiter and Moreau 2022, A framework for bilevel optimization that enables stochastic and
global variance reduction algorithms, arXiv 2201.13409 (formulas as in the benchopt implementation).
Differences from peers: v has the sign of the implicit estimators (there it carries a minus); K > 1 steps of y are
allowed, where the paper takes one; the residual of v, its curvature and a y that runs away are reported.
"""

import dataclasses

from bilevel.engine import spans
from bilevel.estimators.base import AT_SOLUTION, Estimate, Estimator, Instance
from bilevel.estimators.single_loop.base import (
    TOL,
    Pair,
    Rate,
    advanced,
    begun,
    check_rate,
    check_tol,
    counted,
    finished,
    judged,
    made,
    moved,
    rate_at,
    slopes,
    template,
)
from bilevel.space import tree


@dataclasses.dataclass(frozen=True)
class SOBA(Estimator):
    """One round of SOBA: the direction of x at the carried (y, v), and both moved on by one step.

    `hg.inner` and the losses are at the y where the direction was taken, `hg.next_inner` is the y after the round.

    Bias: none at rest. Before, c1 |y - y*| + c2 |v - v*|; at the first round v = 0, and the estimate is df/dx.

    Args:
        rate: rho, the step size of v: a number, or a function of the round, such as lambda k: 0.1 / (1 + k) ** 0.5.
        tol: on the relative residual |H v - df/dy| / |df/dy| of the batches, for the status only: above it MAX_STEPS.

    State: a `Pair` of y and v. The y of a state goes before `inner` and Problem.init. The inner optimizer starts anew
    each round, so that momentum builds up within its K steps only, and one step of Adam has the length of its lr
    forever; SGD is what the method is made for.

    Memory: independent of K; linear in T.

    Raises:
        ValueError: an argument is out of range, the state does not fit, or x enters only through Problem.init or a
            hyper-parameter.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
        >>> state, data = None, bl.Batches(None, None)
        >>> for _ in range(40):
        ...     hg = bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), data, state=state,
        ...         solver=bl.Descent(bl.SGD(lr=0.25), steps=1), estimator=bl.estimators.SOBA(rate=0.25))
        ...     state = hg.state
        >>> hg.grad, hg.state.adjoint
        (tensor(0.2500), tensor(0.2500))
    """

    sharded = True

    rate: Rate
    tol: float = TOL

    def __post_init__(self) -> None:
        check_rate("SOBA", "rate", self.rate)
        check_tol("SOBA", self.tol)

    sees = AT_SOLUTION

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        return "exact once y and v are at rest; before, off by |y - y*| and |v - v*|"

    def init_state(self, instance: Instance) -> Pair:
        return Pair(*template(instance))

    def estimate(self, instance: Instance, state: Pair | None) -> Estimate:
        y, v = begun(instance, state)
        rate, space = rate_at("SOBA", "rate", self.rate, made(state)), instance.oracles.space
        with spans.span(spans.HYPERGRADIENT):
            at = slopes(instance, y, v)
            after = moved(space, v, rate, at.residual)
            judgement = judged(space, v, at, rate, self.tol, after)
        found = advanced(instance, y, at)
        with spans.span(spans.HYPERGRADIENT):
            carried = Pair(found.inner, tree.like(y, after), counted(instance, state))
            return finished(instance, found, at, at.direction, judgement, carried, here=y)
