"""A Record is what one measurement found: frozen, units in the field names, one JSON line.

Meters fill records, reports read them, and nothing else passes between the two. A figure that was not measured is None,
never 0.
"""

import dataclasses
import enum
import json
from collections.abc import Mapping

from bilevel_profiling.records import codec
from bilevel_profiling.records.note import Note
from bilevel_profiling.records.schemas import SCHEMA, upgraded

Point = tuple[int, int, str, str, str]
"""(operation index, live bytes, phase, innermost span, operator)."""


class Target(enum.StrEnum):
    """What an estimator estimates: the two references that errors are measured against."""

    PROGRAM = "program"
    """The gradient of the program that takes K inner steps."""
    SOLUTION = "solution"
    """The hypergradient at a converged inner solution."""


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
    sent_bytes: int | None = None
    collective_seconds: float | None = None
    calls: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rank:
    """What one of several processes found that ran a cell together; figures as in the record."""

    rank: int
    status: str = "OK"
    base_tensor_bytes: int | None = None
    peak_tensor_bytes: int | None = None
    kept_tensor_bytes: int | None = None
    cuda_allocated_bytes: int | None = None
    resident_bytes: int | None = None
    wall_seconds: float | None = None
    sent_bytes: int | None = None
    collective_seconds: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Function:
    """What an engine made of a derivative: traced once, run by every hypergradient on the problem."""

    name: str
    nodes: int | None = None
    """Of its graph."""
    matmul_flops: int | None = None
    """Of one call."""
    moved_bytes: int | None = None
    """Bytes that its operators read and write in one call, as if none were fused."""
    trace_seconds: float | None = None
    """Spent once, in this process."""
    compile_seconds: float | None = None
    """Likewise; its first run is in it."""
    calls: int | None = None
    """In one hypergradient."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Iteration:
    """One outer iteration: hypergradient and outer step."""

    index: int
    outer_loss: float | None = None
    inner_loss: float | None = None
    gradient_norm: float | None = None
    status: str = "OK"
    """As a record's; also INTERRUPTED, of an iteration that a break or Ctrl-C ended."""
    wall_seconds: float | None = None
    peak_tensor_bytes: int | None = None
    cuda_allocated_bytes: int | None = None
    calls: Mapping[str, int] = dataclasses.field(default_factory=dict)
    phases: Mapping[str, Phase] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """What the user logged in this iteration."""


@dataclasses.dataclass(frozen=True)
class Loop:
    """What the outer loop of a row did."""

    iterations: tuple[Iteration, ...]
    metrics_before: Mapping[str, float]
    metrics: Mapping[str, float]


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
    target: Target | None = None
    """What the estimator gives but for rounding and unmet tolerances; None where that is neither (truncated sweeps,
    first-order ones) or not known. The first to give the program is the baseline of a report's ratios."""
    solver: str = ""
    """repr of the inner solver."""
    inner_steps: int | None = None
    """K; the most steps that the solver may take."""
    memory_growth: str = ""
    """The estimator's contract on how peak memory grows with K: constant, sqrt or linear; empty where there is none to
    hold it to."""
    engine: str = ""
    """Label of the engine that computed the derivatives; empty where none was named: operator by operator."""
    engine_settings: str = ""
    """Its repr."""
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    inner_size: int | None = None
    """P: numbers in the inner variable (all tasks)."""
    outer_size: int | None = None
    """Q: numbers in the outer variable."""
    tasks: int | None = None
    processes: int | None = None
    """N: ranks of the group that ran it together; None for one process without a group. Sizes, FLOPs and calls are then
    those of the rank with the highest peak (the first of them), times and errors the largest of all ranks."""
    split: str = ""
    """What each rank has a part of: data, tasks, ..."""

    status: str = "OK"
    """A bilevel.Status name, or OUT_OF_MEMORY, TIMEOUT, CRASHED, ERROR."""
    reason: str = ""
    """A sentence on the status; empty when it is OK."""
    notes: tuple[Note, ...] = ()
    """What a reader must know to use the figures, a sentence each; text is taken for a note of no special kind."""

    base_tensor_bytes: int | None = None
    """Tensor bytes that were there before the call: data, outer and inner variables, the outer optimizer's state."""
    peak_tensor_bytes: int | None = None
    """Most bytes of tensor storages made by the call and alive at once."""
    peak_meter: str = ""
    """What `peak_tensor_bytes` was read from: tensors (every operator on tensors), allocator (what torch's allocator
    gave out, scratch memory of kernels included), cuda (the same of the CUDA allocator); empty in older records, which
    know tensors alone."""
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
    trace_seconds: float | None = None
    """Of an engine that traces: spent once, in this process, and not part of `wall_seconds`."""
    compile_seconds: float | None = None
    """Likewise, by the compiler."""
    warm_up_seconds: float | None = None
    """Of such an engine: the two hypergradients before the measured ones, with tracing, compiling, and the checks
    against eager results."""
    functions: tuple[Function, ...] = ()
    """What such an engine made."""
    matmul_flops: int | None = None
    """FLOPs of matmul-class operations (torch FlopCounterMode); elementwise work is not counted."""
    moved_bytes: int | None = None
    """Bytes that the operators read and wrote, as if none were fused."""
    roofline_seconds: float | None = None
    """A lower bound on the time on `roofline_device`: for each operator the longer of computing and moving."""
    roofline_device: str = ""
    calls: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Oracle calls: inner_gradient, outer_gradient, hvp, mixed."""
    sent_bytes: int | None = None
    """What a rank sends to others in one call, if they stand in a ring: see meters.traffic."""
    collective_seconds: float | None = None
    """Spent in collectives, waiting for slower ranks included, each waited for at once."""
    collectives: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Their calls: all_reduce, all_gather, ..."""
    ranks: tuple[Rank, ...] = ()
    """Each process, in the order of the ranks."""
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

    def __post_init__(self) -> None:
        notes = tuple(Note(note) if isinstance(note, str) else note for note in self.notes)
        object.__setattr__(self, "notes", notes)

    def to_json(self) -> str:
        """One line of JSON, without newlines; a number that is not finite is written as {"nonfinite": "nan"}."""
        return codec.line(self)

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
    return codec.line({"iteration": iteration})


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
        return codec.structured(data["iteration"], Iteration, "iteration")
    if not isinstance(data, dict) or "case" not in data or "estimator" not in data:
        raise ValueError("not a record: a JSON object with 'case' and 'estimator' was needed")
    return codec.structured(upgraded(data), Record, "record")
