"""Step: what one outer step was."""

import dataclasses
import math

from torch import Tensor

from bilevel.loop.precision_check import Precision
from bilevel.outcome import Hypergradient


@dataclasses.dataclass(frozen=True)
class Step:
    """One outer step, after x was moved.

    Attributes:
        index: 0, 1, 2, ...
        hypergradient: the hypergradient the step was made with, as it was estimated: not clipped. With `accumulate`,
            the mean of several.
        lr: of each parameter group of the optimizer, as the step was made with.
        seconds: what making the step took, reading the batches included; on CUDA not waited for.
        precision: what reduced precision has left, at the steps that `PrecisionCheck` looks at.
        skipped: whether x was left where it is, because the hypergradient overflowed in float16.
    """

    index: int
    hypergradient: Hypergradient
    lr: tuple[float, ...] = ()
    seconds: float = math.nan
    precision: Precision | None = None
    skipped: bool = False

    @property
    def outer_loss(self) -> Tensor:
        """The outer loss before the step."""
        return self.hypergradient.outer_loss
