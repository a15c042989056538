"""Run a function in a process of its own, and turn however that ends into a result or a failure.

Processes are forked from a server that has torch loaded and has done nothing else: such a process is as fresh as a new
    interpreter, starts in a
tenth of a second, and has no CUDA context, threads or heap of ours in it. What it prints goes to a log, so that it
cannot corrupt our output.

Several threads may run functions at once, and so may a worker of a pool that was itself started by multiprocessing.
"""

import contextlib
import dataclasses
import faulthandler
import gc
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from bilevel_profiling.records.failure import (
    CRASHED,
    ERROR,
    OUT_OF_MEMORY,
    Failure,
    last_words,
    limited,
    of_error,
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
Gate = Callable[[], None]
"""Called by the function in the other process when it is ready to be watched; returns when it is."""


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
    payload = pickle.dumps((function, arguments, around is not None))
    killed_before = _kernel_kills()
    with _CHILDREN:
        context = _started(_context())
    descriptor, log = tempfile.mkstemp(prefix="bilevel-", suffix=".log")
    ours, theirs = context.Pipe()
    process = context.Process(target=_enter, args=(theirs, log, payload, memory_limit))  # type: ignore[attr-defined]
    try:
        with _CHILDREN, _allowed_children():
            process.start()
        theirs.close()
        value, failure = _awaited(ours, process, time_limit, around)
    finally:
        if process.pid is not None:
            with _CHILDREN:
                if process.is_alive():
                    process.kill()
                process.join()
        ours.close()
        with open(descriptor, "rb") as stream:
            text = stream.read().decode("utf-8", errors="replace")
        Path(log).unlink(missing_ok=True)
    if failure is not None and failure.status == CRASHED:
        failure = of_exit(process.exitcode, last_words(text) if process.exitcode != -signal.SIGKILL else "")
        if process.exitcode == -signal.SIGKILL and _kernel_kills() != killed_before:
            failure = Failure(
                OUT_OF_MEMORY,
                "The kernel killed the process, because the machine, or the container, had no memory left.",
            )
    if failure is not None and failure.status == OUT_OF_MEMORY and memory_limit is not None:
        failure = Failure(OUT_OF_MEMORY, limited(failure.reason, memory_limit))
    return Outcome(value, failure, text)


def _awaited(
    ours: multiprocessing.connection.Connection,
    process: Any,
    time_limit: float,
    around: Callable[[int], AbstractContextManager[Any]] | None,
) -> tuple[Any, Failure | None]:
    deadline, begun = time.monotonic() + time_limit, False
    with contextlib.ExitStack() as watching:
        while True:
            ready = multiprocessing.connection.wait(
                [ours, process.sentinel], timeout=max(deadline - time.monotonic(), 0)
            )
            if not ready:
                return None, of_timeout(time_limit)
            try:
                kind, value = ours.recv() if ours.poll() else ("ended", None)
            except (EOFError, ConnectionError):
                kind = "ended"
            if kind == "begun":
                begun = True
            elif kind == "ready":
                assert around is not None
                watching.enter_context(around(process.pid))
                ours.send("go")
            elif kind == "value":
                return value, None
            elif kind == "failure":
                return None, value
            else:
                with _CHILDREN:
                    process.join(10)
                return None, of_exit(process.exitcode) if begun else Failure(ERROR, _NEVER_BEGAN)


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


@contextlib.contextmanager
def _limited(extra: int | None) -> Iterator[None]:
    """At most so many bytes of address space beyond what is there: torch's own share is another on every machine."""
    if extra is None:
        yield
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * resource.getpagesize() + extra
    # The hard limit stays, so that there is memory again to say what happened.
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _enter(
    connection: multiprocessing.connection.Connection, log: str, payload: bytes, memory_limit: int | None
) -> None:
    """The other process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C our parent ends us
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    with contextlib.suppress(OSError):  # both sides have it open; whoever is killed now leaves no file behind
        os.unlink(log)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.enable()
    gc.freeze()  # what the server loaded is no garbage: without it every collection walks all of torch, 0.2 s
    watched = threading.Event()
    threading.Thread(target=_follow, args=(connection, watched), daemon=True).start()

    def gate() -> None:
        connection.send(("ready", None))
        watched.wait()

    connection.send(("begun", None))
    try:
        function, arguments, gated = pickle.loads(payload)
        with _limited(memory_limit):
            message = ("value", function(*arguments, *((gate,) if gated else ())))
    except BaseException as error:
        traceback.print_exc()
        message = ("failure", of_error(error))
    try:
        connection.send(message)
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        traceback.print_exc()
        connection.send(("failure", of_error(error)))


def _follow(connection: multiprocessing.connection.Connection, watched: threading.Event) -> None:
    """Hear the parent's word; end with it, so that no work outlives the command that wanted it."""
    try:
        connection.recv()
        watched.set()
        connection.recv()
    except (EOFError, OSError):
        os._exit(1)
