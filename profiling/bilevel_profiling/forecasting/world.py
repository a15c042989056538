"""Many ranks without their processes: this process is rank 0 of a group that sends nothing, torch's "fake" backend.

It is a group like any other to whoever asks for its size or calls a collective: results have the right shapes, and no
meaning. Under fake tensors, which have no meaning either, that is all that is needed to see what a rank would hold and
send. The first rank stands for all: where work is not split evenly, the first ranks have the most.
"""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist
from torch._subclasses.fake_tensor import unset_fake_temporarily

from bilevel.engine import spans
from bilevel_profiling.forecasting.shapes import Shapes


@contextlib.contextmanager
def world(ranks: int) -> Iterator[None]:
    """This process as rank 0 of so many.

    Raises:
        ValueError: `ranks` is no positive integer, or torch was built without torch.distributed.
        RuntimeError: this process is in a group already, which must not be disturbed.
    """
    if not isinstance(ranks, int) or isinstance(ranks, bool) or ranks < 1:
        raise ValueError(f"forecast() was given ranks={ranks!r}; a positive integer was needed")
    if not dist.is_available():
        raise ValueError(f"forecast() was given ranks={ranks}, and this torch was built without torch.distributed")
    if dist.is_initialized():
        raise RuntimeError(
            "a forecast for other ranks makes a group of its own, and this process is in one already "
            "(torch.distributed.init_process_group); make the forecast in another process"
        )
    # Importing it registers the backend.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Aside:
    """While the library handles what is no number of the problem (objects that ranks tell each other, the layout of
    ranks), tensors have data: what a rank reads there is what it wrote.
    """

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes
        self._off: list[AbstractContextManager[Any]] = []

    def __enter__(self) -> Self:
        self._listening = spans.listen(self)
        self._listening.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._listening.__exit__(None, None, None)

    def enter(self, name: str, count: int) -> None:
        """A span opened (the listener's side of the seam)."""
        if name == spans.ASIDE:
            self._off.append(unset_fake_temporarily())
            self._off[-1].__enter__()
            self._shapes.aside += 1

    def exit(self, name: str) -> None:
        """A span closed."""
        if name == spans.ASIDE:
            self._shapes.aside -= 1
            self._off.pop().__exit__(None, None, None)
