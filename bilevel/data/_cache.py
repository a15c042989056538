"""A cache of generated data on disk: one file a key, written atomically, checked when read."""

import hashlib
import json
import os
import pathlib
import secrets
import warnings
from collections.abc import Callable
from typing import Any


def folder() -> pathlib.Path:
    """$BILEVEL_CACHE, else $XDG_CACHE_HOME/bilevel, else ~/.cache/bilevel.

    Raises:
        RuntimeError: it is in the home folder, and there is none (a container with a user of no name).
    """
    if chosen := os.environ.get("BILEVEL_CACHE"):
        return pathlib.Path(chosen).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return pathlib.Path(shared) / "bilevel"
    return pathlib.Path.home() / ".cache" / "bilevel"


def path_of(kind: str, key: dict[str, Any], cache: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """The file of a key."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return pathlib.Path(cache if cache is not None else folder()) / f"{kind}-{digest[:20]}.bin"


def fetch(
    kind: str,
    key: dict[str, Any],
    make: Callable[[], tuple[list[str], bytes]],
    cache: str | os.PathLike[str] | None = None,
) -> tuple[list[str], bytes]:
    """What `make` returned when it last ran with this key: a list of names and bytes.

    A file that is missing, cut short or changed is made again. A folder that cannot be written costs a warning, not the
    data.

    Args:
        kind: start of the file's name.
        key: everything that the content depends on, as JSON values.
        make: called when there is no sound file.
        cache: the folder; None means `folder()`.
    """
    path: pathlib.Path | None = None
    trouble: Exception | None = None
    try:
        path = path_of(kind, key, cache)
    except RuntimeError as error:
        trouble = error
    if path is not None and (kept := _read(path)) is not None:
        return kept
    names, payload = make()
    try:
        if path is not None:
            _write(path, names, payload)
    except OSError as error:
        trouble = error
    if trouble is not None:
        warnings.warn(
            f"could not keep {kind} ({trouble}); they are made anew each time. Point $BILEVEL_CACHE at a folder of "
            f"yours",
            stacklevel=3,
        )
    return names, payload


# The file: the SHA-256 of all that follows its line, the names as a line of JSON, the bytes.


def _read(path: pathlib.Path) -> tuple[list[str], bytes] | None:
    try:
        digest, content = path.read_bytes().split(b"\n", 1)
    except (OSError, ValueError):
        return None
    if hashlib.sha256(content).hexdigest().encode() != digest:
        return None
    names, payload = content.split(b"\n", 1)
    return json.loads(names), payload


def _write(path: pathlib.Path, names: list[str], payload: bytes) -> None:
    content = json.dumps(names).encode() + b"\n" + payload
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place and moved: another process sees the whole file or none.
    temporary = path.with_name(f"{path.stem}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
