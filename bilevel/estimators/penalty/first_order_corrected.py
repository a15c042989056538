"""First order with a correction: a finite difference of the perturbed value function. No second derivative anywhere.

    l_nu(x) = min_y g(y, x) + nu f(y, x),   y_nu its minimizer,   dl_nu/dx = dg/dx(y_nu) + nu df/dx(y_nu)      (Danskin)
    dF/dx = d/dnu (dl_nu/dx) at nu = 0
    symmetric:  (dl_nu/dx - dl_-nu/dx) / (2 nu)        forward:  (dl_nu/dx - dl_0/dx) / nu

| scheme | inner gradients | outer gradients | HVPs | bias | memory |
| --- | --- | --- | --- | --- | --- |
| "symmetric" | 2 K + 2 | 2 K + 2 | 0 | O(nu^2) + O(delta / nu) | 3 P + 2 Q + one graph, independent of K |
| "forward" | 2 K + 2 | K + 2 | 0 | O(nu) + O(delta / nu) | the same |

delta: distance of the inner iterates from their minimizers. Both sides start alike, take the same number of steps, see
the same batches and draw the same random numbers, so that delta is nearly common to both and cancels; with different
budgets the error blows up like delta / nu. Under a tolerance each side is solved to nu times that tolerance. With
`warm_sides` each side goes on from its own last solution, which is what F2SA does: few steps a call then suffice, where
two sides that start alike have to build up their difference anew.

References: Chayti and Jaggi 2024, arXiv 2409.03682 (proximal MAML, in which case this is strength (y_-nu - y_nu) /
(2 nu)); the general form after Chen et al., Faster Gradient Methods for Highly-Smooth Stochastic Bilevel Optimization;
F2SA is Kwon et al. 2023, A Fully First-Order Method for Stochastic Bilevel Optimization.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel.batches import PerStep
from bilevel.engine import spans
from bilevel.engine.oracles import Oracles
from bilevel.engine.point import At
from bilevel.estimators.base import Estimate, Estimator, Instance, Path
from bilevel.estimators.state import State, per_task
from bilevel.inner.base import InnerSolver
from bilevel.outcome import Solution, Status, code_if
from bilevel.space import tree
from bilevel.space.inner_product import Space
from bilevel.space.tree import PartialLeaves, Tree

_SCHEMES = ("symmetric", "forward")


@dataclasses.dataclass(frozen=True)
class Sides(State):
    """The minimizers of the two perturbed inner losses, both like the inner variable."""

    one: Tree = per_task()
    other: Tree = per_task()


@dataclasses.dataclass(frozen=True)
class FirstOrderCorrected(Estimator):
    """Finite difference of the perturbed value function, with common random numbers and equal budgets.

    Args:
        nu: the perturbation; None picks `default_nu` by dtype and scheme. -nu must leave the inner problem convex: nu <
            mu / L_f. Rounding adds an error of order eps / nu, truncation one of order nu^2 (nu for "forward").
        scheme: "symmetric" differences the two sides +nu and -nu, "forward" the sides 0 and nu.
        warm_sides: each side goes on from where it ended in the state, instead of both from `inner` or Problem.init.
            The two differ by O(nu), which a few steps from a common start do not build up; carried, they do. The
            forward scheme then is F2SA with 1 / nu as the penalty.

    State: `Sides` with the two inner variables when `warm_sides`, else None.

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
    warm_sides: bool = False

    def __post_init__(self) -> None:
        if self.nu is not None and (not isinstance(self.nu, (int, float)) or not 0 < self.nu < float("inf")):
            raise ValueError(f"FirstOrderCorrected was given nu={self.nu!r}; None or a positive number was needed")
        if self.scheme not in _SCHEMES:
            raise ValueError(
                f"FirstOrderCorrected was given scheme={self.scheme!r}; one of {', '.join(map(repr, _SCHEMES))} was "
                f"needed"
            )

    sees = frozenset({Path.INNER_LOSS, Path.OUTER_LOSS})

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        order = "nu^2" if self.scheme == "symmetric" else "nu"
        return f"off by O({order}) from the finite difference and by |y_K - y*| / nu before the inner solution"

    def init_state(self, instance: Instance) -> Sides | None:
        start = instance.oracles.start()
        return Sides(one=start, other=start) if self.warm_sides else None

    def estimate(self, instance: Instance, state: Sides | None) -> Estimate:
        instance.require_rest(self)
        oracles, dtype = instance.oracles, tree.tensors(instance.outer)[0].dtype
        nu = default_nu(dtype, self.scheme) if self.nu is None else self.nu
        up, down = (nu, -nu) if self.scheme == "symmetric" else (0.0, nu)
        # Each side is solved to a tolerance that dividing by nu leaves meaningful.
        solver = instance.solver.tightened(min(nu, 1.0), floor=4 * torch.finfo(dtype).eps)
        start = oracles.start()
        starts = (start, start) if state is None else (tree.detach(state.one), tree.detach(state.other))
        if not isinstance(instance.batches.inner, PerStep):
            oracles.embedding(0)  # drawn once, for both sides
        before = oracles.generators.peek()
        one = _side(instance, solver, up, starts[0])
        oracles.generators.set(before)
        other = _side(instance, solver, down, starts[1])
        with spans.span(spans.HYPERGRADIENT):
            width = up - down
            grad = _combined([(1 / width, one.g_x), (-1 / width, other.g_x)])
            if self.scheme == "symmetric":
                grad = tree.accumulate(grad, _combined([(0.5, one.f_x), (0.5, other.f_x)]))
                inner = tree.tree_map(lambda a, b: (a + b) / 2, one.found.inner, other.found.inner)
            else:
                grad, inner = tree.accumulate(grad, other.f_x), one.found.inner
            return instance.finish(
                dataclasses.replace(one.found, first_loss=None),
                grad,
                oracles.outer_loss(inner),
                inner=inner,
                codes=[
                    other.found.code,
                    *(instance.health(side.found, side.found.inner, side.found.last_loss) for side in (one, other)),
                    _unbounded(oracles.space, one, other, starts),
                ],
                stats={"inner_steps": one.found.steps + other.found.steps, "nu": nu},
                state=Sides(one=one.found.inner, other=other.found.inner) if self.warm_sides else None,
            )


