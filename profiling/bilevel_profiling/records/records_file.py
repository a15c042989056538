"""Files of records, one JSON line each: never torn by us, and readable as far as they are whole when something else
tore them.

A line is a record; or, in the file of a run, an iteration that belongs to the record before it. A row that has been
appended is on the disk before
the next one is begun, and a row that grows is replaced together with its file: whatever kills the process, the file
    holds each finished row once.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from bilevel_profiling.records.record import Iteration, Record, from_line, iteration_json


@dataclasses.dataclass(frozen=True)
class Row:
    """A record, and the bytes it is written as: its line, and those of its iterations."""

    record: Record
    text: bytes


@dataclasses.dataclass(frozen=True)
class Damage:
    """A line that is no record."""

    line: int
    """Counted from 1."""
    reason: str
    text: bytes
    torn: bool
    """Whether it is the last line and has no end: what a process leaves that is killed while it writes."""


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a file holds."""

    rows: tuple[Row, ...]
    damage: tuple[Damage, ...]

    @property
    def records(self) -> list[Record]:
        """The records that are whole."""
        return [row.record for row in self.rows]


def scan(path: Path) -> Contents:
    """Read what can be read, and say what cannot.

    Raises:
        OSError: the file cannot be read at all.
    """
    *whole, last = path.read_bytes().split(b"\n")
    texts: list[list[bytes]] = []
    records: list[Record] = []
    iterations: list[list[Iteration]] = []
    damage, owned = [], False
    for number, line in enumerate([*whole, last], start=1):
        if not line.strip():
            continue
        try:
            found = from_line(line.decode("utf-8"))
            if isinstance(found, Iteration) and not owned:
                raise ValueError("an iteration without the record that it belongs to")
        except ValueError as error:
            reason = "not text in UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
            damage.append(Damage(number, reason, line, torn=number > len(whole)))
            owned = owned and line.startswith(b'{"iteration"')
            continue
        if isinstance(found, Record):
            texts.append([])
            records.append(found)
            iterations.append([])
            owned = True
        else:
            iterations[-1].append(found)
        texts[-1].append(line + b"\n")
    rows = [
        Row(dataclasses.replace(record, iterations=(*record.iterations, *more)) if more else record, b"".join(text))
        for record, more, text in zip(records, iterations, texts, strict=True)
    ]
    return Contents(tuple(rows), tuple(damage))


def read(path: Path) -> list[Record]:
    """Read a file of which every line is whole.

    Raises:
        ValueError: a line is not a record; the message names the file and the line.
        OSError: the file cannot be read.
    """
    found = scan(path)
    for damage in found.damage:
        raise ValueError(f"{path}, line {damage.line}: {damage.reason}")
    return found.records


def write(records: Iterable[Record], path: Path) -> None:
    """Write records, replacing the file in one step: at any moment it is the old one or the new one."""
    replace_file(path, b"".join(_bytes(record) for record in records))


def append_iteration(iteration: Iteration, stream: TextIO) -> None:
    """Add an outer iteration to the record that `stream` was last given.

    It is handed to the system at once, so it outlives this process. It is not forced onto the disk, which would take
    longer than a short iteration.
    """
    stream.write(iteration_json(iteration) + "\n")
    stream.flush()


class RecordsFile:
    """The rows of a comparison: what `records` holds is on the disk.

    Args:
        path: of the file, which is written anew.
        rows: what it begins with.
    """

    def __init__(self, path: Path, rows: Sequence[Row] = ()) -> None:
        self.path = path
        self._rows = list(rows)
        replace_file(path, b"".join(row.text for row in rows))

    @property
    def records(self) -> list[Record]:
        """The finished rows."""
        return [row.record for row in self._rows]

    def append(self, record: Record) -> None:
        """Add a row.

        Raises:
            OSError: it could not be written; the file is as it was.
        """
        text = _bytes(record)
        before = self.path.stat().st_size
        try:
            with self.path.open("ab") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self.path, before)  # a disk that is full takes half a line
            raise
        self._rows.append(Row(record, text))

    def replace(self, place: int, record: Record) -> None:
        """Write another record in the place of a row; the other rows stay as they are, byte for byte."""
        self.rearrange(range(len(self._rows)), {place: record})

    def rearrange(self, places: Sequence[int], changed: Mapping[int, Record]) -> None:
        """Write all rows in another order, given by the places that they had, and some with another record."""
        rows = [Row(changed[at], _bytes(changed[at])) if at in changed else self._rows[at] for at in places]
        replace_file(self.path, b"".join(row.text for row in rows))
        self._rows = rows


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` in the place of a file, in one step and on the disk.

    Raises:
        OSError: it could not be written; the file is as it was.
    """
    draft = path.with_name(f"{path.name}.tmp")
    try:
        with draft.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise
    _settle(path.parent)


def _settle(folder: Path) -> None:
    """Have the new name itself on the disk, where a folder can be opened for that."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _bytes(record: Record) -> bytes:
    return (record.to_json() + "\n").encode("utf-8")
