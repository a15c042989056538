"""What is kept for later waits on the host: copied there beside the computation, and back before it is needed.

On CUDA the copies run on a stream of their own, to and from pinned memory. The host waits for none of them:

- What leaves is held until the next time something leaves; then the computation waits for its copy (which had a step
  to finish), and it is freed. So copies that are slower than steps slow the steps down, and do not pile up.
- What comes back is copied when its predecessor is in use (`Kept.fetch`), and waited for when it is used.
- A tensor that was changed in place while it was copied is an error, never a quiet number.

| on the device, of n things kept | |
| --- | --- |
| on the way there | the last one |
| on the way back | the one in use, and the next |

A tensor on the CPU stays what it is, and where it is. Buffers on the host are made in a span (`spans.HOST`), so that a
meter of the device's memory knows them. Pinned buffers are torch's, which gives out powers of two and keeps them.
"""

import contextlib
import contextvars
import functools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from bilevel.engine import spans


class Lane(Protocol):
    """How copies travel between a device and the host."""

    def buffer(self, tensor: Tensor) -> Tensor:
        """Memory of the host for a tensor."""

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """Begin to copy, from the second of each pair to the first, after all that the device was given so far; returns
        what to wait for.
        """

    def wait(self, copies: Any, tensors: Sequence[Tensor]) -> None:
        """Whatever the device is given from now on waits for the copies, in which its `tensors` are."""


class Direct:
    """Copies at once. Tensors without data, and devices that are neither CPU nor CUDA."""

    def buffer(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="cpu", requires_grad=False)

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
        for target, source in pairs:
            target.copy_(source)

    def wait(self, copies: Any, tensors: Sequence[Tensor]) -> None:
        pass


class Cuda:
    """Copies on a stream beside the one that computes, to and from pinned memory.

    One stream for both ways: what leaves has left before it comes back. Tensors of the device are allocated and freed
    on the stream that computes, which waits for the copies before it frees or reads; so the allocator needs to know of
    no second stream, unless what was fetched on one stream is used on another.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._beside = device, torch.cuda.Stream(device)

    def buffer(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="cpu", pin_memory=True, requires_grad=False)

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
        stream = torch.cuda.current_stream(self._device)
        # What is read was written there, and what is written to may have been another tensor's there.
        self._beside.wait_stream(stream)
        with torch.cuda.stream(self._beside):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return stream, self._beside.record_event()

    def wait(self, copies: Any, tensors: Sequence[Tensor]) -> None:
        (stream, event), now = copies, torch.cuda.current_stream(self._device)
        stream.wait_event(event)  # where the memory is freed to
        if now != stream:
            now.wait_event(event)
            for tensor in tensors:
                tensor.record_stream(now)


_stands_for: contextvars.ContextVar[Lane | None] = contextvars.ContextVar("bilevel_offload", default=None)


@contextlib.contextmanager
def on_a_device(lane: Lane | None = None) -> Iterator[None]:
    """Inside this block tensors on the CPU stand for those of a device, and leave it: a forecast for a GPU that is not
    there, a test. `lane`: how; copies at once by default.
    """
    token = _stands_for.set(Direct() if lane is None else lane)
    try:
        yield
    finally:
        _stands_for.reset(token)


def lane_of(tensor: Tensor) -> Lane | None:
    """How a tensor leaves its device; None if it stays."""
    if type(tensor) not in (Tensor, FakeTensor) or tensor.layout is not torch.strided:
        return None
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        return None  # copies are no part of a function that is being traced
    kind = tensor.device.type
    if kind in ("cpu", "meta"):
        return None if kind == "meta" else _stands_for.get()
    fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
    return _cuda(tensor.device) if kind == "cuda" and not fake and type(tensor) is Tensor else _direct


_cuda, _direct = functools.cache(Cuda), Direct()


class Item:
    """One tensor: itself where it stays (`lane` is None), a buffer on the host where it leaves."""

    __slots__ = ("_version", "device", "lane", "numbers")

    def __init__(self, tensor: Tensor, lane: Lane | None) -> None:
        self.device, self.lane, self._version = tensor.device, lane, _version(tensor)
        if lane is None:
            self.numbers = tensor
        else:
            with spans.span(spans.HOST):
                self.numbers = lane.buffer(tensor)

    def changed(self, tensor: Tensor) -> bool:
        """Whether the tensor was changed in place since."""
        return _version(tensor) != self._version


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _key(tensor: Tensor) -> Any:
    """What tensors with the same numbers in the same place share, while one of them lives."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