def default_nu(dtype: torch.dtype, scheme: str) -> float:
    """The perturbation that balances truncation and rounding for losses and gradients of order one.

    Symmetric eps^(1/3) and forward eps^(1/2), rounded up to a power of ten, because noise from an inexact inner
    solve grows faster below than truncation does above: 1e-5 and 1e-7 in float64, 1e-2 and 1e-3 in float32, 0.1 in 16
    bits. tests/bilevel/test_conformance.py holds them to the best of a grid.
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


def _side(instance: Instance, solver: InnerSolver, nu: float, start: Tree) -> _Side:
    """Minimize g + nu f from `start` and take both partial derivatives in x there."""
    oracles = instance.oracles
    # (The loss after the last step is that of g alone, which says nothing about what the step on g + nu f gained.)
    found = dataclasses.replace(instance.solve(start, solver=solver, at=_perturbed(oracles, nu)), promised=None)
    with spans.span(spans.HYPERGRADIENT):
        _, g_x = oracles.inner_gradient_in_outer(found.inner, found.steps)
        _, f_x = oracles.outer_gradient_in_outer(found.inner)
    return _Side(found, g_x, f_x)


def _unbounded(space: Space, one: _Side, other: _Side, starts: tuple[Tree, Tree]) -> Tensor | int:
    """UNBOUNDED where a side's gradient has grown while the sides went apart: then it is nu that drove them.

    A side that has a minimum near comes to rest, and its gradient shrinks; in a loop whose steps are too long both
    sides run away alike.
    """

    def distance(a: Tree, b: Tree) -> Tensor:
        return space.norm([x - y for x, y in zip(tree.tensors(a), tree.tensors(b), strict=True)])

    grown = [side.found.grown for side in (one, other) if side.found.grown is not None]
    if not grown:
        return 0
    between = distance(one.found.inner, other.found.inner)
    moved = [distance(side.found.inner, start) for side, start in zip((one, other), starts, strict=True)]
    apart = between > 0.5 * torch.maximum(*moved)
    # Beyond rounding: a loop that starts at rest has a gradient of nothing.
    size = space.norm(tree.tensors(one.found.inner))
    away = (torch.stack(grown).amax(0) > _RUNAWAY) & apart & (between > 1e-3 * size)
    return code_if(away, Status.UNBOUNDED)


_RUNAWAY = 2.0
"""How many times its first norm the gradient of a perturbed loss must have for its loop to have run away."""


def _perturbed(oracles: Oracles, nu: float) -> Callable[[int], At]:
    """The inner problem of g + nu f."""

    def at(step: int) -> At:
        def gradient(inner: Tree, batch: Any) -> tuple[Tensor, PartialLeaves]:
            loss, g = oracles.inner_gradient(inner, step)
            if nu == 0:
                return loss, g
            # Two graphs one after the other, not one over both losses: the peak stays that of one gradient.
            # f draws without moving the stream, so that g's draws are those of a side that needs no f.
            after = oracles.generators.peek()
            f_loss, f = oracles.outer_gradient_in_inner(inner)
            oracles.generators.set(after)
            return loss + nu * f_loss, tuple(_plus(nu, a, b) for a, b in zip(f, g, strict=True))

        def value(inner: Tree, batch: Any) -> Tensor:
            return oracles.inner_value(inner, batch) + nu * oracles.outer_loss(inner)

        return At(step, oracles.embedding(step).value, gradient, value, oracles.source.along(graph=False))

    return at


def _plus(nu: float, f: Tensor | None, g: Tensor | None) -> Tensor | None:
    """g + nu f, where None is a tensor that a loss does not use."""
    if f is None:
        return g
    return nu * f if g is None else torch.add(g, f, alpha=nu)


def _combined(terms: list[tuple[float, PartialLeaves]]) -> PartialLeaves:
    total: PartialLeaves = (None,) * len(terms[0][1])
    for weight, leaves in terms:
        total = tree.accumulate(total, tuple(None if leaf is None else weight * leaf for leaf in leaves))
    return total
