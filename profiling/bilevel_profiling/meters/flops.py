"""FLOPs of matmul-class operations, as torch counts them."""

import collections
from types import TracebackType
from typing import Any, Self

from torch.utils.flop_counter import FlopCounterMode

from bilevel_profiling.meters.base import Meter
from bilevel_profiling.meters.phases import OUTSIDE, Phases


class Flops(Meter):
    """What `torch.utils.flop_counter` counts: matrix products, convolutions and attention. Elementwise work counts nothing, so it is a lower bound.

    Example:
        >>> import torch
        >>> with Flops() as meter:
        ...     _ = torch.ones(2, 3) @ torch.ones(3, 4) + 1
        >>> meter.figures()
        {'matmul_flops': 48}
    """

    perturbs = True

    def __init__(self) -> None:
        self._counter = FlopCounterMode(display=False)
        self._phases = Phases(self._ended)
        self._before = 0
        self._by_phase: dict[str, int] = collections.defaultdict(int)

    def __enter__(self) -> Self:
        self._counter.__enter__()
        self._phases.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._phases.__exit__(None, None, None)
        self._counter.__exit__(None, None, None)

    def figures(self) -> dict[str, Any]:
        return {"matmul_flops": sum(self._by_phase.values())}

    def phases(self) -> dict[str, dict[str, Any]]:
        return {phase: {"matmul_flops": count} for phase, count in self._by_phase.items() if phase != OUTSIDE}

    def _ended(self, phase: str) -> None:
        now = self._counter.get_total_flops()
        self._by_phase[phase] += now - self._before
        self._before = now
