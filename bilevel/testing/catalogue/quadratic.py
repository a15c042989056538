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
        cls,
        steps: int,
        *,
        eigenvalues: tuple[float, ...] = (0.5, 0.8, 1.3, 2.0),
        outer: int = 3,
        rate: float = 0.8,
        seed: int = 0,
    ) -> "Quadratic":
        """One with the given eigenvalues of H. Where one is 0, all vectors lie in the range of H."""
        generator, size = torch.Generator().manual_seed(seed), len(eigenvalues)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        basis = torch.linalg.qr(normal(size, size)).Q
        values = torch.tensor(eigenvalues, dtype=torch.float64)
        kept = basis @ torch.diag((values != 0).double()) @ basis.T
        H = basis @ torch.diag(values) @ basis.T
        C, t, start = kept @ normal(size, outer), kept @ normal(size), kept @ normal(size)
        return cls(H, C, t, normal(outer), normal(outer), start, rate, steps)

    def posed(self, dtype: torch.dtype = torch.float64, tasks: int | None = None) -> dict[str, Any]:
        """The arguments of `bilevel.hypergradient` but for the estimator: trees of several tensors.

        With tasks, task i is `of_task(i)`.
        """
        H, C, d = (each.to(dtype) for each in (self.H, self.C, self.d))

        def joined(tree: dict[str, Tensor]) -> Tensor:
            return torch.cat([leaf.reshape(-1) for leaf in tree.values()])

        def split(vector: Tensor) -> dict[str, Tensor]:
            parts = {"a": vector[:2].reshape(-1, 1).to(dtype), "b": vector[2:].to(dtype)}
            return {name: part for name, part in parts.items() if part.numel()}

        def inner_loss(y: Any, x: Any, batch: Any) -> Tensor:
            z = joined(y)
            return z @ H @ z / 2 - z @ C @ joined(x)

        def outer_loss(y: Any, x: Any, batch: Any) -> Tensor:
            return (joined(y) - batch).square().sum() / 2 + d @ joined(x)

        targets, start = self.t.to(dtype), split(self.start)
        marker = torch.zeros((), dtype=dtype)
        if tasks is not None:
            targets = torch.stack([self.of_task(i).t for i in range(tasks)]).to(dtype)
            start = {name: leaf.expand(tasks, *leaf.shape) for name, leaf in start.items()}
            marker = marker.expand(tasks)
        return {
            "problem": bl.Problem(inner_loss, outer_loss),
            "outer": split(self.x),
            "inner": start,
            "batches": bl.Batches(marker, targets),
            "solver": bl.Descent(bl.SGD(self.rate), self.steps),
        }

    def of_task(self, task: int) -> "Quadratic":
        """The same with another target."""
        return dataclasses.replace(self, t=(1 + task) * self.t)

    @functools.cached_property
    def solution(self) -> Tensor:
        """y*."""
        return torch.linalg.pinv(self.H) @ self.C @ self.x

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
        return self.gradient(torch.linalg.pinv(self.H), y)

    def mapped(self, function: Any) -> Tensor:
        """function(h) of H's eigenvalues, as a matrix: a bias that scales each direction of curvature."""
        values, vectors = torch.linalg.eigh(self.H)
        return vectors @ torch.diag(function(values)) @ vectors.T
