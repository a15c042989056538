"""Limited-memory BFGS: steps along the inner gradient, bent by the curvature that the last steps have met.

    d = -H_k dg/dy       by the two-loop recursion over the last m pairs  s = y_{k+1} - y_k,  r = dg_{k+1} - dg_k
    y <- y + t d         t = lr, in the first step min(1, 1 / |dg/dy|_1) lr; or by a line search that begins there

| | inner gradients | inner losses | memory |
| --- | --- | --- | --- |
| step | 1 (and the search's) | the search's | 2 m P + 2 P + one graph |

Wins: smooth, ill-conditioned inner problems of one full batch, solved to a tight tolerance in tens of steps.
Fails: minibatches (PerStep), whose differences of gradients are noise; kinks, for which see ProximalGradient.
Reference: Liu and Nocedal 1989 (recalled). Differences from peers: the steps are a pure function of y and the pairs, so
that they are differentiated as they ran and mapped over tasks. Steps are those of torch.optim.LBFGS, which works in
place and by closures; its search interpolates, and which pairs it leaves out depends on units.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bilevel.inner import history
from bilevel.inner.dynamics import Dynamics, Point
from bilevel.inner.search.base import LineSearch
from bilevel.optim.base import Hyper, gradients, value_of
from bilevel.space import tree
from bilevel.space.inner_product import Leaves, Space
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class LBFGS(Dynamics):
    """L-BFGS steps on the inner loss.

    It rests where the inner gradient is zero, whatever the pairs: estimators at the solution need nothing of them.
    `Unrolled` differentiates the steps and the pairs as they ran; a length that a search has found counts as a
    constant, which it is almost everywhere. The steps come to a solution sooner than their derivative does: where y is
    right to 5e-5, the hypergradient of the K steps may be 3e-3 off that of the solution. stats["cotangent_left"], the
    part that still hangs on the start, bounds what is off in practice; with `Converge` more than 1% of it is
    Status.STOPPED_EARLY. Take more steps, or `Implicit`. FirstOrderCorrected refuses it.

    Args:
        memory: m, the pairs kept.
        lr: the length of a step, or the one that a search tries first; a number, or a function of outer that returns a
            number or a 0-dim tensor.
        search: None for the length lr, which need not descend; `Armijo()` or `Wolfe()`.
        floor: pairs with <s, r> at or below this part of |s| |r| are left out: from 0 to below 1. (torch.optim.LBFGS
            leaves out those with <s, r> <= 1e-10, in whatever units.)

    Memory: the state holds 2 m + 2 vectors; Unrolled("iterates") keeps that for every step.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> h = torch.tensor([1.0, 100.0])
        >>> problem = bl.Problem(lambda y, x, b: (h * (y - x) ** 2).sum() / 2, lambda y, x, b: (y**2).sum() / 2)
        >>> hg = bl.hypergradient(problem, torch.tensor([2.0, 1.0]), torch.zeros(2), bl.Batches(None, None),
        ...     solver=bl.Converge(bl.inner.LBFGS(search=bl.inner.Wolfe()), tol=1e-4),
        ...     estimator=bl.Implicit(bl.CG(10)))
        >>> hg.grad, hg.status.name
        (tensor([2.0000, 1.0000]), 'OK')
    """

    sharded = True

    memory: int = 10
    lr: Hyper = 1.0
    search: LineSearch | None = None
    floor: float = 1e-10

    def __post_init__(self) -> None:
        history.check_memory("LBFGS", self.memory)
        number = isinstance(self.lr, (int, float)) and not isinstance(self.lr, bool) and 0 < self.lr < float("inf")
        if not callable(self.lr) and not number:
            raise ValueError(
                f"LBFGS was given lr={self.lr!r}; a positive number, or a function of outer that returns one, was "
                f"needed"
            )
        if self.search is not None and not isinstance(self.search, LineSearch):
            raise TypeError(
                f"LBFGS was given search={self.search!r}; None, or a line search such as bilevel.inner.Wolfe(), was "
                f"needed"
            )
        if not isinstance(self.floor, (int, float)) or not 0 <= self.floor < 1:
            raise ValueError(f"LBFGS was given floor={self.floor!r}; a number from 0 to below 1 was needed")

    @property
    def symmetric(self) -> bool:
        return True

    @property
    def autonomous(self) -> bool:
        return True

    @property
    def reads_outer(self) -> bool:
        return callable(self.lr)

    def init(self, inner: Tree, outer: Tree) -> Any:
        y = tree.tensors(inner)
        zeros = tuple(torch.zeros_like(leaf) for leaf in y)
        return {"count": 0, "inner": zeros, "gradient": zeros, "pairs": history.empty(y, self.memory)}

    def step(self, inner: Tree, state: Any, outer: Tree, at: Point) -> tuple[Tree, Any]:
        y, space = tree.tensors(inner), at.space
        g = tuple(
            torch.zeros_like(leaf) if slope is None else slope
            for leaf, slope in zip(y, gradients(at.gradient(inner), inner), strict=True)
        )
        pairs = state["pairs"]
        if state["count"]:
            s, r = history.minus(y, state["inner"]), history.minus(g, state["gradient"])
            pairs = history.pushed(space, self._accepted(space, s, r, y), pairs, (s, r))
        direction = self._direction(space, g, pairs)
        length = self._length(inner, direction, g, outer, at, first=not state["count"])
        moved = space.axpy(length, direction, y)
        after = {"count": state["count"] + 1, "inner": tuple(y), "gradient": g, "pairs": pairs}
        return tree.like(inner, moved), after

    def stationarity(self, inner: Tree, outer: Tree, at: Point) -> Tree | None:
        return at.gradient(inner)

    def _accepted(self, space: Space, s: Leaves, r: Leaves, y: list[Tensor]) -> Tensor:
        """Where a pair shows curvature, and is more than the rounding errors of y."""
        ss, rr, yy, eps = space.dot(s, s), space.dot(r, r), space.dot(y, y), torch.finfo(y[0].dtype).eps
        return (space.dot(s, r) > self.floor * (ss * rr).sqrt()) & (ss > (100 * eps) ** 2 * yy)

    def _direction(self, space: Space, g: Leaves, pairs: history.Pairs) -> Leaves:
        """-H g by the two-loop recursion; empty pairs add nothing."""
        q, parts = space.scaled(-1.0, g), []
        curvatures = [space.dot(s, r) for s, r in pairs]
        weights = [history.inverse(curvature, curvature > 0) for curvature in curvatures]
        for (s, r), weight in zip(reversed(pairs), reversed(weights), strict=True):
            part = weight * space.dot(s, q)
            q = space.axpy(-part, r, q)
            parts.append(part)
        last = curvatures[-1]
        square = space.dot(pairs[-1][1], pairs[-1][1])
        q = space.scaled(torch.where(last > 0, last * history.inverse(square, square > 0), 1.0), q)
        for (s, r), weight, part in zip(pairs, weights, reversed(parts), strict=True):
            q = space.axpy(part - weight * space.dot(r, q), s, q)
        return q

    def _length(self, inner: Tree, direction: Leaves, g: Leaves, outer: Tree, at: Point, *, first: bool) -> Tensor:
        slope = at.space.dot(g, direction)
        length = torch.ones_like(slope) * value_of(self.lr, outer)
        if length.shape != slope.shape:
            raise ValueError(
                f"lr of LBFGS has the shape {tuple(length.shape)}; a number or a 0-dim tensor was needed (a direction "
                f"has one length)"
            )
        if first:
            size = at.space.dot([leaf.abs() for leaf in g], [torch.ones_like(leaf) for leaf in g])
            length = length * torch.where(size > 1, history.inverse(size, size > 1), 1.0)
        return length if self.search is None else length * self.search.multiple(inner, direction, slope, length, at)
