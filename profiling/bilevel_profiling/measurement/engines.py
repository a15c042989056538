"""What a measurement must know of the engine behind a case, and what its record says of it.

A dispatch mode sees every operator that eager code runs, and nothing inside compiled or captured code. So the memory of
other engines is measured by the allocator, and their FLOPs are those of their graphs, times the calls.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import bilevel as bl
from bilevel_profiling.cases.case import Case
from bilevel_profiling.records.note import Note
from bilevel_profiling.records.record import Function

ALLOCATOR = (
    "Its peak is what torch's allocator gave out, scratch memory of kernels included: a dispatch mode does not see "
    "inside compiled code."
)
ABOVE = (
    "Forecast of a traced graph, operator by operator: compiled code keeps fewer intermediate results, so its peak is "
    "at most that."
)
POOLS = (
    "Forecast of a traced graph, operator by operator. Captured on a GPU, each function keeps its peak in a pool of "
    "its own while the problem lives: these add up, and the forecast counts them as one."
)
HIDDEN = (
    "An engine that compiles or captures was at work: what happens inside its functions is in none of these bytes and "
    "FLOPs. Measure a Case(..., engine=...), whose memory is read from the allocator."
)
WARM_UP = 2
"""Hypergradients until an engine has traced, compiled and wholly checked what it runs."""
Stats = Mapping[str, Any]


def sees_operators(engine: bl.Engine | None) -> bool:
    """Whether all that an engine computes is operators that a dispatch mode sees.

    Example:
        >>> import bilevel as bl
        >>> sees_operators(None), sees_operators(bl.Eager()), sees_operators(bl.Compiled())
        (True, True, False)
    """
    return engine is None or isinstance(engine, bl.Eager)


def may_lose_workspaces(engine: bl.Engine | None) -> bool:
    """Whether cuBLAS's workspaces may be freed between two calls; a captured graph would go on using them."""
    return sees_operators(engine) or isinstance(engine, bl.Compiled)


def facts(case: Case, warm_up: Sequence[Stats], warm_up_seconds: float) -> dict[str, Any]:
    """Fields of a record from the stats of the hypergradients before the measured ones; none for eager."""
    if sees_operators(case.engine):
        return {}
    made = _made(warm_up)
    return {
        "functions": made,
        "trace_seconds": sum(each.trace_seconds or 0.0 for each in made),
        "compile_seconds": sum(each.compile_seconds or 0.0 for each in made),
        "warm_up_seconds": warm_up_seconds,
        **_work(warm_up[-1], made),
    }


def functions(stats: Stats, *, timed: bool = True) -> tuple[Function, ...]:
    """What the stats of a hypergradient say of the functions that its engine made, with what it took to make them."""
    report = stats.get("engine", {})
    return tuple(
        Function(
            name=str(row["name"]),
            nodes=row.get("nodes"),
            matmul_flops=row.get("flops"),
            moved_bytes=row.get("bytes"),
            trace_seconds=row.get("trace_seconds") if timed else None,
            compile_seconds=row.get("compile_seconds") if timed else None,
            calls=row.get("calls"),
        )
        for row in report.get("functions", ())
    )


def _made(warm_up: Sequence[Stats]) -> tuple[Function, ...]:
    """The functions as the last hypergradient calls them, each with what it took to make in any of them."""
    spent: dict[str, tuple[float, float]] = {}
    for each in (found for stats in warm_up for found in functions(stats)):
        trace, compiling = spent.get(each.name, (0.0, 0.0))
        spent[each.name] = trace + (each.trace_seconds or 0.0), compiling + (each.compile_seconds or 0.0)
    found = []
    for each in functions(warm_up[-1]):
        trace, compiling = spent.pop(each.name, (0.0, 0.0))  # (of two with one name, all is said of the first)
        found.append(dataclasses.replace(each, trace_seconds=trace, compile_seconds=compiling))
    return tuple(found)


def notes(stats: Stats) -> tuple[Note, ...]:
    """What the engine says of itself."""
    report = stats.get("engine", {})
    return tuple(Note(f"Engine {report.get('name', '')}: {said}.") for said in report.get("notes", ()))


def forecast_note(stats: Stats) -> str:
    """How far the forecast of an engine that is not eager can be relied on."""
    return POOLS if stats["engine"]["name"] == "captured" else ABOVE


def hidden(result: object) -> bool:
    """Whether a result is a hypergradient of an engine whose operators are not all seen."""
    return isinstance(result, bl.Hypergradient) and result.stats.get("engine", {}).get("name", "eager") != "eager"


def _work(stats: Stats, made: Sequence[Function]) -> dict[str, Any]:
    """FLOPs of a hypergradient, where all of its matrix products are in the graphs."""
    if stats.get("engine", {}).get("notes") or any(each.matmul_flops is None for each in made):
        return {}
    return {"matmul_flops": sum((each.matmul_flops or 0) * (each.calls or 0) for each in made)}
