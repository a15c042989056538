"""What goes to a worker of an executor, and what comes back: bytes both ways, so that nothing has to be known there to
take a parcel in, and a worker of any kind can carry it.

A case goes by its name if it is built in, else by the text of its file and of the local modules that this imports. On
a machine that has the same files at the same place they are used there, so that data beside them are found; elsewhere
they are unpacked. Functions go by name: their modules must be there, with the same text. torch and bilevel must be
there in the same version, and bilevel with the same code.

Nothing here imports torch when it is imported: a worker waits, and what it waits for measures.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import pickle
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bilevel_profiling.comparison import sources
from bilevel_profiling.measurement.errand import Answer, Errand, mark_of
from bilevel_profiling.records.failure import ERROR, Failure, of_error

Versions = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Code:
    """A case file and the local modules that it imports."""

    case: Path
    files: Mapping[Path, bytes]
    """Their texts, by where they are for the sender."""
    names: Mapping[Path, str]
    """Where they belong in a folder of their own."""
    roots: tuple[str, ...]
    """Where the modules were found."""

    def unpacked(self, folder: Path) -> tuple[Path, tuple[str, ...]]:
        """The case file here, and where its modules are to be looked for."""
        with contextlib.suppress(OSError):
            if all(path.read_bytes() == text for path, text in self.files.items()):
                return self.case, self.roots
        for path, text in self.files.items():
            target = folder / self.names[path]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(text)
        return folder / self.names[self.case], (str(folder / "modules"),)


@dataclasses.dataclass(frozen=True)
class Parcel:
    """An errand with all that it needs."""

    errand: Errand
    code: Code | None = None
    files: Mapping[Path, bytes] = dataclasses.field(default_factory=dict)
    """What it reads, as far as it is there."""
    started: tuple[str, Path] | None = None
    """The sender's machine, and a file for whoever begins there to sign: so it is known what had begun when a pool
    breaks."""

    def do(self) -> "Returned":
        """Do the errand, in a folder of its own."""
        begun = time.time()
        self._sign()
        with tempfile.TemporaryDirectory(prefix="bilevel-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            paths = {*self.errand.reads, *self.errand.writes}
            places = {path: folder / "files" / path.name for path in paths}
            (folder / "files").mkdir()
            for path, data in self.files.items():
                places[path].write_bytes(data)
            changes = {key: _moved(value, places) for key, value in self.errand.changes.items()}
            roots: tuple[str, ...] = ()
            if self.code is not None:
                path, roots = self.code.unpacked(folder / "code")
                changes["source"] = str(path)
            errand = dataclasses.replace(
                self.errand,
                arguments=tuple(_moved(value, places) for value in self.errand.arguments),
                changes=changes,
                roots=roots,
            )
            answer = dataclasses.replace(errand.do(), place=_here())
            written = {path: places[path].read_bytes() for path in self.errand.writes if places[path].exists()}
        return Returned(answer, written, begun, time.time())

    def _sign(self) -> None:
        if self.started is not None and self.started[0] == platform.node():
            with contextlib.suppress(OSError):
                self.started[1].write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Returned:
    """What came of a parcel: the answer, the files that were written, and from when to when, by the worker's clock."""

    answer: Answer
    files: Mapping[Path, bytes] = dataclasses.field(default_factory=dict)
    begun: float = 0.0
    ended: float = 0.0


def carry_out(versions: Versions, payload: bytes) -> bytes:
    """What an executor is given: do the errand of a pickled `Parcel` in this process, which may be anywhere.

    Returns:
        A pickled `Returned`; whatever goes wrong is in it.
    """
    try:
        if wrong := _otherwise(versions, versions_here()):
            answer = Answer(failure=Failure(ERROR, wrong), place=_here(), begun=False)
            return pickle.dumps(Returned(answer))
        return pickle.dumps(pickle.loads(payload).do())
    except Exception as error:
        answer = Answer(failure=of_error(error), log=traceback.format_exc(), place=_here())
        return pickle.dumps(Returned(answer))


@functools.cache
def versions_here() -> Versions:
    """What must be the same where figures are to be compared, found without importing torch."""
    found = {}
    for name in ("bilevel", "bilevel_profiling"):
        spec = importlib.util.find_spec(name)
        for folder in map(Path, (spec.submodule_search_locations or ()) if spec is not None else ()):
            texts = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.py"))}
            digest = hashlib.sha256(b"\0".join(part for key in texts for part in (key.encode(), texts[key])))
            found[f"code of {name}"] = digest.hexdigest()[:12]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["torch"] = importlib.metadata.version("torch").partition("+")[0]  # the same for a CPU and for CUDA
    return found


def code_of(source: str) -> Code:
    """The case file of a comparison, to be sent."""
    case = Path(source).expanduser().absolute()
    found = {case: Path("case", case.name)}  # apart from the modules, of which one may be called like it
    roots: list[str] = []
    for name, origin in sources.files(case, "").items():
        parts = name.split(".")
        inside = Path(*parts, "__init__.py") if origin.name == "__init__.py" else Path(*parts).with_suffix(".py")
        found.setdefault(origin.absolute(), Path("modules", inside))
        roots.append(str(origin.absolute().parents[len(inside.parts) - 1]))
    names = {path: inside.as_posix() for path, inside in found.items()}
    return Code(case, {path: path.read_bytes() for path in found}, names, tuple(dict.fromkeys(roots)))


def marks_of(values: Iterable[Any]) -> dict[str, str]:
    """The local modules, by name, that other processes must have to load these values, and what tells their texts."""
    found: dict[str, str] = {}
    for value in values:
        name = getattr(value, "__module__", None) if callable(value) else None
        name = name or type(value).__module__
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is not None and sources.local(name, file):
            package = getattr(sys.modules[name], "__package__", "") or ""
            modules = {name: Path(file), **sources.files(Path(file), package)}
            found |= {each: mark_of(path) for each, path in modules.items()}
    return found


def bytes_of(paths: Iterable[Path]) -> dict[Path, bytes]:
    """What is in those files that are there."""
    found = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            found[path] = path.read_bytes()
    return found


def _here() -> dict[str, str]:
    return {"host": platform.node(), "worker": f"{multiprocessing.current_process().name}, process {os.getpid()}"}


def _otherwise(wanted: Versions, here: Versions) -> str:
    """What is not the same, as a sentence; nothing where all is."""
    for name, value in wanted.items():
        if here.get(name) != value:
            return (
                f"Not run: {name} is {here.get(name, 'missing')} on the worker ({platform.node()}), and {value} where "
                f"the comparison was begun. Install the same there, and start the workers anew"
            )
    return ""


def _moved(value: Any, places: Mapping[Path, Path]) -> Any:
    return places.get(value, value) if isinstance(value, Path) else value
