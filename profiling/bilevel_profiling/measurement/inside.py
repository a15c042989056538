"""What `isolate` does in the other process: call the function, within its limits, and say how that ended."""

import contextlib
import faulthandler
import gc
import multiprocessing.connection
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from bilevel_profiling.records.failure import of_error

Gate = Callable[[], None]
"""Called by the function in the other process when it is ready to be watched; returns when it is."""


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


def enter(
    connection: multiprocessing.connection.Connection, log: str, payload: bytes, memory_limit: int | None
) -> None:
    """The first function of the other process."""
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
        function, arguments, gated, surroundings = pickle.loads(payload)
        with surroundings(), _limited(memory_limit):
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
