"""Work: the FLOPs of matmul-class operators, the bytes that all operators move, and what both cost at least on a device
of given speed.

    roofline_seconds = sum over operators of max(FLOPs / peak FLOP/s, moved bytes / bandwidth)

FLOPs are torch's own formulas (torch.utils.flop_counter): matrix products, convolutions and attention; elementwise work
counts nothing there, and is bound by the bytes it moves. Moved bytes are those of an operator's inputs and outputs,
each once, views not at all. It is the roofline model of Williams et al. 2009, one operator at a time: kernels that
reach neither peak, and the launches between them, come on top; fused operators (under torch.compile) move less.
"""

import collections
import contextlib
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from bilevel_profiling.meters.base import Meter
from bilevel_profiling.meters.devices import Device
from bilevel_profiling.meters.operators import Operators
from bilevel_profiling.meters.phases import OUTSIDE, Phases
from bilevel_profiling.meters.storages import storage_bytes


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
        self._inside.enter_context(Operators(self.run))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._inside.close()

    def figures(self) -> dict[str, Any]:
        found = {"matmul_flops": sum(self._flops.values()), "moved_bytes": self._moved}
        return (
            found
            if self._device is None
            else {**found, "roofline_seconds": self._seconds, "roofline_device": self._device.name}
        )

    def phases(self) -> dict[str, dict[str, Any]]:
        return {phase: {"matmul_flops": count} for phase, count in self._flops.items() if phase != OUTSIDE}

    def run(self, operator: Any, args: Any, kwargs: Any) -> Any:
        """Run one operator and count its work."""
        output = operator(*args, **kwargs)
        if getattr(operator, "is_view", False):
            return output
        formula = flop_registry.get(getattr(operator, "_overloadpacket", operator))
        flops = 0 if formula is None else formula(*args, **kwargs, out_val=output)
        moved = 0 if operator in _MOVES_NOTHING else _moved(args, kwargs, output)
        # A phase without a product has 0 of them, which is a finding too.
        self._flops[self._phases.current] += flops
        self._moved += moved
        if self._device is not None and moved:
            dtype = next((leaf.dtype for leaf in args if isinstance(leaf, Tensor)), torch.float32)
            self._seconds += self._device.seconds(flops, moved, str(dtype).removeprefix("torch."))
        return output


_aten = torch.ops.aten
_MOVES_NOTHING = {
    *(
        _aten.empty.memory_format,
        _aten.empty_like.default,
        _aten.empty_strided.default,
        _aten.new_empty.default,
        _aten.new_empty_strided.default,
    ),
    *(_aten._efficientzerotensor.default, _aten._unsafe_view.default, _aten._local_scalar_dense.default),
}


def _moved(args: Any, kwargs: Any, output: Any) -> int:
    """Bytes of the distinct tensors that go in, and of those that come out."""
    read: dict[int, Tensor] = {}
    _gather(args, read)
    _gather(kwargs.values(), read)
    written: dict[int, Tensor] = {}
    _gather((output,), written)
    return sum(map(_bytes, read.values())) + sum(map(_bytes, written.values()))


def _gather(leaves: Any, seen: dict[int, Tensor]) -> None:
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            seen[id(leaf)] = leaf
        elif isinstance(leaf, (list, tuple)):
            _gather(leaf, seen)


def _bytes(tensor: Tensor) -> int:
    """An expanded tensor has fewer bytes than numbers; a sparse one those of its parts."""
    size = tensor.numel() * tensor.itemsize
    if tensor.layout != torch.strided:
        return storage_bytes(tensor)
    if 0 not in tensor.stride():
        return size
    distinct = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        distinct *= length if stride else min(length, 1)
    return distinct * tensor.itemsize
