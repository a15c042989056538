"""Meters: context managers that yield numbers. They are imported when they are first used: watching needs no torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bilevel_profiling.meters.allocator import Allocator as Allocator
    from bilevel_profiling.meters.base import Meter as Meter
    from bilevel_profiling.meters.clock import Clock as Clock
    from bilevel_profiling.meters.collectives import Collectives as Collectives
    from bilevel_profiling.meters.cuda import Cuda as Cuda
    from bilevel_profiling.meters.oracles import Oracles as Oracles
    from bilevel_profiling.meters.resident import Resident as Resident
    from bilevel_profiling.meters.tensors import Tensors as Tensors
    from bilevel_profiling.meters.work import Work as Work

_HOMES = {
    "Allocator": "allocator",
    "Clock": "clock",
    "Collectives": "collectives",
    "Cuda": "cuda",
    "Meter": "base",
    "Oracles": "oracles",
    "Resident": "resident",
    "Tensors": "tensors",
    "Work": "work",
}
__all__ = ["Allocator", "Clock", "Collectives", "Cuda", "Meter", "Oracles", "Resident", "Tensors", "Work"]


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
