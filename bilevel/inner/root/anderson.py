"""Anderson acceleration: the last iterates, mixed so that their residuals nearly cancel.

    r = -rate F(y)        gamma = argmin |r - dR gamma|^2 + ridge tr(dR'dR) |gamma|^2
    y <- y + r - (dY + dR) gamma        dY, dR: the last m differences of y and r

| | calls of F | memory |
| --- | --- | --- |
| step | 1 | 2 m P + 2 P, and m^2 dot products |

Wins: maps that contract slowly, or not quite; for a linear map and m at least its dimension it is GMRES.
Fails: far from a solution of a map that is not smooth.
References: Anderson 1965; Walker and Ni 2011 (recalled); for equilibrium layers Bai et al. 2019, arXiv 1909.01377.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from bilevel.inner import history
from bilevel.inner.dynamics import Products
from bilevel.inner.root.base import Method, check_rate
from bilevel.space.inner_product import Leaves, Space


@dataclasses.dataclass(frozen=True)
class Anderson(Method):
    """Anderson mixing, per task.

    `Unrolled` differentiates the mixing as it ran. Once y stands still the differences are rounding errors, and so is
    their derivative: unroll few steps, or take `Implicit`.

    Args:
        memory: m, the differences kept.
        rate: of the plain step that is mixed, positive.
        ridge: relative to the sum of squares of the differences, at least 0; never less than ten rounding errors.

    Raises:
        ValueError: an argument is out of range.

    Example:
        A map whose plain iterations diverge.

        >>> import torch, bilevel as bl
        >>> root = bl.inner.FixedPoint(lambda y, x, b: x - 3 * y, bl.inner.root.Anderson(memory=2))
        >>> problem = bl.Problem(lambda y, x, b: (4 * y - x) ** 2, lambda y, x, b: y)
        >>> bl.adapt(problem, torch.tensor(8.0), torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Converge(root, tol=1e-4)).inner
        tensor(2.0000)
    """

    memory: int = 5
    rate: float = 1.0
    ridge: float = 1e-10

    def __post_init__(self) -> None:
        history.check_memory("Anderson", self.memory)
        check_rate("Anderson", self.rate)
        if not isinstance(self.ridge, (int, float)) or isinstance(self.ridge, bool) or not 0 <= self.ridge < 1:
            raise ValueError(f"Anderson was given ridge={self.ridge!r}; a number from 0 to below 1 was needed")

    def init(self, y: Leaves) -> Any:
        zeros = tuple(torch.zeros_like(leaf) for leaf in y)
        return {"count": 0, "y": zeros, "r": zeros, "pairs": history.empty(y, self.memory)}

    def step(
        self, y: Leaves, residual: Leaves, state: Any, space: Space, jacobian: Callable[[], Products]
    ) -> tuple[Leaves, Any]:
        r, pairs = space.scaled(-self.rate, residual), state["pairs"]
        if state["count"]:
            dy, dr = history.minus(y, state["y"]), history.minus(r, state["r"])
            # A difference of two residuals that are alike to rounding says nothing.
            size = space.dot(r, r) + space.dot(state["r"], state["r"])
            eps = torch.finfo(size.dtype).eps
            pairs = history.pushed(space, space.dot(dr, dr) > (10 * eps) ** 2 * size, pairs, (dy, dr))
        moved = space.axpy(1.0, r, y)
        if state["count"]:
            rows = [[space.dot(a, b) for _, b in pairs] for _, a in pairs]
            gram = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
            right = torch.stack([space.dot(a, r) for _, a in pairs], dim=-1)
            trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
            ridge = max(self.ridge, 10 * torch.finfo(gram.dtype).eps)
            shift = torch.where(trace > 0, ridge * trace, 1.0)[..., None, None]
            eye = torch.eye(self.memory, dtype=gram.dtype, device=gram.device)
            gamma, _ = torch.linalg.solve_ex(gram + shift * eye, right.unsqueeze(-1))
            for i, (dy, dr) in enumerate(pairs):
                part = -gamma[..., i, 0]
                moved = space.axpy(part, dr, space.axpy(part, dy, moved))
        return moved, {"count": state["count"] + 1, "y": tuple(y), "r": r, "pairs": pairs}
