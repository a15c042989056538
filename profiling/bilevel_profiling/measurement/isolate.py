"""Run a function in a process of its own, and turn however that ends into a result or a failure.

Processes are forked from a server that has torch loaded and has done nothing else: such a process is as fresh as a new
    interpreter, starts in a
tenth of a second, and has no CUDA context, threads or heap of ours in it. What it prints goes to a log, so that it
cannot corrupt our output.

Several threads may run functions at once, and so may a worker of a pool that was itself started by multiprocessing.
"""

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import os
import pickle
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, Self

from bilevel_profiling.measurement import inside
from bilevel_profiling.records.failure import (
    CRASHED,
    ERROR,
    OUT_OF_MEMORY,
    Failure,
    last_words,
    limited,
    of_exit,
    of_timeout,
)

# torch._dynamo: every torch.optim optimizer imports it when it is made, which takes seconds.
_PRELOAD = ["torch", "torch._dynamo", "bilevel_profiling.measurement.cell"]
_NEVER_BEGAN = (
    "The process ended while it imported the main script. "
    "Is the call that starts it under `if __name__ == '__main__':`?"
)
_WAIT = "OMP_WAIT_POLICY"
_CHILDREN = threading.Lock()
"""multiprocessing looks after all children whenever one is started or asked for: two threads that do so at once read
one exit status twice, and the second reads 255."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a process ended: with a value, or with a failure; and what it printed."""

    value: Any = None
    failure: Failure | None = None
    log: str = ""


def refuse_recursion() -> None:
    """Raise when a new process is importing the main script that started it.

    Raises:
        RuntimeError: with what to write in the script.
    """
    if getattr(multiprocessing.process.current_process(), "_inheriting", False):
        raise RuntimeError(
            "compare() starts processes, which import this script: put the call under `if __name__ == '__main__':`"
        )


def warm_up(preload: Sequence[str] = ()) -> None:
    """Start the server that processes are forked from; it loads torch while we go on.

    Args:
        preload: modules for the server to load as well; without effect when it runs already.
    """
    with _CHILDREN:
        _started(_context(preload))


def run(
    function: Callable[..., Any],
    *arguments: Any,
    time_limit: float,
    around: Callable[[int], AbstractContextManager[Any]] | None = None,
    memory_limit: int | None = None,
) -> Outcome:
    """Call `function(*arguments)` in a fresh process and wait for it.

    Args:
        function: importable by name, like its arguments.
        arguments: its arguments.
        time_limit: seconds after which the process is killed.
        around: what watches the process, made from its process id. The function is then given a `Gate` as its last
            argument, and what it does after passing the gate happens inside this context.
        memory_limit: bytes of address space that the function may take beyond what its process has before; Linux only.

    Raises:
        TypeError, AttributeError, pickle.PicklingError: the function or an argument cannot be sent to another process.
        KeyboardInterrupt: after the process has been killed.

    Example:
        >>> run(divmod, 17, 5, time_limit=60).value
        (3, 2)
        >>> run(divmod, 17, 0, time_limit=60).failure.status
        'ERROR'
    """
    child = Child(function, arguments, around=around, memory_limit=memory_limit)
    with child:
        wait([child], time_limit)
    return child.outcome


