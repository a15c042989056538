"""A block that an interrupt from the keyboard does not cut in two."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def finished_first() -> Iterator[None]:
    """SIGINT waits until the block has ended, and then is handled as it would have been.

    Only the main thread handles signals, so elsewhere there is nothing to do.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    came: list[tuple[int, Any]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came and callable(before):
            before(*came[0])
        elif came and before is signal.SIG_DFL:
            signal.raise_signal(signal.SIGINT)
