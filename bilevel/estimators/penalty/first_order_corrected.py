"""First order with a correction: a finite difference of the perturbed value function. No second derivative anywhere.

    l_nu(x) = min_y g(y, x) + nu f(y, x),   y_nu its minimizer,   dl_nu/dx = dg/dx(y_nu) + nu df/dx(y_nu)      (Danskin)
    dF/dx = d/dnu (dl_nu/dx) at nu = 0
    symmetric:  (dl_nu/dx - dl_-nu/dx) / (2 nu)        forward:  (dl_nu/dx - dl_0/dx) / nu

| scheme | inner gradients | outer gradients | HVPs | bias | memory |
| --- | --- | --- | --- | --- | --- |
| "symmetric" | 2 K + 2 | 2 K + 2 | 0 | O(nu^2) + O(delta / nu) | 3 P + 2 Q + one graph, independent of K |
| "forward" | 2 K + 2 | K + 2 | 0 | O(nu) + O(delta / nu) | the same |

delta: distance of the inner iterates from their minimizers. Both sides start alike, take the same number of steps, see
    the same batches and
draw the same random numbers, so that delta is nearly common to both and cancels; with different budgets the error blows
up like delta / nu.

References: Chayti and Jaggi 2024, arXiv 2409.03682 (proximal MAML, in which case this is strength (y_-nu - y_nu) / (2
    nu)); the general form
after Chen et al., Faster Gradient Methods for Highly-Smooth Stochastic Bilevel Optimization. With nu = 1 / penalty the
forward scheme is F2SA.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bilevel.batches import PerStep
from bilevel.engine import oracles, spans
from bilevel.engine.replay import Replay
from bilevel.estimators.base import AT_SOLUTION, UNROLL_OR_PROXIMAL, Estimate, Estimator, Instance, refuse_blind
from bilevel.inner.base import Gradient, health
from bilevel.inner.descent import Descent
from bilevel.outcome import Solution, worst
from bilevel.space import tree
from bilevel.space.tree import Leaves, PartialLeaves, Tree

_SCHEMES = ("symmetric", "forward")


@dataclasses.dataclass(frozen=True)
class FirstOrderCorrected(Estimator):
    """Finite difference of the perturbed value function, with common random numbers and equal budgets.

    Args:
        nu: the perturbation; None picks `default_nu` by dtype and scheme. -nu must leave the inner problem convex: nu <
            mu / L_f. Rounding adds an error of order eps / nu, truncation one of order nu^2 (nu for "forward").
        scheme: "symmetric" or "forward".

    The adapted `hg.inner` is y_0 for "forward" and (y_nu + y_-nu) / 2, within O(nu^2) of it, for "symmetric"; the
    losses are those at `hg.inner`.

    Memory: independent of K; linear in T.

    Raises:
        ValueError: an argument is out of range, or (when used) x enters only through Problem.init or a hyper-parameter.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
        >>> hg = bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.25), steps=50), estimator=bl.FirstOrderCorrected(nu=0.1))
        >>> hg.grad  # 0.25 h^2 / (h^2 - nu^2) with h = 2
        tensor(0.2506)
    """

    nu: float | None = None
    scheme: str = "symmetric"

    def __post_init__(self) -> None:
        if self.nu is not None and (not isinstance(self.nu, (int, float)) or not 0 < self.nu < float("inf")):
            raise ValueError(f"FirstOrderCorrected was given nu={self.nu!r}; None or a positive number was needed")
        if self.scheme not in _SCHEMES:
            raise ValueError(
                f"FirstOrderCorrected was given scheme={self.scheme!r}; one of {', '.join(map(repr, _SCHEMES))} was "
                f"needed"
            )

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        order = "nu^2" if self.scheme == "symmetric" else "nu"
        return f"off by O({order}) from the finite difference and by |y_K - y*| / nu before the inner solution"

    def estimate(self, instance: Instance, state: Any) -> Estimate:
        nu = default_nu(tree.tensors(instance.outer)[0].dtype, self.scheme) if self.nu is None else self.nu
        sides = (nu, -nu) if self.scheme == "symmetric" else (0.0, nu)
        code: Tensor | int = 0
        if not instance.solver.fixed:
            # Two sides that stop at different steps would have that difference divided by nu: learn K first, then give
            # both sides K steps.
            unperturbed = instance.solve()
            code = unperturbed.code
            instance = dataclasses.replace(instance, solver=Descent(instance.solver.optimizer, unperturbed.steps))
        start, gradient = instance.start(), instance.gradient()
        replay = Replay(tree.tensors(instance.outer)[0].device)
        replay.record()
        one = _side(instance, sides[0], start, gradient)
        replay.seek(0)
        other = _side(instance, sides[1], start, gradient)
        with spans.span(spans.HYPERGRADIENT):
            grad = _combine([(1 / (sides[0] - sides[1]), one.g_x), (-1 / (sides[0] - sides[1]), other.g_x)])
            if self.scheme == "symmetric":
                grad = tree.accumulate(grad, _combine([(0.5, one.f_x), (0.5, other.f_x)]))
                inner = tree.tree_map(lambda a, b: (a + b) / 2, one.found.inner, other.found.inner)
            else:
                grad, inner = tree.accumulate(grad, other.f_x), one.found.inner
            with torch.no_grad():
                outer_loss = instance.problem.outer(inner, instance.outer, instance.batches.outer)
            inner_loss = instance.inner_loss(inner, one.found.steps)
        refuse_blind(self, instance, grad, AT_SOLUTION, UNROLL_OR_PROXIMAL)
        comparable = not isinstance(instance.batches.inner, PerStep)
        codes = [
            code,
            *(
                code
                for side in (one, other)
                for code in (
                    side.found.code,
                    health(side.found.inner, side.found.first_loss, side.found.last_loss, comparable=comparable),
                )
            ),
        ]
        stats = {"inner_steps": one.found.steps + other.found.steps, "nu": nu, "inner_residual": one.found.residual}
        return Estimate(grad, inner, outer_loss, inner_loss, worst(*codes), stats)


def default_nu(dtype: torch.dtype, scheme: str) -> float:
    """The perturbation that balances truncation and rounding for losses and gradients of order one.

    Symmetric eps^(1/3) and forward eps^(1/2), rounded up to a power of ten, because noise from an inexact inner solve
    grows faster below than
    truncation does above: 1e-5 and 1e-7 in float64, 1e-2 and 1e-3 in float32, 0.1 in 16 bits.
    tests/bilevel/test_conformance.py holds them to the best of a grid.
    """
    eps = torch.finfo(dtype).eps
    if scheme == "symmetric":
        return 1e-5 if eps < 1e-10 else 1e-2 if eps < 1e-5 else 1e-1
    return 1e-7 if eps < 1e-10 else 1e-3 if eps < 1e-5 else 1e-1


@dataclasses.dataclass(frozen=True)
class _Side:
    found: Solution
    g_x: PartialLeaves
    f_x: PartialLeaves


def _side(instance: Instance, nu: float, start: Tree, gradient: Gradient) -> _Side:
    """Minimize g + nu f from `start` and take both partial derivatives in x there."""
    problem, batches, x = instance.problem, instance.batches, instance.outer

    def perturbed(y: Tree, step: int) -> tuple[Tensor, Leaves]:
        loss, g = gradient(y, step)
        if nu == 0:
            return loss, g
        # Two graphs one after the other, not one over both losses: the peak stays that of one gradient.
        # f draws without moving the stream, so that g's draws are those of a side that needs no f.
        after_g = Replay(tree.tensors(x)[0].device)
        after_g.record()
        f_loss, f, _ = oracles.outer_gradient(problem, y, x, batches.outer, to_outer=False)
        after_g.seek(0)
        return loss + nu * f_loss, tree.axpy(nu, f, g)

    found = instance.solve(start, gradient=perturbed)
    with spans.span(spans.HYPERGRADIENT):
        _, g_x = oracles.inner_gradient_in_outer(problem, found.inner, x, batches.at_solution(found.steps))
        _, f_x = oracles.outer_gradient_in_outer(problem, found.inner, x, batches.outer)
    return _Side(found, g_x, f_x)


def _combine(terms: list[tuple[float, PartialLeaves]]) -> PartialLeaves:
    total: PartialLeaves = (None,) * len(terms[0][1])
    for weight, leaves in terms:
        total = tree.accumulate(total, tuple(None if leaf is None else weight * leaf for leaf in leaves))
    return total
