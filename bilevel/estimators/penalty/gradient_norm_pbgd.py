"""PBGD with the squared norm of the inner gradient as the penalty, which needs no lower copy of y.

    p = |dg/dy|^2,    dp/dy = 2 H dg/dy,    dp/dx = 2 M dg/dy      (M v = d/dx <dg/dy, v>)
    y <- y - rate min(1 / gamma, 1) (df/dy + gamma dp/dy),    x's direction: df/dx + gamma dp/dx

| | inner gradients | outer gradients | HVPs | mixed | memory |
| --- | --- | --- | --- | --- | --- |
| GradientNormPBGD, K moves of y | 2 m | m | 0 | m, each with the HVP in it | y, three gradients, one graph |

m = max(K, 1). dg/dy stands for the stationarity of the inner optimizer, weight decay included.

Wins: one copy of y, no lower solve: nothing has to be solved before the direction means something.
Fails: a second derivative. p has the square of the condition number of g, and holds y at any stationary point of g, a
maximum too.

Reference: Shen and Chen 2023, On Penalty-based Bilevel Gradient Descent Method, arXiv 2302.05185, its gradient form.
Differences from peers: as for `PBGD`, x's direction is not scaled by min(1 / gamma, 1). H dg/dy and M dg/dy come from
one sweep.
"""

import dataclasses

import torch
from torch import Tensor

from bilevel.batches import PerStep
from bilevel.engine import spans
from bilevel.estimators.base import AT_SOLUTION, Estimate, Estimator, Instance
from bilevel.estimators.penalty.base import (
    Schedule,
    at_call,
    check_positive,
    check_schedule,
    combined,
    first_call,
    move_health,
    moved,
    present,
    rest,
    start_of,
    step_rate,
    unsettled,
)
from bilevel.estimators.state import State, per_task
from bilevel.outcome import Solution, Status, code_if, worst
from bilevel.space import tree
from bilevel.space.tree import Leaves, PartialLeaves, Tree


@dataclasses.dataclass(frozen=True)
class GradientNormPBGDState(State):
    """The moved y, like the inner variable, and the number of calls that moved it."""

    inner: Tree = per_task()
    calls: Tensor = per_task(host=True)


@dataclasses.dataclass(frozen=True)
class GradientNormPBGD(Estimator):
    """Penalty on the squared norm of the inner gradient; y and x go down together.

    The steps of the solver are K moves of y, by plain gradient steps, on f + gamma |dg/dy|^2; the direction of x is
    taken where the last of them begins, so that K = 1 is the published joint step. Its optimizer says what else
    belongs to the inner gradient (weight decay), and the step size. With K = 0 y stays.

    Args:
        gamma: the penalty: a number, or a function of the call such as `Ramp(start=0.1, end=10.0, calls=1000)`.
        rate: step size of y; None for that of the solver's optimizer, which must be SGD with a number and neither
            momentum nor decay. Safe below 1 / |H|^2 for gamma of 1 and more.

    Bias: O(1 / gamma) once y has settled. On g = h y^2 / 2 - x y, f = y^2 / 2 the factor
        2 gamma h^2 / (1 + 2 gamma h^2).

    State: `GradientNormPBGDState`. The y in it takes the place of `inner` and of Problem.init.

    The adapted `hg.inner` is the y that the direction was taken at, and the losses are those at it; the last move ends
    at `hg.next_inner`. Stats: `gamma`; `penalty`, |dg/dy|^2, per task;
    `unsettled`, in [0, 1]: 0 where y rests, near 1 where it is the lag of y that is seen, and no hypergradient.

    Memory: independent of K; linear in T.

    Raises:
        ValueError: an argument is out of range, no step size is known, the solver stops by itself, its dynamics is no
            optimizer that says where it rests, or x enters only through Problem.init or a hyper-parameter.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
        >>> bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.1), steps=90),
        ...     estimator=bl.estimators.GradientNormPBGD(10.0)).grad  # 0.25 80 / 81
        tensor(0.2469)
    """

    sharded = True

    gamma: Schedule
    rate: float | None = None

    def __post_init__(self) -> None:
        check_schedule("GradientNormPBGD", "gamma", self.gamma)
        check_positive("GradientNormPBGD", "rate", self.rate, none=True)

    sees = AT_SOLUTION

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        return "off by O(1 / gamma) once y has settled, and before by how far it is from there"

    def init_state(self, instance: Instance) -> GradientNormPBGDState:
        return GradientNormPBGDState(instance.oracles.start(), first_call(instance))

    def estimate(self, instance: Instance, state: GradientNormPBGDState | None) -> Estimate:
        start, oracles = start_of(instance, self), instance.oracles
        if not instance.solver.fixed:
            raise ValueError(
                f"GradientNormPBGD moves y itself, and {type(instance.solver).__name__} would stop where the inner "
                f"gradient is small, not where the penalized one is. Write Descent(optimizer, steps)"
            )
        state = GradientNormPBGDState(start, first_call(instance)) if state is None else state
        gamma = at_call("GradientNormPBGD", "gamma", self.gamma, state.calls)
        rate = step_rate(self, instance, self.rate) * min(1 / gamma, 1.0)
        y = after = tree.detach(state.inner)
        if not isinstance(instance.batches.inner, PerStep):
            oracles.embedding(0)
        last: tuple[Tensor, Tensor] | None = None
        code: Tensor | int = 0
        with spans.span(spans.HYPERGRADIENT):
            for step in range(max(instance.solver.max_steps, 1)):
                y = after
                at = self._at(instance, y, step, gamma)
                unstable = 0 if last is None or not instance.steady else move_health(last[1], last[0], at.value, y)
                code = worst(code, unstable)
                after = moved(y, at.in_inner, rate) if instance.solver.max_steps else y
                last = at.value, rate * oracles.space.norm(present(at.in_inner)).square()
            rest_of = unsettled(oracles.space, y, after, rate, at.f_y)
            return instance.finish(
                Solution(y, step + 1, 0),
                at.in_outer,
                at.outer_loss,
                inner_loss=at.loss,
                codes=[code, code_if(~tree.finite(after), Status.DIVERGED)],
                stats={
                    "inner_steps": instance.solver.max_steps,
                    "gamma": gamma,
                    "penalty": at.penalty,
                    "unsettled": rest_of,
                },
                state=GradientNormPBGDState(after, state.calls + 1),
                next_inner=after,
            )

    def _at(self, instance: Instance, y: Tree, step: int, gamma: float) -> "_Penalized":
        """The penalized loss at y, and its gradients."""
        oracles = instance.oracles
        before = oracles.generators.peek()
        loss, g = oracles.inner_gradient(y, step)
        v = _filled(rest(instance, y, g), y)
        oracles.generators.set(before)
        image, mixed = oracles.linearize(y, step + 1).mixed(v)
        outer_loss, f_y, f_x = oracles.outer_gradient(y)
        penalty = oracles.space.norm(v).square().to(outer_loss.dtype)
        return _Penalized(
            loss,
            outer_loss,
            penalty,
            f_y,
            outer_loss + gamma * penalty,
            combined(2 * gamma, image, f_y),
            combined(2 * gamma, mixed, f_x),
        )


@dataclasses.dataclass(frozen=True)
class _Penalized:
    loss: Tensor
    outer_loss: Tensor
    penalty: Tensor
    f_y: Leaves
    value: Tensor
    in_inner: PartialLeaves
    in_outer: PartialLeaves


def _filled(leaves: PartialLeaves, y: Tree) -> Leaves:
    return tuple(torch.zeros_like(b) if a is None else a for a, b in zip(leaves, tree.tensors(y), strict=True))
