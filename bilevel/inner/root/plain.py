"""Plain iterations: y <- y - rate F(y), which for F = y - T(y) and rate 1 is y <- T(y).

| | calls of F | memory |
| --- | --- | --- |
| step | 1 | P |

They converge where every eigenvalue of I - rate dF/dy lies inside the unit circle.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from bilevel.inner.dynamics import Products
from bilevel.inner.root.base import Method, check_rate
from bilevel.space.inner_product import Leaves, Space


@dataclasses.dataclass(frozen=True)
class Plain(Method):
    """Plain, or damped, iterations.

    Args:
        rate: positive; below 1 it damps a map.

    Raises:
        ValueError: the rate is not positive.

    Example:
        >>> import torch, bilevel as bl
        >>> root = bl.inner.FixedPoint(lambda y, x, b: (y + x / y) / 2, bl.inner.root.Plain())
        >>> problem = bl.Problem(lambda y, x, b: (y**2 - x) ** 2, lambda y, x, b: y)
        >>> bl.adapt(problem, torch.tensor(9.0), torch.tensor(1.0), bl.Batches(None, None),
        ...     solver=bl.Converge(root, tol=1e-6)).inner
        tensor(3.)
    """

    rate: float = 1.0

    def __post_init__(self) -> None:
        check_rate("Plain", self.rate)

    def step(
        self, y: Leaves, residual: Leaves, state: Any, space: Space, jacobian: Callable[[], Products]
    ) -> tuple[Leaves, Any]:
        return space.axpy(-self.rate, residual, y), state
