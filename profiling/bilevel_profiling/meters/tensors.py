"""Live tensor bytes: what the storages made inside the block weigh together at one time, at most. On any device.

Every operator that reaches the dispatcher is seen: forward, backward, double backward, and what torch.func does. An
operator's outputs are counted by their storage, each storage once, and given up when the last tensor on it dies, which
a weak reference tells. Scratch memory inside a kernel is not seen, nor what an allocator adds (`cuda` sees both).

Autograd works out of place in some spots because a dispatch mode is on: where two gradients of one tensor meet, and in
the backward of gather, topk, max(dim), x[index] and their kin, which write into zeros. Their results are counted in the
place of what dies with them; without that, a product with the Hessian of a small net weighs a fifth more than in the
allocator's own record, with it the same to the byte. Not mended: the backward of prod, cumprod, amax, and of max()
without a dimension. Not seen: operators on other threads, tensors from copy.deepcopy or pickle.

torch.distributed's MemTracker works in the same way but refuses to run a module twice, which every inner loop does.
"""

import collections
import contextlib
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, UntypedStorage
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from bilevel.engine import spans
from bilevel_profiling.meters.base import Meter
from bilevel_profiling.meters.ledger import Ledger
from bilevel_profiling.meters.operators import Operators
from bilevel_profiling.meters.origin import Places, node, of_the_engine, operator_name
from bilevel_profiling.meters.phases import OUTSIDE, Phases
from bilevel_profiling.meters.storages import in_blocks, storages
from bilevel_profiling.meters.timeline import Timeline
from bilevel_profiling.records.record import Alive

_MOST_ALIVE = 20
_HOST = spans.HOST.removeprefix("bilevel.")
_lift_fresh = torch.ops.aten.lift_fresh.default
"""torch.tensor(...): its input was made from numbers on the way there."""


