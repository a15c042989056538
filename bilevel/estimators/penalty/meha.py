"""MEHA: a penalty on the gap to the Moreau envelope of the inner loss, with one proximal copy of y. Single loop.

    v(x, y) = min_w g(x, w) + |w - y|^2 / (2 gamma),    w: K steps on it from where it was left
    y <- y - rate (df/dy / c + dg/dy(x, y) - (y - w) / gamma)
    x's direction: df/dx + c (dg/dx(x, y) - dg/dx(x, w))

| | inner gradients | outer gradients | HVPs | mixed | memory |
| --- | --- | --- | --- | --- | --- |
| MEHA | K + 2 | 1 | 0 | 0 | y and w, a gradient, one graph; independent of K |

Wins: the inner loss need not be convex: the envelope's problem is, for gamma below 1 / (its negative curvature), so
that one step of w a call will do.
Fails: c grows, and with it the time that y takes to settle, 1 / c of its rate along f. A small gamma makes the gap
flat, c gamma |dg/dy|^2 / 2 near a solution: it is c gamma h that must be large.

Reference: Liu, Liu, Yao, Zeng and Zhang 2024, Moreau Envelope for Nonconvex Bi-Level Optimization: A Single-loop and
Hessian-free Solution Strategy, arXiv 2405.09927 (formulas recalled, the code of BOAT seen). Differences from peers: the
paper's x moves along df/dx / c + ..., which shrinks as c grows; here it is c times that, an estimate of dF/dx, and the
step size is yours. BOAT multiplies by a gamma that is 1 / gamma here.
"""

import dataclasses

from torch import Tensor

from bilevel.batches import PerStep
from bilevel.engine import spans
from bilevel.estimators.base import Estimate, Estimator, Instance, Path
from bilevel.estimators.penalty.base import (
    Schedule,
    along,
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
    pull_of,
    pulled,
    start_of,
    step_rate,
    unsettled,
)
from bilevel.estimators.state import State, per_task
from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class MEHAState(State):
    """The moved y and the proximal copy w, like the inner variable, and the number of calls that made them."""

    inner: Tree = per_task()
    proximal: Tree = per_task()
    calls: Tensor = per_task(host=True)


@dataclasses.dataclass(frozen=True)
class MEHA(Estimator):
    """Penalty on the gap to the Moreau envelope; one joint step of y and x a call.

    The solver moves w on g + |w - y|^2 / (2 gamma): K steps of its optimizer from where it was left (the paper: 1). y
    itself is moved by one plain gradient step a call, to `hg.next_inner`; x by your outer optimizer.

    Args:
        c: the penalty: a number, or a function of the call such as `Polynomial(start=1.0, power=0.3)` (the paper: a
            power below 1/2).
        gamma: of the envelope; below 1 / (the most negative curvature of g).
        rate: step size of y; None for that of the solver's optimizer, which must be SGD with a number and neither
            momentum nor decay.

    Bias: O(1 / c) once y and w have settled. On g = h y^2 / 2 - x y, f = y^2 / 2 the factor c m / (1 + c m) with
        m = gamma h^2 / (1 + gamma h).

    State: `MEHAState`. Its copies take the place of `inner` and of Problem.init.

    The adapted `hg.inner` is the y that the direction was taken at, and the losses are those at it. Stats: `c`; `gap`,
    g(x, y) - g(x, w), per task; `digits`, the decimal digits that rounding leaves;
    `unsettled`, in [0, 1]: 0 where y rests, near 1 where it is the lag of y that is seen, and no hypergradient.

    Memory: independent of K; linear in T.

    Raises:
        ValueError: an argument is out of range, no step size is known, the solver's dynamics is no optimizer that says
            where it rests, or x enters only through Problem.init or a hyper-parameter.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
        >>> hg = bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.4), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.25), steps=40), estimator=bl.estimators.MEHA(c=10.0, rate=1.0))
        >>> hg.state.proximal, hg.grad / 10, hg.next_inner
        (tensor(0.4667), tensor(0.0667), tensor(0.4933))
    """

    sharded = True

    c: Schedule
    gamma: float = 1.0
    rate: float | None = None

    def __post_init__(self) -> None:
        check_schedule("MEHA", "c", self.c)
        check_positive("MEHA", "gamma", self.gamma)
        check_positive("MEHA", "rate", self.rate, none=True)

    sees = frozenset({Path.INNER_LOSS, Path.OUTER_LOSS})

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        return "off by O(1 / c) once y has settled, and before by how far it is from there"

    def init_state(self, instance: Instance) -> MEHAState:
        start = instance.oracles.start()
        return MEHAState(start, start, first_call(instance))

    def estimate(self, instance: Instance, state: MEHAState | None) -> Estimate:
        start, oracles = start_of(instance, self), instance.oracles
        state = MEHAState(start, start, first_call(instance)) if state is None else state
        c, rate = at_call("MEHA", "c", self.c, state.calls), step_rate(self, instance, self.rate)
        y = tree.detach(state.inner)
        if not isinstance(instance.batches.inner, PerStep):
            oracles.embedding(0)  # drawn once, for both
        found = instance.solve(tree.detach(state.proximal), at=pulled(oracles, y, 1 / self.gamma))
        found = dataclasses.replace(found, promised=None)
        with spans.span(spans.HYPERGRADIENT):
            before = oracles.generators.peek()
            between = gap(instance, y, found.inner, found.steps)
            outer_loss, f_y, f_x = oracles.outer_gradient(y)
            # The gradient of f / c + g - v in y.
            pull = pull_of(y, found.inner, 1 / self.gamma, between.in_inner)
            direction = combined(1 / c, f_y, combined(-1.0, pull, between.in_inner))
            grad = combined(c, between.in_outer, f_x)
            after = moved(y, direction, rate)
            drawn = oracles.generators.peek()
            oracles.generators.set(before)
            value_after = penalized_value(instance, after, found.steps, c)
            oracles.generators.set(drawn)
            # (The envelope is concave in what it takes away: g alone is asked whether the step was too long.)
            promised = rate * oracles.space.norm(present(direction)).square() * c
            lag = unsettled(oracles.space, y, after, rate / c, f_y)
            digits, rounded = digits_left(c, between.lower_in_outer, grad)
            held = c * along(oracles.space, pull, y, after)
            return instance.finish(
                dataclasses.replace(found, first_loss=None),
                grad,
                outer_loss,
                inner=y,
                inner_loss=between.loss,
                codes=[
                    instance.health(found, found.inner, found.last_loss),
                    move_health(promised, outer_loss + c * between.height, value_after - held, after),
                    rounded,
                ],
                stats={"c": c, "gap": between.value, "unsettled": lag, "digits": digits},
                state=MEHAState(after, found.inner, state.calls + 1),
                next_inner=after,
            )
