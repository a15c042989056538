"""A comparison through an executor: its pieces are handed out as soon as what they need is there, and written down as
they come back, in whatever order.

Whatever happens to a piece becomes its row. A run's own crash, time-out or lack of memory ends only the process that
the worker had started for it. A worker that dies takes with it what it had begun: CRASHED. What had not begun when a
pool broke, an executor was shut down, or a future was cancelled, is not blamed: its row says that it was not run, and
continuing measures it. Nothing is run here instead: this may be the wrong machine for it.
"""

import concurrent.futures
import contextlib
import dataclasses
import graphlib
import itertools
import os
import pickle
import platform
import queue
import tempfile
import time
import traceback
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bilevel_profiling.cases.case_file import builtin_names
from bilevel_profiling.comparison.parcel import (
    Code,
    Parcel,
    Returned,
    bytes_of,
    carry_out,
    code_of,
    marks_of,
    versions_here,
)
from bilevel_profiling.comparison.plan import Settled
from bilevel_profiling.comparison.progress import Progress, Task
from bilevel_profiling.comparison.tasks import Key, Piece, Reference, Site
from bilevel_profiling.measurement.errand import Answer, Errand
from bilevel_profiling.records.failure import CRASHED, ERROR, TIMEOUT, Failure, of_error
from bilevel_profiling.records.records_file import replace_file

_MOST = 2**30
"""Bytes handed out and not yet back: the executor keeps them, and a float64 reference goes along with every row."""
_LOST = (concurrent.futures.BrokenExecutor, concurrent.futures.CancelledError, KeyboardInterrupt)
"""What a future says when the worker, or the executor, is gone, and not what was run."""
_TICK = 1.0
_SELDOM = 20.0
"""All rows are written again at most one part of the time in so many, however many they are."""


def check(executor: object) -> None:
    """Refuse what cannot be handed pieces of work.

    Raises:
        TypeError: it is no executor; the message says what to write.
    """
    if isinstance(executor, concurrent.futures.Executor):
        if type(executor).submit is concurrent.futures.Executor.submit:
            raise TypeError(
                f"{type(executor).__name__} has no submit() of its own; an executor that has one was needed"
            )
        return
    name = getattr(executor, "__name__", type(executor).__name__)
    write = "such as concurrent.futures.ProcessPoolExecutor(4)"
    if callable(getattr(executor, "get_executor", None)):
        write = "write executor=client.get_executor()"
    elif isinstance(executor, type) and issubclass(executor, concurrent.futures.Executor):
        write = f"write executor={name}()"
    raise TypeError(f"compare() was given {name} as executor; a concurrent.futures.Executor was needed, {write}")


@dataclasses.dataclass(frozen=True)
class _Out:
    """A piece that is handed out."""

    piece: Piece
    future: "concurrent.futures.Future[bytes]"
    size: int
    started: Path


