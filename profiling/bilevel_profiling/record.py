"""A Record is what one measurement found: frozen, units in the field names, one JSON line.

Meters fill records, reports read them, and nothing else passes between the two. A figure that was not measured is None, never 0.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SCHEMA = 1


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One measured cell: an estimator on a case with K inner steps. Sizes are bytes, times seconds, counts calls of one hypergradient."""

    case: str
    """Name of the case: a built-in one or the stem of a user's file."""
    estimator: str
    """Label of the estimator in the comparison."""
    settings: str = ""
    """repr of the estimator, so that the row can be rebuilt."""
    inner_steps: int | None = None
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

    base_tensor_bytes: int | None = None
    """Tensor bytes that were there before the call: data, outer and inner variables."""
    peak_tensor_bytes: int | None = None
    """Most bytes of tensor storages made by the call and alive at once."""
    kept_tensor_bytes: int | None = None
    """Bytes still alive after the result was dropped: 0 unless something leaks."""
    cuda_allocated_bytes: int | None = None
    cuda_reserved_bytes: int | None = None
    cuda_requested_bytes: int | None = None
    resident_bytes: int | None = None
    """Peak resident memory of the process above what it held before the call (memory-profiler)."""

    wall_seconds: float | None = None
    """Median over `repeats` calls, device synchronized."""
    wall_seconds_low: float | None = None
    wall_seconds_high: float | None = None
    repeats: int | None = None
    matmul_flops: int | None = None
    """FLOPs of matmul-class operations (torch FlopCounterMode); elementwise work is not counted."""
    calls: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Oracle calls: inner_gradient, outer_gradient, hvp, mixed."""
    phases: Mapping[str, Phase] = dataclasses.field(default_factory=dict)
    """inner, hypergradient, outer."""
    timeline: tuple[tuple[int, int, str], ...] = ()
    """(operation index, live bytes made by the call, phase), thinned so that every local maximum that matters is kept."""

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
        """One line of JSON, without newlines; non-finite numbers are written as strings ("nan", "inf")."""
        return json.dumps(_plain(dataclasses.asdict(self)), allow_nan=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> "Record":
        """Read a line written by `to_json`.

        Raises:
            ValueError: not JSON, not a record, or a record of another schema version; the message says which.
        """
        try:
            data = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a record: invalid JSON ({error.msg} at column {error.colno})") from error
        if not isinstance(data, dict) or "case" not in data or "estimator" not in data:
            raise ValueError("not a record: a JSON object with 'case' and 'estimator' was needed")
        if data.get("schema") != SCHEMA:
            raise ValueError(f"record of schema {data.get('schema')!r}; this version of bilevel_profiling reads schema {SCHEMA}")
        unknown = sorted(set(data) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"record with unknown fields {unknown}")
        data = _revive(data)
        data["phases"] = {name: Phase(**phase) for name, phase in data.get("phases", {}).items()}
        data["timeline"] = tuple((int(a), int(b), str(c)) for a, b, c in data.get("timeline", ()))
        data["iterations"] = tuple(
            Iteration(**{**entry, "phases": {name: Phase(**phase) for name, phase in entry.get("phases", {}).items()}})
            for entry in data.get("iterations", ())
        )
        return cls(**data)


def write(records: Iterable[Record], path: Path) -> None:
    """Write records as JSON lines, replacing the file."""
    path.write_text("".join(record.to_json() + "\n" for record in records), encoding="utf-8")


def append(record: Record, path: Path) -> None:
    """Add one record to a JSON-lines file and flush it, so that an interrupted run keeps what is finished."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(record.to_json() + "\n")
        stream.flush()


def read(path: Path) -> list[Record]:
    """Read a JSON-lines file of records.

    Raises:
        ValueError: a line is not a record; the message names the file and the line.
        OSError: the file cannot be read.
    """
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            records.append(Record.from_json(line))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return records


_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


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
        if set(value) == {"nonfinite"}:
            return _NONFINITE[value["nonfinite"]]
        return {key: _revive(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_revive(item) for item in value]
    return value
