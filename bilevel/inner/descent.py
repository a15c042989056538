"""A fixed number of steps: the K-step program.

| | inner gradients | memory |
| --- | --- | --- |
| K steps | K | 2 P + optimizer state + one graph, independent of K |
"""

import dataclasses

from bilevel.inner.base import InnerSolver, as_dynamics, check_limit
from bilevel.inner.dynamics import Dynamics
from bilevel.optim.base import Optimizer


@dataclasses.dataclass(frozen=True)
class Descent(InnerSolver):
    """K steps of an optimizer on the inner loss, or of any dynamics.

    Args:
        optimizer: how y moves: an inner optimizer, or a `Dynamics`.
        steps: K >= 0.

    Raises:
        TypeError, ValueError: the arguments are of the wrong kind, such as a torch.optim optimizer.

    Example:
        >>> import bilevel as bl
        >>> bl.Descent(bl.SGD(lr=0.1), steps=20).max_steps
        20
    """

    sharded = True

    optimizer: Optimizer | Dynamics
    steps: int

    def __post_init__(self) -> None:
        as_dynamics("Descent", self.optimizer)
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 0:
            raise ValueError(f"Descent was given steps={self.steps!r}; an integer of at least 0 was needed")
        check_limit("Descent", self.dynamics, self.steps)

    @property
    def dynamics(self) -> Dynamics:
        return as_dynamics("Descent", self.optimizer)

    @property
    def max_steps(self) -> int:
        return self.steps

    @property
    def fixed(self) -> bool:
        return True
