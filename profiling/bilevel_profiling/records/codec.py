"""Frozen dataclasses as lines of JSON, through cattrs: strict about the types that the fields declare, so that a
damaged file is refused with the place of the damage; lenient about fields that a newer version added, which are left
out.
"""

import enum
import functools
import json
import math
from typing import TYPE_CHECKING, Any, TypeVar

from bilevel_profiling.records.note import NoteKind

if TYPE_CHECKING:
    from cattrs import Converter

_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_MOST_SAID = 3
_Kind = TypeVar("_Kind")


def line(found: object) -> str:
    """Dataclasses, and what holds them, as one line of JSON."""
    return json.dumps(_converter().unstructure(found), allow_nan=False, separators=(",", ":"))


def structured(data: Any, kind: type[_Kind], place: str) -> _Kind:
    """What JSON gave, as a dataclass.

    Raises:
        ValueError: it is none; the message says what is wrong, and where below `place`.
    """
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


def _scalar(kind: type, value: Any, declared: Any) -> Any:
    """A value of exactly this type. JSON does not tell 1.0 from 1, so a number is a number."""
    numbers = (int, float)
    if isinstance(value, dict) and set(value) == {"nonfinite"} and kind in numbers and value["nonfinite"] in _NONFINITE:
        return _NONFINITE[value["nonfinite"]]
    if type(value) not in (numbers if kind in numbers else (kind,)):
        raise TypeError(f"{str(value)[:40]!r} was given, {kind.__name__} was needed")
    # An enum of strings is a str to cattrs.
    return declared(value) if isinstance(declared, type) and issubclass(declared, enum.Enum) else value


def _finite(value: float) -> Any:
    return value if math.isfinite(value) else {"nonfinite": str(value)}
