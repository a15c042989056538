"""Memory-reduced bilevel optimization without historical iterates.

    K steps on y without a trajectory;  CG on H v = df/dy;  dF/dx = df/dx - M v          (Algorithm 1 and its Subroutine
    1)

| | inner gradients | HVPs | mixed products | memory |
| --- | --- | --- | --- | --- |
| MemoryReduced(steps=m) | K + 1 | at most m (one more when v is warm) | 1 | y, v, r, p, Hp: 5 P + one graph; independent of K |

Reference: Yang, Ma and Yu 2024, arXiv 2412.12030. Differences from the released code: features that do not involve y
    are computed once and
without a graph when the problem declares them (`Problem.features`), and the mixed product passes them as one plain
backward; the code re-runs the extractor with a graph at every inner step, also in its baselines. Warm starts of y and v
are options (the released code stores but never uses them); curvature and residual are reported.
"""

import dataclasses
from typing import Any

from bilevel.batches import PerStep
from bilevel.engine import spans
from bilevel.estimators.base import AT_SOLUTION, UNROLL_OR_PROXIMAL, Estimate, Estimator, Instance, refuse_blind
from bilevel.estimators.implicit.adjoint import adjoint
from bilevel.inner.base import health
from bilevel.linear.base import check_number, check_steps
from bilevel.linear.cg import CG
from bilevel.outcome import worst
from bilevel.space import tree


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

    State: {"inner": y_K, "adjoint": v} when a warm start is asked for, else None. With TaskMean the state is by
        position, so tasks
    must come back in the same order.

    Memory: independent of K and of `steps`; linear in T.

    Raises:
        ValueError: an argument is out of range, the state does not fit, or x enters only through Problem.init or a
            hyper-parameter.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
        >>> hg = bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.25), steps=50), estimator=bl.MemoryReduced(warm_inner=True))
        >>> hg.grad, sorted(hg.state)
        (tensor(0.2500), ['adjoint', 'inner'])
    """

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

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        return "exact at the inner solution; before it, off by |y_K - y*| and by the linear residual"

    def estimate(self, instance: Instance, state: Any) -> Estimate:
        if not self.cache_features and instance.problem.features is not None:
            instance = dataclasses.replace(instance, problem=_without_features(instance.problem))
        y0, v0 = self._warm(instance, state)
        found = instance.solve(y0)
        with spans.span(spans.HYPERGRADIENT):
            linear = CG(self.steps, self.tol, self.damping)
            at = adjoint(instance.problem, found.inner, instance.outer, instance.batches, found.steps, linear, v0)
        refuse_blind(self, instance, at.grad, AT_SOLUTION, UNROLL_OR_PROXIMAL)
        comparable = not isinstance(instance.batches.inner, PerStep)
        inner_loss = (
            at.inner_loss if instance.batches.curvature is None else instance.inner_loss(found.inner, found.steps)
        )
        code = worst(
            found.code, health(found.inner, found.first_loss, inner_loss, comparable=comparable), at.linear.code
        )
        stats = {"inner_steps": found.steps, "inner_residual": found.residual}
        stats |= {"linear_residual": at.linear.residual, "linear_steps": at.linear.steps}
        keep = self.warm_inner or self.warm_adjoint
        carried = {"inner": found.inner, "adjoint": tree.like(found.inner, at.linear.value)} if keep else None
        return Estimate(at.grad, found.inner, at.outer_loss, inner_loss, code, stats, carried)

    def _warm(self, instance: Instance, state: Any) -> tuple[Any, Any]:
        if state is None:
            return None, None
        if not isinstance(state, dict) or set(state) != {"inner", "adjoint"}:
            raise ValueError(
                f"MemoryReduced was given a state of type {type(state).__name__}; the state of its own last call was "
                f"needed (hg.state)"
            )
        start = instance.start()
        for name, value in state.items():
            if [leaf.shape for leaf in tree.tensors(value)] != [leaf.shape for leaf in tree.tensors(start)]:
                raise ValueError(
                    f"MemoryReduced was given a state whose {name!r} does not have the shapes of the inner variable; "
                    f"pass state=None to start afresh"
                )
        return (
            tree.detach(state["inner"]) if self.warm_inner else None,
            tuple(tree.tensors(state["adjoint"])) if self.warm_adjoint else None,
        )


def _without_features(problem: Any) -> Any:
    features, inner_loss, outer_loss = problem.features, problem.inner_loss, problem.outer_loss
    return dataclasses.replace(
        problem,
        features=None,
        inner_loss=lambda y, x, batch: inner_loss(y, x, features(x, batch)),
        outer_loss=lambda y, x, batch: outer_loss(y, x, features(x, batch)),
    )
