"""Quadratic problems, with everything in closed form: for tests, for documentation, and to see an estimator's bias.

    g(y, x) = 1/2 y'Hy - y'Cx        f(y, x) = 1/2 |y - a|^2 + c |x|^2        H symmetric positive definite

With R = I - lr H, gradient descent from y_0 with step size lr gives

    y*   = H^-1 C x                                dF/dx           = 2c x + C'H^-1 (y* - a)
    y_K  = R^K y_0 + (I - R^K) y*                  its K-step form = 2c x + C'H^-1 (I - R^K) (y_K - a)

`random` draws one; `scalar` is the one-dimensional problem with round numbers that the literature's estimators can be
checked on by hand: H = 2, C = 1, a = 0, c = 0 at x = 1 has the hypergradient 0.25; four steps of size 0.25 from 0 reach
0.46875, and their derivative is 0.2197265625.
"""

import dataclasses

import torch
from torch import Tensor

import bilevel as bl


@dataclasses.dataclass(frozen=True, eq=False)
class Quadratic:
    """One quadratic problem and its closed forms. All tensors share one dtype and device.

    Args:
        hessian: H, shape [P, P], symmetric positive definite.
        coupling: C, shape [P, Q].
        target: a, shape [P].
        outer: the x to begin with, shape [Q].
        penalty: c.

    Raises:
        ValueError: the shapes do not fit together.

    Example:
        >>> quadratic = scalar()
        >>> quadratic.hypergradient(quadratic.outer)
        tensor([0.2500], dtype=torch.float64)
    """

    hessian: Tensor
    coupling: Tensor
    target: Tensor
    outer: Tensor
    penalty: float = 0.0

    def __post_init__(self) -> None:
        p, q = self.coupling.shape
        if self.hessian.shape != (p, p) or self.target.shape != (p,) or self.outer.shape != (q,):
            raise ValueError(
                f"Quadratic was given hessian {tuple(self.hessian.shape)}, coupling {(p, q)}, target "
                f"{tuple(self.target.shape)} and outer {tuple(self.outer.shape)}; [P, P], [P, Q], [P] and [Q] were "
                f"needed"
            )

    def solution(self, outer: Tensor) -> Tensor:
        """y*(x), shape [P]."""
        return torch.linalg.solve(self.hessian, self.coupling @ outer)

    def value(self, outer: Tensor) -> Tensor:
        """F(x) = f(y*(x), x), a 0-dim tensor."""
        return outer_loss(self.solution(outer), outer, (self.target, self.penalty))

    def hypergradient(self, outer: Tensor) -> Tensor:
        """dF/dx at y*(x), shape [Q]."""
        return self.solve_hypergradient(outer, self.solution(outer))

    def solve_hypergradient(self, outer: Tensor, inner: Tensor) -> Tensor:
        """What implicit differentiation with an exact linear solve returns at a y that need not be y*, shape [Q].

        It is 2c x + C'H^-1 (y - a).
        """
        return 2 * self.penalty * outer + self.coupling.mT @ torch.linalg.solve(self.hessian, inner - self.target)

    def iterate(self, outer: Tensor, inner: Tensor, lr: float, steps: int) -> Tensor:
        """y_K: K steps of gradient descent on g from `inner`, shape [P]."""
        limit = self.solution(outer)
        return limit + self._contraction(lr, steps) @ (inner - limit)

    def unrolled_hypergradient(
        self, outer: Tensor, inner: Tensor, lr: float, steps: int, last: int | None = None
    ) -> Tensor:
        """The derivative of f(y_K(x), x) through the last `last` of K steps (None: all of them), shape [Q].

        A Neumann series with `last` terms and step size lr, evaluated at y_K, is the same number.
        """
        seen = steps if last is None else min(last, steps)
        error = self.iterate(outer, inner, lr, steps) - self.target
        return 2 * self.penalty * outer + self.coupling.mT @ torch.linalg.solve(
            self.hessian, error - self._contraction(lr, seen) @ error
        )

    def rate_derivative(self, outer: Tensor, inner: Tensor, lr: float, steps: int) -> Tensor:
        """The derivative of f(y_K, x) in the step size lr, a 0-dim tensor."""
        if steps == 0:
            return torch.zeros_like(self.target[0])
        moved = -steps * self.hessian @ (self._contraction(lr, steps - 1) @ (inner - self.solution(outer)))
        return torch.dot(self.iterate(outer, inner, lr, steps) - self.target, moved)

    def pose(self) -> tuple[bl.Problem, Tensor, Tensor, bl.Batches]:
        """`(problem, outer, inner, batches)`, with y starting at 0. The batches hold (H, C) and (a, c)."""
        outer = self.outer.detach().clone().requires_grad_()
        batches = bl.Batches(inner=(self.hessian, self.coupling), outer=(self.target, self.penalty))
        return bl.Problem(inner_loss, outer_loss), outer, torch.zeros_like(self.target), batches

    def _contraction(self, lr: float, steps: int) -> Tensor:
        """(I - lr H)^steps."""
        return torch.linalg.matrix_power(torch.eye(len(self.hessian)).to(self.hessian) - lr * self.hessian, steps)


