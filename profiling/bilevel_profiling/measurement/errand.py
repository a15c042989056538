"""An errand: one piece of measuring as plain data, done by whoever holds it, the comparison itself or a worker on
another machine.

Who does it starts a fresh process for each run, as `isolate` does, waits, and watches: two errands that are done at the
same time in one process share no memory that is counted. torch and what the user wrote are imported only in those
processes.
"""

import dataclasses
import hashlib
import importlib.util
import pickle
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bilevel_profiling.measurement import isolate, together
from bilevel_profiling.records.failure import Failure
from bilevel_profiling.records.ranks import joined, with_resident
from bilevel_profiling.records.record import Record


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came of an errand."""

    value: Any = None
    failure: Failure | None = None
    log: str = ""
    resident_bytes: int | None = None
    resident_log: str = ""
    """Why there are none, where that was a failure."""
    begun: bool = True
    """False where nothing was run at all, so that it may as well be run another time."""
    place: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Who did it, for the environment of the row; empty for the comparison itself."""


@dataclasses.dataclass(frozen=True)
class Packed:
    """A `cell.Job` that is pickled: it is opened by the process that measures, not by those that hand it on."""

    data: bytes
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the job that are otherwise where it is opened, such as the path of its case file."""
    roots: Sequence[str] = ()
    """Folders in which modules are looked for first."""
    marks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Of local modules by name, what `mark_of` their files was where the job was made."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (self.data, dict(self.changes), tuple(self.roots), dict(self.marks))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Errand:
    """One piece of measuring.

    Args:
        what: the function of `cell` that is called with the job and the arguments.
        job: a pickled `cell.Job`.
        arguments: plain values; a `Path` among them is a file.
        changes, roots, marks: see `Packed`.
        reads, writes: the files among the arguments and changes that must be there before, and may be there after.
        watched: whether resident memory is measured afterwards, by another run.
        time_limit: seconds for each run.
        memory_limit: bytes for each run beyond what torch has taken.
        preload: modules that take long to import.
        processes: N, for a run on so many ranks (see `together`), each with these limits; None for one process alone.
        device: of the ranks.
    """

    what: str
    job: bytes
    arguments: tuple[Any, ...] = ()
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    roots: tuple[str, ...] = ()
    marks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    reads: tuple[Path, ...] = ()
    writes: tuple[Path, ...] = ()
    watched: bool = False
    time_limit: float
    memory_limit: int | None = None
    preload: tuple[str, ...] = ()
    processes: int | None = None
    device: str = "cpu"

    def do(self) -> Answer:
        """Do it here, each run in a fresh process."""
        isolate.warm_up(available(self.preload))
        limits: dict[str, Any] = {"time_limit": self.time_limit, "memory_limit": self.memory_limit}
        job = Packed(self.job, self.changes, self.roots, self.marks)
        if self.processes is not None:
            return self._together(job, {**limits, "processes": self.processes, "device": self.device})
        outcome = isolate.run(call, self.what, job, *self.arguments, **limits)
        answer = Answer(outcome.value, outcome.failure, outcome.log)
        if not self.watched or outcome.failure is not None or outcome.value.wall_seconds is None:
            return answer
        grown, log = _resident(job, limits)
        return dataclasses.replace(answer, resident_bytes=grown, resident_log=log)

    def _together(self, job: "Packed", limits: Mapping[str, Any]) -> Answer:
        """Do it on ranks; what is not a record comes from the first of them."""
        outcome = together.run(call, self.what, job, *self.arguments, **limits)
        if outcome.failure is not None:
            return Answer(None, outcome.failure, outcome.log)
        if not all(isinstance(value, Record) for value in outcome.values):
            return Answer(outcome.values[0], None, outcome.log)
        answer = Answer(joined(outcome.values), None, outcome.log)
        if not self.watched or answer.value.wall_seconds is None:
            return answer
        grown, log = _resident_of_ranks(job, limits)
        record = with_resident(answer.value, grown)
        return dataclasses.replace(answer, value=record, resident_bytes=max(grown, default=None), resident_log=log)


def call(what: str, *arguments: Any) -> Any:
    """Call a function of `cell`: by its name, so that who asks for it need not load torch."""
    from bilevel_profiling.measurement import cell

    return getattr(cell, what)(*arguments)


def available(names: Sequence[str]) -> list[str]:
    """The modules that are there: one that cannot be found is for `setup` to complain about."""
    return [name for name in names if importlib.util.find_spec(name.partition(".")[0]) is not None]


def mark_of(path: Path) -> str:
    """Tells the texts of files apart."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _resident(job: Packed, limits: Mapping[str, Any]) -> tuple[int | None, str]:
    from bilevel_profiling.meters.resident import Resident

    meters: list[Resident] = []

    def around(pid: int) -> Resident:
        meters.append(Resident(pid))
        return meters[-1]

    try:
        outcome = isolate.run(call, "resident", job, around=around, **limits)
    except ImportError:  # memory-profiler is optional
        return None, ""
    if outcome.failure is not None:
        return None, f"{outcome.failure.status}: {outcome.failure.reason}\n{outcome.log}"
    return meters[-1].figures()["resident_bytes"], ""


def _resident_of_ranks(job: Packed, limits: Mapping[str, Any]) -> tuple[list[int], str]:
    from bilevel_profiling.meters.resident import Resident

    meters: dict[int, Resident] = {}

    def around(rank: int, pid: int) -> Resident:
        return meters.setdefault(rank, Resident(pid))

    try:
        outcome = together.run(call, "resident", job, around=around, **limits)
    except ImportError:  # memory-profiler is optional
        return [], ""
    if outcome.failure is not None:
        return [], f"{outcome.failure.status}: {outcome.failure.reason}\n{outcome.log}"
    return [meters[rank].figures()["resident_bytes"] for rank in sorted(meters)], ""


def _opened(data: bytes, changes: Mapping[str, Any], roots: Sequence[str], marks: Mapping[str, str]) -> Any:
    sys.path[:0] = [root for root in roots if root not in sys.path]
    for name, mark in marks.items():
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None and mark_of(Path(spec.origin)) != mark:
            raise ImportError(
                f"module {name} is {spec.origin} here, with another text than where the comparison was begun; put the "
                f"same there, or write the case as a file and pass its path"
            )
    try:
        job = pickle.loads(data)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"the process that measures cannot load the case ({type(error).__name__}: {error}). Install the module "
            f"that defines it where it runs, or write the case as a file and pass its path"
        ) from error
    return dataclasses.replace(job, **changes)
