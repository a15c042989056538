"""The problem whose every hypergradient is known: a quadratic inner loss, gradient descent, in closed form.

g = y'Hy / 2 - y'C x,    f = |y - t|^2 / 2 + d'x,    y_{k+1} = y_k - a (H y_k - C x)

y* = H^-1 C x,    dy_K/dx = a sum_{j<K} (I - a H)^j C,    dF/dx = d + (dy/dx)' (y - t)
"""

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

import bilevel as bl


@dataclasses.dataclass(frozen=True)
class Quadratic:
    """A quadratic bilevel problem with its inner loop; all tensors of one dtype.

    Args:
        H: (P, P), symmetric.
        C: (P, Q).
        t: (P,).
        d: (Q,).
        x: (Q,).
        start: y_0, (P,).
        rate: a, the step size.
        steps: K.

    Example:
        >>> q = Quadratic.example(steps=400)
        >>> torch.allclose(q.program(), q.implicit(q.last))
        True
    """

    H: Tensor
    C: Tensor
    t: Tensor
    d: Tensor
    x: Tensor
    start: Tensor
    rate: float
    steps: int

    @classmethod
    def example(
        cls, steps: int, *, eigenvalues: tuple[float, ...] = (0.5, 0.8, 1.3, 2.0), seed: int = 0
    ) -> "Quadratic":
        """One with the given eigenvalues of H and three outer numbers."""
        generator, size = torch.Generator().manual_seed(seed), len(eigenvalues)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        basis = torch.linalg.qr(normal(size, size)).Q
        H = basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T
        return cls(H, normal(size, 3), normal(size), normal(3), normal(3), normal(size), 0.4, steps)

    def posed(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        """The arguments of `bilevel.hypergradient` but for the estimator: trees of several tensors."""
        H, C, t, d = (each.to(dtype) for each in (self.H, self.C, self.t, self.d))

        def joined(tree: dict[str, Tensor]) -> Tensor:
            return torch.cat([tree["a"].reshape(-1), tree["b"]])

        def inner_loss(y: Any, x: Any, batch: Any) -> Tensor:
            z = joined(y)
            return z @ H @ z / 2 - z @ C @ joined(x)

        def outer_loss(y: Any, x: Any, batch: Any) -> Tensor:
            return (joined(y) - t).square().sum() / 2 + d @ joined(x)

        return {
            "problem": bl.Problem(inner_loss, outer_loss),
            "outer": {"a": self.x[:1].to(dtype), "b": self.x[1:].to(dtype)},
            "inner": {"a": self.start[:2].reshape(2, 1).to(dtype), "b": self.start[2:].to(dtype)},
            "batches": bl.Batches(None, None),
            "solver": bl.Descent(bl.SGD(self.rate), self.steps),
        }

    @functools.cached_property
    def solution(self) -> Tensor:
        """y*."""
        return torch.linalg.solve(self.H, self.C @ self.x)

    @functools.cached_property
    def last(self) -> Tensor:
        """y_K."""
        return self.solution + torch.linalg.matrix_power(self.A, self.steps) @ (self.start - self.solution)

    @property
    def A(self) -> Tensor:
        """I - a H, the derivative of a step."""
        return torch.eye(len(self.H), dtype=self.H.dtype) - self.rate * self.H

    def gradient(self, inverse: Tensor, y: Tensor) -> Tensor:
        """d + C' inverse' (y - t), where `inverse` stands in the place of H^-1."""
        return self.d + self.C.T @ inverse.T @ (y - self.t)

    def series(self, terms: int) -> Tensor:
        """a sum_{j<terms} (I - a H)^j: what so many steps, or terms of Neumann's series, make of H^-1."""
        powers = [torch.linalg.matrix_power(self.A, j) for j in range(terms)]
        return self.rate * sum(powers, torch.zeros_like(self.H))

    def program(self) -> Tensor:
        """dF/dx of the K-step program."""
        return self.gradient(self.series(self.steps), self.last)

    def implicit(self, y: Tensor) -> Tensor:
        """The implicit hypergradient at y."""
        return self.gradient(torch.linalg.inv(self.H), y)

    def mapped(self, function: Any) -> Tensor:
        """function(h) of H's eigenvalues, as a matrix: a bias that scales each direction of curvature."""
        values, vectors = torch.linalg.eigh(self.H)
        return vectors @ torch.diag(function(values)) @ vectors.T