class Child:
    """A fresh process that calls a function, begun and ended by `with`; `wait` hears it in between.

    Args:
        function, arguments, around, memory_limit: see `run`.
        surroundings: makes a context manager, in the other process, around the call and outside of its memory limit.

    Attributes:
        done: whether it has said how it ended.
        outcome: how it ended, after the block; neither value nor failure where it had to be ended.

    Raises:
        TypeError, AttributeError, pickle.PicklingError: see `run`.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Any],
        *,
        around: Callable[[int], AbstractContextManager[Any]] | None = None,
        memory_limit: int | None = None,
        surroundings: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self._payload = pickle.dumps((function, tuple(arguments), around is not None, surroundings))
        self._around, self._memory_limit = around, memory_limit
        self._watching = contextlib.ExitStack()
        self._value: Any = None
        self._failure: Failure | None = None
        self._begun = False
        self.done, self.outcome = False, Outcome()

    def __enter__(self) -> Self:
        self._killed_before = _kernel_kills()
        with _CHILDREN:
            context = _started(_context())
        self._descriptor, self._log = tempfile.mkstemp(prefix="bilevel-", suffix=".log")
        self._ours, theirs = context.Pipe()
        arguments = (theirs, self._log, self._payload, self._memory_limit)
        self._process = context.Process(target=inside.enter, args=arguments)  # type: ignore[attr-defined]
        try:
            with _CHILDREN, _allowed_children():
                self._process.start()
            theirs.close()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._watching.close()
            if self._process.pid is not None:
                with _CHILDREN:
                    if self._process.is_alive():
                        self._process.kill()
                    self._process.join()
        finally:
            self._ours.close()
            with open(self._descriptor, "rb") as stream:
                text = stream.read().decode("utf-8", errors="replace")
            Path(self._log).unlink(missing_ok=True)
        self.outcome = Outcome(self._value, self._explained(text), text)

    @property
    def failed(self) -> bool:
        """Whether it has ended with a failure."""
        return self._failure is not None

    @property
    def speaks(self) -> list[Any]:
        """What to wait for: its words, and its end."""
        return [self._ours, self._process.sentinel]

    def stop(self, failure: Failure) -> None:
        """It took too long."""
        self._failure, self.done = failure, True

    def hear(self) -> None:
        """Take what it says."""
        try:
            kind, value = self._ours.recv() if self._ours.poll() else ("ended", None)
        except (EOFError, ConnectionError):
            kind, value = "ended", None
        if kind == "begun":
            self._begun = True
        elif kind == "ready":
            assert self._around is not None
            self._watching.enter_context(self._around(self._process.pid))
            self._ours.send("go")
        else:
            self.done = True
            if kind == "value":
                self._value = value
            elif kind == "failure":
                self._failure = value
            else:
                with _CHILDREN:
                    self._process.join(10)
                self._failure = of_exit(self._process.exitcode) if self._begun else Failure(ERROR, _NEVER_BEGAN)
            self._watching.close()

    def _explained(self, log: str) -> Failure | None:
        """The failure, with what is known only when the process has ended."""
        failure, code = self._failure, self._process.exitcode
        if failure is not None and failure.status == CRASHED:
            failure = of_exit(code, last_words(log) if code != -signal.SIGKILL else "")
            if code == -signal.SIGKILL and _kernel_kills() != self._killed_before:
                failure = Failure(
                    OUT_OF_MEMORY,
                    "The kernel killed the process, because the machine, or the container, had no memory left.",
                )
        if failure is not None and failure.status == OUT_OF_MEMORY and self._memory_limit is not None:
            failure = Failure(OUT_OF_MEMORY, limited(failure.reason, self._memory_limit))
        return failure


def wait(children: Sequence[Child], time_limit: float, grace: float = 0.0) -> None:
    """Hear processes until all have ended, or one has failed and `grace` seconds have passed since.

    Args:
        children: begun.
        time_limit: seconds after which those that have not ended get the failure TIMEOUT.
        grace: for what others have to say.
    """
    deadline, last = time.monotonic() + time_limit, None
    while waiting := [child for child in children if not child.done]:
        until = deadline if last is None else min(deadline, last)
        ready = multiprocessing.connection.wait(
            [end for child in waiting for end in child.speaks], timeout=max(until - time.monotonic(), 0)
        )
        if not ready:
            for child in waiting if last is None else ():
                child.stop(of_timeout(time_limit))
            return
        for child in waiting:
            if any(end in ready for end in child.speaks):
                child.hear()
        if last is None and any(child.failed for child in children):
            last = time.monotonic() + grace


def _context(preload: Sequence[str] = ()) -> BaseContext:
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload([*_PRELOAD, *preload])
    return context


def _started(context: BaseContext) -> BaseContext:
    """The context with its server running; another one in a process that was forked from one that has a server: that
    one's is not ours to use.
    """
    if context.get_start_method() != "forkserver":
        return context
    from multiprocessing.forkserver import ensure_running

    try:
        with _ignoring_interrupts(), _waiting_passively():
            ensure_running()
    except ChildProcessError:
        return multiprocessing.get_context("spawn")
    return context


@contextlib.contextmanager
def _allowed_children() -> Iterator[None]:
    """Workers of pools have children only when this is undone: multiprocessing wants none of a daemon, such as a worker
    of Dask, because they would outlive it (ours end with who started them), and tells them a start method that they may
    not know, such as loky's.
    """
    us: Any = multiprocessing.process.current_process()
    method = multiprocessing.get_start_method(allow_none=True)
    with contextlib.ExitStack() as undone:
        if us.daemon:
            us.daemon = False
            undone.callback(setattr, us, "daemon", True)
        if method is not None and method not in multiprocessing.get_all_start_methods():
            multiprocessing.set_start_method(_context().get_start_method(), force=True)
            undone.callback(multiprocessing.set_start_method, method, force=True)
        yield


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Ctrl-C reaches every process of the terminal; the server inherits that it is to ignore it, from its first moment
    on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _waiting_passively() -> Iterator[None]:
    """OpenMP threads that wait for each other sleep instead of spinning, unless the user has chosen.

    Beside another busy process, spinning threads take the cores from those they wait for: one hypergradient of the
        built-in hypercleaning case took
    5 s instead of 0.09 s on two cores. OpenMP reads the variable once, when it is loaded.
    """
    if _WAIT in os.environ:
        yield
        return
    os.environ[_WAIT] = "PASSIVE"
    try:
        yield
    finally:
        del os.environ[_WAIT]


def _kernel_kills() -> int:
    """How many processes the kernel has killed for want of memory, where it says so."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
