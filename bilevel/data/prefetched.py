"""Prefetched: a loader whose next batches are made ready by a thread while the last one is used."""

import collections
import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from bilevel.batches import Batches, PerStep
from bilevel.data._checks import whole
from bilevel.space import tree


class Prefetched:
    """A loader that makes batches ahead of time in a thread: the same batches, in the same order.

    What the thread raises is raised in the loop, after the batches before it. The thread ends with the loop, whichever
    way that ends, with `close()`, and with the `with` block that it may stand in. One loop at a time.

    `state_dict()` is that of the loader behind it as of the batch that the loop received last, not of those made ahead:
    ask this object for it, not the loader. A loader that can be read only once (a generator) loses nothing when a loop
    ends early: the next loop begins with what was made ahead.

    Inside a dispatch mode (fake tensors, a meter) there is no thread, which would not see it: batches are made when
    they are asked for. The loader runs with the modes that the consumer has when the loop begins: gradients, inference,
    autocast, default device, CUDA stream. It should draw no random numbers from torch's global generator, which the
    loop draws from at the same time.

    Args:
        loader: any iterable, such as `Episodes` or a DataLoader.
        ahead: batches, at most, that are ready or being made.
        device: where tensors of the batches go; None leaves them. Identities (`index`, `task_ids`) stay.
        pin: copy through page-locked memory, so that a copy to a CUDA device runs beside computation; with device=None,
            leave them there.

    Raises:
        TypeError: `loader` is no iterable.
        ValueError: `ahead` is smaller than 1, or a CUDA device or `pin` is asked for without CUDA.

    Memory: `ahead` batches more than without it.

    Example:
        >>> from bilevel.data import Sinusoids
        >>> loader = Prefetched(Sinusoids(tasks=2, steps=3), ahead=2)
        >>> [batches.index for batches in loader]
        [0, 1, 2]
    """

    def __init__(
        self, loader: Iterable[Any], ahead: int = 2, device: torch.device | str | None = None, pin: bool = False
    ) -> None:
        if not isinstance(loader, Iterable):
            raise TypeError(f"Prefetched was given a {type(loader).__name__}; an iterable of batches was needed")
        self.loader = loader
        self.ahead = whole("Prefetched", "ahead", ahead)
        self.device = None if device is None else torch.device(device)
        self.pin = pin
        if self.device is not None and self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"Prefetched was given device={str(device)!r}, and torch finds no CUDA device here")
        if pin and (not torch.cuda.is_available() or (self.device is not None and self.device.type != "cuda")):
            raise ValueError(
                f"Prefetched was given pin=True and device={device}; page-locked memory is for a CUDA device"
            )
        self._run: _Run | None = None
        self._left: list[_Made] = []
        self._state: Any = None

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread, if there is one; a loop that is still open raises RuntimeError when it goes on."""
        if self._run is not None:
            run, self._run = self._run, None
            left = run.end()
            self._left = left if run.once else []

    def __iter__(self) -> Iterator[Any]:
        # A generator: nothing runs before the first batch is asked for, and its end is seen however the loop ends.
        self.close()
        iterator = iter(self.loader)
        self._state = self._state if self._left else self._loader_state()
        run = self._run = _Run(self, iterator, self._left, once=iterator is self.loader)
        self._left = []
        stop = weakref.finalize(run, _stop, run.shared, run.thread)  # at the interpreter's exit, before threads freeze
        try:
            while True:
                made = run.next() if self._run is run else None
                if made is None or self._run is not run:
                    raise RuntimeError(
                        "a loop over Prefetched went on after close() or after another loop over it began; one loop at "
                        "a time"
                    )
                if made.error is not None:
                    raise made.error
                if made.end:
                    return
                if made.ready is not None:
                    _wait_for(made)
                self._state = made.state
                yield made.batches
        finally:
            if self._run is run:
                self.close()
            else:
                run.end()
            stop.detach()

    def state_dict(self) -> Any:
        """The loader's state as of the batch that the loop received last.

        Raises:
            TypeError: the loader has no state.
        """
        state = self._loader_state() if self._state is None else self._state
        if state is None:
            raise TypeError(f"the loader, a {type(self.loader).__name__}, has no state_dict()")
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next loop go on where the state was taken; an open loop is closed.

        Raises:
            TypeError: the loader has no state; otherwise as the loader's.
        """
        if not hasattr(self.loader, "load_state_dict"):
            raise TypeError(f"the loader, a {type(self.loader).__name__}, has no load_state_dict()")
        self.close()
        self._left, self._state = [], None
        self.loader.load_state_dict(state)

    def _loader_state(self) -> Any:
        return self.loader.state_dict() if hasattr(self.loader, "state_dict") else None


_END = object()


class _Made(NamedTuple):
    """A batch, the end, or an error; `ready` is the event after its copy to a CUDA device, and the device."""

    batches: Any = None
    state: Any = None
    ready: Any = None
    error: BaseException | None = None
    end: bool = False


