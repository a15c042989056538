"""The contract of a meter."""

import abc
import gc
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self


class Meter(abc.ABC):
    """A context manager around the measured call. Its numbers are there after the block, also when the block raised."""

    @abc.abstractmethod
    def __enter__(self) -> Self: ...

    @abc.abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    @abc.abstractmethod
    def figures(self) -> dict[str, Any]:
        """Fields of a `Record`; None for what could not be measured."""

    def phases(self) -> dict[str, dict[str, Any]]:
        """Fields of a `Phase`, by the name of the phase. Peaks are maxima over the stretches of a phase, times and
        counts sums.
        """
        return {}


def observe(meter: Meter, call: Callable[[], object]) -> None:
    """Run `call` once under `meter`, and drop its result, so that what is still alive afterwards is a leak.

    Garbage is collected before and after: a cycle left by an earlier call would be freed, or not, at a random moment of
        this one.
    """
    gc.collect()
    with meter:
        result = call()
    del result
    gc.collect()