class Tensors(Meter):
    """Peak of live tensor bytes, in total and by phase, with a timeline and who held them. Meters may be nested; each
    counts from its own start.

    Inputs of an operator are older than its outputs: an output on an input's storage is a view, and is not counted. A
    storage that grows later (`resize_`, `out=`) counts with its new size, and an older one with its growth.
    What the library offloads from a device does not count: it makes its buffers on the host in the span spans.HOST.

    After the block `live_bytes` goes on falling as tensors die: read when the result is dropped, it is what leaked.

    Backward passes inside the block run on the calling thread, also on a GPU, so that they are attributed to the
    operations they belong to.

    Args:
        stand_in: what to give to operators in place of a real tensor, under fake tensors.

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

    def __init__(self, stand_in: Callable[[Tensor], Tensor] | None = None) -> None:
        self._stand_in = stand_in
        self._counted: dict[int, _Counted] = {}
        # Weak references call back at any moment, on any thread: they only append here, and the sums are made between
        # operators.
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
        self._inside.enter_context(Operators(self.run))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._settle()
        self._note()
        self._timeline.end(self._live, (self._phases.current, "", ""))
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
    def hidden(self) -> bool:
        """Whether an engine that compiles or captures was at work, so that these bytes are not all there were."""
        return self._phases.hidden

    @property
    def live_bytes(self) -> int:
        """Bytes made inside the block and alive now."""
        self._settle()
        return self._live

    def live_sizes(self) -> dict[int, int]:
        """Bytes of each storage made inside the block and alive now, by the address of the storage."""
        self._settle()
        return {key: counted.size for key, counted in self._counted.items()}

    def alive(self, most: int = _MOST_ALIVE) -> tuple[Alive, ...]:
        """What was alive at the peak, by origin, the largest first; the entry after the first `most` is the rest."""
        return self._ledger.alive(most)

    def figures(self) -> dict[str, Any]:
        return {
            "peak_tensor_bytes": self.peak_bytes,
            "kept_tensor_bytes": self.live_bytes,
            "peak_meter": "tensors",
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
        literal = operator is _lift_fresh
        if self._stand_in is not None and not literal:
            args, kwargs = self._stood_in(args), {name: self._stood_in((value,))[0] for name, value in kwargs.items()}
        if _views(operator):
            self._places.here(None if (running := node()) is None else running._sequence_nr())
            output = operator(*args, **kwargs)
            self._timeline.add(self._live, (self._phases.current, self._phases.span, operator_name(operator)))
            return output
        inputs = {storage._cdata: storage for storage in storages((args, kwargs) if kwargs else args)}
        sizes = {key: storage.nbytes() for key, storage in inputs.items()} if _mutates(operator) else {}
        if literal:
            inputs = {}  # the one operator whose input nobody has seen
        for key, storage in inputs.items():
            known = self._counted.get(key)
            if known is not None and storage.nbytes() != known.older + known.size:  # storage.resize_(): no operator
                self._resized(key, storage, 0, known.origin)
        running = node()
        at = None if running is None else running._sequence_nr()
        in_place_otherwise = (
            at is not None and operator in _OUT_OF_PLACE and self._in_place_otherwise(operator, args[0], running)
        )
        place = self._places.here(at)
        output = operator(*args, **kwargs)
        self._settle()
        before, name, number = self._live, operator_name(operator), -1
        for key, size in sizes.items():
            if inputs[key].nbytes() != size:
                self._resized(
                    key, inputs[key], size, self._ledger.number((self._phases.current, self._phases.span, name, place))
                )
        for storage in () if self._phases.span == _HOST else storages((output,)):
            if storage._cdata not in inputs and storage._cdata not in self._counted and _weighs(operator, output):
                number = (
                    self._ledger.number((self._phases.current, self._phases.span, name, place))
                    if number < 0
                    else number
                )
                self._count(storage, storage.nbytes(), 0, number, at)
        if (
            not in_place_otherwise
        ):  # else the next operator notes what is left, the gradient included if it is still held
            self._note()
        self._timeline.add(
            before if in_place_otherwise else self._live, (self._phases.current, self._phases.span, name)
        )
        return output

    def _in_place_otherwise(self, operator: Any, first: Any, node: Any) -> bool:
        """Whether autograd would write into the first argument if no dispatch mode were on. With create_graph it never
        does.
        """
        if torch.is_grad_enabled() or not isinstance(first, Tensor) or first.layout != torch.strided:
            return False
        known = self._counted.get(first.untyped_storage()._cdata)
        if known is None or known.node is None:
            return False
        own = known.node == node._sequence_nr()
        if operator is not torch.ops.aten.add.Tensor:
            return own  # zeros that the same node has made
        # Two gradients of one tensor: from two nodes, or both from this one. A view's storage is held by its base as
        # well, and is not written to.
        twice = len(set(node.next_functions)) < len(node.next_functions)
        return (not own or twice) and not first._is_view() and of_the_engine()

    def _stood_in(self, leaves: Any) -> Any:
        """Arguments of an operator with real tensors replaced."""
        if not any(type(leaf) in (Tensor, torch.nn.Parameter) or isinstance(leaf, (list, tuple)) for leaf in leaves):
            return leaves
        assert self._stand_in is not None
        found = [
            self._stand_in(leaf)
            if type(leaf) in (Tensor, torch.nn.Parameter)
            else self._stood_in(leaf)
            if isinstance(leaf, (list, tuple))
            else leaf
            for leaf in leaves
        ]
        return found if isinstance(leaves, list) else tuple(found)

    def _count(self, storage: UntypedStorage, size: int, older: int, origin: int, node: int | None) -> None:
        counted = _Counted(storage, self._dead.append)
        counted.key, counted.size, counted.older, counted.origin, counted.node = (
            storage._cdata,
            size,
            older,
            origin,
            node,
        )
        self._counted[counted.key] = counted
        self._book(origin, size)

    def _resized(self, key: int, storage: UntypedStorage, before: int, origin: int) -> None:
        known = self._counted.get(key)
        if known is None:
            self._count(storage, max(storage.nbytes() - before, 0), before, origin, None)
        else:
            # The new memory is there before the old goes.
            size, known.size = known.size, max(storage.nbytes() - known.older, 0)
            self._book(known.origin, known.size)
            if known.size > size:
                self._note()
            self._book(known.origin, -size)

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
    """A storage that is counted with `size` bytes; `older` bytes of it were there before. `origin` made it, in the
    backward pass of `node`.
    """

    __slots__ = ("key", "node", "older", "origin", "size")
    key: int
    size: int
    older: int
    origin: int
    node: int | None


def _weighs(operator: Any, output: Any) -> bool:
    """Whether what an operator made takes memory: zeros that are never written down do not, nor do tensors on the meta
    device.
    """
    if operator is torch.ops.aten._efficientzerotensor.default:
        return False
    first = (
        output
        if isinstance(output, Tensor)
        else next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
    )
    device = first.fake_device if isinstance(first, FakeTensor) else None if first is None else first.device
    return device is None or device.type != "meta"


def _views(operator: Any) -> bool:
    """Whether all that an operator returns is views: not so for composite ones, which may copy."""
    found = _viewing.get(operator)
    if found is None:
        found = _viewing[operator] = (
            isinstance(operator, OpOverload) and operator.is_view and not operator._can_decompose()
        )
    return found


_viewing: dict[Any, bool] = {_lift_fresh: False}


def _mutates(operator: Any) -> bool:
    found = _mutating.get(operator)
    if found is None:
        schema = getattr(operator, "_schema", None)
        found = _mutating[operator] = schema is None or schema.is_mutable
    return found


_mutating: dict[Any, bool] = {}
_aten = torch.ops.aten
_OUT_OF_PLACE = {
    _aten.add.Tensor,
    *(
        _aten.scatter_add.default,
        _aten.scatter.src,
        _aten.scatter.value,
        _aten.index_add.default,
        _aten.index_copy.default,
    ),
    *(_aten.index_put.default, _aten._unsafe_index_put.default, _aten.put.default),
}
"""Operators that autograd calls in place of their twins that write, because a dispatch mode is on."""
