"""A Record is what one measurement found: frozen, units in the field names, one JSON line.

Meters fill records, reports read them, and nothing else passes between the two. A figure that was not measured is None,
never 0.
"""

import dataclasses
import functools
import json
import math
import types
from collections.abc import Mapping
from typing import Any, get_args, get_origin

SCHEMA = 2
_READABLE = (1, SCHEMA)
"""Schema 2 added fields to schema 1 and changed none but the timeline, whose points had three parts."""

Point = tuple[int, int, str, str, str]
"""(operation index, live bytes, phase, innermost span, operator)."""

SPREADS = "wall_seconds spreads"
"""How the clock's note on a wide spread begins: reports mark such times in their own way."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alive:
    """Tensors of one origin that were alive at the peak."""

    bytes: int
    count: int
    """Storages."""
    phase: str = ""
    """inner, hypergradient, outer; empty outside of them."""
    span: str = ""
    """The innermost span: inner_gradient, hvp, ...; empty outside."""
    operator: str = ""
    """What made them, such as aten.mm."""
    module: str = ""
    """The path of the innermost nn.Module, such as Net.layers.0, where there is one."""
    line: str = ""
    """The innermost line of the user's code, such as model.py:31. Made in a backward pass: the line whose gradient it
    is, where that is known."""
    backward: bool = False
    """Whether a backward pass made them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """Cost of one phase (inner, hypergradient or outer) of one hypergradient."""

    peak_tensor_bytes: int | None = None
    """Most tensor bytes made by the measured call and alive at once while this phase ran."""
    cuda_allocated_bytes: int | None = None
    wall_seconds: float | None = None
    matmul_flops: int | None = None
    calls: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Iteration:
    """One outer iteration: hypergradient and outer step."""

    index: int
    outer_loss: float | None = None
    inner_loss: float | None = None
    gradient_norm: float | None = None
    status: str = "OK"
    wall_seconds: float | None = None
    peak_tensor_bytes: int | None = None
    cuda_allocated_bytes: int | None = None
    calls: Mapping[str, int] = dataclasses.field(default_factory=dict)
    phases: Mapping[str, Phase] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """What the user logged in this iteration."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One measured cell: an estimator on a case with K inner steps. Sizes are bytes, times seconds, counts calls of one
    hypergradient.
    """

    case: str
    """Name of the case: a built-in one or the stem of a user's file."""
    estimator: str
    """Label of the estimator in the comparison."""
    source: str = "measured"
    """measured, or forecast: then no figure was measured, the run was made on tensors without data."""
    settings: str = ""
    """repr of the estimator, so that the row can be rebuilt."""
    inner_steps: int | None = None
    memory_growth: str = ""
    """The estimator's contract on how peak memory grows with K: constant, sqrt or linear; empty where there is none to
    hold it to."""
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    inner_size: int | None = None
    """P: numbers in the inner variable (all tasks)."""
    outer_size: int | None = None
    """Q: numbers in the outer variable."""
    tasks: int | None = None

    status: str = "OK"
    """A bilevel.Status name, or OUT_OF_MEMORY, TIMEOUT, CRASHED, ERROR."""
    reason: str = ""
    """A sentence on the status; empty when it is OK."""
    notes: tuple[str, ...] = ()
    """What a reader must know to use the figures, a sentence each."""

    base_tensor_bytes: int | None = None
    """Tensor bytes that were there before the call: data, outer and inner variables, the outer optimizer's state."""
    peak_tensor_bytes: int | None = None
    """Most bytes of tensor storages made by the call and alive at once."""
    kept_tensor_bytes: int | None = None
    """Bytes still alive after the result was dropped: 0 unless something leaks."""
    cuda_allocated_bytes: int | None = None
    cuda_reserved_bytes: int | None = None
    cuda_requested_bytes: int | None = None
    cuda_workspace_bytes: int | None = None
    """What cuBLAS keeps for itself in the allocator; no tensor."""
    cuda_retries: int | None = None
    """How often the allocator had to give its cache back before it could serve a request."""
    cuda_out_of_memory_events: int | None = None
    resident_bytes: int | None = None
    """Peak resident memory of the process above what it held before the call (memory-profiler)."""

    wall_seconds: float | None = None
    """Median over `repeats` calls, device synchronized."""
    wall_seconds_low: float | None = None
    """The 10% quantile of the repeats."""
    wall_seconds_high: float | None = None
    """The 90% quantile."""
    repeats: int | None = None
    matmul_flops: int | None = None
    """FLOPs of matmul-class operations (torch FlopCounterMode); elementwise work is not counted."""
    moved_bytes: int | None = None
    """Bytes that the operators read and wrote, as if none were fused."""
    roofline_seconds: float | None = None
    """A lower bound on the time on `roofline_device`: for each operator the longer of computing and moving."""
    roofline_device: str = ""
    calls: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Oracle calls: inner_gradient, outer_gradient, hvp, mixed."""
    phases: Mapping[str, Phase] = dataclasses.field(default_factory=dict)
    """inner, hypergradient, outer."""
    timeline: tuple[Point, ...] = ()
    """Live bytes made by the call, thinned so that every local maximum that matters is kept."""
    alive: tuple[Alive, ...] = ()
    """What was alive at the peak, the largest first; the last entry may be the rest, with no operator."""

    program_relative_error: float | None = None
    """|estimate - exact| / |exact|, exact = float64 gradient of the K-step program."""
    program_cosine: float | None = None
    solution_relative_error: float | None = None
    """The same against the float64 hypergradient at a converged inner solution; None where the case has none."""
    solution_cosine: float | None = None
    reference_note: str = ""
    """How the references were made, or why there is none."""

    iterations: tuple[Iteration, ...] = ()
    """The outer loop, one entry an outer step; empty when only single hypergradients were measured."""
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """What the case's own `evaluate` found after the outer loop."""
    metrics_before: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """The same before the first outer step."""

    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    schema: int = SCHEMA

    def to_json(self) -> str:
        """One line of JSON, without newlines; a number that is not finite is written as {"nonfinite": "nan"}."""
        return _line(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, line: str) -> "Record":
        """Read a line written by `to_json`.

        Raises:
            ValueError: not JSON, not a record, or a record of another schema version; the message says which.
        """
        found = from_line(line)
        if not isinstance(found, cls):
            raise ValueError("not a record: it is an iteration of one")
        return found


