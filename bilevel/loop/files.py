"""Files of a loop: whole or not there, sealed by a checksum, the last few of them kept.

A file is what torch.save writes, with a comment at the end of its zip archive: the SHA-256 of all that stands before.
`torch.load(file, weights_only=True)` reads it, as any other.
"""

import contextlib
import hashlib
import os
import pathlib
import re
import warnings
from typing import Any

import torch

_MARK = b"bilevel.OuterLoop 1 sha256 "
_TEMPORARY = "bilevel-outer-loop-"  # torch.save writes it into the first bytes of the archive
_NAME = re.compile(r"(\d{6,})-step-(\d+)\.pt")
_END = b"PK\x05\x06"
_END_SIZE = 22


class DamagedFileError(ValueError):
    """A file that is no whole file of `OuterLoop.save`; nothing was loaded.

    Attributes:
        path: the file.
        sound: the newest whole one before it, in the same folder; None if there is none.
    """

    def __init__(self, message: str, path: pathlib.Path, sound: pathlib.Path | None = None) -> None:
        super().__init__(message)
        self.path, self.sound = path, sound


def listed(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a folder, the newest first: by the order in which they were saved."""
    found = (path for path in folder.iterdir() if _NAME.fullmatch(path.name) and not path.is_dir())
    return sorted(found, key=_serial, reverse=True)


def write(folder: pathlib.Path, index: int, contents: Any, keep: int | None) -> pathlib.Path:
    """Write a file that is there whole or not at all, also after a power failure, and delete the oldest ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_TEMPORARY}*.tmp"):  # of a process that was killed
        left.unlink(missing_ok=True)
    before = listed(folder)
    path = folder / f"{_serial(before[0]) + 1 if before else 1:06d}-step-{index}.pt"
    temporary = folder / f"{_TEMPORARY}{os.getpid()}.tmp"
    try:
        _put(contents, temporary)
        _seal(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(folder)
    if keep is not None:
        for old in [path, *before][keep:]:
            old.unlink(missing_ok=True)
    return path


def _put(contents: Any, temporary: pathlib.Path) -> None:
    temporary.touch()  # a folder that cannot be written to says so itself
    try:
        torch.save(contents, temporary)
    except RuntimeError as error:
        raise OSError(
            f"OuterLoop could not write a file in {temporary.parent}: {error}. Is the disk full? The files of before "
            f"are as they were, and so is the loop: make room, and save again or go on"
        ) from error


def read(path: pathlib.Path) -> Any:
    """What a file holds, its tensors on the CPU.

    Raises:
        DamagedFileError: it is empty, cut short, altered, or something else's.
    """
    if (wrong := _wrong(path)) is not None:
        raise DamagedFileError(f"{path} {wrong}", path)
    return torch.load(path, map_location="cpu", weights_only=True)


def chosen(path: pathlib.Path, *, older: bool, missing_ok: bool) -> tuple[pathlib.Path, Any] | None:
    """The file that a path stands for, and what it holds; see `OuterLoop.load`."""
    if missing_ok and not (listed(path) if path.is_dir() else path.exists()):
        return None
    if not path.exists() and not path.is_symlink():
        raise FileNotFoundError(f"OuterLoop found nothing at {path} to load; missing_ok=True begins anew")
    if path.is_dir():
        folder, found = path, listed(path)
        if not found:
            raise FileNotFoundError(f"OuterLoop found no file of its save() in {path}; missing_ok=True begins anew")
    else:
        folder, found = path.parent, [path, *(each for each in _before(path) if each != path)]
    try:
        return found[0], read(found[0])
    except DamagedFileError as error:
        sound = next((each for each in found[1:] if _wrong(each) is None), None)
        if sound is None or not older:
            hint = (
                "There is no whole one before it"
                if sound is None
                else f"The newest whole one before it is {sound}: load that, or write load({str(folder)!r}, older=True)"
            )
            raise DamagedFileError(f"{error}. Nothing was loaded. {hint}", found[0], sound) from None
        warnings.warn(f"{error}; OuterLoop goes on with {sound}, the newest whole one before it", stacklevel=3)
        return sound, read(sound)


def _before(path: pathlib.Path) -> list[pathlib.Path]:
    """The files of its folder that were saved before it, the newest first; all of them if it has another's name."""
    if not path.parent.is_dir():
        return []
    match = _NAME.fullmatch(path.name)
    return [each for each in listed(path.parent) if match is None or _serial(each) < int(match[1])]


def _serial(path: pathlib.Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else 0


def _wrong(path: pathlib.Path) -> str | None:
    """What is wrong with a file, as a clause; None if it is whole."""
    try:
        return _wrong_inside(path)
    except FileNotFoundError:
        if path.is_symlink():
            return "is a link to a file that is not there"
        raise
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _wrong_inside(path: pathlib.Path) -> str | None:
    comment = len(_MARK) + 64
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            return "is empty"
        file.seek(0)
        head = file.read(128)
        if size > comment:
            file.seek(size - comment)
            end = file.read()
            if end.startswith(_MARK):
                file.seek(0)
                same = _checksum(file, size - comment) == end[len(_MARK) :]
                return None if same else "is damaged: its checksum is another one"
    if _TEMPORARY.encode() in head:
        return "is damaged: it was cut short, or altered at its end"
    return "was not written by OuterLoop.save"


def _seal(path: pathlib.Path) -> None:
    """Append the checksum as the archive's comment, and let the disk have all of it."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size - _END_SIZE)
        end = file.read()
        if not (end.startswith(_END) and end.endswith(b"\0\0")):
            raise RuntimeError("this torch.save ends its archives otherwise than a file of OuterLoop is sealed")
        file.seek(size - 2)
        file.write((len(_MARK) + 64).to_bytes(2, "little"))
        file.seek(0)
        checksum = _checksum(file, size)
        file.seek(size)
        file.write(_MARK + checksum)
        file.flush()
        os.fsync(file.fileno())


def _checksum(file: Any, size: int) -> bytes:
    found = hashlib.sha256()
    while size > 0 and (block := file.read(min(size, 1 << 20))):
        found.update(block)
        size -= len(block)
    return found.hexdigest().encode()


def _sync(folder: pathlib.Path) -> None:
    """Let the disk have the folder's entries; systems that cannot open a folder keep them by themselves."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
