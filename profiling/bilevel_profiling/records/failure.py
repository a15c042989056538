"""What went wrong with a run, as a status and a sentence, so that it can be a row; and which statuses are failures.

Nothing here imports torch: an error of torch's comes from a torch that is loaded already.
"""

import dataclasses
import enum
import signal
import sys

from bilevel_profiling.records.note import NoteKind
from bilevel_profiling.records.record import Iteration, Record

OK = "OK"
ERROR, CRASHED, TIMEOUT, OUT_OF_MEMORY = "ERROR", "CRASHED", "TIMEOUT", "OUT_OF_MEMORY"
FAILURES = frozenset({ERROR, CRASHED, TIMEOUT, OUT_OF_MEMORY})
"""How a run can fail; all other statuses are a hypergradient's own."""
_LESS_ACCURATE = frozenset({"INNER_ROSE", "INNER_UNSTABLE", "MAX_STEPS", "INNER_MAX_STEPS", "DIGITS_LOST"})
"""The names of the library's statuses with `Status.failed` False, OK apart: an answer is there, and less accurate."""


class Severity(enum.IntEnum):
    """What a status means for the result."""

    OK = 0
    NOTE = 1
    """The result can be used, and is less accurate than was asked for."""
    FAILED = 2
    """The result must not be used."""


# torch's CPU allocator raises a plain RuntimeError; C++ that is not torch's says bad_alloc, and the loader of libraries
# "failed to map".
_MEMORY_MESSAGES = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "cannot allocate memory",
    "bad_alloc",
    "failed to map segment",
)
_LONGEST = 600


@dataclasses.dataclass(frozen=True)
class Failure:
    """A run without a result: one of the four statuses above or one that the error carried, and a sentence on it."""

    status: str
    reason: str


def severity(status: str) -> Severity:
    """What a status means: the one definition in this package. A status that it does not know is a failure.

    Example:
        >>> severity("MAX_STEPS").name, severity("DIVERGED").name
        ('NOTE', 'FAILED')
    """
    return Severity.OK if status == OK else Severity.NOTE if status in _LESS_ACCURATE else Severity.FAILED


def failed(row: Record | Iteration) -> bool:
    """Whether the result must not be used (an unmet tolerance alone is a less accurate answer, not a failure)."""
    return severity(row.status) is Severity.FAILED


def noted(row: Record | Iteration) -> bool:
    """Whether the status is anything but OK."""
    return severity(row.status) is not Severity.OK


def unfinished(row: Record | Iteration) -> bool:
    """Whether the run itself failed, so that there are no figures, or not all; running it again may end otherwise."""
    return row.status in FAILURES


def never_begun(row: Record) -> bool:
    """Whether the row stands for a run that was not begun: that is no result, so that continuing measures it."""
    return any(note.kind is NoteKind.NOT_RUN for note in row.notes)


def carried(error: BaseException) -> str | None:
    """The name of the library's status that an exception carries as `error.status`; None if it carries none.

    Example:
        >>> import bilevel
        >>> error = RuntimeError("diverged")
        >>> error.status = bilevel.Status.DIVERGED
        >>> carried(error), carried(ValueError())
        ('DIVERGED', None)
    """
    outcome, status = sys.modules.get("bilevel.outcome"), getattr(error, "status", None)
    return status.name if outcome is not None and isinstance(status, outcome.Status) else None


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the CPU or on a GPU."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError, ImportError)) and _speaks_of_memory(_said(error))


def of_error(error: BaseException) -> Failure:
    """The failure that an exception stands for.

    Example:
        >>> of_error(ValueError("K must be positive"))
        Failure(status='ERROR', reason='ValueError: K must be positive')
        >>> of_error(MemoryError()).status
        'OUT_OF_MEMORY'
    """
    text = " ".join(_said(error).split())
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
    return Failure(carried(error) or (OUT_OF_MEMORY if out_of_memory(error) else ERROR), text)


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
    status = OUT_OF_MEMORY if _speaks_of_memory(last_words) else CRASHED
    return Failure(status, f"The process was killed by signal {-code} ({name}).{hint}{said}")


def last_words(log: str) -> str:
    r"""What a process that crashed wrote last: of faulthandler's report the error and the innermost line of Python,
    else the last line.

    Example:
        >>> thread = 'Current thread 0x1 (most recent call first):\n  File "a.py", line 3 in f\n'
        >>> last_words(f"oh\nFatal Python error: Aborted\n\n{thread}")
        'oh; Fatal Python error: Aborted; File "a.py", line 3 in f'
    """
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    fatal = next((place for place, line in enumerate(lines) if line.startswith("Fatal Python error")), None)
    if fatal is None:
        return lines[-1][:300] if lines else ""
    current = next(
        (place for place, line in enumerate(lines) if place > fatal and line.startswith("Current thread")), len(lines)
    )
    return "; ".join(line[:300] for line in (*lines[max(fatal - 1, 0) : fatal + 1], *lines[current + 1 : current + 2]))


def limited(reason: str, limit: int) -> str:
    """The reason of a run that ran out of the memory it was given.

    Example:
        >>> limited("MemoryError", 2**30)
        'The run was given 1024 MiB beyond what torch itself had taken, and asked for more: MemoryError'
    """
    return f"The run was given {limit / 2**20:.0f} MiB beyond what torch itself had taken, and asked for more: {reason}"


def _said(error: BaseException) -> str:
    """The text of an exception, whatever its class does when it is asked for it, in characters that can be written to a
    file.
    """
    try:
        return str(error).encode("utf-8", "backslashreplace").decode("utf-8")
    except Exception as second:
        return f"its text raised {type(second).__name__}"


def _speaks_of_memory(text: str) -> bool:
    return any(message in text.lower() for message in _MEMORY_MESSAGES)


def of_timeout(seconds: float) -> Failure:
    """The failure of a run that was stopped."""
    return Failure(TIMEOUT, f"The run was stopped after its time limit of {seconds:g} s.")
