"""Strategy: the base of everything that is swapped by passing another object.

Abstract or final: an abstract strategy defines an interface, a concrete one is what runs, and nobody overrides what is
implemented. Variation goes through arguments or wrappers.
"""

import abc
import inspect
from typing import Any


class Strategy(abc.ABC):  # noqa: B024 (its subclasses declare the abstract methods)
    """Frozen dataclasses derive from this; a subclass of a concrete strategy is refused."""

    __slots__ = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__bases__:
            if base is not Strategy and issubclass(base, Strategy) and not inspect.isabstract(base):
                raise TypeError(f"{base.__name__} is final: wrap it or pass other arguments instead of subclassing it")
