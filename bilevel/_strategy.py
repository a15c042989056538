"""Strategy: the base of everything that is swapped by passing another object.

Abstract or final: an abstract strategy defines an interface, a concrete one is what runs, and nobody overrides what is
implemented. Variation goes through arguments or wrappers.
"""

import abc
import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any


class Strategy(abc.ABC):  # noqa: B024 (its subclasses declare the abstract methods)
    """Frozen dataclasses derive from this; a subclass of a concrete strategy is refused."""

    __slots__ = ()

    sharded: bool = False
    """Whether it is right where each process holds a part of the inner variable: all that it sums over the numbers of
    y it sums by the space that it is given, and it draws no numbers like y. Said class by class; what is not said is
    refused there.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__bases__:
            if base is not Strategy and issubclass(base, Strategy) and not inspect.isabstract(base):
                raise TypeError(f"{base.__name__} is final: wrap it or pass other arguments instead of subclassing it")


def unsharded(strategy: Any) -> Iterator[str]:
    """The names of the strategies that are not said to be right on parts of y: of this one and of those it holds."""
    if isinstance(strategy, Strategy):
        if "sharded" not in vars(type(strategy)) or not strategy.sharded:
            yield type(strategy).__name__
        elif dataclasses.is_dataclass(strategy):
            for field in dataclasses.fields(strategy):
                value = getattr(strategy, field.name)
                if field.name == "preconditioner" and value is not None and not isinstance(value, Strategy):
                    yield f"{type(strategy).__name__} with a preconditioner that is a function"
                yield from unsharded(value)
    elif isinstance(strategy, (tuple, list)):
        for each in strategy:
            yield from unsharded(each)
    elif isinstance(strategy, dict):
        yield from unsharded(tuple(strategy.values()))
