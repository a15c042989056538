"""Live tensor bytes: what the storages made inside the block weigh together, at most, at one time. On any device, real or fake.

Every operator that reaches the dispatcher is seen: forward, backward, double backward, and what torch.func does. An operator's outputs are counted by
their storage, each storage once, and given up when the last tensor on it dies, which a weak reference tells. Scratch memory inside a kernel is
not seen, nor is what an allocator adds by rounding and caching (`cuda` sees both).

One thing differs while a dispatch mode is on: where two gradients of one tensor meet, autograd adds them out of place, and without a mode in place.
The sum is therefore counted in the place of the gradient that dies with it; without that, a Hessian-vector product of a small net weighs a fifth more
than in the allocator's own record, with it the same to the byte.

torch.distributed._tools.MemTracker works in the same way but refuses to run a module twice, which every inner loop does.
"""

import collections
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bilevel_profiling.meters.base import Meter
from bilevel_profiling.meters.phases import OUTSIDE, Phases
from bilevel_profiling.meters.timeline import Timeline


class Tensors(Meter):
    """Peak of live tensor bytes, in total and by phase, with a timeline. Meters may be nested; each counts from its own start.

    Inputs of an operator are older than its outputs: an output on an input's storage is a view, and is not counted. A storage that grows later
    (`resize_`, `out=`) counts with its new size, and an older one with its growth.

    After the block `live_bytes` goes on falling as tensors die: read when the result is dropped, it is what leaked.

    Example:
        >>> import torch
        >>> x = torch.ones(256)
        >>> with Tensors() as meter:
        ...     y = x[:128] + 1         # 512 bytes; the view is none
        ...     y = y * 2               # 512 more, before the first 512 go
        >>> meter.peak_bytes, meter.live_bytes
        (1024, 512)
        >>> del y
        >>> meter.live_bytes
        0
    """

    perturbs = True

    def __init__(self) -> None:
        self._counted: dict[int, _Counted] = {}
        # Weak references call back at any moment, on any thread: they only append here, and the sums are made between operators.
        self._dead: collections.deque[_Counted] = collections.deque()
        self._live = 0
        self._peaks: dict[str, int] = {}
        self._timeline = Timeline()
        self._phases = Phases(lambda phase: None)
        self._mode = _Mode(self)

    def __enter__(self) -> Self:
        self._phases.__enter__()
        self._mode.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._mode.__exit__(None, None, None)
        self._settle()
        self._note()
        self._phases.__exit__(None, None, None)

    @property
    def peak_bytes(self) -> int:
        """Most bytes alive at once inside the block."""
        return max(self._peaks.values(), default=0)

    @property
    def live_bytes(self) -> int:
        """Bytes made inside the block and alive now."""
        self._settle()
        return self._live

    def figures(self) -> dict[str, Any]:
        return {"peak_tensor_bytes": self.peak_bytes, "kept_tensor_bytes": self.live_bytes, "timeline": self._timeline.points()}

    def phases(self) -> dict[str, dict[str, Any]]:
        return {phase: {"peak_tensor_bytes": peak} for phase, peak in self._peaks.items() if phase != OUTSIDE}

    def run(self, operator: Any, args: Any, kwargs: Any) -> Any:
        """Run one operator and count what it made."""
        # What begins a phase is alive during it, also when its first operator makes nothing.
        self._settle()
        self._note()
        inputs = {storage._cdata: (storage, storage.nbytes()) for storage in _storages((args, kwargs))}
        if operator is torch.ops.aten.lift_fresh.default:
            inputs = {}  # torch.tensor(...): the one operator whose input nobody has seen, because it was made from numbers on the way here
        node = _node()
        in_place_otherwise = operator is torch.ops.aten.add.Tensor and node is not None and self._made_elsewhere(args[0], node)
        output = operator(*args, **kwargs)
        self._settle()
        before = self._live
        for key, (storage, size) in inputs.items():
            if storage.nbytes() != size:
                self._resized(key, storage, size)
        for storage in _storages(output):
            if storage._cdata not in inputs and storage._cdata not in self._counted:
                self._count(storage, storage.nbytes(), 0, node)
        if not in_place_otherwise:  # else the next operator notes what is left, the gradient included if it is still held
            self._note()
        self._timeline.add(before if in_place_otherwise else self._live, self._phases.current)
        return output

    def _made_elsewhere(self, gradient: Any, node: int) -> bool:
        """Whether a gradient comes from another node of the graph than the one that runs: then adding to it is autograd's doing, not the node's."""
        known = self._counted.get(gradient.untyped_storage()._cdata) if isinstance(gradient, Tensor) and gradient.layout == torch.strided else None
        return known is not None and known.node not in (None, node)

    def _count(self, storage: UntypedStorage, size: int, older: int, node: int | None = None) -> None:
        counted = _Counted(storage, self._dead.append)
        counted.key, counted.size, counted.older, counted.node = storage._cdata, size, older, node
        self._counted[counted.key] = counted
        self._live += size

    def _resized(self, key: int, storage: UntypedStorage, before: int) -> None:
        known = self._counted.get(key)
        if known is None:
            self._count(storage, max(storage.nbytes() - before, 0), before)
        else:
            size = max(storage.nbytes() - known.older, 0)
            self._live += size - known.size
            known.size = size

    def _settle(self) -> None:
        while self._dead:
            gone = self._dead.popleft()
            self._live -= gone.size
            # A new storage may live at the address already.
            if self._counted.get(gone.key) is gone:
                del self._counted[gone.key]

    def _note(self) -> None:
        phase = self._phases.current
        self._peaks[phase] = max(self._peaks.get(phase, 0), self._live)


