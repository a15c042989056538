"""Where a hypergradient is: the one place, besides the oracle counter, that listens to the library's spans."""

from collections.abc import Callable
from types import TracebackType
from typing import Self

from bilevel.engine import spans

NAMES = tuple(name.removeprefix("bilevel.") for name in spans.PHASES)
"""inner, hypergradient, outer."""
OUTSIDE = ""
"""The name of what runs outside all phases; it belongs to the total only."""


class Phases:
    """Follows the phases inside a `with` block and calls `ended(phase)` at the end of every stretch.

    A phase may run in several stretches (once a task, or twice for a symmetric difference); between them the phase is
    `OUTSIDE`.

    Args:
        ended: called with the name of the phase that ran until now, at each boundary and at the end of the block.

    Attributes:
        current: the phase that runs now.
        span: the oracle call that runs now (inner_gradient, hvp, ...), or "".
        hidden: whether an engine was at work whose operators a dispatch mode does not see.

    Example:
        >>> import torch, bilevel as bl
        >>> stretches = []
        >>> problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
        >>> with Phases(stretches.append):
        ...     hg = bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(None, None),
        ...         solver=bl.Descent(bl.SGD(lr=0.25), steps=1), estimator=bl.Unrolled())
        >>> stretches
        ['', 'inner', '', 'hypergradient', '']
    """

    def __init__(self, ended: Callable[[str], None]) -> None:
        self._ended = ended
        self._phases = [OUTSIDE]
        self._spans = [""]
        self.current, self.span = OUTSIDE, ""
        self.hidden = False

    def __enter__(self) -> Self:
        self._phases, self._spans = [OUTSIDE], [""]
        self.current, self.span = OUTSIDE, ""
        self._listening = spans.listen(self)
        self._listening.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._listening.__exit__(None, None, None)
        self._ended(self.current)

    def enter(self, name: str, count: int) -> None:
        """A span opened (the listener's side of the seam)."""
        if name in spans.PHASES:
            self._ended(self.current)
            self._phases.append(name.removeprefix("bilevel."))
            self.current = self._phases[-1]
        else:
            self.hidden |= name == spans.HIDDEN
            self._spans.append(name.removeprefix("bilevel."))
            self.span = self._spans[-1]

    def exit(self, name: str) -> None:
        """A span closed."""
        if name in spans.PHASES:
            if len(self._phases) > 1:  # else it was open before the block began
                self._ended(self.current)
                self._phases.pop()
                self.current = self._phases[-1]
        elif len(self._spans) > 1:
            self._spans.pop()
            self.span = self._spans[-1]
