"""One iteration of somebody's loop: what it cost, and what ended it."""

import contextlib
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

import bilevel as bl
from bilevel.space import tree
from bilevel_profiling.meters.allocator import Allocator
from bilevel_profiling.meters.base import Meter
from bilevel_profiling.meters.clock import Clock
from bilevel_profiling.meters.cuda import Cuda
from bilevel_profiling.meters.oracles import Oracles
from bilevel_profiling.meters.tensors import Tensors
from bilevel_profiling.records.failure import of_error
from bilevel_profiling.records.record import Iteration, Phase

_open = threading.local()
"""The iterations that are measured on this thread, in the order in which they began."""
INTERRUPTED = "INTERRUPTED"
"""Status of an iteration that Ctrl-C, or sys.exit, ended."""


class Running:
    """An iteration that is being measured, from now on.

    Args:
        index: of the iteration.
        device: where the work runs.
        tensors: whether its live tensor bytes are counted, which slows it down.
        seen: whether all that runs is operators that a dispatch mode sees; else the allocator is asked for the bytes.

    Attributes:
        metrics: what the user logged.
        tensors: the meter of live tensor bytes, where they are counted.
    """

    def __init__(self, index: int, device: torch.device, tensors: bool, *, seen: bool = True) -> None:
        self.metrics: dict[str, float] = {}
        self.tensors = None if not tensors else Tensors() if seen else Allocator()
        self._index = index
        self._facts: dict[str, Any] = {}
        meters: list[Meter | None] = [
            Clock(device),
            Oracles(),
            Cuda(device) if device.type == "cuda" else None,
            self.tensors,
        ]
        self._meters = [meter for meter in meters if meter is not None]
        with contextlib.ExitStack() as inside:
            for meter in self._meters:
                inside.enter_context(meter)
            self._inside = inside.pop_all()
        _open.stack = [*_stack(), self]

    @property
    def hidden(self) -> bool:
        """Whether the iteration hid operators from the meter of tensors: its bytes are then not known."""
        return isinstance(self.tensors, Tensors) and self.tensors.hidden

    def look_at(self, item: object) -> None:
        """Take over what a step of `bilevel.iterate` says; nothing of it is kept."""
        if not isinstance(item, bl.Step):
            return
        found = item.hypergradient
        with _disable_current_modes(), torch.no_grad():
            norms = [torch.linalg.vector_norm(leaf, dtype=torch.float64) for leaf in tree.tensors(found.grad)]
            self._facts = {
                "outer_loss": found.outer_loss.item(),
                "inner_loss": found.inner_loss.item(),
                "gradient_norm": torch.stack(norms).square().sum().sqrt().item(),
                "status": found.status.name,
            }

    def end(self) -> None:
        """End the measurement; once more does nothing.

        Raises:
            RuntimeError: an iteration that began later is still measured, and ends now as well: meters nest, so neither
                could be told from the other.
        """
        stack = _stack()
        later = stack[stack.index(self) + 1 :] if self in stack else []
        _open.stack = [running for running in stack if running is not self and running not in later]
        for running in (*reversed(later), self):
            running._inside.close()
        if later:
            raise RuntimeError(
                "the loops of two recorders are interleaved: an iteration of one ended inside an iteration of the "
                "other. Put one loop wholly into the body of the other, or watch one loop and log() what belongs to "
                "the other: recorder.watch(zip(first, second))"
            )

    def stop(self, status: str = "") -> Iteration:
        """End the measurement, and say what was found; a status given here is the iteration's."""
        self.end()
        fields: dict[str, Any] = {}
        phases: dict[str, dict[str, Any]] = {}
        for meter in self._meters:
            fields |= {} if self.hidden and meter is self.tensors else meter.figures()
            if self.hidden and meter is self.tensors:
                continue
            for name, found in meter.phases().items():
                phases.setdefault(name, {}).update(found)
        return Iteration(
            index=self._index,
            wall_seconds=fields["wall_seconds"],
            peak_tensor_bytes=fields.get("peak_tensor_bytes"),
            cuda_allocated_bytes=fields.get("cuda_allocated_bytes"),
            calls=fields["calls"] if any(fields["calls"].values()) else {},
            phases={name: Phase(**found) for name, found in phases.items()},
            metrics=self.metrics,
            **self._facts | ({"status": status} if status else {}),
        )


def _stack() -> list[Running]:
    return getattr(_open, "stack", [])


def number(name: str, value: Any) -> float:
    """What a user logged, as a number.

    Raises:
        TypeError: it is none.
    """
    try:
        if isinstance(value, str):
            raise TypeError
        with _disable_current_modes():
            return float(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        given = (
            f"a tensor of shape {tuple(value.shape)}"
            if isinstance(value, torch.Tensor)
            else f"a {type(value).__name__}"
        )
        raise TypeError(
            f"log() was given {given} as {name}; a number, or a tensor with one element, was needed: write "
            f"{name}=value.mean()"
        ) from None


def status_of(error: BaseException) -> str:
    """The status of an iteration that an exception ended.

    Example:
        >>> status_of(MemoryError()), status_of(KeyError("x")), status_of(KeyboardInterrupt())
        ('OUT_OF_MEMORY', 'ERROR', 'INTERRUPTED')
    """
    if isinstance(error, bl.BilevelError):
        status = getattr(error, "status", None)
        return (status if isinstance(status, bl.Status) else bl.Status.NONFINITE).name
    return of_error(error).status if isinstance(error, Exception) else INTERRUPTED


def instructions_of(frame: FrameType | None) -> dict[int, int]:
    """The instruction that each frame of the stack is at."""
    found = {}
    while frame is not None:
        found[id(frame)] = frame.f_lasti
        frame = frame.f_back
    return found


def went_through(error: BaseException, instructions: dict[int, int]) -> bool:
    """Whether an exception came from the very instructions that the stack was at: then it, and no break, ended the
    loop.

    Python drops a loop's iterator before anybody sees the exception that ends the loop, so this is told afterwards,
    from its traceback.
    """
    entries = [(entry.tb_lasti, instructions.get(id(entry.tb_frame))) for entry in _traceback(error.__traceback__)]
    known = [(at, was) for at, was in entries if was is not None]
    return bool(known) and all(at == was for at, was in known)


def _traceback(entry: TracebackType | None) -> Iterator[TracebackType]:
    while entry is not None:
        yield entry
        entry = entry.tb_next