def inner_loss(inner: Tensor, outer: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Inner loss g = 1/2 y'Hy - y'Cx, with the batch (H, C)."""
    hessian, coupling = batch
    return 0.5 * torch.dot(inner, hessian @ inner) - torch.dot(inner, coupling @ outer)


def outer_loss(inner: Tensor, outer: Tensor, batch: tuple[Tensor, float]) -> Tensor:
    """Outer loss f = 1/2 |y - a|^2 + c |x|^2, with the batch (a, c)."""
    target, penalty = batch
    return 0.5 * (inner - target).pow(2).sum() + penalty * outer.pow(2).sum()


def scalar(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64) -> Quadratic:
    """The scalar problem: g = y^2 - x y and f = y^2 / 2 at x = 1.

    Example:
        >>> import torch
        >>> scalar().unrolled_hypergradient(torch.ones(1).double(), torch.zeros(1).double(), lr=0.25, steps=4).item()
        0.2197265625
    """

    def tensor(value: list[float] | list[list[float]]) -> Tensor:
        return torch.tensor(value, dtype=dtype, device=device)

    return Quadratic(tensor([[2.0]]), tensor([[1.0]]), tensor([0.0]), tensor([1.0]))


def random(
    device: torch.device | str = "cpu",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    *,
    inner_size: int = 6,
    outer_size: int = 4,
    condition: float = 10.0,
    penalty: float = 0.05,
) -> Quadratic:
    """A random problem whose Hessian has the eigenvalues 1/condition .. 1, evenly spaced on a log scale.

    Gradient descent converges for every lr below 2, CG is exact after `inner_size` steps.

    Args:
        device: of all tensors.
        seed: of the eigenvectors, C, a and x, which are drawn on the CPU in float64: the same everywhere up to
            rounding.
        dtype: of all tensors.
        inner_size: P.
        outer_size: Q.
        condition: of H, at least 1.
        penalty: c.

    Raises:
        ValueError: a size is smaller than 1, or `condition` smaller than 1.

    Source:
        The analytic test of memory-reduced meta-learning (Yang, Ma, Yu, arXiv 2412.12030) with c = 0.05.
    """
    if inner_size < 1 or outer_size < 1 or not condition >= 1:
        raise ValueError(
            f"quadratic.random() was given inner_size={inner_size}, outer_size={outer_size}, condition={condition}; at "
            f"least 1 was needed for each"
        )
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    basis = torch.linalg.qr(normal(inner_size, inner_size)).Q
    values = condition ** (torch.linspace(0, 1, inner_size, dtype=torch.float64) - 1)
    hessian = (basis * values) @ basis.mT
    parts = [(hessian + hessian.mT) / 2, normal(inner_size, outer_size), normal(inner_size), normal(outer_size)]
    hessian, coupling, target, outer = (part.to(device=device, dtype=dtype) for part in parts)
    return Quadratic(hessian, coupling, target, outer, penalty)


def setup(
    device: torch.device | str = "cpu",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    *,
    inner_size: int = 6,
    outer_size: int = 4,
    condition: float = 10.0,
    penalty: float = 0.05,
) -> tuple[bl.Problem, Tensor, Tensor, bl.Batches]:
    """`(problem, outer, inner, batches)` of `random(...)` with the same arguments.

    Example:
        >>> problem, outer, inner, batches = setup()
        >>> hg = bl.hypergradient(problem, outer, inner, batches,
        ...     solver=bl.Descent(bl.SGD(lr=1.0), steps=50), estimator=bl.Unrolled())
        >>> bool((hg.grad - random().unrolled_hypergradient(outer.detach(), inner, 1.0, 50)).abs().max() < 1e-12)
        True
    """
    return random(
        device, seed, dtype, inner_size=inner_size, outer_size=outer_size, condition=condition, penalty=penalty
    ).pose()