class _Shared:
    """What thread and consumer share."""

    def __init__(self, ahead: int, made: list[_Made]) -> None:
        self.ahead = ahead
        self.made = collections.deque(made)
        self.changed = threading.Condition()
        self.stopped = False

    def room(self) -> bool:
        """Wait until one more may be made; False if none should be."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopped or len(self.made) < self.ahead)
            return not self.stopped

    def put(self, made: _Made) -> None:
        with self.changed:
            self.made.append(made)
            self.changed.notify_all()

    def get(self) -> _Made | None:
        """The next one; None after a stop."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopped or bool(self.made))
            if self.stopped:
                return None
            found = self.made[0] if self.made[0].end else self.made.popleft()
            self.changed.notify_all()
            return found

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()


class _Run:
    """One loop: its iterator, and the thread that goes through it."""

    def __init__(self, owner: Prefetched, iterator: Iterator[Any], left: list[_Made], *, once: bool) -> None:
        self.once = once
        self.shared = _Shared(owner.ahead, left)
        self._make = _Maker(owner, iterator)
        self.thread: threading.Thread | None = None
        if not _modes():
            self.thread = threading.Thread(
                target=_work, args=(self.shared, self._make), name="bilevel prefetch", daemon=True
            )
            self.thread.start()

    def next(self) -> _Made | None:
        if self.thread is None and not self.shared.made:
            self.shared.put(self._make())
        return self.shared.get()

    def end(self) -> list[_Made]:
        """Stop and wait for the thread; what was made and not received."""
        self.shared.stop()
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join()
        return list(self.shared.made)


def _stop(shared: _Shared, thread: threading.Thread | None) -> None:
    shared.stop()
    if thread is not None:
        thread.join(timeout=5)


def _work(shared: _Shared, make: "_Maker") -> None:
    with make.surroundings():
        while shared.room():
            made = make()
            shared.put(made)
            if made.end or made.error is not None:
                return


class _Maker:
    """Makes the next batch, as the consumer would."""

    def __init__(self, owner: Prefetched, iterator: Iterator[Any]) -> None:
        self.iterator, self.state_of, self.pin = iterator, owner._loader_state, owner.pin
        self.device = owner.device
        self.grad, self.inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self.default_device = torch.get_default_device()
        self.autocast = [
            torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=torch.is_autocast_cache_enabled())
            for kind in ("cpu", "cuda")
            if torch.is_autocast_enabled(kind)
        ]
        self.current: Any = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
        self.stream: Any = None
        if self.device is not None and self.device.type == "cuda":
            index = torch.cuda.current_device() if self.device.index is None else self.device.index
            self.device = torch.device("cuda", index)
            self.stream = torch.cuda.Stream(self.device)

    @contextlib.contextmanager
    def surroundings(self) -> Iterator[None]:
        """The consumer's modes, which a thread does not inherit."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            if self.default_device.type != "cpu":
                stack.enter_context(self.default_device)
            for mode in self.autocast:
                stack.enter_context(mode)
            if self.current is not None:
                stack.enter_context(torch.cuda.stream(self.current))
            yield

    def __call__(self) -> _Made:
        try:
            batches = next(self.iterator, _END)
            if batches is _END:
                return _Made(end=True)
            state = self.state_of()
            if self.device is None and not self.pin:
                return _Made(batches, state)
            if self.stream is None:
                return _Made(_mapped(batches, self._moved), state)
            if any(leaf.is_cuda for leaf in _tensors(batches)):
                self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                moved = _mapped(batches, self._moved)
                return _Made(moved, state, (self.stream.record_event(), self.device))
        except BaseException as error:
            return _Made(error=error)

    def _moved(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if self.pin and leaf.device.type == "cpu":
            leaf = leaf.pin_memory()
        return leaf if self.device is None else leaf.to(self.device, non_blocking=self.pin)


def _wait_for(made: _Made) -> None:
    """Let the consumer's stream wait for the copy, and keep the memory until it is done with it."""
    event, device = made.ready
    stream = torch.cuda.current_stream(device)
    stream.wait_event(event)
    for leaf in _tensors(made.batches):
        if leaf.is_cuda:
            leaf.record_stream(stream)


def _mapped(batches: Any, move: Any) -> Any:
    """The batches with their tensors moved; identities are left alone."""
    if isinstance(batches, Batches):
        parts = {name: _mapped(getattr(batches, name), move) for name in ("inner", "outer", "curvature")}
        return dataclasses.replace(batches, **parts)
    if isinstance(batches, PerStep):
        return PerStep([_mapped(batches[step], move) for step in range(len(batches))], ragged=True)
    return None if batches is None else tree.tree_map(move, batches)


def _tensors(batches: Any) -> list[Tensor]:
    if isinstance(batches, Batches):
        return [leaf for part in (batches.inner, batches.outer, batches.curvature) for leaf in _tensors(part)]
    if isinstance(batches, PerStep):
        return [leaf for step in range(len(batches)) for leaf in _tensors(batches[step])]
    return tree.tensors(batches)


def _modes() -> bool:
    """Whether operators are watched or replaced in this thread, other than by a default device."""
    functions = [mode for mode in _get_current_function_mode_stack() if not isinstance(mode, DeviceContext)]
    return bool(functions or _get_current_dispatch_mode_stack())
