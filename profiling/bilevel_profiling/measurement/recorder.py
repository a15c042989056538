"""Recorder: a record of a training loop that is the user's own, written while the loop runs, one line an iteration.

The loop may be any: over a DataLoader, a range, `bilevel.iterate`. The file is a record without figures (the name of
    the run, the environment)
and after it a line for each iteration, so it can be read at any moment with `bilevel_profiling.records.scan`,
shown, and turned into TensorBoard's.
"""

import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO, TypeVar

import torch

from bilevel_profiling.measurement.environment import environment
from bilevel_profiling.measurement.running import Running, instructions_of, number, status_of, went_through
from bilevel_profiling.records.note import Note
from bilevel_profiling.records.record import Alive, Iteration, Record
from bilevel_profiling.records.records_file import append_iteration, scan

Item = TypeVar("Item")

_HEADS = (b'{"case"', b'{"iteration"')
_SLOWED = (
    "Counting bytes slows an iteration down: where peak_tensor_bytes is there, wall_seconds is not comparable with "
    "that of the others."
)


class Recorder:
    """Writes down what each iteration of a loop costs: time, memory, oracle calls, and what the user logs.

    An iteration is making the item (loading a batch, or the whole step when the items come from `bilevel.iterate`) and
    the loop's body. Wall time is there for all of them, on CUDA with the device waited for at both ends; so are the
    peaks of CUDA's allocator, oracle calls, and phases where spans of the library open. Live tensor bytes slow an
    iteration down and are counted now and then.

    Of a `bilevel.Step` the losses, the norm of the hypergradient and its status are taken over. An iteration that ends
    with an exception has the status OUT_OF_MEMORY or ERROR, and INTERRUPTED when Ctrl-C ended it, provided that the
    exception leaves the `with` block, too.

    Args:
        path: of the file to write; its folder is made.
        name: of the run, in the record.
        label: what varies between runs: a method, a setting.
        tensors_every: live tensor bytes are counted in the iterations 0, 1 (the first makes the optimizer's state, the
            second is like all later ones) and each that many; 1 for every one, 0 for none. Compiled functions run
            uncompiled while they are counted.
        device: where the work runs; None takes the current GPU if CUDA is in use when the first iteration begins,
            otherwise the CPU.
        append: whether to add a run to a file that exists. Half a line at its end, left by a run that was killed, is
            removed.

    Raises:
        FileExistsError: on entering, when the file exists and `append` is False.
        ValueError: `tensors_every` is no whole number >= 0; on entering, a file to append to that holds something else
            than records.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile, torch
        >>> weight = torch.ones(1000, requires_grad=True)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Recorder(f"{folder}/run.jsonl") as recorder:
        ...         for step in recorder.watch(range(3)):
        ...             loss = (2 * weight).sum()
        ...             loss.backward()
        ...             recorder.log(loss=loss)
        ...             weight.grad = None
        ...     iterations = recorder.record.iterations
        >>> [(step.index, step.metrics["loss"], step.peak_tensor_bytes) for step in iterations]
        [(0, 2000.0, 4008), (1, 2000.0, 4008), (2, 2000.0, None)]
        >>> recorder.alive[0].bytes, recorder.alive[0].operator
        (4000, 'aten.mul')
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        name: str = "run",
        label: str = "",
        tensors_every: int = 100,
        device: torch.device | str | None = None,
        append: bool = False,
    ) -> None:
        if isinstance(tensors_every, bool) or not isinstance(tensors_every, int) or tensors_every < 0:
            raise ValueError(
                f"Recorder() was given tensors_every={tensors_every!r}; a whole number of iterations was needed, 0 for "
                f"never"
            )
        self.path = Path(path)
        self._name, self._label = name, label
        self._every = tensors_every
        self._device = None if device is None else torch.device(device)
        self._append = append
        self._stream: TextIO | None = None
        self._begun = False
        self._used = False
        self._watching = False
        self._index = 0
        self._running: Running | None = None
        self._left: tuple[Iteration, dict[int, int] | None] | None = None
        self._peak: tuple[int, tuple[Alive, ...]] = (-1, ())

    def __enter__(self) -> Self:
        if self._used:
            raise RuntimeError(
                f"the recorder of {self.path} was used before; make another one, with append=True to add a run to the "
                f"file"
            )
        self._used = True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._append and self.path.exists():
            _mend(self.path)
        try:
            # Lines are flushed one by one. That hands them to the system, so they outlive this process however it ends;
            # fsync, which would take longer than a short iteration, guards against the death of the machine only.
            self._stream = self.path.open("a" if self._append else "x", encoding="utf-8", newline="\n")
        except FileExistsError:
            raise FileExistsError(
                f"{self.path} exists; write Recorder({str(self.path)!r}, append=True) to add a run to it, or choose "
                f"another path (each process of a distributed run needs its own)"
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._stream is not None
        try:
            self._leave(None)  # where the loop's iterator is still held by somebody
            self._settle(error)
            self._begin()
        finally:
            self._stream.close()
            self._stream = None

    def watch(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items of `items`, and write down what each iteration cost.

        Loops one after another count on. To see a progress bar, watch it: `recorder.watch(tqdm(loader))`.

        Args:
            items: anything that can be looped over.

        Raises:
            RuntimeError: the recorder is not open; or this loop is inside another watched one.
        """
        self._check()
        return self._watched(iter(items))

    def log(self, **metrics: Any) -> None:
        """Add numbers to the current iteration; the last one given under a name counts.

        Args:
            metrics: numbers, or tensors with one element, which are waited for.

        Raises:
            RuntimeError: no iteration is running.
            TypeError: a value is no number.
        """
        if self._running is None:
            raise RuntimeError(
                "log() was called outside of an iteration; call it in the body of `for item in recorder.watch(items):`"
            )
        for name, value in metrics.items():
            self._running.metrics[name] = number(name, value)

    @property
    def record(self) -> Record:
        """The record so far, read from the file: its `iterations` are those that are finished.

        Raises:
            RuntimeError: nothing was written yet.
        """
        if self._stream is not None:
            self._settle(sys.exception())
        if not self._begun:
            raise RuntimeError(f"nothing was written to {self.path} yet; the record begins with the first iteration")
        return scan(self.path).records[-1]

    @property
    def alive(self) -> tuple[Alive, ...]:
        """What was alive at the highest peak of all iterations whose bytes were counted, the largest first."""
        return self._peak[1]

    def _watched(self, iterator: Iterator[Item]) -> Iterator[Item]:
        self._check()
        self._settle(sys.exception())
        self._begin()
        self._watching = True
        try:
            while True:
                self._running = running = Running(
                    self._index, self._device or torch.device("cpu"), self._counts(self._index)
                )
                try:
                    # The item is held nowhere here while the body runs: the body may want its memory back.
                    taken = [next(iterator)]
                except StopIteration:
                    running.stop()
                    self._running = None
                    return
                except BaseException as error:
                    self._write(self._stopped(), status_of(error))
                    raise
                running.look_at(taken[0])
                try:
                    yield taken.pop()
                except GeneratorExit:
                    self._leave(instructions_of(sys._getframe(1)))
                    raise
                if self._running is not running:
                    raise RuntimeError(
                        f"the recorder of {self.path} was closed while its loop went on; put the whole loop inside the "
                        f"with block"
                    )
                self._write(self._stopped())
        finally:
            self._watching = False

    def _check(self) -> None:
        if self._stream is None:
            raise RuntimeError(
                f"the recorder is not open; write `with Recorder({str(self.path)!r}) as recorder:` around the loop"
            )
        if self._watching:
            raise RuntimeError(
                "watch() was called inside a loop that is watched already; watch one of the two. (After a break the "
                "loop is over only when its iterator is gone: write recorder.watch(tqdm(loader)), not "
                "tqdm(recorder.watch(loader)).)"
            )

    def _counts(self, index: int) -> bool:
        return self._every > 0 and (index < 2 or index % self._every == 0)

    def _begin(self) -> None:
        if self._begun or self._stream is None:
            return
        self._begun = True
        if self._device is None:
            self._device = torch.device("cuda" if torch.cuda.is_available() and torch.cuda.is_initialized() else "cpu")
        notes = (Note(_SLOWED),) if self._every else ()
        found = environment(device=self._device)
        record = Record(
            case=self._name, estimator=self._label, device=str(self._device), dtype="", notes=notes, environment=found
        )
        self._stream.write(record.to_json() + "\n")
        self._stream.flush()

    def _stopped(self) -> Iteration:
        """The iteration that runs, ended now."""
        assert self._running is not None
        running, self._running = self._running, None
        found = running.stop()
        self._index += 1
        if running.tensors is not None and not running.hidden and running.tensors.peak_bytes > self._peak[0]:
            self._peak = (running.tensors.peak_bytes, running.tensors.alive())
        return found

    def _leave(self, instructions: dict[int, int] | None) -> None:
        """The loop was left inside an iteration: by break, or by an exception. Which, is not known before somebody can
        see the exception.
        """
        if self._running is not None:
            self._left = (self._stopped(), instructions)

    def _settle(self, error: BaseException | None) -> None:
        """Write the iteration in which the loop was left."""
        if self._left is not None:
            (iteration, instructions), self._left = self._left, None
            torn = error is not None and (instructions is None or went_through(error, instructions))
            self._write(iteration, status_of(error) if torn and error is not None else "")

    def _write(self, iteration: Iteration, status: str = "") -> None:
        assert self._stream is not None
        append_iteration(dataclasses.replace(iteration, status=status or iteration.status), self._stream)


def _mend(path: Path) -> None:
    """Make a file ready for more lines: cut half a line of ours off its end.

    Raises:
        ValueError: it holds something else than records; it is left as it is.
    """
    found = scan(path)
    for damage in found.damage:
        ours = damage.torn and any(damage.text.startswith(head) or head.startswith(damage.text) for head in _HEADS)
        if not ours:
            raise ValueError(
                f"{path}, line {damage.line}: {damage.reason}; Recorder(append=True) adds a run to a file of records "
                f"and to no other"
            )
        os.truncate(path, path.stat().st_size - len(damage.text))
    if not found.damage and found.rows and not path.read_bytes().endswith(b"\n"):
        with path.open("ab") as stream:
            stream.write(b"\n")
