"""The folder that a comparison writes: one comparison at a time, and nothing in it is lost.

| name | what it is |
| --- | --- |
| `records.jsonl` | the finished rows |
| `records.plan.json` | what they were measured with and do not say themselves: see `resume` |
| `records-<date>.jsonl`, `records-<date>.plan.json` | the same of an earlier comparison that was not continued |
| `records.jsonl.damaged` | half a line that a killed comparison left behind |
| `references/`, `logs/` | float64 hypergradients; what failed runs printed |
| `traces/`, `snapshots/` | of each run, if they were asked for: see `compare` |
| `.lock` | held by the comparison that is writing |
| `index.html`, `report.md`, `figures/` | the report |
"""

import datetime
import hashlib
import os
import re
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

from bilevel_profiling.records.records_file import scan

RECORDS, PLAN, DAMAGED = "records.jsonl", "records.plan.json", "records.jsonl.damaged"
LOCK = ".lock"
_LONGEST = 100


class Folder:
    """A folder that is ours until `release`, or until this process ends, however it ends.

    Args:
        path: of the folder; made if missing.

    Raises:
        OSError: it cannot be made or written, or another comparison is writing there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.release = weakref.finalize(self, _locked(self.path))
        # Drafts of a comparison that was killed. Nobody else is writing here.
        for draft in (
            self.path / f"{RECORDS}.tmp",
            self.path / f"{PLAN}.tmp",
            *(self.path / "references").glob("*.[0-9]*.tmp"),
        ):
            draft.unlink(missing_ok=True)

    @property
    def records(self) -> Path:
        """The finished rows."""
        return self.path / RECORDS

    @property
    def plan(self) -> Path:
        """What they were measured with."""
        return self.path / PLAN

    def reference(self, stem: str) -> Path:
        """Where a float64 hypergradient is kept."""
        return self.path / "references" / f"{filename(stem)}.pt"

    def trace(self, stem: str) -> Path:
        """Where a trace of a run is kept."""
        return self.path / "traces" / f"{filename(stem)}.json.gz"

    def snapshot(self, stem: str) -> Path:
        """Where a snapshot of the CUDA allocator is kept."""
        (self.path / "snapshots").mkdir(exist_ok=True)
        return self.path / "snapshots" / f"{filename(stem)}.pickle"

    def keep_log(self, log: str, stem: str) -> None:
        """Keep what a run printed."""
        if log.strip():
            (self.path / "logs").mkdir(exist_ok=True)
            (self.path / "logs" / f"{filename(stem)}.txt").write_text(log, encoding="utf-8", errors="backslashreplace")

    def set_aside(self) -> str:
        """Rename the rows of an earlier comparison, if there are any.

        Returns:
            A sentence on it, or nothing.
        """
        if not self.records.exists() or not self.records.read_bytes().strip():
            return ""
        found = scan(self.records)
        date = datetime.datetime.fromtimestamp(self.records.stat().st_mtime).strftime("%Y%m%d-%H%M%S")
        taken = [path.name for path in self.path.glob("records-*")]
        stem = next(name for name in _numbered(f"records-{date}") if f"{name}.jsonl" not in taken)
        # The plan first: rows without their plan can be read, a plan must never be taken for that of other rows.
        if self.plan.exists():
            self.plan.rename(self.path / f"{stem}.plan.json")
        self.records.rename(self.path / f"{stem}.jsonl")
        count = f"{len(found.rows)} row{'' if len(found.rows) == 1 else 's'}"
        return f"the {count} of an earlier comparison are kept in {self.path / stem}.jsonl (--resume continues one)"

    def keep_damaged(self, text: bytes) -> None:
        """Keep half a line, on the disk before anything else happens to it."""
        with (self.path / DAMAGED).open("ab") as stream:
            stream.write(text + b"\n")
            stream.flush()
            os.fsync(stream.fileno())


def filename(text: str) -> str:
    """A name for a file that any system takes, different for different texts.

    Example:
        >>> filename("quadratic-unrolled-5")
        'quadratic-unrolled-5'
        >>> filename("a/b") == filename("a b")
        False
    """
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip(".-")[:_LONGEST]
    if plain and plain == text:
        return plain
    return f"{plain}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}".lstrip("-")


def _numbered(stem: str) -> Iterator[str]:
    yield stem
    yield from (f"{stem}-{number}" for number in range(2, 10_000))


def _locked(folder: Path) -> Callable[[], None]:
    """Take the folder's lock; the function lets go of it, as the system does when the process ends."""
    try:
        from filelock import FileLock, Timeout
    except ImportError as error:
        raise ImportError('a comparison needs filelock and jinja2: pip install "bilevel[profiling]"') from error

    lock = FileLock(folder / LOCK, blocking=False, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(0, "another comparison is writing there; wait for it, or give another folder") from None
    return lock.release
