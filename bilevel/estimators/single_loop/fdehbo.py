"""FdeHBO: a single loop of first derivatives, with finite differences for both products and STORM on all three.

    H v = [c(y + s v) - c(y - s v)] / 2s,   M v = [dg/dx(y + s v) - dg/dx(y - s v)] / 2s;   c = dg/dy and weight decay
    d_y <- D_y + (1 - eta) (d_y - D_y(old)),   d_v and d_x likewise, from D_v and D_x of SOBA
    y <- y - a d_y,   v <- P_r(v - rho d_v),   x moves along d_x        P_r: onto the ball |v| <= r

| | inner gradients | HVPs | mixed | memory |
| --- | --- | --- | --- | --- |
| FdeHBO(rate), K steps of y, first round | K + 2 (3 for K = 0) | 0 | 0 | 6 P + 2 Q carried, one graph |
| later rounds | K + 5 | 0 | 0 | the same |

Each side of the difference is one backward for y and x at once. One outer gradient at the first round, two later; one
evaluation of g at the new y. Both sides, and both points, are of one batch and one set of random numbers.

Wins: operators without a second derivative (fused attention, compiled losses), at the cost of a few plain gradients.
Fails: where y moves far within the curvature's scale: the differences are off by O(width^2), and in 16 bits, where the
    width is large, that is much. x that acts through weight decay is not seen.
Reference: Yang, Xiao and Ji 2023, Achieving O(eps^-1.5) Complexity in Hessian/Jacobian-free Stochastic Bilevel
Optimization, arXiv 2312.03807 (recalled: formulas and identifier).
Differences from peers: the sides lie width (1 + |y|) from y whatever the size of v, so that a small v keeps its digits
in float32; the paper's distance is |v| times a constant.
"""

import dataclasses
import math

import torch
from torch import Tensor

from bilevel.batches import PerStep
from bilevel.engine import spans
from bilevel.engine.oracles import Oracles
from bilevel.estimators.base import Estimate, Estimator, Instance, Path
from bilevel.estimators.single_loop.base import (
    TOL,
    Rate,
    Slopes,
    advanced,
    begun,
    check_rate,
    check_tol,
    copied,
    counted,
    finished,
    gathered,
    judged,
    made,
    minus,
    moved,
    rate_at,
    recovered,
    spread,
    storm,
    template,
)
from bilevel.estimators.state import State, per_task
from bilevel.space import tree
from bilevel.space.inner_product import Space
from bilevel.space.tree import Leaves, PartialLeaves, Tree


@dataclasses.dataclass(frozen=True)
class Momenta(State):
    """y, v, the number of rounds; (y, v, x) of the round before, and d_y, d_v, d_x, the last in equal parts for each
    task.
    """

    inner: Tree = per_task()
    adjoint: Tree = per_task()
    rounds: Tensor = per_task(host=True)
    old_inner: Tree = per_task()
    old_adjoint: Tree = per_task()
    old_outer: Tree = per_task()
    inner_momentum: tuple[Tensor, ...] = per_task()
    adjoint_momentum: tuple[Tensor, ...] = per_task()
    outer_momentum: tuple[Tensor, ...] = per_task()


