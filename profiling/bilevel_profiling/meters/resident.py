"""Resident memory of another process, sampled by memory-profiler.

Resident memory is what the kernel gave a process, and holds what the C heap did not give back: up to eleven times the
    tensor bytes on a CPU. It says
what a machine must have, not what an algorithm costs.

memory-profiler is asked about a process id, from outside. Its other form, memory_usage(function), calls a short
function several times and returns absolute numbers, interpreter and torch included.
"""

import contextlib
import ctypes
import gc
import sys
import threading
from types import TracebackType
from typing import Any, Self

from bilevel_profiling.meters.base import Meter

_INTERVAL = 0.002
_SPAN = 0.04


class Resident(Meter):
    """Growth of a process above what it holds when the block begins. The block is this process waiting for that one.

    Args:
        pid: the process.

    Raises:
        ImportError: memory-profiler is missing.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._done = threading.Event()
        self._peak = 0.0

    def __enter__(self) -> Self:
        self._base = self._peak = self._sample(0.0)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def figures(self) -> dict[str, Any]:
        return {"resident_bytes": round((self._peak - self._base) * 2**20)}

    def _watch(self) -> None:
        import memory_profiler

        # psutil is what memory-profiler reads with; its error says that the process is gone.
        with contextlib.suppress(memory_profiler.psutil.Error):
            while not self._done.is_set():
                self._peak = max(self._peak, self._sample(_SPAN))

    def _sample(self, seconds: float) -> float:
        """The most MiB seen for so long."""
        from memory_profiler import memory_usage

        return memory_usage(self._pid, interval=_INTERVAL, timeout=max(seconds, _INTERVAL), max_usage=True)


def trim() -> None:
    """Give freed heap memory back to the kernel, so that growth above what is left is the call's own (glibc only)."""
    gc.collect()
    if sys.platform == "linux":
        trimmed = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trimmed is not None:
            trimmed(0)
