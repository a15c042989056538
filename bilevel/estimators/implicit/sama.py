"""SAMA: the derivative of the optimizer's own step in the place of the inverse Hessian. No second derivative. Biased.

    y_K = y_{K-1} - u(g; s),    v = scale * (du/dg)' df/dy(y_K),    g and s those of the last step
    dF/dx ~ df/dx - [dg/dx(y_K + e v) - dg/dx(y_K - e v)] / (2 e),    e = radius / |v|
    SGD: du/dg = lr.    Adam, with moments m, n and bias corrections c1, c2 of the step and D = sqrt(n / c2) + eps:
         du/dg = (lr / c1) [(1 - b1) / D - m (1 - b2) g / (sqrt(n c2) D^2)]

| | inner gradients | outer gradients | HVPs | memory |
| --- | --- | --- | --- | --- |
| Sama() | K + 2 | 1 | 0 | 7 P under SGD, 17 P under Adam + 2 Q + one graph; independent of K |

du/dg is taken from `optimizer.step` itself, so that it is right for any optimizer: bias correction, eps, momentum,
clipping by its norm, a user's own. Where g is linear in y and x it is backpropagation through the last step.
Wins: large models under Adam; no double backward, so fused kernels and torch.compile of the user's model serve.
Fails: ill-conditioned Hessians; outer variables that act over many steps; a first step of Adam, whose length is lr
whatever the gradient is: du/dg is zero there, and the status says so (FLAT_STEP).
Reference: Choe et al. 2023, arXiv 2310.05674. Differences from peers: Betty's code leaves out the bias correction (its
factor is that after many steps) and divides by zero at a first step; for SGD it takes v = df/dy, which is
`Sama(scale=1 / lr)` here; it moves y by radius = 1, here by what suits the dtype.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bilevel.engine import spans
from bilevel.engine.maps import through_update
from bilevel.engine.oracles import Oracles
from bilevel.engine.point import At
from bilevel.estimators.base import Estimate, Estimator, Instance, Path
from bilevel.estimators.implicit.base import central_difference, check_scale, minus
from bilevel.outcome import Status, code_if
from bilevel.space import tree
from bilevel.space.tree import Leaves, Tree


@dataclasses.dataclass(frozen=True)
class Sama(Estimator):
    """One step of the inner optimizer, differentiated in its gradient, and a central difference in y.

    Where a rule stops the inner loop (`Converge`), the step is the one that would come next.

    Bias: that of one step (of SGD, a component of curvature h is off by the factor lr * h), which no budget removes;
        O(radius^2) of the difference, and rounding of order eps / radius: stats["digits"] says what that
        leaves, and below one digit the status (DIGITS_LOST).

    Args:
        scale: multiplies v; one over the step size makes v = df/dy of SGD.
        radius: how far y is moved to each side; None: eps^(1/3) (|y| + |y - y_0|).

    Memory: independent of K; linear in T. The last step's start, gradient and state are kept, and its algebra is
        differentiated: 7 P in all under SGD and 17 P under Adam, where plain steps take 3 P and 9 P.

    Raises:
        ValueError: an argument is out of range; (when used) the inner dynamics is no optimizer, or x enters on no path
            that it sees: not through weight decay, a hyper-parameter or Problem.init alone.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
        >>> hg = bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.5), steps=50), estimator=bl.estimators.Sama())
        >>> hg.grad  # the curvature is 2, so that one step is enough
        tensor(0.2500)
    """

    sharded = True

    scale: float = 1.0
    radius: float | None = None

    def __post_init__(self) -> None:
        if self.scale is None:
            raise ValueError(
                "Sama was given scale=None; a positive number was needed, 1.0 for the optimizer's own step"
            )
        check_scale("Sama", "scale", self.scale)
        check_scale("Sama", "radius", self.radius)

    sees = frozenset({Path.INNER_LOSS, Path.OUTER_LOSS})

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        return "that of a single step of the inner optimizer, and O(radius^2) of the difference"

    def estimate(self, instance: Instance, state: Any) -> Estimate:
        oracles, update = instance.oracles, instance.solver.dynamics.update
        if update is None:
            raise ValueError(
                f"Sama differentiates a step of an optimizer in its gradient, and "
                f"{type(instance.solver.dynamics).__name__} is no optimizer. Use Unrolled(), or Implicit"
            )
        last = _Last(oracles)
        found = instance.solve(at=last.at, visit=last.visit)
        last.made(found.inner)
        with spans.span(spans.HYPERGRADIENT):
            outer_loss, b, direct = oracles.outer_gradient(found.inner)
            gradient = last.gradient()
            v, moved = through_update(update, gradient, last.state, last.inner, oracles.x, b)
            code = _flat(oracles, v, b, gradient, moved, last)
            del gradient, moved, last
            v = oracles.space.scaled(self.scale, v) if self.scale != 1 else v
            indirect, digits, rounded = central_difference(oracles, found.inner, found.steps, v, self.radius)
            return instance.finish(
                found,
                minus(direct, indirect),
                outer_loss,
                codes=[code, rounded],
                stats={"digits": digits},
            )


class _Last:
    """The last step: where it began, its state, and its gradient, which is not computed twice."""

    def __init__(self, oracles: Oracles) -> None:
        self._oracles = oracles
        self._point: At | None = None
        self.inner: Tree = None
        self.state: Any = None
        self.step = -1

    def visit(self, step: int, inner: Tree, state: Any) -> None:
        """Before anything of a step is computed."""
        self._point, self.inner, self.state, self.step = None, inner, state, step

    def at(self, step: int) -> At:
        """The inner problem of a step."""
        self._point = self._oracles.point(step)
        return self._point

    def made(self, inner: Tree) -> None:
        """After the loop: of none, the first step, which was not made."""
        if self._point is None:
            self.visit(0, inner, self._oracles.begin(inner))
            self.at(0)

    def gradient(self) -> Tree:
        """The gradient of the step."""
        assert self._point is not None, "made() was called"
        return self._point.gradient(self.inner)


def _flat(oracles: Oracles, v: Leaves, b: Leaves, gradient: Tree, moved: Tree, last: _Last) -> Tensor:
    """FLAT_STEP where v says nothing although df/dy does.

    That is where it is zero (a sign has no derivative), and at a first step, which has no history, where it is far
    below what the step's length over that of the gradient makes of df/dy (Adam's first step).
    """
    space = oracles.space
    size, wanted = space.norm(v), space.norm(b)
    flat = (size == 0) & (wanted > 0)
    if last.step == 0:
        steps = [after - before for after, before in zip(tree.tensors(moved), tree.tensors(last.inner), strict=True)]
        slope = space.norm([leaf for leaf in tree.flatten(gradient)[0] if leaf is not None])
        secant = space.norm(steps) / torch.where(slope > 0, slope, float("inf"))
        flat = flat | (size < _FLAT * secant * wanted)
    return code_if(flat, Status.FLAT_STEP)


_FLAT = 1e-3