class _Counted(weakref.ref[UntypedStorage]):
    """A storage that is counted with `size` bytes; `older` bytes of it were there before; `node` of a backward pass made it."""

    __slots__ = ("key", "node", "older", "size")
    key: int
    size: int
    older: int
    node: int | None


class _Mode(TorchDispatchMode):
    def __init__(self, meter: Tensors) -> None:
        super().__init__()
        self._meter = meter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "profiler":  # a span opening or closing, not an operator on tensors
            return func(*args, **(kwargs or {}))
        return self._meter.run(func, args, kwargs or {})


def _node() -> int | None:
    """The number of the node that a backward pass without create_graph is at; None outside of one."""
    if torch.is_grad_enabled() or torch._C._current_graph_task_id() == -1:
        return None
    node = torch._C._current_autograd_node()
    return None if node is None else node._sequence_nr()


def _storages(tree: Any) -> Iterator[UntypedStorage]:
    """The storages of all tensors in the arguments or the output of an operator."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield from storages_of(leaf)
        elif isinstance(leaf, UntypedStorage):
            yield leaf


def storages_of(tensor: Tensor) -> Iterator[UntypedStorage]:
    """The storages a tensor lies on: one, or those of the parts of a sparse tensor or of a wrapper."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from storages_of(getattr(tensor, name))
    elif tensor.layout == torch.strided:
        yield tensor.untyped_storage()
    elif tensor.layout == torch.sparse_coo:
        yield from (part.untyped_storage() for part in (tensor._indices(), tensor._values()))
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (part.untyped_storage() for part in (tensor.crow_indices(), tensor.col_indices(), tensor.values()))
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (part.untyped_storage() for part in (tensor.ccol_indices(), tensor.row_indices(), tensor.values()))


def storage_bytes(tree: Any) -> int:
    """Bytes of the distinct storages under the tensors of a tree.

    Example:
        >>> import torch
        >>> x = torch.zeros(4)
        >>> storage_bytes({"whole": x, "part": x[:2]})
        16
    """
    return sum({storage._cdata: storage.nbytes() for storage in _storages(tree)}.values())
