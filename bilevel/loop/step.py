"""Step: what one outer step was."""

import dataclasses

from torch import Tensor

from bilevel.outcome import Hypergradient


@dataclasses.dataclass(frozen=True)
class Step:
    """One outer step, after x was moved.

    Attributes:
        index: 0, 1, 2, ...
        hypergradient: the hypergradient the step was made with.
    """

    index: int
    hypergradient: Hypergradient

    @property
    def outer_loss(self) -> Tensor:
        """The outer loss before the step."""
        return self.hypergradient.outer_loss
