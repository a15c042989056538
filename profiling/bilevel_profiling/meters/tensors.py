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
import contextlib
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bilevel_profiling.meters.base import Meter
from bilevel_profiling.meters.ledger import Ledger
from bilevel_profiling.meters.origin import Places, node, operator_name
from bilevel_profiling.meters.phases import OUTSIDE, Phases
from bilevel_profiling.meters.timeline import Timeline
from bilevel_profiling.record import Alive

CUDA_BLOCK = 512
"""The CUDA caching allocator serves whole blocks of so many bytes."""
_MOST_ALIVE = 20


class Tensors(Meter):
    """Peak of live tensor bytes, in total and by phase, with a timeline and who held them. Meters may be nested; each counts from its own start.

    Inputs of an operator are older than its outputs: an output on an input's storage is a view, and is not counted. A storage that grows later
    (`resize_`, `out=`) counts with its new size, and an older one with its growth.

    After the block `live_bytes` goes on falling as tensors die: read when the result is dropped, it is what leaked.

    Backward passes inside the block run on the calling thread, also on a GPU, so that they are attributed to the operations they belong to.

    Example:
        >>> import torch
        >>> x = torch.ones(256)
        >>> with Tensors() as meter:
        ...     y = x[:128] + 1         # 512 bytes; the view is none
        ...     y = y * 2               # 512 more, before the first 512 go
        >>> meter.peak_bytes, meter.live_bytes
        (1024, 512)
        >>> [(entry.bytes, entry.operator) for entry in meter.alive()]
        [(512, 'aten.add'), (512, 'aten.mul')]
        >>> del y
        >>> meter.live_bytes
        0
    """

    perturbs = True

    def __init__(self) -> None:
        self._counted: dict[int, _Counted] = {}
        # Weak references call back at any moment, on any thread: they only append here, and the sums are made between operators.
        self._dead: collections.deque[_Counted] = collections.deque()
        self._live = self._blocks = 0
        self._peak = self._peak_blocks = 0
        self._peaks: dict[str, int] = {}
        self._timeline = Timeline()
        self._ledger = Ledger()
        self._places = Places()
        self._phases = Phases(lambda phase: None)
        self._inside = contextlib.ExitStack()

    def __enter__(self) -> Self:
        # A function that torch.compile meets first under a dispatch mode would never be compiled afterwards.
        self._inside.enter_context(torch.compiler.set_stance("force_eager"))
        self._inside.enter_context(self._phases)
        self._inside.enter_context(self._places)
        self._inside.enter_context(torch.autograd.set_multithreading_enabled(False))
        self._inside.enter_context(_Mode(self))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._settle()
        self._note()
        self._inside.close()

    @property
    def peak_bytes(self) -> int:
        """Most bytes alive at once inside the block."""
        return self._peak

    @property
    def peak_block_bytes(self) -> int:
        """The same with each storage rounded up to whole blocks of 512 bytes, as the CUDA caching allocator does."""
        return self._peak_blocks

    @property
    def live_bytes(self) -> int:
        """Bytes made inside the block and alive now."""
        self._settle()
        return self._live

    def alive(self, most: int = _MOST_ALIVE) -> tuple[Alive, ...]:
        """What was alive at the peak, by origin, the largest first; the entry after the first `most` is the rest."""
        return self._ledger.alive(most)

    def figures(self) -> dict[str, Any]:
        return {
            "peak_tensor_bytes": self.peak_bytes,
            "kept_tensor_bytes": self.live_bytes,
            "timeline": self._timeline.points(),
            "alive": self.alive(),
        }

    def phases(self) -> dict[str, dict[str, Any]]:
        return {phase: {"peak_tensor_bytes": peak} for phase, peak in self._peaks.items() if phase != OUTSIDE}

    def run(self, operator: Any, args: Any, kwargs: Any) -> Any:
        """Run one operator and count what it made."""
        # What begins a phase is alive during it, also when its first operator makes nothing.
        self._settle()
        self._note()
        inputs = {storage._cdata: storage for storage in _storages((args, kwargs) if kwargs else args)}
        sizes = {key: storage.nbytes() for key, storage in inputs.items()} if _mutates(operator) else {}
        if operator is torch.ops.aten.lift_fresh.default:
            inputs = {}  # torch.tensor(...): the one operator whose input nobody has seen, because it was made from numbers on the way here
        at = node()
        in_place_otherwise = at is not None and operator is torch.ops.aten.add.Tensor and self._made_elsewhere(args[0], at)
        place = self._places.here(at)
        output = operator(*args, **kwargs)
        self._settle()
        before, name, number = self._live, operator_name(operator), -1
        for key, size in sizes.items():
            if inputs[key].nbytes() != size:
                self._resized(key, inputs[key], size, self._ledger.number((self._phases.current, self._phases.span, name, place)))
        for storage in _storages((output,)):
            if storage._cdata not in inputs and storage._cdata not in self._counted:
                number = self._ledger.number((self._phases.current, self._phases.span, name, place)) if number < 0 else number
                self._count(storage, storage.nbytes(), 0, number, at)
        if not in_place_otherwise:  # else the next operator notes what is left, the gradient included if it is still held
            self._note()
        self._timeline.add(before if in_place_otherwise else self._live, (self._phases.current, self._phases.span, name))
        return output

    def _made_elsewhere(self, gradient: Any, node: int) -> bool:
        """Whether a gradient comes from another node of the graph than the one that runs: then adding to it is autograd's doing, not the node's.

        With create_graph the sum is out of place in any case.
        """
        if torch.is_grad_enabled() or not isinstance(gradient, Tensor) or gradient.layout != torch.strided:
            return False
        known = self._counted.get(gradient.untyped_storage()._cdata)
        return known is not None and known.node not in (None, node)

    def _count(self, storage: UntypedStorage, size: int, older: int, origin: int, node: int | None) -> None:
        counted = _Counted(storage, self._dead.append)
        counted.key, counted.size, counted.older, counted.origin, counted.node = storage._cdata, size, older, origin, node
        self._counted[counted.key] = counted
        self._book(origin, size)

    def _resized(self, key: int, storage: UntypedStorage, before: int, origin: int) -> None:
        known = self._counted.get(key)
        if known is None:
            self._count(storage, max(storage.nbytes() - before, 0), before, origin, None)
        else:
            self._book(known.origin, -known.size)
            known.size = max(storage.nbytes() - known.older, 0)
            self._book(known.origin, known.size)

    def _settle(self) -> None:
        while self._dead:
            gone = self._dead.popleft()
            self._book(gone.origin, -gone.size)
            # A new storage may live at the address already.
            if self._counted.get(gone.key) is gone:
                del self._counted[gone.key]

    def _book(self, origin: int, size: int) -> None:
        self._live += size
        self._blocks += in_blocks(size) if size > 0 else -in_blocks(-size)
        self._ledger.add(origin, size)

    def _note(self) -> None:
        phase = self._phases.current
        if self._live > self._peaks.get(phase, -1):
            self._peaks[phase] = self._live
            if self._live > self._peak:
                self._peak = self._live
                self._ledger.mark()
        self._peak_blocks = max(self._peak_blocks, self._blocks)


