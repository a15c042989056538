"""The CUDA caching allocator, as `torch.cuda.memory_stats` reports it: peaks, what is no tensor, and how often it ran
dry.

Three kinds of bytes are in the allocator and in no tensor. cuBLAS keeps a workspace for each handle and stream from its
first product on (some MiB; CUBLAS_WORKSPACE_CONFIG sets the size). cuDNN, and other kernels, take theirs from the
allocator for one call and give it back: such a workspace is in the peak, but nothing names it. And each block is
    rounded up. So, with base and peak tensor bytes of the `tensors` meter,

    requested peak - base - tensors - cuBLAS workspaces = temporary workspaces that were alive at the peak, cuDNN's
    above all,

and allocated - requested is the rounding.
"""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from bilevel_profiling.meters.base import Meter
from bilevel_profiling.meters.phases import OUTSIDE, Phases

_PEAKS = {
    "cuda_allocated_bytes": "allocated_bytes.all.peak",
    "cuda_reserved_bytes": "reserved_bytes.all.peak",
    "cuda_requested_bytes": "requested_bytes.all.peak",
}
_REQUESTED = "requested_bytes.all.current"
_COUNTS = {"cuda_retries": "num_alloc_retries", "cuda_out_of_memory_events": "num_ooms"}
_WORKSPACES = "cuda_workspace_bytes"
_MOST_EVENTS = 100_000
"""Of a snapshot: several kilobytes of host memory each."""


class Cuda(Meter):
    """The allocator's peaks, what was there before included: to be compared with base + peak tensor bytes. Without CUDA
    every figure is None.

    The allocator counts on the host at the moment of a request, so phases need no synchronization. Allocated is rounded
    up to blocks of 512 bytes, requested is not, reserved is what the process holds from the driver. Entering resets
    torch's own peaks (`torch.cuda.max_memory_allocated`).

    Retries are requests that were served only after the allocator gave its cache back to the driver, which is slow;
    out-of-memory events are requests that failed. Both are counted inside the block alone.

    Args:
        device: the GPU; None for the current one.
        workspaces: whether to free cuBLAS's workspaces after the block, and to report what that gave back. They are
            part of the three peaks, also where they were taken before the block. The next product takes them again; a
            CUDA graph captured with them must not be replayed.
        tensors: whether to report `peak_tensor_bytes` and `kept_tensor_bytes` too, as the bytes asked for beyond what
            was there when the block began, and the private pools of CUDA graphs, which hold what a graph needs whether
            it runs or not. So workspaces that are taken inside are in it, too: for code whose tensors nobody sees. Drop
            the result inside the block, and what is kept is what leaked.
        snapshot: where to write what https://pytorch.org/memory_viz opens: every request of the block (the last
            100,000) with its stack. It is written also when the block raises, and a recording of the allocator's
            history that was on before is ended. Recording takes time.

    Raises:
        ValueError: `snapshot` where there is no CUDA device to take it from.

    Example:
        >>> import torch
        >>> with Cuda("cpu") as meter:
        ...     _ = torch.ones(3)
        >>> meter.figures()["cuda_allocated_bytes"] is None
        True
    """

    def __init__(
        self,
        device: torch.device | str | None = None,
        *,
        workspaces: bool = False,
        tensors: bool = False,
        snapshot: str | Path | None = None,
    ) -> None:
        self._device = None if device is None else torch.device(device)
        self._on = torch.cuda.is_available() and (self._device is None or self._device.type == "cuda")
        if snapshot is not None and not self._on:
            where = (
                "CUDA is not available"
                if device is None or torch.device(device).type == "cuda"
                else f"the device is {device}"
            )
            raise ValueError(
                f"Cuda() was given snapshot={str(snapshot)!r}, but {where}; a snapshot is of the CUDA allocator: leave "
                f"it out"
            )
        self._workspaces = workspaces
        self._snapshot = None if snapshot is None else Path(snapshot)
        self._phases = Phases(self._ended)
        self._peaks: dict[str, int] = {}
        self._by_phase: dict[str, int] = {}
        self._tensors, self._base, self._kept, self._pools = tensors, 0, 0, 0
        self._requested: dict[str, int] = {}
        self._counts: dict[str, int] = {}
        self._workspace_bytes: int | None = None

    def __enter__(self) -> Self:
        if self._on:
            stats = torch.cuda.memory_stats(self._device)
            self._before = {field: stats.get(name, 0) for field, name in _COUNTS.items()}
            self._base = stats.get(_REQUESTED, 0)
            torch.cuda.reset_peak_memory_stats(self._device)
            if self._snapshot is not None:
                torch.cuda.memory._record_memory_history(
                    max_entries=_MOST_EVENTS, device=self._device, clear_history=True
                )
        self._phases.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._phases.__exit__(None, None, None)
            if self._on:
                stats = torch.cuda.memory_stats(self._device)
                self._counts = {field: stats.get(name, 0) - self._before[field] for field, name in _COUNTS.items()}
                self._kept = stats.get(_REQUESTED, 0) - self._base
                self._pools = _private_bytes() if self._tensors else 0
        finally:
            if self._snapshot is not None:
                self._dump(self._snapshot)
        if self._on and self._workspaces:
            self._workspace_bytes = _freed_workspaces(self._device)

    def figures(self) -> dict[str, Any]:
        return {
            **{field: self._peaks.get(field) for field in _PEAKS},
            **{field: self._counts.get(field) for field in _COUNTS},
            _WORKSPACES: self._workspace_bytes,
            **(self._added() if self._tensors and self._on else {}),
        }

    def phases(self) -> dict[str, dict[str, Any]]:
        found = {phase: {"cuda_allocated_bytes": peak} for phase, peak in self._by_phase.items() if phase != OUTSIDE}
        if self._tensors:
            for phase, fields in found.items():
                fields["peak_tensor_bytes"] = self._requested[phase] - self._base + self._pools
        return found

    def _added(self) -> dict[str, Any]:
        peak = self._peaks.get("cuda_requested_bytes", self._base) - self._base + self._pools
        return {"peak_tensor_bytes": peak, "kept_tensor_bytes": self._kept, "peak_meter": "cuda"}

    def _ended(self, phase: str) -> None:
        if not self._on:
            return
        stats = torch.cuda.memory_stats(self._device)
        for field, name in _PEAKS.items():
            self._peaks[field] = max(self._peaks.get(field, 0), stats.get(name, 0))
        self._by_phase[phase] = max(self._by_phase.get(phase, 0), stats.get(_PEAKS["cuda_allocated_bytes"], 0))
        self._requested[phase] = max(self._requested.get(phase, 0), stats.get(_PEAKS["cuda_requested_bytes"], 0))
        torch.cuda.reset_peak_memory_stats(self._device)

    def _dump(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(path))
        finally:
            torch.cuda.memory._record_memory_history(enabled=None, device=self._device)


def _private_bytes() -> int:
    """Bytes in the private pools of CUDA graphs."""
    pools = (
        (segment.get("segment_pool_id", (0, 0)), segment["total_size"]) for segment in torch.cuda.memory_snapshot()
    )
    return sum(size for pool, size in pools if tuple(pool) != (0, 0))


def _freed_workspaces(device: torch.device | None) -> int | None:
    """Bytes that cuBLAS held in the allocator until now; None where torch cannot free them (a build without CUDA, or a
    later torch).
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is None:
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    clear()
    return before - torch.cuda.memory_allocated(device)