@dataclasses.dataclass(frozen=True)
class FdeHBO(Estimator):
    """One round of FdeHBO: returns d_x. No second derivative anywhere.

    `hg.inner` and the losses are at the y where the direction was taken, `hg.next_inner` is the y after the round.

    Bias: O(width^2), from the third derivative of g along v, plus O(eps / width) from rounding; none on a quadratic.
        Before rest, c1 |y - y*| + c2 |v - v*|.

    Args:
        rate: rho, the step size of v: a number, or a function of the round.
        eta: what is forgotten of the three directions before, in (0, 1]; likewise. 1 is SOBA by differences.
        radius: r, of the ball that v is kept in; `math.inf` for none. It must hold H^-1 df/dy, of which |df/dy| / mu is
            a bound; where it does not, the residual of v says so.
        width: half the distance of the two sides, as a part of 1 + |y|; None for eps^(1/3) of the dtype that losses are
            computed in: 6e-6 in float64, 5e-3 in float32.
        tol: on the relative residual of v, for the status only: above it MAX_STEPS.

    State: `Momenta`. As in SOBA, the y of a state goes before `inner`, and the inner optimizer starts anew each round.

    Memory: independent of K; linear in T.

    Raises:
        ValueError: an argument is out of range, the state does not fit, the inner optimizer does not say where it
            rests, or x enters only through Problem.init, a hyper-parameter or weight decay.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
        >>> state, data = None, bl.Batches(None, None)
        >>> for _ in range(40):
        ...     hg = bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), data, state=state,
        ...         solver=bl.Descent(bl.SGD(lr=0.25), steps=1), estimator=bl.estimators.FdeHBO(0.25, radius=10.0))
        ...     state = hg.state
        >>> round(hg.grad.item(), 3), hg.stats["calls"]["mixed"]
        (0.25, 0)
    """

    sharded = True

    rate: Rate
    eta: Rate = 0.5
    radius: float = math.inf
    width: float | None = None
    tol: float = TOL

    def __post_init__(self) -> None:
        check_rate("FdeHBO", "rate", self.rate)
        check_rate("FdeHBO", "eta", self.eta, 1.0)
        check_tol("FdeHBO", self.tol)
        if not isinstance(self.radius, (int, float)) or isinstance(self.radius, bool) or not self.radius > 0:
            raise ValueError(f"FdeHBO was given radius={self.radius!r}; a positive number, or math.inf, was needed")
        if self.width is not None:
            check_rate("FdeHBO", "width", self.width, 1.0)
            if callable(self.width):
                raise ValueError("FdeHBO was given a function as width; None or a positive number was needed")

    sees = frozenset({Path.INNER_LOSS, Path.OUTER_LOSS})

    @property
    def memory_growth(self) -> str:
        return "constant"

    @property
    def bias(self) -> str:
        return "off by O(width^2) from the finite differences; before y and v are at rest, by |y - y*| and |v - v*|"

    def init_state(self, instance: Instance) -> Momenta:
        y, v, rounds = template(instance)
        zeros, none = tuple(tree.tensors(v)), spread(instance, (None,) * len(tree.tensors(instance.outer)))
        return Momenta(y, v, rounds, y, v, copied(instance, instance.outer), zeros, zeros, none)

    def estimate(self, instance: Instance, state: Momenta | None) -> Estimate:
        instance.require_rest(self)
        y, v = begun(instance, state)
        count, oracles = made(state), instance.oracles
        rate, eta = rate_at("FdeHBO", "rate", self.rate, count), rate_at("FdeHBO", "eta", self.eta, count, 1.0)
        generators, space = oracles.generators, oracles.space
        before = generators.peek()
        with spans.span(spans.HYPERGRADIENT):
            at = self._slopes(instance, y, v)
            gradient, d_v, d_x = _gradient(at), at.residual, at.direction
            d_y, shift = gradient, None
            if state is not None and eta < 1:
                now = generators.peek()
                generators.set(before)
                there = dataclasses.replace(instance, outer=recovered(instance, state.old_outer))
                old = self._slopes(there, tree.detach(state.old_inner), _leaves(state.old_adjoint))
                generators.set(now)
                d_y = storm(gradient, eta, _leaves(state.inner_momentum), _gradient(old))
                d_v = _filled(storm(d_v, eta, _leaves(state.adjoint_momentum), old.residual), v)
                d_x = storm(d_x, eta, gathered(instance, state.outer_momentum), old.direction)
                shift = minus(d_y, gradient)
                del old
            after = _into_ball(space, moved(space, v, rate, d_v), self.radius)
            judgement = judged(space, v, at, rate, self.tol, after)
        found = advanced(instance, y, at, shift)
        with spans.span(spans.HYPERGRADIENT):
            begin = (found.inner, tree.like(y, after), counted(instance, state))
            last = (y, tree.like(y, v), copied(instance, instance.outer))
            carried = Momenta(*begin, *last, _filled(d_y, v), d_v, spread(instance, d_x))
            return finished(instance, found, at, d_x, judgement, carried, here=y, shift=shift)

    def _slopes(self, instance: Instance, y: Tree, v: Leaves) -> Slopes:
        """All of a round from first derivatives."""
        oracles = instance.oracles
        if not isinstance(instance.batches.inner, PerStep):
            oracles.embedding(0)  # drawn once, for both sides
        outer_loss, right, direct = oracles.outer_gradient(y)
        loss, gradient = oracles.inner_gradient(y, 0)
        width = _precision(v[0]) ** (1 / 3) if self.width is None else self.width
        image, mixed = _products(oracles, y, v, width)
        return Slopes(loss, tree.like(y, gradient), image, mixed, outer_loss, right, direct)


def _products(oracles: Oracles, y: Tree, v: Leaves, width: float) -> tuple[Leaves, PartialLeaves]:
    """(H v, M v) by one central difference along v."""
    space, generators, leaves = oracles.space, oracles.generators, tuple(tree.tensors(y))
    length = space.norm(v)
    step = width * (1 + space.norm(leaves)) / torch.where(length > 0, length, 1.0)
    before, sides = generators.peek(), []
    for sign in (1.0, -1.0):
        generators.set(before)
        side = tree.like(y, space.axpy(sign * step, v, leaves))
        # x is everyone's, and each task has a step of its own: so its weight goes into the backward.
        loss, in_y, in_x = oracles.inner_gradients(side, 1, weights=0.5 / step, apart=True)
        own = tree.like(y, [None if leaf is None else space.scaled(2 * step, [leaf])[0] for leaf in in_y])
        with torch.no_grad():
            rest = oracles.dynamics.stationarity(side, oracles.x, oracles.point(0).told(side, loss, own))
        sides.append((tuple(tree.flatten(tree.ordered(rest, side))[0]), in_x))
    (above, x_above), (below, x_below) = sides
    image = space.scaled(0.5 / step, _filled(minus(above, below), v))
    return image, minus(x_above, x_below)


def _into_ball(space: Space, v: Leaves, radius: float) -> Leaves:
    if radius == math.inf:
        return v
    length = space.norm(v)
    return space.scaled(torch.where(length > radius, radius / torch.where(length > 0, length, 1.0), 1.0), v)


def _gradient(at: Slopes) -> PartialLeaves:
    return tuple(tree.flatten(at.gradient)[0])


def _leaves(value: Tree) -> Leaves:
    return tuple(leaf.detach() for leaf in tree.tensors(value))


def _filled(leaves: PartialLeaves, like: Leaves) -> Leaves:
    return tuple(torch.zeros_like(b) if a is None else a for a, b in zip(leaves, like, strict=True))


def _precision(leaf: Tensor) -> float:
    """The rounding of the dtype that losses are computed in: that of an open autocast, or the variables' own."""
    kind = leaf.device.type
    reduced = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.finfo(torch.get_autocast_dtype(kind) if reduced else leaf.dtype).eps