class _Counted(weakref.ref[UntypedStorage]):
    """A storage that is counted with `size` bytes; `older` bytes of it were there before. `origin` made it, in the backward pass of `node`."""

    __slots__ = ("key", "node", "older", "origin", "size")
    key: int
    size: int
    older: int
    origin: int
    node: int | None


class _Mode(TorchDispatchMode):
    def __init__(self, meter: Tensors) -> None:
        super().__init__()
        self._meter = meter

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the meter has switched compilation off; the wrapper that torch would put around each operation costs more than the meter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked by autograd more often than anything is computed
        # A span opening or closing, or another question: no operator on tensors.
        if func.namespace in ("profiler", "prim"):
            return func(*args, **(kwargs or {}))
        return self._meter.run(func, args, kwargs or {})


def _mutates(operator: Any) -> bool:
    found = _mutating.get(operator)
    if found is None:
        schema = getattr(operator, "_schema", None)
        found = _mutating[operator] = schema is None or schema.is_mutable
    return found


_mutating: dict[Any, bool] = {}
_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)


def _storages(tree: Any) -> Iterator[UntypedStorage]:
    """The storages of all tensors in the arguments or the output of an operator."""
    for leaf in tree:
        if isinstance(leaf, Tensor):
            if type(leaf) in _PLAIN and leaf.layout == torch.strided:
                yield leaf.untyped_storage()
            else:
                yield from storages_of(leaf)
        elif isinstance(leaf, (list, tuple)):
            yield from _storages(leaf)
        elif isinstance(leaf, dict):
            yield from _storages(leaf.values())
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


def in_blocks(size: int) -> int:
    """Bytes rounded up to what the CUDA caching allocator serves."""
    return -(-size // CUDA_BLOCK) * CUDA_BLOCK


def storage_bytes(tree: Any) -> int:
    """Bytes of the distinct storages under the tensors of a tree.

    Example:
        >>> import torch
        >>> x = torch.zeros(4)
        >>> storage_bytes({"whole": x, "part": x[:2]})
        16
    """
    return sum(storage_sizes(tree))


def storage_sizes(tree: Any) -> list[int]:
    """Bytes of each of them."""
    return list({storage._cdata: storage.nbytes() for storage in _storages(tree_leaves(tree))}.values())
