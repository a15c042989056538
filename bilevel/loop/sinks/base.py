"""What a sink is: where the numbers of a run go."""

import abc
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from torch import Tensor

Number = float | int | Tensor


class Sink(abc.ABC):
    """Takes numbers by step. One of your own needs `log` alone.

    Steps come in order. After a resume the steps since the checkpoint come once more, with the same numbers; none of
    the sinks here keeps a step twice.

    Example:
        >>> import bilevel as bl
        >>> class Printed(bl.loop.Sink):
        ...     def log(self, step, values):
        ...         print(step, dict(values))
        >>> with Printed() as sink:
        ...     sink.log(0, {"accuracy": 0.5})
        0 {'accuracy': 0.5}
    """

    @abc.abstractmethod
    def log(self, step: int, values: Mapping[str, Number]) -> None:
        """Keep the values of a step.

        Args:
            step: its index.
            values: numbers, or tensors with one element, which are waited for.

        Raises:
            TypeError: a value is no number.
        """

    def close(self) -> None:  # noqa: B027 (most have nothing to close)
        """Write what is left, and give back what was opened here."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def numbers(owner: str, values: Mapping[str, Any]) -> dict[str, float]:
    """The values as floats.

    Raises:
        TypeError: one is no number.
    """
    found: dict[str, float] = {}
    for name, value in values.items():
        try:
            if isinstance(value, (str, bytes)):
                raise TypeError
            found[name] = float(value)
        except (TypeError, ValueError, RuntimeError):
            kind = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:60]
            raise TypeError(
                f"{owner}.log was given {name}={kind}; a number, or a tensor with one element, was needed"
            ) from None
    return found
