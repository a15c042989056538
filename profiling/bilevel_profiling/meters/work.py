"""Work: the FLOPs of matmul-class operators, the bytes that all operators move, and what both cost at least on a device of given speed.

    roofline_seconds = sum over operators of max(FLOPs / peak FLOP/s, moved bytes / bandwidth)

FLOPs are torch's own formulas (torch.utils.flop_counter): matrix products, convolutions and attention; elementwise work counts nothing there, and is
bound by the bytes it moves. Moved bytes are those of an operator's inputs and outputs, each once, views not at all. It is the roofline model of
Williams et al. 2009, one operator at a time: kernels that reach neither peak, and the launches between them, come on top; fused operators (under
torch.compile) move less.
"""

import collections
import contextlib
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bilevel_profiling.devices import Device
from bilevel_profiling.meters.base import Meter
from bilevel_profiling.meters.phases import OUTSIDE, Phases


class Work(Meter):
    """Counts FLOPs and moved bytes, in total and FLOPs by phase; also under fake tensors, where nothing is computed.

    Args:
        device: its peak FLOP/s and bytes/s; None for no roofline.

    Example:
        >>> import torch
        >>> with Work() as meter:
        ...     _ = torch.ones(2, 3) @ torch.ones(3, 4) + 1
        >>> meter.figures()["matmul_flops"], meter.figures()["moved_bytes"]
        (48, 240)
    """

    perturbs = True

    def __init__(self, device: Device | None = None) -> None:
        self._device = device
        self._flops: collections.Counter[str] = collections.Counter()
        self._moved = 0
        self._seconds = 0.0
        self._phases = Phases(lambda phase: None)
        self._inside = contextlib.ExitStack()

    def __enter__(self) -> Self:
        # A function that torch.compile meets first under a dispatch mode would never be compiled afterwards.
        self._inside.enter_context(torch.compiler.set_stance("force_eager"))
        self._inside.enter_context(self._phases)
        self._inside.enter_context(_Mode(self))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._inside.close()

    def figures(self) -> dict[str, Any]:
        found = {"matmul_flops": sum(self._flops.values()), "moved_bytes": self._moved}
        return found if self._device is None else {**found, "roofline_seconds": self._seconds, "roofline_device": self._device.name}

    def phases(self) -> dict[str, dict[str, Any]]:
        return {phase: {"matmul_flops": count} for phase, count in self._flops.items() if phase != OUTSIDE}

    def count(self, operator: Any, args: Any, kwargs: Any, output: Any) -> None:
        """One operator that ran."""
        formula = flop_registry.get(operator._overloadpacket)
        flops = 0 if formula is None else formula(*args, **kwargs, out_val=output)
        moved = 0 if operator.is_view else _bytes(args) + _bytes(kwargs.values()) + _bytes((output,))
        # A phase without a product has 0 of them, which is a finding too.
        self._flops[self._phases.current] += flops
        self._moved += moved
        if self._device is not None and moved:
            dtype = next((leaf.dtype for leaf in args if isinstance(leaf, Tensor)), torch.float32)
            self._seconds += self._device.seconds(flops, moved, str(dtype).removeprefix("torch."))


class _Mode(TorchDispatchMode):
    def __init__(self, meter: Work) -> None:
        super().__init__()
        self._meter = meter

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the meter has switched compilation off; the wrapper that torch would put around each operation costs more than the meter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func.namespace not in ("profiler", "prim"):
            self._meter.count(func, args, kwargs, output)
        return output


def _bytes(leaves: Any) -> int:
    total = 0
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            total += leaf.numel() * leaf.itemsize
        elif isinstance(leaf, (list, tuple)):
            total += _bytes(leaf)
    return total
