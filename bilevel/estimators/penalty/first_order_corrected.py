"""First order with a correction: a finite difference of the perturbed value function. No second derivative anywhere.

    l_nu(x) = min_y g(y, x) + nu f(y, x),   y_nu its minimizer,   dl_nu/dx = dg/dx(y_nu) + nu df/dx(y_nu)      (Danskin)
    dF/dx = d/dnu (dl_nu/dx) at nu = 0
    symmetric:  (dl_nu/dx - dl_-nu/dx) / (2 nu)        forward:  (dl_nu/dx - dl_0/dx) / nu
    order p:    sum_j a_j dl_(j nu)/dx / nu, the stencils of perturbation.py

| scheme | inner gradients | outer gradients | HVPs | bias | memory |
| --- | --- | --- | --- | --- | --- |
| "symmetric" or 2 | 2 K + 2 | 2 K + 2 | 0 | O(nu^2) + O(delta / nu) | 3 P + 2 Q + one graph, independent of K |
| "forward" or 1 | 2 K + 2 | K + 2 | 0 | O(nu) + O(delta / nu) | the same |
| even p | p (K + 1) | p (K + 1) | 0 | O(nu^p) + O(delta / nu) | 4 P + 2 Q + one graph, independent of K and p |
| odd p > 1 | (p + 1) (K + 1) | p K + p + 1 | 0 | the same | the same |

delta: distance of the inner iterates from their minimizers. All sides start alike, take the same number of steps, see
the same batches and draw the same random numbers, so that delta is nearly common to them and cancels; with different
budgets the error blows up like delta / nu. Under a tolerance each side is solved to nu times that tolerance. With
`warm_sides` each side goes on from its own last solution, which is what F2SA does: few steps a call then suffice, where
sides that start alike have to build up their difference anew.

What is divided by nu is a sum of differences to one of the sides. A difference of two numbers that are within a factor
of two of each other is exact in any precision, so that a wider type would gain nothing; tests/bilevel/test_stencils.py
measures it.

Wins: no second derivative is at hand (fused kernels), or there is no memory for one; K reaches the solution.
Fails: sides that do not come to rest (delta / nu); 16-bit losses leave few digits of a difference.
References: Chayti and Jaggi 2024, arXiv 2409.03682 (proximal MAML, in which case this is strength (y_-nu - y_nu) /
(2 nu)); the general form and p > 2 after Chen et al., Faster Gradient Methods for Highly-Smooth Stochastic Bilevel
Optimization; F2SA is Kwon et al. 2023, A Fully First-Order Method for Stochastic Bilevel Optimization.
"""

import dataclasses

import torch
from torch import Tensor

from bilevel.batches import PerStep
from bilevel.engine import spans
from bilevel.estimators.base import Estimate, Estimator, Instance, Path
from bilevel.estimators.penalty.base import digits_left, perturbed, plus, times, unbounded
from bilevel.estimators.penalty.perturbation import Stencil, default_nu, order_of, stencil_of
from bilevel.estimators.state import State, per_task
from bilevel.inner.base import InnerSolver
from bilevel.outcome import Solution
from bilevel.space import tree
from bilevel.space.tree import PartialLeaves, Tree


