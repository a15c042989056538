"""FSLA: a fully single loop with a STORM correction of the direction of x.

    D_y, D_v, D_x as in SOBA, at one (y, v, x) and one pair of batches
    d <- D_x(y, v, x) + (1 - eta) (d - D_x(y_old, v_old, x_old))        both D_x on the same batches;   x moves along d

| | inner gradients | HVPs | mixed | memory |
| --- | --- | --- | --- | --- |
| FSLA(rate, eta), K steps of y | K + 1 (K at the first round) | 0 | 2, one with H v | 4 P + 2 Q carried, one graph |

Two outer gradients (one at the first round), and one evaluation of g at the new y. The state keeps the last (y, v, x),
under `TaskMean` x and d once for each task: 2 T Q.

Wins: the variance of d falls with eta, and what x, y and v have moved is accounted for: on a minibatched quadratic
    eta = 0.1 leaves less than a third of it (tests/bilevel/test_single_loop.py).
Fails: a second linearization a round; where the gradients of a batch differ much between two rounds (long steps), the
    correction brings in more noise than it takes out.
Reference: Li, Gu and Huang 2022, A Fully Single Loop Algorithm for Bilevel Optimization without Hessian Inverse, arXiv
2112.04660 (formulas as in the benchopt implementation; identifier recalled).
Differences from peers: all directions are of one point and one pair of batches, as in SOBA (benchopt moves y, v and x
one after the other, with a batch for each); what a loss draws is drawn alike at the old point.
"""

import dataclasses

from torch import Tensor

from bilevel.engine import spans
from bilevel.estimators.base import AT_SOLUTION, Estimate, Estimator, Instance
from bilevel.estimators.single_loop.base import (
    TOL,
    Rate,
    advanced,
    begun,
    check_rate,
    check_tol,
    copied,
    counted,
    finished,
    gathered,
    judged,
    made,
    minus,
    moved,
    rate_at,
    recovered,
    slopes,
    spread,
    storm,
    template,
)
from bilevel.estimators.state import State, per_task
from bilevel.space import tree
from bilevel.space.tree import Leaves, PartialLeaves, Tree


@dataclasses.dataclass(frozen=True)
class Corrected(State):
    """y, v, the number of rounds; (y, v, x) of the round before, and its direction in equal parts for each task."""

    inner: Tree = per_task()
    adjoint: Tree = per_task()
    rounds: Tensor = per_task(host=True)
    old_inner: Tree = per_task()
    old_adjoint: Tree = per_task()
    old_outer: Tree = per_task()
    direction: tuple[Tensor, ...] = per_task()


@dataclasses.dataclass(frozen=True)
class FSLA(Estimator):
    """One round of FSLA: returns the corrected direction d.

    `hg.inner` and the losses are at the y where the direction was taken, `hg.next_inner` is the y after the round.

    Bias: none at rest. Before, c1 |y - y*| + c2 |v - v*|. On one fixed pair of batches d is D_x in every round.

    Args:
        rate: the step size of v: a number, or a function of the round.
        eta: what is forgotten of the direction before, in (0, 1]; likewise. 1 is SOBA.
        tol: on the relative residual of v, for the status only: above it MAX_STEPS.

    State: `Corrected`. As in SOBA, the y of a state goes before `inner`, and the inner optimizer starts anew each
    round.

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
        ...         solver=bl.Descent(bl.SGD(lr=0.25), steps=1), estimator=bl.estimators.FSLA(rate=0.25, eta=0.5))
        ...     state = hg.state
        >>> hg.grad
        tensor(0.2500)
    """

    sharded = True

    rate: Rate
    eta: Rate = 0.1
    tol: float = TOL

    def __post_init__(self) -> None:
        check_rate("FSLA", "rate", self.rate)
        check_rate("FSLA", "eta", self.eta, 1.0)
        check_tol("FSLA", self.tol)

    sees = AT_SOLUTION

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        return "exact once y and v are at rest; before, off by |y - y*| and |v - v*|"

    def init_state(self, instance: Instance) -> Corrected:
        y, v, rounds = template(instance)
        direction = spread(instance, (None,) * len(tree.tensors(instance.outer)))
        return Corrected(y, v, rounds, y, v, copied(instance, instance.outer), direction)

    def estimate(self, instance: Instance, state: Corrected | None) -> Estimate:
        y, v = begun(instance, state)
        rate, eta = self._rates(state)
        generators, space = instance.oracles.generators, instance.oracles.space
        before = generators.peek()
        with spans.span(spans.HYPERGRADIENT):
            at = slopes(instance, y, v)
            after = moved(space, v, rate, at.residual)
            judgement = judged(space, v, at, rate, self.tol, after)
            d = at.direction
            if state is not None and eta < 1:
                now = generators.peek()
                generators.set(before)
                d = storm(d, eta, gathered(instance, state.direction), _old(instance, state))
                generators.set(now)
        found = advanced(instance, y, at)
        with spans.span(spans.HYPERGRADIENT):
            x = copied(instance, instance.outer)
            rounds = counted(instance, state)
            carried = Corrected(found.inner, tree.like(y, after), rounds, y, tree.like(y, v), x, spread(instance, d))
            return finished(instance, found, at, d, judgement, carried, here=y)

    def _rates(self, state: Corrected | None) -> tuple[float, float]:
        count = made(state)
        return rate_at("FSLA", "rate", self.rate, count), rate_at("FSLA", "eta", self.eta, count, 1.0)


def _old(instance: Instance, state: Corrected) -> PartialLeaves:
    """D_x at the point of the round before, on this round's batches."""
    oracles = dataclasses.replace(instance, outer=recovered(instance, state.old_outer)).oracles
    y = tree.detach(state.old_inner)
    _, direct = oracles.outer_gradient_in_outer(y)
    v: Leaves = tuple(leaf.detach() for leaf in tree.tensors(state.old_adjoint))
    return minus(direct, oracles.linearize(y, 1).mixed_alone(v))
