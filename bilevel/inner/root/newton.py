"""Newton's method for equations: dF/dy d = F(y), y <- y - rate d, with any linear solver.

| | calls of F | products with dF/dy | memory |
| --- | --- | --- | --- |
| step | 2 | the solver's | the solver's vectors + one graph |

Wins: quadratic convergence near a simple root. Fails: far from one, and at roots where dF/dy is singular.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from bilevel.inner.dynamics import Products, Solves
from bilevel.inner.root.base import Method, check_rate
from bilevel.space.inner_product import Leaves, Space


@dataclasses.dataclass(frozen=True)
class NewtonRoot(Method):
    """Newton steps on an equation, whose Jacobian need not be symmetric.

    Args:
        linear: a linear solver for systems that are not symmetric, such as bilevel.Dense().
        rate: positive; below 1 it damps.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range; (when used) the solver needs a
            symmetric matrix.

    Example:
        >>> import torch, bilevel as bl
        >>> root = bl.inner.Root(lambda y, x, b: y.exp() - x, bl.inner.root.NewtonRoot(bl.Dense()))
        >>> problem = bl.Problem(bl.inner.half_square(root.residual), lambda y, x, b: y)
        >>> hg = bl.hypergradient(problem, torch.tensor(2.0), torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Descent(root, steps=6), estimator=bl.Unrolled())
        >>> hg.inner, hg.grad  # log 2 and 1 / 2
        (tensor(0.6931), tensor(0.5000))
    """

    linear: Solves
    rate: float = 1.0

    def __post_init__(self) -> None:
        if not callable(getattr(self.linear, "prepare", None)) or isinstance(self.linear, type):
            raise TypeError(
                f"NewtonRoot was given linear={self.linear!r}; a linear solver was needed, such as "
                f"NewtonRoot(bilevel.Dense())"
            )
        check_rate("NewtonRoot", self.rate)

    @property
    def needs_jacobian(self) -> bool:
        return True

    def step(
        self, y: Leaves, residual: Leaves, state: Any, space: Space, jacobian: Callable[[], Products]
    ) -> tuple[Leaves, Any]:
        d = self.linear.prepare(jacobian(), space).found(residual).value
        return space.axpy(-self.rate, d, y), state