def iteration_json(iteration: Iteration) -> str:
    """The line that adds an outer iteration to the record before it, in the file of a run.

    Example:
        >>> from_line(iteration_json(Iteration(index=3, outer_loss=0.5))).outer_loss
        0.5
    """
    return _line({"iteration": dataclasses.asdict(iteration)})


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
        found = _within("iteration", Iteration, _revive(data["iteration"]))
        assert isinstance(found, Iteration)
        return found
    if not isinstance(data, dict) or "case" not in data or "estimator" not in data:
        raise ValueError("not a record: a JSON object with 'case' and 'estimator' was needed")
    if data.get("schema") not in _READABLE:
        readable = " and ".join(map(str, _READABLE))
        raise ValueError(
            f"record of schema {data.get('schema')!r}; this version of bilevel_profiling reads schemas {readable}. "
            f"Read it with the version of bilevel that wrote it, or measure again with this one"
        )
    data = _revive(data)
    if data["schema"] == 1 and isinstance(data.get("timeline"), list):
        data["timeline"] = [[*point, "", ""] if isinstance(point, list) else point for point in data["timeline"]]
    record = _built(Record, {**data, "schema": SCHEMA})
    assert isinstance(record, Record)
    return record


_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _line(data: dict[str, Any]) -> str:
    return json.dumps(_plain(data), allow_nan=False, separators=(",", ":"))


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"nonfinite": str(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _revive(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"nonfinite"} and value["nonfinite"] in _NONFINITE:
            return _NONFINITE[value["nonfinite"]]
        return {key: _revive(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_revive(item) for item in value]
    return value


def _built(wanted: Any, value: Any) -> Any:
    """What JSON gave, as the type a field declares: a damaged file is refused here, with the place, and not where its
    figures are used.

    The message of an error begins with the place, which grows on its way up.
    """
    scalars, kind, parts = _parsed(wanted)
    if type(value) in scalars:
        return value
    if kind is Mapping and isinstance(value, dict):
        return {key: _within(f"[{key!r}]", parts[1], item) for key, item in value.items()}
    if kind is tuple and isinstance(value, list):
        each = [parts[0]] * len(value) if parts[-1] is Ellipsis else parts
        if len(each) != len(value):
            raise ValueError(f" has {len(value)} parts; {len(each)} were needed")
        return tuple([_built(part, item) for part, item in zip(each, value, strict=True)])
    if dataclasses.is_dataclass(wanted) and isinstance(value, dict):
        return _object(wanted, value)
    names = [
        "null" if part is types.NoneType else getattr(part, "__name__", str(part))
        for part in (parts if kind is types.UnionType else (wanted,))
    ]
    raise ValueError(f" is {str(value)[:40]!r}; {' or '.join(names)} was needed")


def _within(place: str, wanted: Any, value: Any) -> Any:
    try:
        return _built(wanted, value)
    except ValueError as error:
        raise ValueError(f"{place}{error}") from None


@functools.cache
def _parsed(wanted: Any) -> tuple[frozenset[type], Any, tuple[Any, ...]]:
    """The scalar types that a declared type takes, its origin and its parts. JSON does not tell 1.0 from 1, so a number
    is a number.
    """
    kind, parts = get_origin(wanted), get_args(wanted)
    scalars = frozenset(
        parts if kind is types.UnionType else (wanted,) if kind is None and not dataclasses.is_dataclass(wanted) else ()
    )
    return scalars | {int, float} if scalars & {int, float} else scalars, kind, parts


@functools.cache
def _types(wanted: Any) -> dict[str, Any]:
    return {field.name: field.type for field in dataclasses.fields(wanted)}


def _object(wanted: Any, value: dict[str, Any]) -> Any:
    declared = _types(wanted)
    unknown = sorted(set(value) - set(declared))
    if unknown:
        raise ValueError(f"{'record' if wanted is Record else ''} with unknown fields {unknown}")
    dot = "" if wanted is Record else "."
    found = {}
    for name, item in value.items():
        try:
            found[name] = _built(declared[name], item)
        except ValueError as error:
            raise ValueError(f"{dot}{name}{error}") from None
    try:
        return wanted(**found)
    except TypeError as error:  # a field without a default is missing
        raise ValueError(f": {error}") from error
