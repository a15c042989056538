"""Records as lines of JSON, through cattrs: strict about the types that the fields declare, so that a damaged file is
refused with the place of the damage; lenient about fields that a newer version added, which are left out.

Files of schemas 1 and 2 are read too. Schema 2 gave the points of the timeline two more parts; schema 3 gave notes a
kind, and records their target.
"""

import functools
import json
import math
import re
from typing import TYPE_CHECKING, Any, TypeVar

from bilevel_profiling.records.note import NoteKind
from bilevel_profiling.records.record import SCHEMA, Iteration, Record, Target

if TYPE_CHECKING:
    from cattrs import Converter

_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_MOST_SAID = 3
_Kind = TypeVar("_Kind", Record, Iteration)


def line(record: Record) -> str:
    """A record as one line of JSON."""
    return _text(_converter().unstructure(record))


def iteration_json(iteration: Iteration) -> str:
    """The line that adds an outer iteration to the record before it, in the file of a run.

    Example:
        >>> from_line(iteration_json(Iteration(index=3, outer_loss=0.5))).outer_loss
        0.5
    """
    return _text({"iteration": _converter().unstructure(iteration)})


def from_line(line: str) -> Record | Iteration:
    """Read a line: a record, or an iteration that belongs to the record before it.

    Raises:
        ValueError: neither; the message says what is wrong with it.
    """
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not a record: invalid JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("not a record: invalid JSON (nested too deeply)") from error
    if isinstance(data, dict) and set(data) == {"iteration"}:
        return _structured(data["iteration"], Iteration, "iteration")
    if not isinstance(data, dict) or "case" not in data or "estimator" not in data:
        raise ValueError("not a record: a JSON object with 'case' and 'estimator' was needed")
    schema = data.get("schema")
    if schema not in range(1, SCHEMA + 1) or isinstance(schema, bool):
        raise ValueError(
            f"record of schema {schema!r}; this version of bilevel_profiling reads schemas 1 to {SCHEMA}. "
            f"Read it with the version of bilevel that wrote it, or measure again with this one"
        )
    return _structured(_upgraded(data) if schema < SCHEMA else data, Record, "record")


def _upgraded(data: dict[str, Any]) -> dict[str, Any]:
    """A record of an earlier schema as one of this: the only place that tells facts from texts; those had no more."""
    data = {**data, "schema": SCHEMA}
    if isinstance(points := data.get("timeline"), list):
        data["timeline"] = [[*p, "", ""] if isinstance(p, list) and len(p) == 3 else p for p in points]
    if isinstance(notes := data.get("notes"), list):
        kinds = {"wall_seconds spreads": NoteKind.SPREAD, "The outer loop ended": NoteKind.OUTER_LOOP}
        data["notes"] = [
            {"text": note, "kind": next((kinds[start] for start in kinds if str(note).startswith(start)), "general")}
            for note in notes
        ]
    settings = str(data.get("settings", ""))
    if re.match(r"(TaskMean\(estimator=)?Unrolled\((?!.*\blast=\d)", settings):
        data["target"] = Target.PROGRAM.value
    return data


def _text(data: Any) -> str:
    return json.dumps(data, allow_nan=False, separators=(",", ":"))


def _structured(data: Any, kind: type[_Kind], place: str) -> _Kind:
    from cattrs import BaseValidationError, transform_error

    if not isinstance(data, dict):
        raise ValueError(f"{place}: {str(data)[:40]!r} was given, a JSON object was needed")
    try:
        return _converter().structure(data, kind)
    except BaseValidationError as error:
        said = transform_error(error, path=place, format_exception=lambda problem, _: _said(problem))
        raise ValueError("; ".join(said[:_MOST_SAID])) from None


def _said(problem: BaseException) -> str:
    if isinstance(problem, AttributeError):  # cattrs asks a mapping for its items
        return "a JSON object was needed"
    return f"{problem.args[0]} is missing" if isinstance(problem, KeyError) else str(problem)


@functools.cache
def _converter() -> "Converter":
    from cattrs import Converter

    found = Converter()
    for kind in (int, float, str, bool):
        found.register_structure_hook(kind, functools.partial(_scalar, kind))
    found.register_unstructure_hook(float, _finite)
    found.register_unstructure_hook(float | None, lambda value: value if value is None else _finite(value))
    known = {kind.value: kind for kind in NoteKind}
    found.register_structure_hook(NoteKind, lambda value, _: known.get(value, NoteKind.GENERAL))
    return found


def _scalar(kind: type, value: Any, _: object) -> Any:
    """A value of exactly this type. JSON does not tell 1.0 from 1, so a number is a number."""
    numbers = (int, float)
    if isinstance(value, dict) and set(value) == {"nonfinite"} and kind in numbers and value["nonfinite"] in _NONFINITE:
        return _NONFINITE[value["nonfinite"]]
    if type(value) not in (numbers if kind in numbers else (kind,)):
        raise TypeError(f"{str(value)[:40]!r} was given, {kind.__name__} was needed")
    return value


def _finite(value: float) -> Any:
    return value if math.isfinite(value) else {"nonfinite": str(value)}
