"""What is kept still around a measurement: warnings that the record says, random numbers, the garbage collector."""

import contextlib
import gc
import warnings
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Leave out the warnings of a status that is stepped through: the record says it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"iterate\(\) stepped through")
        yield


@contextlib.contextmanager
def own_random_state() -> Iterator[None]:
    """Put the global random state back after the block."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        yield


@contextlib.contextmanager
def frozen_heap() -> Iterator[None]:
    """Collections between passes look only at what the passes made: walking all of torch takes 0.2 s each time.

    A block within another does nothing, so that many forecasts in one take one collection.
    """
    global _frozen
    if _frozen or gc.get_freeze_count():  # somebody else's, and unfreezing would be too; counting takes 30 ms
        yield
        return
    gc.collect()
    gc.freeze()
    _frozen = True
    try:
        yield
    finally:
        _frozen = False
        gc.unfreeze()


_frozen = False
"""Whether a block of `frozen_heap` is at work."""
