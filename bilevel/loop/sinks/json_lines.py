"""A file with a line of JSON for each step: no package needed, and readable while the run goes on."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from bilevel.loop.sinks.base import Number, Sink, numbers


class JSONLines(Sink):
    """Writes {"step": 7, "outer_loss": 0.25, ...}, a line a call, handed to the system at once.

    A step that comes again, after a resume, replaces what the file has from there on: it is cut off first, and so is
    half a line that a killed run left. What is not finite is null, since JSON has no word for it.

    Args:
        path: of the file; its folder is made.
        resume: whether the file may exist.

    Raises:
        FileExistsError: it exists, and `resume` is False.
        ValueError: on logging: it holds something else than such lines. It is left as it is.
        OSError: it cannot be written.

    Example:
        >>> import pathlib, tempfile, bilevel as bl
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "run.jsonl")
        ...     with bl.loop.JSONLines(path) as sink:
        ...         for step in range(3): sink.log(step, {"loss": 0.5})
        ...     with bl.loop.JSONLines(path, resume=True) as sink:  # from the checkpoint after step 0
        ...         sink.log(1, {"loss": 0.5})
        ...     path.read_text().splitlines()
        ['{"step": 0, "loss": 0.5}', '{"step": 1, "loss": 0.5}']
    """

    def __init__(self, path: str | os.PathLike[str], *, resume: bool = False) -> None:
        self.path = Path(path)
        if self.path.exists() and not resume:
            raise FileExistsError(
                f"{self.path} exists; write JSONLines({str(self.path)!r}, resume=True) to go on with it, or choose "
                f"another path (each process of a distributed run needs its own)"
            )
        self._stream: BinaryIO | None = None
        self._last: int | None = None

    def log(self, step: int, values: Mapping[str, Number]) -> None:
        found = numbers("JSONLines", values)
        if self._stream is None or (self._last is not None and step < self._last):
            self._begin(step)
        assert self._stream is not None
        line = {"step": int(step)} | {name: value if math.isfinite(value) else None for name, value in found.items()}
        # One write of a whole line: a killed run leaves lines, and at most a part of the last one.
        self._stream.write(json.dumps(line).encode() + b"\n")
        self._stream.flush()
        self._last = step

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _begin(self, step: int) -> None:
        """Open the file where the lines before `step` end."""
        self.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = self._before(self.path.read_bytes(), step) if self.path.exists() else 0
        self._stream = self.path.open("ab")
        self._stream.truncate(kept)

    def _before(self, text: bytes, step: int) -> int:
        kept, found = 0, True
        for number, line in enumerate(text.splitlines(keepends=True), start=1):
            whole = line.endswith(b"\n")
            try:
                at = json.loads(line)["step"]
                ours = isinstance(at, int)
            except (ValueError, TypeError, KeyError):
                at, ours = step, False
            if not ours and (whole or not (line.startswith(b'{"step"') or b'{"step"'.startswith(line))):
                raise ValueError(
                    f"{self.path}, line {number} is none of JSONLines; it goes on with a file that it wrote itself"
                )
            found = found and ours and whole and at < step
            kept += len(line) if found else 0
        return kept
