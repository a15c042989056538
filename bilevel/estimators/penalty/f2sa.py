"""F2SA: two copies of y, one on the inner loss and one on the inner loss plus a little of the outer one.

    z = argmin g(x, .),    y = argmin g(x, .) + f(x, .) / L
    dF/dx ~ df/dx(x, y) + L (dg/dx(x, y) - dg/dx(x, z)),    off by O(1 / L)

| | inner gradients | outer gradients | HVPs | mixed | memory |
| --- | --- | --- | --- | --- | --- |
| F2SA | 2 K + 2 | K + 1 | 0 | 0 | y and z, a gradient, one graph; independent of K |

Wins: no second derivatives, any inner optimizer, a few steps a call because both copies are carried.
Fails: the bias is 1 / L, and what is multiplied by L is a difference of two gradients: a large L costs digits, and asks
for copies that are accurate to less than their distance, which is O(1 / L). Stochastic gradients show it first.

Reference: Kwon, Kwon, Wright and Nowak 2023, A Fully First-Order Method for Stochastic Bilevel Optimization, arXiv
2301.10945; the steps as in benchopt's benchmark_bilevel. Differences from peers: benchopt moves y along L dg/dy + df/dy
with a step size of its own that must fall like 1 / L. Here both copies are moved by the inner optimizer of the solver,
y along dg/dy + (df/dy) / L, so that one step size does for both and for every L. With a constant L,
`FirstOrderCorrected(1 / L, "forward", warm_sides=True)` is the same number.
"""

import dataclasses

import torch
from torch import Tensor

from bilevel.batches import PerStep
from bilevel.engine import spans
from bilevel.estimators.base import Estimate, Estimator, Instance, Path
from bilevel.estimators.penalty.base import (
    Schedule,
    at_call,
    check_schedule,
    combined,
    descended,
    digits_left,
    first_call,
    perturbed,
    start_of,
    times,
)
from bilevel.estimators.state import State, per_task
from bilevel.outcome import Solution, Status, code_if
from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class F2SAState(State):
    """Both copies, like the inner variable, and the number of calls that made them."""

    penalized: Tree = per_task()
    lower: Tree = per_task()
    calls: Tensor = per_task(host=True)


@dataclasses.dataclass(frozen=True)
class F2SA(Estimator):
    """Fully first-order: the difference of two partial gradients, at the minimizers with and without a penalty.

    The solver moves both copies: K steps of its optimizer from where they were left, first z on g, then y on g + f / L.
    Each has the same batches and random numbers.

    Args:
        multiplier: L, the penalty on the inner loss: a number, or a function of the call such as
            `Polynomial(start=10, power=2 / 7)`.

    Bias: O(1 / L); on g = h y^2 / 2 - x y, f = y^2 / 2 the factor L h / (1 + L h). Before the copies have settled,
        L times the error of their difference.

    State: `F2SAState`. The copies in it take the place of `inner` and of Problem.init. With TaskMean it is by position,
        so tasks must come back in the same order, unless `Batches(task_ids=)` names them.

    The adapted `hg.inner` is z, and the losses are those at z. Stats: `multiplier`; `digits`, the decimal digits that
    rounding leaves.

    Memory: independent of K; linear in T.

    Raises:
        ValueError: the multiplier is not positive, the solver's dynamics is no optimizer that says where it rests, or x
            enters only through Problem.init or a hyper-parameter.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
        >>> bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.25), steps=50), estimator=bl.estimators.F2SA(10.0)).grad  # 0.25 20 / 21
        tensor(0.2381)
    """

    sharded = True

    multiplier: Schedule

    def __post_init__(self) -> None:
        check_schedule("F2SA", "multiplier", self.multiplier)

    sees = frozenset({Path.INNER_LOSS, Path.OUTER_LOSS})

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        return "off by O(1 / multiplier), and by the multiplier times what the copies lack"

    def init_state(self, instance: Instance) -> F2SAState:
        start = instance.oracles.start()
        return F2SAState(start, start, first_call(instance))

    def estimate(self, instance: Instance, state: F2SAState | None) -> Estimate:
        start, oracles = start_of(instance, self), instance.oracles
        state = F2SAState(start, start, first_call(instance)) if state is None else state
        weight = at_call("F2SA", "multiplier", self.multiplier, state.calls)
        copies = tree.detach(state.lower), tree.detach(state.penalized)
        eps = torch.finfo(tree.tensors(instance.outer)[0].dtype).eps
        solver = instance.solver.tightened(min(1 / weight, 1.0), floor=4 * eps)
        if not isinstance(instance.batches.inner, PerStep):
            oracles.embedding(0)  # drawn once, for both
        before = oracles.generators.peek()
        z = instance.solve(copies[0], solver=solver)
        with spans.span(spans.HYPERGRADIENT):
            floor, z_x = oracles.inner_gradient_in_outer(z.inner, z.steps)
        oracles.generators.set(before)
        y = dataclasses.replace(
            instance.solve(copies[1], solver=solver, at=perturbed(oracles, 1 / weight)), promised=None
        )
        with spans.span(spans.HYPERGRADIENT):
            _, y_x = oracles.inner_gradient_in_outer(y.inner, y.steps)
            _, direct = oracles.outer_gradient_in_outer(y.inner)
            grad = tree.accumulate(times(weight, combined(-1.0, z_x, y_x)), direct)
            digits, rounded = digits_left(weight, z_x, grad)
            return instance.finish(
                z,
                grad,
                oracles.outer_loss(z.inner),
                inner_loss=floor,
                codes=[y.code, instance.health(y, y.inner, y.last_loss), _unbounded(instance, y, copies[1]), rounded],
                stats={"inner_steps": z.steps + y.steps, "multiplier": weight, "digits": digits},
                state=F2SAState(y.inner, z.inner, state.calls + 1),
            )


def _unbounded(instance: Instance, y: Solution, start: Tree) -> Tensor | int:
    """UNBOUNDED where g + f / L has no minimum near: the gradient of its copy has grown as it went."""
    if y.grown is None or not instance.steady:
        return 0
    went = descended(instance.oracles.space, y, start)
    return code_if((y.grown > 2.0) & went, Status.UNBOUNDED)
