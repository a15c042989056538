"""Broyden's method: an inverse Jacobian that is learned from the steps, a rank-one term each.

    B_0 = rate I        y <- y - B F(y)
    B <- B + (dy - B dF) (B' dy)' / <dy, B dF>        dy, dF: the last differences of y and F

| | calls of F | memory |
| --- | --- | --- |
| step | 1 | 2 m P + 2 P |

After m terms it begins again from B_0. Of an update that would leave the Jacobian all but singular a part is made.

Wins: equations without a cheap Jacobian. Fails: far from a root; more unknowns that matter than m.
References: Broyden 1965; the part of an update More and Trangenstein 1976 (recalled); for equilibrium layers Bai et al.
2019, arXiv 1909.01377. Differences from peers: theirs overwrite the oldest term, on which the others were made.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from bilevel.inner import history
from bilevel.inner.dynamics import Products
from bilevel.inner.root.base import Method, check_rate
from bilevel.space.inner_product import Leaves, Space

_REGULAR = 0.1
"""The least that a whole update may leave of the Jacobian along its step."""


@dataclasses.dataclass(frozen=True)
class Broyden(Method):
    """Broyden's good update in limited memory, per task.

    `Unrolled` differentiates the updates as they ran, with the limits that `Anderson` has.

    Args:
        memory: m, the rank-one terms kept.
        rate: of the first, plain step, positive.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> root = bl.inner.Root(lambda y, x, b: y**3 + y - x, bl.inner.root.Broyden(rate=0.2))
        >>> problem = bl.Problem(bl.inner.half_square(root.residual), lambda y, x, b: y)
        >>> hg = bl.hypergradient(problem, torch.tensor(10.0), torch.tensor(1.0), bl.Batches(None, None),
        ...     solver=bl.Converge(root, tol=1e-4), estimator=bl.Implicit(bl.Dense()))
        >>> hg.inner, hg.grad  # 1 / (3 y^2 + 1)
        (tensor(2.0000), tensor(0.0769))
    """

    memory: int = 20
    rate: float = 1.0

    def __post_init__(self) -> None:
        history.check_memory("Broyden", self.memory)
        check_rate("Broyden", self.rate)

    def init(self, y: Leaves) -> Any:
        zeros = tuple(torch.zeros_like(leaf) for leaf in y)
        return {"count": 0, "y": zeros, "residual": zeros, "pairs": history.empty(y, self.memory)}

    def step(
        self, y: Leaves, residual: Leaves, state: Any, space: Space, jacobian: Callable[[], Products]
    ) -> tuple[Leaves, Any]:
        pairs = state["pairs"]
        if state["count"]:
            dy, change = history.minus(y, state["y"]), history.minus(residual, state["residual"])
            # (Terms are made on top of each other: without the first, the others are wrong.)
            full = space.dot(pairs[0][1], pairs[0][1]) > 0
            pairs = tuple((space.where(~full, u), space.where(~full, v)) for u, v in pairs)
            guessed = self._product(space, pairs, change)
            size = space.dot(dy, dy)
            moves = size > (100 * torch.finfo(size.dtype).eps) ** 2 * space.dot(y, y)
            bend = space.dot(dy, guessed) * history.inverse(size, moves)
            # A whole update where that leaves the Jacobian regular, else a part of it.
            limit = torch.where(bend < 0, -_REGULAR, _REGULAR)
            part = torch.where(bend.abs() < _REGULAR, (1 - limit) / (1 - bend.clamp(-0.5, 0.5)), 1.0)
            weight = part * history.inverse(size * (1 - part + part * bend), moves)
            u = space.scaled(weight, history.minus(dy, guessed))
            v = self._product(space, tuple((v, u) for u, v in pairs), dy)
            pairs = history.pushed(space, moves, pairs, (u, v))
        moved = space.axpy(-1.0, self._product(space, pairs, residual), y)
        return moved, {"count": state["count"] + 1, "y": tuple(y), "residual": tuple(residual), "pairs": pairs}

    def _product(self, space: Space, terms: history.Pairs, w: Leaves) -> Leaves:
        """rate w + the sum of u <v, w>."""
        found = space.scaled(self.rate, w)
        for u, v in terms:
            found = space.axpy(space.dot(v, w), u, found)
        return found
