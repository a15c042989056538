"""Runs for TensorBoard: the iterations of records as scalars, through torch.utils.tensorboard.

The only file that imports tensorboard, and only when it writes.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bilevel_profiling.records.failure import noted
from bilevel_profiling.records.record import Iteration, Record
from bilevel_profiling.records.records_file import scan

_FIGURES = ("outer_loss", "inner_loss", "gradient_norm", "wall_seconds", "peak_tensor_bytes", "cuda_allocated_bytes")
_OF_PHASES = ("wall_seconds", "peak_tensor_bytes", "cuda_allocated_bytes")


def to_tensorboard(
    records: Record | Iterable[Record] | str | os.PathLike[str], folder: str | os.PathLike[str]
) -> list[Path]:
    """Write the iterations of records for TensorBoard, a run for each record. See them with `tensorboard --logdir
    folder`.

    Scalars are the figures of an iteration under their own names, those of phases under `inner/wall_seconds` and the
    like, oracle calls under `calls/hvp`, and what the user logged under `metrics/`. What was not measured, or is not
    finite, is left out. A status other than OK is a text.

    Args:
        records: a record, several, or the path of a file of them, which may be one that a running `Recorder` writes.
        folder: where the runs go, each in a folder of its own that is named after its record.

    Returns:
        The folders of the runs. A record without iterations has none.

    Raises:
        ImportError: tensorboard is not installed.
        FileExistsError: the folder of a run exists; TensorBoard would draw both as one.
        ValueError: a line of the file is no record (half a line at its end, of a run that is being written, is left
            out).
        OSError: a file cannot be read or written.
    """
    found = (
        _read(Path(records))
        if isinstance(records, (str, os.PathLike))
        else [records]
        if isinstance(records, Record)
        else list(records)
    )
    wanted = [record for record in found if record.iterations]
    targets = [Path(folder) / name for name in _names(wanted)]
    for target in targets:
        if target.exists():
            raise FileExistsError(
                f"{target} exists, and TensorBoard would draw the old run and the new one as one; remove it, or choose "
                f"another folder"
            )
    for record, target in zip(wanted, targets, strict=True):
        writer = _writer(target)
        try:
            for line in _description(record):
                writer.add_text("record", line)
            for iteration in record.iterations:
                for name, value in _scalars(iteration):
                    writer.add_scalar(name, value, iteration.index)
                if noted(iteration):
                    writer.add_text("status", iteration.status, iteration.index)
        finally:
            writer.close()
    return targets


def _writer(target: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "to_tensorboard() needs tensorboard, which is not installed; write: pip install tensorboard"
        ) from error
    return SummaryWriter(log_dir=str(target))


def _read(path: Path) -> list[Record]:
    found = scan(path)
    for damage in found.damage:
        if not damage.torn:
            raise ValueError(f"{path}, line {damage.line}: {damage.reason}")
    return found.records


def _names(records: Iterable[Record]) -> Iterator[str]:
    """A name for each record that a folder can have; those that are the same get a number."""
    taken: dict[str, int] = {}
    for record in records:
        steps = "" if record.inner_steps is None else f"K={record.inner_steps}"
        parts = [record.case, record.estimator, record.engine, steps]
        name = "-".join(re.sub(r"[^\w.=+]+", "_", part).strip("_.") for part in parts if part) or "run"
        taken[name] = taken.get(name, 0) + 1
        yield name if taken[name] == 1 else f"{name}-{taken[name]}"


def _scalars(iteration: Iteration) -> Iterator[tuple[str, float]]:
    named: list[tuple[str, Any]] = [(name, getattr(iteration, name)) for name in _FIGURES]
    for phase, figures in iteration.phases.items():
        named += [(f"{phase}/{name}", getattr(figures, name)) for name in _OF_PHASES]
    named += [(f"calls/{name}", count) for name, count in iteration.calls.items()]
    named += [(f"metrics/{name}", value) for name, value in iteration.metrics.items()]
    yield from ((name, value) for name, value in named if value is not None and math.isfinite(value))


def _description(record: Record) -> Iterator[str]:
    """What the run is, and where it was made, as a Markdown table."""
    rows = {
        "case": record.case,
        "estimator": record.estimator,
        "settings": record.settings,
        "engine": record.engine_settings,
        "device": record.device,
        **record.environment,
    }
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items() if value)]
    yield "\n".join(table + [""] * bool(record.notes) + list(map(str, record.notes)))
