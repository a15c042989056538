"""Scalars for TensorBoard, through torch.utils.tensorboard.

The only file of the library that imports tensorboard, and only when it writes.
"""

import os
from collections.abc import Mapping
from typing import Any

from bilevel.loop.sinks.base import Number, Sink, numbers


class TensorBoard(Sink):
    """Writes each value as a scalar. See them with `tensorboard --logdir folder`.

    A step that comes again, after a resume, begins a new file in the folder, which tells TensorBoard to drop what the
    others have from that step on. A SummaryWriter of your own cannot be told; steps below its last one are left out.

    Args:
        folder: of the run, or a torch.utils.tensorboard.SummaryWriter, which is left open.

    Raises:
        ImportError: tensorboard is not installed.

    Example:
        >>> import bilevel as bl
        >>> class Writer:  # in the place of torch.utils.tensorboard.SummaryWriter
        ...     def add_scalar(self, tag, scalar_value, global_step=None): print(tag, scalar_value, global_step)
        ...     def flush(self): pass
        >>> bl.loop.TensorBoard(Writer()).log(3, {"accuracy": 0.5})
        accuracy 0.5 3
    """

    def __init__(self, folder: str | os.PathLike[str] | Any) -> None:
        self._folder = os.fspath(folder) if isinstance(folder, (str, os.PathLike)) else None
        if self._folder is None and not hasattr(folder, "add_scalar"):
            raise TypeError(
                f"TensorBoard() was given a {type(folder).__name__}; a folder or a torch.utils.tensorboard."
                f"SummaryWriter was needed"
            )
        self._writer: Any = None if self._folder is not None else folder
        self._last: int | None = None
        if self._folder is not None:
            _summary_writer()  # what is missing is said before the first step was made

    def log(self, step: int, values: Mapping[str, Number]) -> None:
        found, back = numbers("TensorBoard", values), self._last is not None and step < self._last
        if self._folder is None:
            if back:
                return
        elif self._writer is None or back:
            self.close()
            self._writer = _summary_writer()(log_dir=self._folder, purge_step=step)
        for name, value in found.items():
            self._writer.add_scalar(name, value, step)
        # A run that is killed has lost nothing that it logged.
        self._writer.flush()
        self._last = step

    def close(self) -> None:
        if self._folder is not None and self._writer is not None:
            self._writer.close()
            self._writer = None


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "TensorBoard() needs tensorboard, which is not installed; write: pip install tensorboard"
        ) from error
    return SummaryWriter
