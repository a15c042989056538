"""Implicit differentiation of the fixed point of any inner map, an optimizer's step with its state included.

    z = T(z, x),  z = (y, s):    (I - dT/dz)' w = (df/dy, 0),    dF/dx = df/dx + (dT/dx)' w

| | inner gradients | HVPs | mixed products | memory |
| --- | --- | --- | --- | --- |
| FixedPoint(linear) | K + 1 | m, the solver's products | 1 | the solver's vectors of (y, s) + one graph; flat in K |

The system is not symmetric: `Neumann(steps, step_size=1.0)` sums (dT/dz)^j and converges where the inner loop does;
`linear.GMRES`, `BiCGSTAB`, `LSMR` and `NormalCG` take fewer products, `Dense` one a number. CG refuses.
Wins: maps that say nothing of where they rest (decoupled weight decay, a user's own dynamics); momentum and moments
belong to the fixed point. For plain gradient descent, Neumann with J products is backpropagation through J + 1 steps
with y held at y_K.
Fails: maps that are no contraction near z (the solver's status says so); maps without a rest.
References: Grazzi et al. 2020, arXiv 2006.16218 (their fixed_point); Bai et al. 2019, arXiv 1909.01377 for equilibrium
models. Differences from peers: the optimizer's state is found and made part of the fixed point (in hypertorch the user
writes it into the map); any solver; the true residual.
"""

import dataclasses
from typing import Any

from bilevel.engine import spans
from bilevel.engine.maps import linearized_step
from bilevel.estimators.base import AT_SOLUTION, Estimate, Estimator, Instance, Path
from bilevel.estimators.implicit.adjoint import linear_stats, solved
from bilevel.inner.aggregated import Aggregated
from bilevel.inner.dynamics import Dynamics
from bilevel.inner.langevin import Langevin
from bilevel.linear.base import LinearSolver
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class FixedPoint(Estimator):
    """Implicit differentiation of z = T(z, x) with T the inner step and z its y and state.

    Bias: exact at the fixed point, with an exact solve. Otherwise c1 |z_K - z*| + c2 |residual|, geometric in their
        steps for a contraction. stats["fixed_point_motion"] is |T(y_K) - y_K|.

    Args:
        linear: solver of a system that is not symmetric: Neumann(step_size=1.0), linear.GMRES, BiCGSTAB, LSMR, Dense.

    Numbers of the state count as constants unless they have the shape of a tensor of y; a user's count of steps is best
    a Python number.

    The map is that of the last step, with its batch: steps that differ by their number have no fixed point in common.

    Memory: independent of K and of the number of products; vectors of y and of the state, one graph; linear in T.

    Raises:
        TypeError: `linear` is no linear solver.
        ValueError: (when used) the linear solver needs a symmetric system; x enters only through Problem.init, or, of
            a loop that says where it rests, only through a hyper-parameter that does not move that (a step size);
            the inner loop is a Langevin chain or Aggregated, which are no single map.

    Example:
        A map that does not say where it rests:

        >>> import dataclasses, torch, bilevel as bl
        >>> @dataclasses.dataclass(frozen=True)
        ... class Babylonian(bl.inner.Dynamics):
        ...     def step(self, inner, state, outer, at):
        ...         return (inner + outer / inner) / 2, state
        >>> problem = bl.Problem(lambda y, x, b: (y**2 - x) ** 2, lambda y, x, b: y)
        >>> hg = bl.hypergradient(problem, torch.tensor(4.0), torch.tensor(1.0), bl.Batches(None, None),
        ...     solver=bl.Descent(Babylonian(), steps=6),
        ...     estimator=bl.estimators.FixedPoint(bl.Neumann(steps=3, step_size=1.0)))
        >>> hg.grad
        tensor(0.2500)
    """

    sharded = True

    linear: LinearSolver

    def __post_init__(self) -> None:
        if not isinstance(self.linear, LinearSolver):
            raise TypeError(
                f"FixedPoint was given {type(self.linear).__name__}; a linear solver was needed, such as "
                f"FixedPoint(bilevel.Neumann(steps=50, step_size=1.0))"
            )

    sees = AT_SOLUTION

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        return "exact at the fixed point; before it, off by |z_K - z*| and by the linear residual"

    def sees_in(self, instance: Instance) -> frozenset[Path]:
        # Of a map that does not say where it rests, nothing tells what moves the fixed point from what moves the way.
        return self.sees if _says_rest(instance) else self.sees | {Path.HYPERPARAMETER}

    def estimate(self, instance: Instance, state: Any) -> Estimate:
        dynamics = instance.solver.dynamics
        if _wanders(dynamics):
            raise ValueError(
                f"FixedPoint differentiates where one map comes to rest, and {type(dynamics).__name__} never does: its "
                f"steps draw noise, or are another map each. Use Unrolled(), or bilevel.estimators.stochastic"
            )
        oracles, last = instance.oracles, list[Any]()

        def ended(inner: Tree, at_end: Any) -> None:
            last.append(at_end)

        found = instance.solve(ended=ended)
        with spans.span(spans.HYPERGRADIENT):
            outer_loss, b, direct = oracles.outer_gradient(found.inner)
            step = linearized_step(oracles, found.inner, last.pop(), found.steps)
            wide = (*b, *oracles.space.zeros_like(step.z[len(b) :]))
            at = solved(oracles, step.at, (outer_loss, wide, direct), self.linear)
            return instance.finish(
                found,
                at.grad,
                at.outer_loss,
                inner_loss=at.inner_loss if instance.batches.curvature is None else None,
                codes=[at.linear.code],
                stats=linear_stats(at.linear) | {"fixed_point_motion": step.motion},
            )


def _wanders(dynamics: Dynamics) -> bool:
    """Whether a dynamics of the library is no single map."""
    chain = isinstance(dynamics, Langevin) and dynamics.temperature > 0
    return chain or (isinstance(dynamics, Aggregated) and dynamics.update is None)


def _says_rest(instance: Instance) -> bool:
    """Whether the inner loop says where it comes to rest."""
    dynamics, oracles = instance.solver.dynamics, instance.oracles
    if dynamics.update is None:
        return type(dynamics).stationarity is not Dynamics.stationarity
    start = oracles.start()
    return dynamics.update.stationarity(start, start, oracles.x) is not None
