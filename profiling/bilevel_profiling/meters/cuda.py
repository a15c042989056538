"""Peaks of the CUDA caching allocator, as `torch.cuda.memory_stats` reports them."""

from types import TracebackType
from typing import Any, Self

import torch

from bilevel_profiling.meters.base import Meter
from bilevel_profiling.meters.phases import OUTSIDE, Phases

_STATS = {
    "cuda_allocated_bytes": "allocated_bytes.all.peak",
    "cuda_reserved_bytes": "reserved_bytes.all.peak",
    "cuda_requested_bytes": "requested_bytes.all.peak",
}


class Cuda(Meter):
    """The allocator's peaks, what was there before included: to be compared with base + peak tensor bytes. Without CUDA every figure is None.

    The allocator counts on the host at the moment of a request, so phases need no synchronization. Allocated is rounded up to blocks of 512 bytes,
    requested is not, reserved is what the process holds from the driver.

    Args:
        device: the GPU; None for the current one.

    Example:
        >>> import torch
        >>> with Cuda("cpu") as meter:
        ...     _ = torch.ones(3)
        >>> meter.figures()["cuda_allocated_bytes"] is None
        True
    """

    perturbs = False

    def __init__(self, device: torch.device | str | None = None) -> None:
        self._device = None if device is None else torch.device(device)
        self._on = torch.cuda.is_available() and (self._device is None or self._device.type == "cuda")
        self._phases = Phases(self._ended)
        self._peaks: dict[str, int] = {}
        self._by_phase: dict[str, int] = {}

    def __enter__(self) -> Self:
        if self._on:
            torch.cuda.reset_peak_memory_stats(self._device)
        self._phases.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._phases.__exit__(None, None, None)

    def figures(self) -> dict[str, Any]:
        return {field: self._peaks.get(field) for field in _STATS}

    def phases(self) -> dict[str, dict[str, Any]]:
        return {phase: {"cuda_allocated_bytes": peak} for phase, peak in self._by_phase.items() if phase != OUTSIDE}

    def _ended(self, phase: str) -> None:
        if not self._on:
            return
        stats = torch.cuda.memory_stats(self._device)
        for field, name in _STATS.items():
            self._peaks[field] = max(self._peaks.get(field, 0), stats.get(name, 0))
        self._by_phase[phase] = max(self._by_phase.get(phase, 0), stats.get(_STATS["cuda_allocated_bytes"], 0))
        torch.cuda.reset_peak_memory_stats(self._device)
