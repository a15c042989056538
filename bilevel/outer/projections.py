"""Projections: the nearest point of a convex set, for `Projected`.

| | set | cost |
| --- | --- | --- |
| NonNegative | x >= 0 | one pass |
| Box | low <= x <= high | one pass |
| Ball | abs(x - center) <= radius | a norm |
| Simplex | x >= 0, sum x = total, along a dimension | a sort |

A projection is a function of one tensor that returns the nearest point as a new one. Simplex: x = max(v - t, 0) with
the t that makes the sum right, which sorting finds. Reference: Held, Wolfe and Crowder 1974, Validation of Subgradient
Optimization (recalled); Duchi, Shalev-Shwartz, Singer and Chandra 2008 (recalled).
"""

import dataclasses

import torch
from torch import Tensor

from bilevel.outer.base import check_number


@dataclasses.dataclass(frozen=True)
class NonNegative:
    """x >= 0.

    Example:
        >>> import torch, bilevel as bl
        >>> bl.outer.NonNegative()(torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
    """

    def __call__(self, x: Tensor) -> Tensor:
        """The nearest point."""
        return x.clamp_min(0)


@dataclasses.dataclass(frozen=True)
class Box:
    """low <= x <= high, number by number.

    Args:
        low: -inf for none.
        high: inf for none.

    Raises:
        ValueError: the box is empty.

    Example:
        >>> import torch, bilevel as bl
        >>> bl.outer.Box(0.0, 1.0)(torch.tensor([-1.0, 0.5, 2.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        numbers = all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in (self.low, self.high))
        if not numbers or not self.low <= self.high:
            raise ValueError(
                f"Box was given low={self.low!r}, high={self.high!r}; numbers with low <= high were needed"
            )

    def __call__(self, x: Tensor) -> Tensor:
        """The nearest point."""
        return x.clamp(self.low, self.high)


@dataclasses.dataclass(frozen=True)
class Ball:
    """|x - center| <= radius, in the Euclidean norm of all numbers of a tensor.

    Args:
        radius: positive.
        center: one number for all.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> bl.outer.Ball(1.0)(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """

    radius: float
    center: float = 0.0

    def __post_init__(self) -> None:
        check_number("Ball", "radius", self.radius, 5e-324, float("inf"), "a positive number")
        check_number("Ball", "center", self.center, -1.7e308, float("inf"), "a number")

    def __call__(self, x: Tensor) -> Tensor:
        """The nearest point."""
        if not x.numel():
            return x.clone()
        away = x.to(torch.promote_types(x.dtype, torch.float32)) - self.center
        # (Squares of 16-bit numbers overflow at 256, those of float32 at 2e19.)
        largest = away.abs().amax()
        along = away / torch.where(largest > 0, largest, 1)
        norm = torch.linalg.vector_norm(along).clamp_min(1)
        return torch.where(norm * largest <= self.radius, x, (self.center + self.radius / norm * along).to(x.dtype))


@dataclasses.dataclass(frozen=True)
class Simplex:
    """x >= 0 with a sum of `total`, along a dimension.

    Args:
        total: positive.
        dim: along which numbers sum up; the others hold one simplex each. A 0-dim tensor has none.

    Raises:
        ValueError: total is not positive.

    Example:
        >>> import torch, bilevel as bl
        >>> bl.outer.Simplex()(torch.tensor([0.5, 1.0, -2.0]))
        tensor([0.2500, 0.7500, 0.0000])
    """

    total: float = 1.0
    dim: int = -1

    def __post_init__(self) -> None:
        check_number("Simplex", "total", self.total, 5e-324, float("inf"), "a positive number")

    def __call__(self, x: Tensor) -> Tensor:
        """The nearest point."""
        if x.dim() == 0:
            raise ValueError("Simplex was given a 0-dim tensor; a dimension to sum over was needed")
        if not -x.dim() <= self.dim < x.dim() or not x.shape[self.dim]:
            raise ValueError(
                f"Simplex(dim={self.dim}) was given a tensor of shape {tuple(x.shape)}; a dimension that it has, with "
                f"at least one number along it, was needed"
            )
        # (Sums of 16-bit numbers have too few digits.)
        v = x.to(torch.promote_types(x.dtype, torch.float32)).movedim(self.dim, -1)
        v = v - v.amax(-1, keepdim=True)  # which changes nothing but the size of the sums
        falling = v.sort(-1, descending=True).values
        sums = falling.cumsum(-1) - self.total
        count = torch.arange(1, v.shape[-1] + 1, device=v.device, dtype=v.dtype)
        kept = (falling * count > sums).sum(-1, keepdim=True).clamp_min(1)  # (NaN is kept nowhere, and stays NaN)
        level = sums.gather(-1, kept - 1) / kept
        # Running sums of many numbers lose digits that their sum has.
        point = (v - level).clamp_min(0)
        level = level + (point.sum(-1, keepdim=True) - self.total) / (point > 0).sum(-1, keepdim=True).clamp_min(1)
        return (v - level).clamp_min(0).movedim(-1, self.dim).to(x.dtype)
