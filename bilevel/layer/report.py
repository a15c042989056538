"""What a layer has to say of its solves: it returns plain tensors, so it says it beside them."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from bilevel.outcome import BilevelError, Status, readable, status_of

_WORDS = ("raise", "warn")


@dataclasses.dataclass(frozen=True)
class Report:
    """One solve of a layer: that of the forward, or that of one backward.

    Attributes:
        phase: "forward", "backward", or "differentiable backward" for one with create_graph=True.
        stats: as `stats` of a `Hypergradient`.
        code: the status as an integer tensor, not yet waited for.

    Example:
        >>> import torch, bilevel as bl
        >>> seen = []
        >>> x = torch.tensor(1.0, requires_grad=True)
        >>> y = bl.solution(lambda y, x, b: y**2 - x * y, x, torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.5), steps=1), estimator=bl.Implicit(bl.CG(5)), report=seen.append)
        >>> y.backward()
        >>> [(each.phase, each.status.name, each.stats["calls"]["inner_gradient"]) for each in seen]
        [('forward', 'OK', 1), ('backward', 'OK', 1)]
    """

    phase: str
    stats: dict[str, Any] = dataclasses.field(default_factory=dict)
    code: Tensor | int = 0

    @property
    def status(self) -> Status:
        """How the solve ended; waits for the GPU."""
        return status_of(self.code)


@dataclasses.dataclass(frozen=True)
class Teller:
    """Where reports go, and what a failed one does.

    Args:
        on_failure: "raise" or "warn".
        strict: whether a tolerance that was not met is a failure, too.
        report: hears of every solve; None for nobody.

    Raises:
        ValueError: `on_failure` is another word.
    """

    on_failure: str
    strict: bool
    report: Callable[[Report], Any] | None

    def __post_init__(self) -> None:
        if self.on_failure not in _WORDS:
            raise ValueError(
                f"solution() was given on_failure={self.on_failure!r}; one of {', '.join(map(repr, _WORDS))} was needed"
            )
        if self.report is not None and not callable(self.report):
            raise TypeError(
                f"solution() was given report={self.report!r}; a function of a bilevel.layer.Report was needed, such "
                f"as seen.append of a list"
            )

    def tell(self, report: Report) -> None:
        """Hand it on; then raise or warn if it failed. Waits for the GPU. Of tensors without data nothing is told."""
        if isinstance(report.code, Tensor) and not readable(report.code):
            return
        if self.report is not None:
            self.report(report)
        status = report.status
        if not (status.failed or (self.strict and status is not Status.OK)):
            return
        said = f"the {report.phase} of bilevel.solution: {status.name}: {status.value}"
        if self.on_failure == "raise":
            raise BilevelError(said, status)
        warnings.warn(said, stacklevel=4)
