"""What a hypergradient costs, measured: memory, time, compute and error, one record a run.

The names below are imported when they are first used, so that reading records, and `bilevel --help`, need no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bilevel_profiling.baselines.baseline import Baseline as Baseline
    from bilevel_profiling.cases.case import Case as Case
    from bilevel_profiling.cases.parallel import DATA as DATA
    from bilevel_profiling.cases.parallel import TASKS as TASKS
    from bilevel_profiling.cases.parallel import Parallel as Parallel
    from bilevel_profiling.comparison.work import compare as compare
    from bilevel_profiling.forecasting import Advice as Advice
    from bilevel_profiling.forecasting import Fit as Fit
    from bilevel_profiling.forecasting import ForecastError as ForecastError
    from bilevel_profiling.forecasting import NotMonotone as NotMonotone
    from bilevel_profiling.forecasting import fit as fit
    from bilevel_profiling.forecasting import forecast as forecast
    from bilevel_profiling.forecasting import largest_fit as largest_fit
    from bilevel_profiling.forecasting import recommend as recommend
    from bilevel_profiling.measurement.passes import measure as measure
    from bilevel_profiling.measurement.recorder import Recorder as Recorder
    from bilevel_profiling.meters.devices import Device as Device
    from bilevel_profiling.meters.trace import trace as trace
    from bilevel_profiling.records.record import Alive as Alive
    from bilevel_profiling.records.record import Function as Function
    from bilevel_profiling.records.record import Iteration as Iteration
    from bilevel_profiling.records.record import Phase as Phase
    from bilevel_profiling.records.record import Rank as Rank
    from bilevel_profiling.records.record import Record as Record
    from bilevel_profiling.report.tensorboard import to_tensorboard as to_tensorboard

# No module bears the name of a function here: importing it would put the module in the function's place.
_HOMES = {
    "DATA": "cases.parallel",
    "Parallel": "cases.parallel",
    "Rank": "records.record",
    "TASKS": "cases.parallel",
    "Advice": "forecasting",
    "Alive": "records.record",
    "Baseline": "baselines.baseline",
    "Case": "cases.case",
    "Device": "meters.devices",
    "Fit": "forecasting",
    "ForecastError": "forecasting",
    "Function": "records.record",
    "Iteration": "records.record",
    "NotMonotone": "forecasting",
    "Phase": "records.record",
    "Record": "records.record",
    "Recorder": "measurement.recorder",
    "compare": "comparison.work",
    "fit": "forecasting",
    "forecast": "forecasting",
    "largest_fit": "forecasting",
    "measure": "measurement.passes",
    "recommend": "forecasting",
    "to_tensorboard": "report.tensorboard",
    "trace": "meters.trace",
}
__all__ = [
    "DATA",
    "TASKS",
    "Advice",
    "Alive",
    "Baseline",
    "Case",
    "Device",
    "Fit",
    "ForecastError",
    "Function",
    "Iteration",
    "NotMonotone",
    "Parallel",
    "Phase",
    "Rank",
    "Record",
    "Recorder",
    "compare",
    "fit",
    "forecast",
    "largest_fit",
    "measure",
    "recommend",
    "to_tensorboard",
    "trace",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