@dataclasses.dataclass(frozen=True)
class Sides(State):
    """The minimizers of the perturbed inner losses, like the inner variable, in the order of the nodes."""

    sides: Tree = per_task()
    nodes: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class FirstOrderCorrected(Estimator):
    """Finite difference of the perturbed value function, with common random numbers and equal budgets.

    Args:
        nu: the perturbation; None picks `default_nu` by dtype (that of an autocast around the call, where one is open)
            and scheme. -nu must leave the inner problem convex: nu < mu / L_f, and for order p half of p times as much.
            Rounding adds an error of order eps / nu, truncation one of order nu^p. `best_nu` chooses it from the
            accuracy of the inner solves, `calibrated_nu` by measuring.
        scheme: "symmetric" differences the two sides +nu and -nu, "forward" the sides 0 and nu. An integer p is the
            order of a stencil: 2 and 1 are these two, 4 has the sides -2 nu, -nu, nu and 2 nu.
        warm_sides: each side goes on from where it ended in the state, instead of all from `inner` or Problem.init.
            They differ by O(nu), which a few steps from a common start do not build up; carried, they do. The
            forward scheme then is F2SA with 1 / nu as the penalty.

    State: `Sides` with the inner variables of all sides when `warm_sides`, else None.

    The adapted `hg.inner` is y_0 for odd orders, and within O(nu^p) of it for even ones, (y_nu + y_-nu) / 2 for
    "symmetric"; the losses are those at `hg.inner`.

    Memory: independent of K, and beyond p = 2 of p; with `warm_sides` p P more. Linear in T.

    Raises:
        ValueError: an argument is out of range, or (when used) x enters only through Problem.init or a hyper-parameter.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
        >>> def grad(scheme):
        ...     return bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(None, None),
        ...         solver=bl.Descent(bl.SGD(lr=0.25), steps=50), estimator=bl.FirstOrderCorrected(0.2, scheme)).grad
        >>> grad("symmetric")  # 0.25 h^2 / (h^2 - nu^2) with h = 2
        tensor(0.2525)
        >>> grad(4)  # exact: 0.25
        tensor(0.2499)
    """

    sharded = True

    nu: float | None = None
    scheme: str | int = "symmetric"
    warm_sides: bool = False

    def __post_init__(self) -> None:
        if self.nu is not None and (not isinstance(self.nu, (int, float)) or not 0 < self.nu < float("inf")):
            raise ValueError(f"FirstOrderCorrected was given nu={self.nu!r}; None or a positive number was needed")
        order_of(self.scheme)

    sees = frozenset({Path.INNER_LOSS, Path.OUTER_LOSS})

    @property
    def stencil(self) -> Stencil:
        """The nodes, as multiples of nu, and the weights."""
        return stencil_of(order_of(self.scheme))

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        order = order_of(self.scheme)
        power = "nu" if order == 1 else f"nu^{order}"
        return f"off by O({power}) from the finite difference and by |y_K - y*| / nu before the inner solution"

    def init_state(self, instance: Instance) -> Sides | None:
        start = instance.oracles.start()
        return Sides([start] * len(self.stencil.nodes), self.stencil.nodes) if self.warm_sides else None

    def estimate(self, instance: Instance, state: Sides | None) -> Estimate:
        instance.require_rest(self)
        if state is not None and tuple(state.nodes) != tuple(self.stencil.nodes):
            raise ValueError(
                f"FirstOrderCorrected(scheme={self.scheme!r}) has its sides at {list(self.stencil.nodes)} times nu and "
                f"was given the state of a scheme with sides at {list(state.nodes)}. Pass state=None to start afresh"
            )
        oracles, stencil, dtype = instance.oracles, self.stencil, _precision(tree.tensors(instance.outer)[0])
        nu = default_nu(dtype, self.scheme) if self.nu is None else self.nu
        # Each side is solved to a tolerance that dividing by nu leaves meaningful.
        solver = instance.solver.tightened(min(nu, 1.0), floor=4 * torch.finfo(dtype).eps)
        start = oracles.start()
        starts = [start] * len(stencil.nodes) if state is None else [tree.detach(side) for side in state.sides]
        if not isinstance(instance.batches.inner, PerStep):
            oracles.embedding(0)  # drawn once, for all sides
        before = oracles.generators.peek()
        first = _side(instance, solver, stencil.nodes[0] * nu, starts[0])
        inner, sides, steps = first.found.inner, [first.found.inner], first.found.steps
        codes: list[Tensor | int] = [_health(instance, first)]
        grad = times(stencil.nodes[0] * stencil.weights[0], first.f_x)
        calm = first.found.grown if stencil.nodes[0] else None  # of the side +nu
        for node, weight, share, begin in zip(*stencil.others, starts[1:], strict=True):
            oracles.generators.set(before)
            side = _side(instance, solver, node * nu, begin)
            with spans.span(spans.HYPERGRADIENT):
                # The weights sum to 0, the shares to 1: so all is a sum of differences to the first side.
                apart = tuple(plus(-1.0, a, b) for a, b in zip(first.g_x, side.g_x, strict=True))
                grad = tree.accumulate(grad, times(weight / nu, apart))
                grad = tree.accumulate(grad, times(node * weight, side.f_x))
                inner = _toward(inner, share, first.found.inner, side.found.inner)
                codes += [side.found.code, _health(instance, side)]
                codes.append(
                    unbounded(oracles.space, first.found, side.found, (starts[0], begin), calm, warm=state is not None)
                )
                calm = side.found.grown if calm is None else calm
                steps += side.found.steps
                if self.warm_sides:
                    sides.append(side.found.inner)
            del side, apart
        with spans.span(spans.HYPERGRADIENT):
            digits, rounded = digits_left(max(map(abs, stencil.weights)) / nu, first.g_x, grad)
            codes.append(rounded)
            return instance.finish(
                dataclasses.replace(first.found, first_loss=None),
                grad,
                oracles.outer_loss(inner),
                inner=inner,
                codes=codes,
                stats={"inner_steps": steps, "nu": nu, "digits": digits},
                state=Sides(sides, stencil.nodes) if self.warm_sides else None,
            )


def _precision(leaf: Tensor) -> torch.dtype:
    """The dtype that losses are computed in: that of an open autocast, or the variables' own."""
    kind = leaf.device.type
    reduced = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if reduced else leaf.dtype


@dataclasses.dataclass(frozen=True)
class _Side:
    found: Solution
    g_x: PartialLeaves
    f_x: PartialLeaves


def _side(instance: Instance, solver: InnerSolver, nu: float, start: Tree) -> _Side:
    """Minimize g + nu f from `start` and take both partial derivatives in x there."""
    oracles = instance.oracles
    # (The loss after the last step is that of g alone, which says nothing about what the step on g + nu f gained.)
    found = dataclasses.replace(instance.solve(start, solver=solver, at=perturbed(oracles, nu)), promised=None)
    with spans.span(spans.HYPERGRADIENT):
        _, g_x = oracles.inner_gradient_in_outer(found.inner, found.steps)
        _, f_x = oracles.outer_gradient_in_outer(found.inner)
    return _Side(found, g_x, f_x)


def _health(instance: Instance, side: _Side) -> Tensor:
    return instance.health(side.found, side.found.inner, side.found.last_loss)


def _toward(total: Tree, share: float, here: Tree, there: Tree) -> Tree:
    """total + share (there - here)."""
    return total if share == 0 else tree.tree_map(lambda t, a, b: t + share * (b - a), total, here, there)
