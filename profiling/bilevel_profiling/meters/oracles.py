"""Oracle calls by name: the cost of an estimator in units that no machine changes."""

import collections
from types import TracebackType
from typing import Any, Self

from bilevel.engine import spans
from bilevel_profiling.meters.base import Meter
from bilevel_profiling.meters.phases import OUTSIDE, Phases


class Oracles(Meter):
    """Counts inner gradients, outer gradients, Hessian-vector products and mixed products, in total and by phase.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
        >>> with Oracles() as meter:
        ...     hg = bl.hypergradient(problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(None, None),
        ...         solver=bl.Descent(bl.SGD(lr=0.25), steps=5), estimator=bl.Unrolled())
        >>> meter.figures()
        {'calls': {'inner_gradient': 5, 'outer_gradient': 1, 'hvp': 5, 'mixed': 0}}
        >>> meter.phases()["inner"]
        {'calls': {'inner_gradient': 5}}
    """

    def __init__(self) -> None:
        self._phases = Phases(lambda phase: None)
        self._total = spans.Calls()
        self._by_phase: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)

    def __enter__(self) -> Self:
        self._phases.__enter__()
        self._listening = spans.listen(self)
        self._listening.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._listening.__exit__(None, None, None)
        self._phases.__exit__(None, None, None)

    def figures(self) -> dict[str, Any]:
        return {"calls": dict(self._total.calls)}

    def phases(self) -> dict[str, dict[str, Any]]:
        return {phase: {"calls": dict(counts)} for phase, counts in self._by_phase.items() if phase != OUTSIDE}

    def enter(self, name: str, count: int) -> None:
        """A span opened (the listener's side of the seam)."""
        self._total.enter(name, count)
        if name in spans.ORACLES:
            self._by_phase[self._phases.current][name.removeprefix("bilevel.")] += count

    def exit(self, name: str) -> None:
        """A span closed."""
