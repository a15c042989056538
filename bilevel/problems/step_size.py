"""Tuning the step size of T steps of gradient descent, on a quadratic with everything in closed form.

    w_{i+1} = w_i - eta H w_i,   F(eta) = 1/2 w_T' H w_T,   G(eta) = log F(eta) / T

F falls below the smallest number of float32 (it is 1e-178 at the best eta of 400 steps here) or exceeds the largest,
and with it backpropagation through log F: NaN, or a gradient of 0 where F = inf. G' is of order one everywhere. Steps
that divide by their own length, and remember its logarithm, stay in range and have exactly the gradient of G:

    v_{i+1} = (I - eta H) v_i / s_i,   s_i = |(I - eta H) v_i| as a constant,   G = (log f(v_T) + 2 sum log s_i) / T

because f is homogeneous of degree 2, and the s_i may be any constants.

Reference: Wang, Yuan, Wu and Ge 2021, Guarantees for Tuning the Step Size using a Learning-to-Learn Approach, arXiv
2006.16495, and its released code, which cancels a scale in the closed form of G'; that the scales may be constants of
backpropagation is our addition.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import bilevel as bl

Scaled = dict[str, Tensor]
"""`point`, a vector, and `log_scale`, 0-dim: they stand for exp(log_scale) point."""


@dataclasses.dataclass(frozen=True)
class Rescaled(bl.inner.Dynamics):
    """Gradient steps on {"point": vector, "log_scale": 0-dim}, rescaled to length one after each.

    Only for inner losses that are homogeneous of degree 2 in the point (quadratics around 0): the gradient at a scaled
    point is then the scaled gradient. Wrong for others.

    Args:
        rate: the step size as a function of outer; outer itself by default.

    Raises:
        ValueError: (when used) the inner variable has other entries.

    Example:
        >>> import torch, bilevel as bl
        >>> problem, eta, inner, batches = setup(rate=3.0, dtype=torch.float32)  # F is 1e111, beyond float32
        >>> hg = bl.hypergradient(problem, eta, inner, batches, solver=bl.Descent(Rescaled(), steps=80),
        ...     estimator=bl.Unrolled())
        >>> round(hg.grad.item(), 6), round(hg.outer_loss.item(), 4)
        (0.8, 3.2189)
    """

    rate: Callable[[Any], Tensor] = lambda outer: outer

    def step(self, inner: Scaled, state: Any, outer: Any, at: Any) -> tuple[Scaled, Any]:
        if not isinstance(inner, dict) or set(inner) != {"point", "log_scale"}:
            raise ValueError(
                "Rescaled moves an inner variable {'point': vector, 'log_scale': 0-dim tensor}; write inner={'point': "
                "y, 'log_scale': torch.zeros(())}"
            )
        moved = inner["point"] - self.rate(outer) * at.gradient(inner)["point"]
        length = torch.linalg.vector_norm(moved.detach(), dim=-1)
        scale = torch.where(length > 0, length, 1.0)  # what has arrived stays there
        return {"point": moved / scale.unsqueeze(-1), "log_scale": inner["log_scale"] + scale.log()}, state


@dataclasses.dataclass(frozen=True, eq=False)
class StepSize:
    """One problem and its closed forms, for a diagonal H.

    Args:
        curvatures: the eigenvalues of H, shape [P], positive.
        start: w_0 in their basis, shape [P].
        steps: T >= 1.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> known = StepSize(torch.tensor([2.0, 0.5]).double(), torch.ones(2).double(), 80)
        >>> round(known.value(0.5).item(), 4), round(known.slope(0.5).item(), 6)
        (-0.5927, -1.333333)
    """

    curvatures: Tensor
    start: Tensor
    steps: int

    def __post_init__(self) -> None:
        if self.curvatures.dim() != 1 or self.start.shape != self.curvatures.shape or not (self.curvatures > 0).all():
            raise ValueError(
                f"StepSize was given curvatures {tuple(self.curvatures.shape)} and start {tuple(self.start.shape)}; "
                f"two vectors of one length were needed, the curvatures positive"
            )
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise ValueError(f"StepSize was given steps={self.steps!r}; an integer of at least 1 was needed")

    def _logs(self, eta: float) -> Tensor:
        """log of each eigenvector's part of F."""
        shrinking = (1 - eta * self.curvatures).abs().log()
        return (0.5 * self.curvatures * self.start.square()).log() + 2 * self.steps * shrinking

    def value(self, eta: float) -> Tensor:
        """G(eta) = log F / T, 0-dim, without overflow; -inf where F = 0."""
        return self._logs(eta).logsumexp(0) / self.steps

    def slope(self, eta: float) -> Tensor:
        """G'(eta), 0-dim: -2 times the mean of h / (1 - eta h), weighted by the parts of F."""
        parts = self._logs(eta).softmax(0)
        rates = self.curvatures / (1 - eta * self.curvatures)
        return -2 * torch.where(parts > 0, parts * rates, 0.0).sum()

    def best(self, low: float, high: float) -> float:
        """The eta in (low, high) with G' = 0, by bisection; G' must be negative at low and positive at high.

        Raises:
            ValueError: it is not.
        """
        if not self.slope(low) < 0 < self.slope(high):
            raise ValueError(
                f"StepSize.best() was given ({low}, {high}), where G' is {self.slope(low):.3g} and "
                f"{self.slope(high):.3g}; a change of sign from negative to positive was needed"
            )
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if self.slope(middle) < 0 else (low, middle)
        return (low + high) / 2


