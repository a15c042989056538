"""What went wrong with a run, as a status and a sentence, so that it can be a row."""

import dataclasses
import signal

import torch

ERROR, CRASHED, TIMEOUT, OUT_OF_MEMORY = "ERROR", "CRASHED", "TIMEOUT", "OUT_OF_MEMORY"

# torch's CPU allocator raises a plain RuntimeError.
_MEMORY_MESSAGES = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory")
_LONGEST = 600


@dataclasses.dataclass(frozen=True)
class Failure:
    """A run without a result: one of the four statuses above, and a sentence on it."""

    status: str
    reason: str


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the CPU or on a GPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error).lower() for message in _MEMORY_MESSAGES)


def of_error(error: BaseException) -> Failure:
    """The failure that an exception stands for.

    Example:
        >>> of_error(ValueError("K must be positive"))
        Failure(status='ERROR', reason='ValueError: K must be positive')
        >>> of_error(MemoryError()).status
        'OUT_OF_MEMORY'
    """
    text = " ".join(str(error).split())
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
    return Failure(OUT_OF_MEMORY if out_of_memory(error) else ERROR, text)


def of_exit(code: int | None, last_words: str = "") -> Failure:
    """The failure of a process that ended without a result.

    Example:
        >>> of_exit(-11).reason
        'The process was killed by signal 11 (SIGSEGV).'
    """
    said = f" It last wrote: {last_words}" if last_words else ""
    if code is None or code >= 0:
        return Failure(CRASHED, f"The process exited with status {code} before it had a result.{said}")
    name = signal.Signals(-code).name if -code in {member.value for member in signal.Signals} else "unknown"
    hint = " On Linux this is most often the kernel, out of memory." if name == "SIGKILL" else ""
    return Failure(CRASHED, f"The process was killed by signal {-code} ({name}).{hint}{said}")


def of_timeout(seconds: float) -> Failure:
    """The failure of a run that was stopped."""
    return Failure(TIMEOUT, f"The run was stopped after its time limit of {seconds:g} s.")
