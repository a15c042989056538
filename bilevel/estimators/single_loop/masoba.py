"""MA-SOBA: SOBA with a moving average of the direction of x.

    D_y, D_v, D_x as in SOBA, at one (y, v, x) and one pair of batches
    h <- (1 - theta) h + theta D_x        (h = D_x at the first round);   x moves along h

| | inner gradients | HVPs | mixed | memory |
| --- | --- | --- | --- | --- |
| MASOBA(rate, theta), K steps of y | K (1 for K = 0) | 0 | 1, with H v | 2 P + Q carried (y, v, h), one graph |

One outer gradient, and one evaluation of g at the new y. Under `TaskMean` h is kept once for each task: T Q.

Wins: where the noise of a batch in D_x is what limits x: on a minibatched quadratic theta = 0.1 leaves less than a
    third of its variance (tests/bilevel/test_single_loop.py).
Fails: where x moves fast: h is of the x of the last 1 / theta rounds; y and v lag as in SOBA.
Reference: Chen, Xiao and Balasubramanian 2023, Optimal Algorithms for Stochastic Bilevel Optimization under Relaxed
Smoothness Conditions, arXiv 2306.12067 (recalled: formulas and identifier).
Differences from peers: h starts at the first direction, not at 0, which would shrink the first 1 / theta estimates.
"""

import dataclasses

from torch import Tensor

from bilevel.engine import spans
from bilevel.estimators.base import AT_SOLUTION, Estimate, Estimator, Instance
from bilevel.estimators.single_loop.base import (
    TOL,
    Rate,
    advanced,
    averaged,
    begun,
    check_rate,
    check_tol,
    counted,
    finished,
    gathered,
    judged,
    made,
    moved,
    rate_at,
    slopes,
    spread,
    template,
)
from bilevel.estimators.state import State, per_task
from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class Averaged(State):
    """y, v, the number of rounds, and h: a tensor for each one of x, in equal parts for each task."""

    inner: Tree = per_task()
    adjoint: Tree = per_task()
    rounds: Tensor = per_task(host=True)
    average: tuple[Tensor, ...] = per_task()


@dataclasses.dataclass(frozen=True)
class MASOBA(Estimator):
    """One round of MA-SOBA: returns the average h, moved by this round's direction.

    `hg.inner` and the losses are at the y where the direction was taken, `hg.next_inner` is the y after the round.

    Bias: none at rest. Before, c1 |y - y*| + c2 |v - v*| of the last 1 / theta rounds, and what x has moved in them.

    Args:
        rate: rho, the step size of v: a number, or a function of the round.
        theta: the weight of the newest direction, in (0, 1]; likewise. 1 is SOBA.
        tol: on the relative residual of v, for the status only: above it MAX_STEPS.

    State: `Averaged`. As in SOBA, the y of a state goes before `inner`, and the inner optimizer starts anew each round.

    Memory: independent of K; linear in T, also that of h.

    Raises:
        ValueError: an argument is out of range, the state does not fit, or x enters only through Problem.init or a
            hyper-parameter.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
        >>> state, data = None, bl.Batches(None, None)
        >>> for _ in range(40):
        ...     hg = bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), data, state=state,
        ...         solver=bl.Descent(bl.SGD(lr=0.25), steps=1), estimator=bl.estimators.MASOBA(rate=0.25, theta=0.5))
        ...     state = hg.state
        >>> hg.grad
        tensor(0.2500)
    """

    sharded = True

    rate: Rate
    theta: Rate = 0.1
    tol: float = TOL

    def __post_init__(self) -> None:
        check_rate("MASOBA", "rate", self.rate)
        check_rate("MASOBA", "theta", self.theta, 1.0)
        check_tol("MASOBA", self.tol)

    sees = AT_SOLUTION

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        return "exact once y, v and the average are at rest; before, off by |y - y*| and |v - v*| of the last rounds"

    def init_state(self, instance: Instance) -> Averaged:
        return Averaged(*template(instance), spread(instance, (None,) * len(tree.tensors(instance.outer))))

    def estimate(self, instance: Instance, state: Averaged | None) -> Estimate:
        y, v = begun(instance, state)
        rate, space = rate_at("MASOBA", "rate", self.rate, made(state)), instance.oracles.space
        theta = rate_at("MASOBA", "theta", self.theta, made(state), 1.0)
        with spans.span(spans.HYPERGRADIENT):
            at = slopes(instance, y, v)
            after = moved(space, v, rate, at.residual)
            judgement = judged(space, v, at, rate, self.tol, after)
            h = at.direction
            if state is not None:
                h = averaged(gathered(instance, state.average), theta, h)
        found = advanced(instance, y, at)
        with spans.span(spans.HYPERGRADIENT):
            carried = Averaged(found.inner, tree.like(y, after), counted(instance, state), spread(instance, h))
            return finished(instance, found, at, h, judgement, carried, here=y)
