"""What a hypergradient costs, measured: memory, time, compute and error, one record a run.

The names below are imported when they are first used, so that reading records, and `bilevel --help`, need no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bilevel_profiling.case import Case as Case
    from bilevel_profiling.comparison import compare as compare
    from bilevel_profiling.forecasting import ForecastError as ForecastError
    from bilevel_profiling.forecasting import forecast as forecast
    from bilevel_profiling.measurement import measure as measure
    from bilevel_profiling.record import Iteration as Iteration
    from bilevel_profiling.record import Phase as Phase
    from bilevel_profiling.record import Record as Record

# No module bears the name of a function here: importing it would put the module in the function's place.
_HOMES = {
    "Case": "case",
    "ForecastError": "forecasting",
    "Iteration": "record",
    "Phase": "record",
    "Record": "record",
    "compare": "comparison",
    "forecast": "forecasting",
    "measure": "measurement",
}
__all__ = ["Case", "ForecastError", "Iteration", "Phase", "Record", "compare", "forecast", "measure"]


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