class Dispatch:
    """Does pieces of work through an executor.

    Args:
        executor: any; it stays the caller's, who shuts it down.
        site: where the rows go.
        progress: told about each piece.
    """

    def __init__(self, executor: concurrent.futures.Executor, site: Site, progress: Progress) -> None:
        self._executor, self._site, self._progress = executor, site, progress
        self._back: queue.SimpleQueue[Hashable] = queue.SimpleQueue()
        self._out: dict[Hashable, _Out] = {}
        self._spans: list[tuple[str, float, float, Key | None]] = []
        self._sent: dict[str, tuple[Code | None, Mapping[str, str]]] = {}
        self._gone = ""
        """Why nothing more is handed out."""
        self._said = False
        self._numbers, self._bytes, self._tidy_after = itertools.count(), 0, 0.0

    def run(self, work: Sequence[Piece]) -> None:
        """Do it all.

        Raises:
            KeyboardInterrupt, OSError: what was handed out and has not begun is cancelled before.
        """
        pieces = {piece.name(self._site): piece for piece in work}
        graph: graphlib.TopologicalSorter[Hashable] = graphlib.TopologicalSorter()
        for name, piece in pieces.items():
            graph.add(name, *(need for need in piece.needs(self._site) if need in pieces))
        graph.prepare()
        waiting: list[Hashable] = []
        with _folder() as folder:
            try:
                while graph.is_active():
                    waiting += graph.get_ready()
                    while waiting and (not self._out or self._bytes < _MOST):
                        name = waiting.pop(0)
                        if self._handed_out(name, pieces[name], folder / str(next(self._numbers))):
                            continue
                        graph.done(name)
                        waiting += graph.get_ready()
                    if self._out:
                        graph.done(*self._taken_in())
            finally:
                for out in self._out.values():
                    out.future.cancel()

    def _handed_out(self, name: Hashable, piece: Piece, started: Path) -> bool:
        """Whether the piece is on its way; if not, it is finished."""
        errand = piece.errand(self._site)
        if isinstance(errand, Errand):
            try:
                if self._gone:
                    raise concurrent.futures.BrokenExecutor(self._gone)
                payload = pickle.dumps(self._parcel(piece, errand, started))
                future = self._executor.submit(carry_out, versions_here(), payload)
                future.add_done_callback(lambda _: self._back.put(name))
            except Exception as error:  # an executor's own, of any kind
                self._finish(piece, self._not_run(error))
                return False
            self._out[name] = _Out(piece, future, len(payload), started)
            self._bytes += len(payload)
            self._tell()
            return True
        if isinstance(errand, Answer):
            self._finish(piece, errand)
        else:
            self._progress.finish(piece.task, errand)
        return False

    def _parcel(self, piece: Piece, errand: Errand, started: Path) -> Parcel:
        name = piece.settled.case.name
        if name not in self._sent:
            self._sent[name] = _needed(piece.settled)
        code, marks = self._sent[name]
        errand = dataclasses.replace(errand, marks=marks)
        return Parcel(errand, code, bytes_of(errand.reads), (platform.node(), started))

    def _taken_in(self) -> list[Hashable]:
        """Wait for what comes back next, and write it down."""
        deadline = time.monotonic() + self._patience()
        while True:
            try:
                name = self._back.get(timeout=_TICK)
            except queue.Empty:
                if time.monotonic() > deadline:
                    return self._given_up()
                continue
            if name in self._out:  # an executor may call back twice
                break
        out = self._out.pop(name)
        self._bytes -= out.size
        returned = self._returned(out)
        for path, data in returned.files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, data)
        self._finish(out.piece, returned.answer, returned)
        self._tell()
        return [name]

    def _returned(self, out: _Out) -> Returned:
        """What a future holds, whatever it is."""
        try:
            returned = pickle.loads(out.future.result(timeout=0))
            if isinstance(returned, Returned):
                return returned
            raise TypeError(f"the executor gave back a {type(returned).__name__}")
        except (Exception, KeyboardInterrupt) as found:
            error = found
        log = "".join(traceback.format_exception(error))
        if isinstance(error, _LOST):
            return Returned(dataclasses.replace(self._lost(error, out), log=log))
        failure = of_error(error)
        if type(error).__name__ == "KilledWorker":  # Dask's, when a piece was there as several workers died
            return Returned(Answer(failure=Failure(CRASHED, f"Its workers died: {failure.reason}"), log=log))
        said = f"The worker did not run it: {failure.reason}"
        return Returned(Answer(failure=Failure(failure.status, said), log=log))

    def _lost(self, error: BaseException, out: _Out) -> Answer:
        """What had begun on this machine has signed; what is elsewhere cannot. What was cancelled is nobody's fault."""
        who = _signed(out.started)
        if who and isinstance(error, concurrent.futures.BrokenExecutor):
            said = f"Its worker, {who}, was lost: {of_error(error).reason}"
            said += " A pool that breaks ends all its workers, so this run need not be the one that broke it."
            return Answer(failure=Failure(CRASHED, said))
        return self._not_run(error)

    def _not_run(self, error: BaseException) -> Answer:
        reason = of_error(error).reason
        if not self._said:
            self._said = True
            self._progress.say(f"the executor failed ({reason}); what was not run is measured by --resume")
        return Answer(failure=Failure(ERROR, f"Not run, because the executor failed: {reason}"), begun=False)

    def _given_up(self) -> list[Hashable]:
        """Nothing came back for too long: nothing more is waited for."""
        seconds = self._patience()
        self._gone = f"it gave no answer for {seconds:g} s (wait_limit and what a run may take)"
        names = list(self._out)
        for name in names:
            out = self._out.pop(name)
            out.future.cancel()
            failure = Failure(TIMEOUT, f"The executor was given up: {self._gone}.")
            self._finish(out.piece, Answer(failure=failure, begun=bool(_signed(out.started))))
        return names

    def _patience(self) -> float:
        """A row takes two runs; the rest of what anything takes is waiting for a worker."""
        return 2 * self._site.settings.time_limit + self._site.settings.wait_limit

    def _finish(self, piece: Piece, answer: Answer, returned: Returned | None = None) -> None:
        said = piece.take(self._site, answer)
        if returned is not None and returned.ended:
            self._side_by_side(piece, returned)
        self._progress.finish(piece.task, said)

    def _side_by_side(self, piece: Piece, returned: Returned) -> None:
        """Note in the rows which runs were at work on one machine at the same time."""
        host, begun, ended = returned.answer.place.get("host", ""), returned.begun, returned.ended
        own = None if isinstance(piece, Reference) else piece.key
        for other_host, other_begun, other_ended, other in self._spans:
            if host == other_host and begun < other_ended and other_begun < ended:
                self._site.shared.update(key for key in (own, other) if key is not None)
        self._spans.append((host, begun, ended, own))
        if (now := time.monotonic()) > self._tidy_after:
            self._site.tidy()
            self._tidy_after = time.monotonic() + _SELDOM * (time.monotonic() - now)

    def _tell(self) -> None:
        self._progress.begin(Task("executor", f"{len(self._out)} handed out", 0.0))


def _needed(settled: Settled) -> tuple[Code | None, Mapping[str, str]]:
    """What a case needs to be loaded elsewhere: its file, or the marks of modules that must be there."""
    source, overrides = settled.plan.source, settled.plan.overrides
    parts: list[Any] = [] if isinstance(source, str) else [source]
    for value in overrides.values():
        parts += value.values() if isinstance(value, Mapping) else [value]
    own = isinstance(source, str) and source not in builtin_names()
    return code_of(str(source)) if own else None, marks_of(parts)


def _signed(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """Where those who begin on this machine sign; it is empty of everything else."""
    with tempfile.TemporaryDirectory(prefix=f"bilevel-begun-{os.getpid()}-", ignore_cleanup_errors=True) as name:
        yield Path(name)
