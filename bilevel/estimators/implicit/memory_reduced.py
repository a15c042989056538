"""Memory-reduced bilevel optimization without historical iterates.

    K steps on y without a trajectory;  CG on H v = df/dy;  dF/dx = df/dx - M v          (Algorithm 1 and its Subroutine
    1)

| | inner gradients | HVPs | mixed products | memory |
| --- | --- | --- | --- | --- |
| MemoryReduced(steps=m) | K + 1 | at most m (warm v: m + 1) | 1 | y, v, r, p, Hp: 5 P + one graph; independent of K |

Wins: a feature extractor is x and a head is y (`Problem.features`); slowly moving x with warm starts.
Fails: as Implicit: far from the solution, or an indefinite Hessian.
Reference: Yang, Ma and Yu 2024, arXiv 2412.12030. Differences from the released code: features that do not involve y
are computed once and without a graph when the problem declares them (`Problem.features`), and the mixed product passes
them as one plain backward; the code re-runs the extractor with a graph at every inner step, also in its baselines. Warm
starts of y and v are options (the released code stores but never uses them); curvature and residual are reported.
"""

import dataclasses

from bilevel.engine import spans
from bilevel.estimators.base import AT_SOLUTION, Estimate, Estimator, Instance
from bilevel.estimators.implicit.adjoint import adjoint
from bilevel.estimators.state import State, per_task
from bilevel.linear.base import check_number, check_steps
from bilevel.linear.cg import CG
from bilevel.problem import Problem
from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class WarmStart(State):
    """Where the next inner loop and the next linear solve begin: the last y and the last v, both like `inner`."""

    inner: Tree = per_task()
    adjoint: Tree = per_task()


@dataclasses.dataclass(frozen=True)
class MemoryReduced(Estimator):
    """Algorithm 1 of 2412.12030: no historical iterates, conjugate gradients for the adjoint.

    Bias: as Implicit: c1 |y_K - y*| + c2 |residual|. With warm starts and a slowly moving x both go to zero even for K
        = 1.

    Args:
        steps: the most CG products (the released code uses 20).
        tol: on the relative residual of the adjoint system (1e-8 there, on the absolute one).
        damping: solves (H + damping I) v = df/dy. A softmax head has a singular Hessian (adding one vector to all class
            rows changes nothing); 1e-3 to 1e-2 helps in float32.
        warm_inner: start y from the y of the state instead of `inner` or Problem.init.
        warm_adjoint: start v from the v of the state.
        cache_features: run `Problem.features` once per call instead of once per inner step and product. False re-runs
            it, as the released code does, for comparison. No effect on a problem without features.

    State: a `WarmStart` with y_K and v when a warm start is asked for, else None. With TaskMean it is by position, so
    tasks must come back in the same order, unless `Batches(task_ids=)` names them.

    Memory: independent of K and of `steps`; linear in T.

    Raises:
        ValueError: an argument is out of range, the state does not fit, or x enters only through Problem.init or a
            hyper-parameter.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
        >>> hg = bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.25), steps=50), estimator=bl.MemoryReduced(warm_inner=True))
        >>> hg.grad, hg.state.adjoint
        (tensor(0.2500), tensor(0.2500))
    """

    sharded = True

    steps: int = 20
    tol: float = 1e-8
    damping: float = 0.0
    warm_inner: bool = False
    warm_adjoint: bool = False
    cache_features: bool = True

    def __post_init__(self) -> None:
        check_steps("MemoryReduced", "steps", self.steps)
        check_number("MemoryReduced", "tol", self.tol, 0.0)
        check_number("MemoryReduced", "damping", self.damping, 0.0)

    sees = AT_SOLUTION

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        return "exact at the inner solution; before it, off by |y_K - y*| and by the linear residual"

    def init_state(self, instance: Instance) -> WarmStart | None:
        if not self._warm:
            return None
        start = instance.oracles.start()
        # Zeros without memory.
        zeros = tree.tree_map(lambda leaf: leaf.new_zeros(()).expand(leaf.shape), start)
        return WarmStart(inner=start, adjoint=zeros)

    @property
    def _warm(self) -> bool:
        return self.warm_inner or self.warm_adjoint

    @property
    def adjoint_solver(self) -> CG:
        return CG(self.steps, self.tol, self.damping)

    def estimate(self, instance: Instance, state: WarmStart | None) -> Estimate:
        if not self.cache_features and instance.problem.features is not None:
            instance = dataclasses.replace(instance, problem=_without_features(instance.problem))
        y0 = tree.detach(state.inner) if state is not None and self.warm_inner else None
        v0 = tuple(tree.tensors(state.adjoint)) if state is not None and self.warm_adjoint else None
        found = instance.solve(y0)
        with spans.span(spans.HYPERGRADIENT):
            at = adjoint(instance.oracles, found.inner, found.steps, self.adjoint_solver, v0)
            v = tree.like(found.inner, at.linear.value)
            return instance.finish(
                found,
                at.grad,
                at.outer_loss,
                inner_loss=at.inner_loss if instance.batches.curvature is None else None,
                codes=[at.linear.code],
                stats={"linear_residual": at.linear.residual, "linear_steps": at.linear.steps},
                state=WarmStart(inner=found.inner, adjoint=v) if self._warm else None,
            )


def _without_features(problem: Problem) -> Problem:
    features = problem.features or (lambda outer, batch: batch)
    inner_loss, outer_loss = problem.inner_loss, problem.outer_loss
    return dataclasses.replace(
        problem,
        features=None,
        inner_loss=lambda y, x, batch: inner_loss(y, x, features(x, batch)),
        outer_loss=lambda y, x, batch: outer_loss(y, x, features(x, batch)),
    )
