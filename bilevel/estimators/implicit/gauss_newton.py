"""Implicit differentiation with the generalized Gauss-Newton matrix in the place of the Hessian.

    g(y) = l(z(y)) + r(y):    (G + damping I) v = df/dy,    G = J' (d2l/dz2) J + d2r/dy2,    dF/dx = df/dx - M v

| | inner gradients | GGN products | mixed products | memory |
| --- | --- | --- | --- | --- |
| GaussNewton(linear, outputs, loss) | K + 1 | m, the solver's products | 1 | Implicit's, the graphs of z and J' u |

G is positive semi-definite where l is convex in its outputs, so that conjugate gradients are safe where the Hessian of
a network that has not converged is indefinite. What is left out, the curvature of the model times the slope of l, is
zero for a linear model and small where the outputs fit.
Wins: classification and regression networks far from their minimum; exact for models that are linear in y.
Fails: large residuals; losses that are not convex in the outputs (NEGATIVE_CURVATURE says so).
Reference: Schraudolph 2002; Martens 2010 (recalled). Differences from peers: the decomposition is checked against the
inner loss, value and gradient, and refused where it is another; weight decay and a proximal term are added exactly; the
mixed product is that of the inner loss itself.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bilevel.engine import spans
from bilevel.engine.gauss_newton import Composed, GaussNewtonProducts, LossOfOutputs, Outputs, Rest
from bilevel.estimators.base import AT_SOLUTION, Estimate, Estimator, Instance
from bilevel.estimators.implicit.adjoint import linear_stats
from bilevel.estimators.implicit.base import minus
from bilevel.linear.base import LinearSolver
from bilevel.outcome import readable
from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class GaussNewton(Estimator):
    """`Implicit` with Gauss-Newton products.

    Bias: exact at y*, with an exact solve, where the residual curvature sum_i (dl/dz_i) d2z_i/dy2 is zero; else of its
        order. Damping biases as in any solve.

    Args:
        linear: solver of the adjoint system: CG, Neumann, Dense; its damping is added to G.
        outputs: (inner, outer, batch) -> z, a tree of floating tensors: the model.
        loss: (z, outer, batch) -> a 0-dim tensor: the loss on outputs.
        rest: (inner, outer, batch) -> a 0-dim tensor: what the inner loss adds, such as a regularizer; its Hessian is
            taken as it is. None: nothing. Weight decay of the inner optimizer and `bilevel.proximal` are known already.

    All three get the batch as the losses do: with `Problem.features`, what that returned. With tasks they are written
    for one task.

    loss(outputs) + rest must be the inner loss: its value is looked at in every call on the CPU, and once per problem
    its gradient, at y_K and beside it.

    Memory: independent of K and of the number of products; linear in T.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: (when used) the parts are not the inner loss; the inner loop is no optimizer that says where it
            rests; x enters only through Problem.init or a hyper-parameter.

    Example:
        >>> import torch, bilevel as bl
        >>> def outputs(y, x, b):
        ...     return b * y
        >>> def loss(z, x, b):
        ...     return (z - x) ** 2
        >>> problem = bl.Problem(lambda y, x, b: loss(outputs(y, x, b), x, b), lambda y, x, b: y**2 / 2)
        >>> hg = bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(torch.tensor(2.0), None),
        ...     solver=bl.Descent(bl.SGD(lr=0.1), steps=50),
        ...     estimator=bl.estimators.GaussNewton(bl.CG(max_steps=5), outputs, loss))
        >>> hg.grad  # y* = x / 2
        tensor(0.2500)
    """

    linear: LinearSolver
    outputs: Outputs
    loss: LossOfOutputs
    rest: Rest | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.linear, LinearSolver):
            raise TypeError(
                f"GaussNewton was given {type(self.linear).__name__}; a linear solver was needed, such as "
                f"GaussNewton(bilevel.CG(max_steps=10), outputs, loss)"
            )
        for name in ("outputs", "loss", "rest"):
            given = getattr(self, name)
            if not callable(given) and not (name == "rest" and given is None):
                raise TypeError(f"GaussNewton was given {name}={given!r}; a function (…, outer, batch) was needed")

    sees = AT_SOLUTION

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        return "off by the residual curvature that Gauss-Newton leaves out; before y*, by |y_K - y*| and the residual"

    def estimate(self, instance: Instance, state: Any) -> Estimate:
        oracles = instance.oracles
        if instance.solver.dynamics.update is None:
            raise ValueError(
                f"GaussNewton stands in for the Hessian of the inner loss, and "
                f"{type(instance.solver.dynamics).__name__} need not rest where its gradient vanishes. Use Implicit "
                f"with a linear solver for systems that are not symmetric, or FixedPoint"
            )
        found = instance.solve()
        with spans.span(spans.HYPERGRADIENT):
            outer_loss, b, direct = oracles.outer_gradient(found.inner)
            before = oracles.generators.peek()
            at = oracles.linearize(found.inner, found.steps)
            after = oracles.generators.peek()
            oracles.generators.set(before)
            composed = Composed(oracles, self.outputs, self.loss, self.rest)
            self._check(instance, composed, found.inner, at.batch)
            products = GaussNewtonProducts(oracles, composed, found.inner, at.batch)
            oracles.generators.set(after)
            if at.loss is not None:
                _check_value(at.loss, products.loss)
            solution = self.linear.prepare(products, oracles.space).solve(b)
            del products
            return instance.finish(
                found,
                minus(direct, at.mixed_alone(solution.value)),
                outer_loss,
                inner_loss=at.loss if instance.batches.curvature is None else None,
                codes=[solution.code],
                stats=linear_stats(solution),
            )

    def _check(self, instance: Instance, composed: Composed, inner: Tree, batch: Any) -> None:
        """Raise unless the parts are the inner loss, once per problem."""
        functions = (self.outputs, self.loss, self.rest, instance.tasks is None)
        known = instance.problem.memo.setdefault("gauss newton", [])
        if functions in known or not readable(tree.tensors(inner)[0]):
            return
        for at in (inner, _beside(inner)):
            differs = composed.differs(at, tree.detach(batch))
            if differs is not None:
                raise ValueError(_DIFFERS.format(how=differs))
        known.append(functions)


_DIFFERS = (
    "GaussNewton was given loss(outputs(inner, outer, batch), outer, batch) + rest(inner, outer, batch), which is "
    "{how}. They must be one function: write a regularizer that inner_loss adds as rest=, and nothing twice (weight "
    "decay of the inner optimizer and bilevel.proximal are known)"
)


def _check_value(loss: Tensor, other: Tensor) -> None:
    """Raise unless two values of the inner loss agree, where looking costs no wait."""
    if loss.device.type != "cpu" or not readable(loss) or not readable(other):
        return
    size = torch.maximum(loss.abs(), other.abs()).double()
    if bool(((loss - other).abs().double() > 1e3 * torch.finfo(loss.dtype).eps * size).any()):
        how = f"{other.flatten()[0].item():.6g} where inner_loss is {loss.flatten()[0].item():.6g}"
        raise ValueError(_DIFFERS.format(how=how))


def _beside(inner: Tree) -> Tree:
    """A point beside y."""
    seed = torch.Generator().manual_seed(0)
    return tree.tree_map(
        lambda leaf: leaf + (0.1 + 0.1 * leaf.abs()) * torch.randn(leaf.shape, generator=seed).to(leaf), inner
    )