class _Flight:
    """Copies under way, and the device's tensors in them, whose memory nobody may have before they are done."""

    def __init__(self, lane: Lane, tensors: list[Tensor], pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._tensors, self._lane = tensors, lane
        self._copies: tuple[Any] | None = None
        self._copies = (lane.copy(pairs),)

    def land(self) -> list[Tensor]:
        """The tensors, to be read and freed from now on."""
        copies, self._copies = self._copies, None
        if copies is not None:
            self._lane.wait(copies[0], self._tensors)
        return self._tensors

    def __del__(self) -> None:  # dropped on the way, by an error for example
        self.land()


class Kept:
    """Some tensors that were put away together; made by `Store.put`.

    Args:
        store: where.
        items: one for each tensor.
        sources: the tensors of those items whose numbers are on their way to the host or were when the last were put
            away: so one that does not change is copied once.
        leaving: which of these are to be copied.
        changed: what to say if one was changed in place.
    """

    def __init__(
        self,
        store: "Store",
        items: list[Item],
        sources: dict[Any, tuple[Tensor, Item]],
        leaving: list[tuple[Tensor, Item]],
        changed: str,
    ) -> None:
        self._store, self.items, self._sources, self._changed = store, items, sources, changed
        self._away = [
            _Flight(lane, [tensor for tensor, _ in part], [(item.numbers, tensor) for tensor, item in part])
            for lane, part in _by_lane(leaving)
        ]
        self._coming: list[tuple[list[int], _Flight]] | None = None

    def item_of(self, key: Any) -> Item | None:
        """The item of a tensor that is on its way, or was likewise when this was put away."""
        source, item = self._sources.get(key, (None, None))
        return None if source is None or item is None or item.changed(source) else item

    def land(self) -> None:
        """What is on its way to the host gets there, and is freed.

        Raises:
            ValueError: it was changed in place meanwhile.
        """
        changed = any(item.changed(tensor) for tensor, item in self._sources.values())
        for flight in self._away:
            flight.land()
        self._away, self._sources = [], {}
        if changed:
            raise ValueError(self._changed)

    def fetch(self) -> None:
        """Begin to bring everything back. At most one `Kept` of a store is on its way back."""
        if self._coming is not None:
            return
        self._store.ahead(self)
        numbered: dict[int, tuple[Lane, list[int]]] = {}
        for place, item in enumerate(self.items):
            if item.lane is not None:
                numbered.setdefault(id(item.lane), (item.lane, []))[1].append(place)
        self._coming = []
        for lane, places in numbered.values():
            items = [self.items[place] for place in places]
            tensors = [torch.empty_like(item.numbers, device=item.device, pin_memory=False) for item in items]
            pairs = [(tensor, item.numbers) for tensor, item in zip(tensors, items, strict=True)]
            self._coming.append((places, _Flight(lane, tensors, pairs)))

    def forget(self) -> None:
        """Free what was brought back and not taken."""
        self._coming = None

    def take(self) -> list[Tensor]:
        """All tensors, on their devices, as often as they are asked for.

        Raises:
            ValueError: one that stayed was changed in place.
        """
        self.land()
        if any(item.lane is None and item.changed(item.numbers) for item in self.items):
            raise ValueError(self._changed)
        self.fetch()
        coming, self._coming = self._coming or [], None
        found = [item.numbers for item in self.items]
        for places, flight in coming:
            for place, tensor in zip(places, flight.land(), strict=True):
                found[place] = tensor
        return found


def _by_lane(leaving: Sequence[tuple[Tensor, Item]]) -> Iterator[tuple[Lane, list[tuple[Tensor, Item]]]]:
    lanes = {id(item.lane): item.lane for _, item in leaving}
    for key, lane in lanes.items():
        if lane is not None:
            yield lane, [(tensor, item) for tensor, item in leaving if id(item.lane) == key]


class Store:
    """Where tensors wait. It holds nothing itself: who holds a `Kept` keeps its tensors.

    Args:
        leaves: whether tensors leave a device that they can leave; else all stay what they are.

    Example:
        >>> store, y = Store(), torch.ones(2)
        >>> kept = store.put([y], "the tensor was changed in place")
        >>> kept.take()[0] is y             # on the CPU
        True
        >>> with on_a_device():
        ...     kept = store.put([y], "the tensor was changed in place")
        >>> kept.take()[0] is y
        False
    """

    def __init__(self, *, leaves: bool = True) -> None:
        self._leaves = leaves
        self._last: weakref.ref[Kept] | None = None
        self._ahead: weakref.ref[Kept] | None = None

    @property
    def last(self) -> Kept | None:
        """What was put away last, if it is still there."""
        return None if self._last is None else self._last()

    def put(
        self, tensors: Sequence[Tensor], changed: str, known: Sequence[Item | None] = (), stay: Sequence[bool] = ()
    ) -> Kept:
        """Put tensors away; what was put away before gets there first.

        Args:
            tensors: without a graph.
            changed: what to say if one is changed in place before it is taken (or has been copied).
            known: for each the item that holds it already, or None.
            stay: for each whether it stays on its device.

        Raises:
            ValueError: what was put away before was changed in place meanwhile.
        """
        last, items, leaving = self.last, list[Item](), list[tuple[Tensor, Item]]()
        sources: dict[Any, tuple[Tensor, Item]] = {}
        for place, tensor in enumerate(tensors):
            item = known[place] if known else None
            lane = None if item is not None or not self._leaves or (stay and stay[place]) else lane_of(tensor)
            if lane is not None:
                key = _key(tensor)
                item = sources[key][1] if key in sources else None if last is None else last.item_of(key)
                if item is None:
                    item = Item(tensor, lane)
                    leaving.append((tensor, item))
                sources.setdefault(key, (tensor, item))
            items.append(Item(tensor, None) if item is None else item)
        if last is not None:
            last.land()
        kept = Kept(self, items, sources, leaving, changed)
        self._last = weakref.ref(kept)
        return kept

    def ahead(self, kept: Kept) -> None:
        """`kept` is being brought back: whatever else was brought back ahead and not taken goes."""
        before = None if self._ahead is None else self._ahead()
        if before is not None and before is not kept:
            before.forget()
        self._ahead = weakref.ref(kept)