def inner_loss(inner: Scaled, outer: Tensor, batch: Any) -> Tensor:
    """g = 1/2 w' H w at the point, with the batch H: a matrix [P, P]."""
    return 0.5 * torch.dot(inner["point"], batch @ inner["point"])


def outer_loss(inner: Scaled, outer: Tensor, batch: Any) -> Tensor:
    """G = (log f(point) + 2 log_scale) / T, with the batch (H, T)."""
    hessian, steps = batch
    return (inner_loss(inner, outer, hessian).log() + 2 * inner["log_scale"]) / steps


def setup(
    device: torch.device | str = "cpu",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    *,
    curvatures: tuple[float, ...] = (2.0, 0.5),
    start: tuple[float, ...] = (1.0, 1.0),
    rate: float = 0.1,
    steps: int = 80,
) -> tuple[bl.Problem, Tensor, Scaled, bl.Batches]:
    """`(problem, outer, inner, batches)`: outer is eta, 0-dim; solve it with Descent(Rescaled(), steps).

    Args:
        device: of all tensors.
        seed: unused; nothing is random.
        dtype: of all tensors.
        curvatures: the diagonal of H, positive.
        start: w_0, of the same length.
        rate: the eta to begin with.
        steps: T; the solver must take as many.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> problem, eta, inner, batches = setup(rate=0.5)
        >>> hg = bl.hypergradient(problem, eta, inner, batches, solver=bl.Descent(Rescaled(), steps=80),
        ...     estimator=bl.Unrolled())
        >>> hg.grad
        tensor(-1.3333, dtype=torch.float64)
    """

    def tensor(value: Any) -> Tensor:
        return torch.tensor(value, dtype=dtype, device=device)

    h, w = tensor(curvatures), tensor(start)
    if len(curvatures) != len(start) or not min(curvatures) > 0 or steps < 1:
        raise ValueError(
            f"step_size.setup() was given curvatures={curvatures}, start={start}, steps={steps}; positive curvatures, "
            f"as many starts and at least one step were needed"
        )
    outer = tensor(rate).requires_grad_()
    inner = {"point": w, "log_scale": tensor(0.0)}
    return bl.Problem(inner_loss, outer_loss), outer, inner, bl.Batches(torch.diag(h), (torch.diag(h), steps))
