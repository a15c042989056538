"""Files of a loop that several processes run together: each rank writes its own, and all go on from the same step.

A run that is killed may have written its newest step on some ranks only. So old files are deleted when all ranks have
written, and what is loaded is the newest step of which every rank has a whole file.
"""

import contextlib
import pathlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from bilevel.loop import files
from bilevel.space.ranks import Ranks


def write(
    folder: pathlib.Path, index: int, contents: Callable[[], Any], keep: int | None, ranks: Ranks
) -> pathlib.Path:
    """Write this rank's file into its own folder, and delete the oldest there when all ranks have written.

    Raises:
        ValueError: the ranks are at different steps.
        RankError: another rank could not write; its old files are there.
    """
    steps = ranks.gathered(index)
    if len(set(steps)) > 1:
        raise ValueError(
            f"OuterLoop.save() was called at the steps {steps} of ranks 0 to {len(steps) - 1}; the same step of all of "
            f"them was needed. Call it on every rank, at the same place of the loop's body"
        )
    mine = _folder(folder, ranks)
    with agreed(ranks, "OuterLoop.save()"):
        path = files.write(mine, index, contents(), None)
    files.prune(mine, keep)
    return path


@contextlib.contextmanager
def agreed(ranks: Ranks, what: str) -> Iterator[None]:
    """What raises in this block on one rank raises on all."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    ranks.agree(error, what)


def chosen(folder: pathlib.Path, ranks: Ranks, *, missing_ok: bool) -> tuple[pathlib.Path, Any] | None:
    """This rank's file of the newest step that all ranks have, and what it holds; see `OuterLoop.load`."""
    mine = _folder(folder, ranks)
    there = files.listed(mine) if mine.is_dir() else []
    sound = [path for path in there if files.wrong(path) is None]
    steps = ranks.gathered([files.step_of(path) for path in sound])
    newest = ranks.gathered(files.step_of(there[0]) if there else None)
    common = next((step for step in steps[0] if all(step in each for each in steps)), None)
    if common is None:
        if missing_ok:
            if any(each is not None for each in newest):
                warnings.warn(
                    f"OuterLoop begins anew: the ranks have no step in common under {folder} (newest: {newest})",
                    stacklevel=3,
                )
            return None
        others = sorted({path.name for path in folder.glob("rank-*-of-*")} - {mine.name}) if folder.is_dir() else []
        hint = f"; there are {', '.join(others)}" if others else "; missing_ok=True begins anew"
        raise FileNotFoundError(
            f"OuterLoop found no step that all {ranks.size} ranks have saved under {folder} (newest: {newest}){hint}. "
            f"A run goes on with as many ranks as it was saved with"
        )
    if any(each != common for each in newest):
        warnings.warn(
            f"OuterLoop goes on with step {common}, the newest of which every rank has a whole file (newest of each "
            f"rank: {newest})",
            stacklevel=3,
        )
    path = next(path for path in sound if files.step_of(path) == common)
    with agreed(ranks, "OuterLoop.load()"):
        found = files.read(path)
    return path, found


def _folder(folder: pathlib.Path, ranks: Ranks) -> pathlib.Path:
    return folder / f"rank-{ranks.rank}-of-{ranks.size}"
