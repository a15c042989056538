"""BOME: y and x go down together, along the outer gradient and as much of the inner gap's as closes the gap.

    y_T: T inner steps from y,    q = g(x, y) - g(x, y_T)      (y_T held fixed)
    m = max(phi - <grad f, grad q>, 0) / |grad q|^2,    phi = eta |grad q|^2 or eta q      (gradients in y and x)
    y <- y - rate (df/dy + m dq/dy),    x's direction: df/dx + m dq/dx

| | inner gradients | outer gradients | HVPs | mixed | memory |
| --- | --- | --- | --- | --- | --- |
| BOME, T = K | K + 2 | 1 | 0 | 0 | y and y_T, a gradient, one graph; independent of K |

Wins: no schedule of a multiplier: it finds one by itself; the inner loss need not be convex.
Fails: with x standing still, y comes to rest where f + m g does, so that eta is a penalty: m is eta (|dq/dy|^2 +
|dq/dx|^2) / |dq/dx|^2 where f has no x, and the bias is O(1 / eta). |grad q| -> 0 makes m large, and steps that are
safe for g are not for m g.

Reference: Ye, Liu, Wright, Stone and Liu 2022, BOME! Bilevel Optimization Made Easy: A Simple First-Order Approach,
arXiv 2209.08709; the steps as in the released toy (Cranial-XIX/BOME). Differences from peers: the released code adds
1e-8 to |grad q|^2, which is m = 0 near the solution in any case; here m is 0 only where |grad q| is. Its toy keeps
phi = eta |grad q|^2, which is the default; `phi="value"` is eta q.
"""

import dataclasses

import torch
from torch import Tensor

from bilevel.batches import PerStep
from bilevel.engine import spans
from bilevel.estimators.base import Estimate, Estimator, Instance, Path
from bilevel.estimators.penalty.base import (
    Gap,
    check_positive,
    combined,
    digits_left,
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
from bilevel.space.inner_product import PLAIN, Space
from bilevel.space.tree import Leaves, PartialLeaves, Tree

_PHIS = ("gradient", "value")


@dataclasses.dataclass(frozen=True)
class BOMEState(State):
    """Where y was moved to, like the inner variable."""

    inner: Tree = per_task()


@dataclasses.dataclass(frozen=True)
class BOME(Estimator):
    """Dynamic barrier on the gap of the inner loss; one joint step of y and x a call.

    The solver makes y_T: T = K steps of its optimizer from y. y itself is moved by one plain gradient step a call, to
    `hg.next_inner`; x by your outer optimizer.

    Args:
        eta: how fast the gap is to close; the larger, the nearer to the inner solution y stays.
        phi: "gradient" for phi = eta |grad q|^2, "value" for eta q.
        rate: step size of y; None for that of the solver's optimizer, which must be SGD with a number and neither
            momentum nor decay.

    Bias: O(1 / eta) once y has settled, and |y_T - y*|. On g = h y^2 / 2 - x y, f = y^2 / 2 the factor L h / (1 + L h)
        with L = eta (1 + h^2).

    State: `BOMEState`, the moved y, which takes the place of `inner` and of Problem.init.

    The adapted `hg.inner` is the y that the direction was taken at, and the losses are those at it. Stats:
    `multiplier`; `gap`, q; `digits`, the decimal digits that rounding leaves;
    `unsettled`, in [0, 1]: 0 where y rests, near 1 where it is the lag of y that is seen, and no hypergradient.

    Memory: independent of K. Tasks are taken one after another: the multiplier of each needs its own gradient in x.

    Raises:
        ValueError: an argument is out of range, no step size is known, the solver's dynamics is no optimizer that says
            where it rests, or x enters only through Problem.init or a hyper-parameter.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
        >>> hg = bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.4), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.25), steps=2), estimator=bl.estimators.BOME(eta=0.5))
        >>> hg.grad, hg.stats["multiplier"], hg.next_inner
        (tensor(0.1690), tensor(2.2534), tensor(0.4127))
    """

    sharded = True

    eta: float = 0.5
    phi: str = "gradient"
    rate: float | None = None

    def __post_init__(self) -> None:
        check_positive("BOME", "eta", self.eta)
        check_positive("BOME", "rate", self.rate, none=True)
        if self.phi not in _PHIS:
            raise ValueError(f"BOME was given phi={self.phi!r}; one of {', '.join(map(repr, _PHIS))} was needed")

    sees = frozenset({Path.INNER_LOSS, Path.OUTER_LOSS})

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        return "off by O(1 / eta) once y has settled, and before by how far it is from there"

    @property
    def one_by_one(self) -> bool:
        return True

    def init_state(self, instance: Instance) -> BOMEState:
        return BOMEState(instance.oracles.start())

    def estimate(self, instance: Instance, state: BOMEState | None) -> Estimate:
        start, oracles = start_of(instance, self), instance.oracles
        rate = step_rate(self, instance, self.rate)
        y = start if state is None else tree.detach(state.inner)
        if not isinstance(instance.batches.inner, PerStep):
            oracles.embedding(0)
        found = instance.solve(y)
        with spans.span(spans.HYPERGRADIENT):
            before = oracles.generators.peek()
            between = gap(instance, y, found.inner, found.steps)
            outer_loss, f_y, f_x = oracles.outer_gradient(y)
            multiplier = self._multiplier(oracles.space, between, f_y, f_x)
            direction = combined(multiplier, between.in_inner, f_y)
            grad = combined(multiplier, between.in_outer, f_x)
            after = moved(y, direction, rate)
            drawn = oracles.generators.peek()
            value = outer_loss + multiplier * between.height
            oracles.generators.set(before)
            value_after = penalized_value(instance, after, found.steps, multiplier)
            oracles.generators.set(drawn)
            promised = rate * oracles.space.norm(present(direction)).square()
            lag = unsettled(oracles.space, y, after, rate, f_y)
            digits, rounded = digits_left(multiplier, between.lower_in_outer, grad)
            return instance.finish(
                dataclasses.replace(found, first_loss=None, promised=None),
                grad,
                outer_loss,
                inner=y,
                inner_loss=between.loss,
                codes=[
                    instance.health(found, found.inner, between.floor),
                    move_health(promised, value, value_after, after),
                    rounded,
                ],
                stats={"multiplier": multiplier, "gap": between.value, "unsettled": lag, "digits": digits},
                state=BOMEState(after),
                next_inner=after,
            )

    def _multiplier(self, space: Space, between: Gap, f_y: Leaves, f_x: PartialLeaves) -> Tensor:
        """The multiplier; 0 where the gap has no gradient."""
        q_y, q_x = between.in_inner, between.in_outer
        square = _dot(space, q_y, q_y) + _dot(PLAIN, q_x, q_x)
        phi = self.eta * (square if self.phi == "gradient" else between.value)
        least = (phi - _dot(space, f_y, q_y) - _dot(PLAIN, f_x, q_x)).clamp_min(0)
        found = torch.where(square > 0, least / torch.where(square > 0, square, 1.0), 0.0)
        return found.to(f_y[0].dtype)


def _dot(space: Space, x: PartialLeaves, y: PartialLeaves) -> Tensor:
    """The product of two directions, where None is zero."""
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if a is not None and b is not None]
    return space.dot([a for a, _ in pairs], [b for _, b in pairs]) if pairs else torch.zeros(())
