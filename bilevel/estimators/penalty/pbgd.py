"""PBGD: y and x go down together on the outer loss and a penalty on the gap of the inner one.

    w: K inner steps from where it was left,    q = g(x, y) - g(x, w)      (w held fixed)
    y <- y - rate min(1 / gamma, 1) (df/dy + gamma dq/dy),    x's direction: df/dx + gamma dq/dx

| | inner gradients | outer gradients | HVPs | mixed | memory |
| --- | --- | --- | --- | --- | --- |
| PBGD | K + 2 | 1 | 0 | 0 | y and w, a gradient, one graph; independent of K |

Wins: the easiest to put on top of a trainer that exists: one more copy of y, and a penalty that is ramped up.
Fails: gamma sets the accuracy, and what is multiplied by it is a difference of two gradients. y moves by 1 / gamma of
its rate along f, so that a large gamma takes long to settle.

Reference: Shen and Chen 2023, On Penalty-based Bilevel Gradient Descent Method, arXiv 2302.05185, its value form; the
steps as in the released code (hanshen95/penalized-bilevel-gradient-descent). Differences from peers: the released code
scales x's direction by min(1 / gamma, 1) as well. Here it is an estimate of dF/dx, unscaled; put that factor into your
outer step size where you want it. The form that penalizes |dg/dy|^2 is `GradientNormPBGD`.
"""

import dataclasses

from torch import Tensor

from bilevel.batches import PerStep
from bilevel.engine import spans
from bilevel.estimators.base import Estimate, Estimator, Instance, Path
from bilevel.estimators.penalty.base import (
    Schedule,
    at_call,
    check_positive,
    check_schedule,
    combined,
    digits_left,
    first_call,
    gap,
    move_health,
    moved,
    penalized_value,
    present,
    start_of,
    step_rate,
    unsettled,
)
from bilevel.estimators.state import State, per_task
from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class PBGDState(State):
    """The moved y and the lower copy w, like the inner variable, and the number of calls that made them."""

    inner: Tree = per_task()
    lower: Tree = per_task()
    calls: Tensor = per_task(host=True)


@dataclasses.dataclass(frozen=True)
class PBGD(Estimator):
    """Penalty on the value gap; one joint step of y and x a call.

    The solver moves w on g: K steps of its optimizer from where it was left. y itself is moved by one plain gradient
    step a call, to `hg.next_inner`; x by your outer optimizer.

    Args:
        gamma: the penalty: a number, or a function of the call such as `Ramp(start=0.1, end=10.0, calls=1000)`.
        rate: step size of y; None for that of the solver's optimizer, which must be SGD with a number and neither
            momentum nor decay.

    Bias: O(1 / gamma) once y has settled, and gamma |w - y*|. On g = h y^2 / 2 - x y, f = y^2 / 2 the factor
        gamma h / (1 + gamma h).

    State: `PBGDState`. Its copies take the place of `inner` and of Problem.init.

    The adapted `hg.inner` is the y that the direction was taken at, and the losses are those at it. Stats: `gamma`;
    `gap`, q, per task; `digits`, the decimal digits that rounding leaves;
    `unsettled`, in [0, 1]: 0 where y rests, near 1 where it is the lag of y that is seen, and no hypergradient.

    Memory: independent of K; linear in T.

    Raises:
        ValueError: an argument is out of range, no step size is known, the solver's dynamics is no optimizer that says
            where it rests, or x enters only through Problem.init or a hyper-parameter.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
        >>> inner, state = torch.tensor(0.0), None
        >>> for _ in range(60):
        ...     hg = bl.hypergradient(problem, torch.tensor(1.0), inner, bl.Batches(None, None), state=state,
        ...         solver=bl.Descent(bl.SGD(lr=0.25), steps=2), estimator=bl.estimators.PBGD(gamma=10.0))
        ...     state = hg.state
        >>> hg.grad  # 0.25 20 / 21
        tensor(0.2381)
    """

    sharded = True

    gamma: Schedule
    rate: float | None = None

    def __post_init__(self) -> None:
        check_schedule("PBGD", "gamma", self.gamma)
        check_positive("PBGD", "rate", self.rate, none=True)

    sees = frozenset({Path.INNER_LOSS, Path.OUTER_LOSS})

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        return "off by O(1 / gamma) once y has settled, and before by how far it is from there"

    def init_state(self, instance: Instance) -> PBGDState:
        start = instance.oracles.start()
        return PBGDState(start, start, first_call(instance))

    def estimate(self, instance: Instance, state: PBGDState | None) -> Estimate:
        start, oracles = start_of(instance, self), instance.oracles
        state = PBGDState(start, start, first_call(instance)) if state is None else state
        gamma = at_call("PBGD", "gamma", self.gamma, state.calls)
        rate = step_rate(self, instance, self.rate) * min(1 / gamma, 1.0)
        y = tree.detach(state.inner)
        if not isinstance(instance.batches.inner, PerStep):
            oracles.embedding(0)  # drawn once, for both
        found = instance.solve(tree.detach(state.lower))
        with spans.span(spans.HYPERGRADIENT):
            before = oracles.generators.peek()
            between = gap(instance, y, found.inner, found.steps)
            outer_loss, f_y, f_x = oracles.outer_gradient(y)
            direction = combined(gamma, between.in_inner, f_y)
            grad = combined(gamma, between.in_outer, f_x)
            after = moved(y, direction, rate)
            drawn = oracles.generators.peek()
            oracles.generators.set(before)
            value_after = penalized_value(instance, after, found.steps, gamma)
            oracles.generators.set(drawn)
            promised = rate * oracles.space.norm(present(direction)).square()
            lag = unsettled(oracles.space, y, after, rate, f_y)
            digits, rounded = digits_left(gamma, between.lower_in_outer, grad)
            return instance.finish(
                dataclasses.replace(found, first_loss=None, promised=None),
                grad,
                outer_loss,
                inner=y,
                inner_loss=between.loss,
                codes=[
                    instance.health(found, found.inner, between.floor),
                    move_health(promised, outer_loss + gamma * between.height, value_after, after),
                    rounded,
                ],
                stats={"gamma": gamma, "gap": between.value, "unsettled": lag, "digits": digits},
                state=PBGDState(after, found.inner, state.calls + 1),
                next_inner=after,
            )
