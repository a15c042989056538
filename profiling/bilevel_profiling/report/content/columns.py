"""The columns of every table: one place that says what is shown, how it is written and how it is read."""

import dataclasses
from collections.abc import Callable, Sequence

from bilevel_profiling.records import units
from bilevel_profiling.records.record import Record
from bilevel_profiling.report.content import ranks
from bilevel_profiling.report.content.footnotes import QUANTILES, SPREAD, WIDE, marker, wide
from bilevel_profiling.report.content.groups import Group
from bilevel_profiling.report.content.text import clean

_CALLS = {"inner_gradient": "inner grad", "outer_gradient": "outer grad", "hvp": "HVP", "mixed": "mixed"}
_SAID = {
    "inner_gradient": "gradients of the inner loss",
    "outer_gradient": "gradients of the outer loss",
    "hvp": "Hessian-vector products of the inner loss",
    "mixed": "products with the mixed second derivative of the inner loss",
}
_SHORT_CALLS = {"inner_gradient": "in", "outer_gradient": "out", "hvp": "HVP", "mixed": "mix"}

STATUS = "OK, or a number that leads to the reason below the table; letters lead to notes"

Cell = Callable[[Record], str]


@dataclasses.dataclass(frozen=True)
class Column:
    """One column. `section` is the heading it stands under; `rank` says how early a narrow terminal gives it up (0:
    never).
    """

    header: str
    section: str
    cell: Cell
    explanation: str
    short: str = ""
    rank: int = 0
    text: bool = False
    folds: bool = False
    """Whether `folded_calls` can stand in for it."""

    @property
    def brief(self) -> str:
        return self.short or self.header


def columns(group: Group) -> list[Column]:
    """The columns that say something about this group: those measured in at least one of its rows."""
    numbers = [*_memory(group), *_time(group), *_ranks(), *_work(group), *_errors()]
    return [
        *_identity(group),
        *(column for column in numbers if any(column.cell(record) != units.MISSING for record in group.rows)),
    ]


def phases(group: Group) -> tuple[list[str], list[list[str]]]:
    """Header and rows of memory and time by phase at the group's focus K; no rows where phases were not measured."""
    rows = [r for r in group.rows if r.inner_steps == group.focus and r.phases]
    names = list(dict.fromkeys(name for r in rows for name in r.phases))
    header = ["estimator", *(f"{clean(n)} (MiB)" for n in names), *(f"{clean(n)} (ms)" for n in names)]
    table = []
    for r in rows:
        sizes = [units.mebibytes(r.phases[n].peak_tensor_bytes) if n in r.phases else units.MISSING for n in names]
        times = [units.milliseconds(r.phases[n].wall_seconds) if n in r.phases else units.MISSING for n in names]
        table.append([clean(r.estimator), *sizes, *times])
    kept = [place for place in range(len(header)) if place == 0 or any(row[place] != units.MISSING for row in table)]
    return [header[place] for place in kept], [[row[place] for place in kept] for row in table] if len(kept) > 1 else []


def steps(record: Record) -> str:
    """K of a row."""
    return units.count(record.inner_steps)


def _identity(group: Group) -> list[Column]:
    found = [
        Column("estimator", "", lambda r: clean(r.estimator), "label in the comparison", text=True),
        Column("K", "", steps, "number of inner steps"),
        Column("status", "", lambda r: marker(r, group), STATUS, text=True),
    ]
    if all(record.inner_steps is None for record in group.records):
        del found[1]
    if len({record.seed for record in group.records}) > 1:
        found.insert(len(found) - 1, Column("seed", "", lambda r: str(r.seed), "seed of the run"))
    return found


def _memory(group: Group) -> list[Column]:
    base = "the baseline" if group.baseline is None else clean(group.baseline)
    field = group.measure.field
    return [
        Column(
            "peak MiB",
            "memory",
            lambda r: units.mebibytes(r.peak_tensor_bytes),
            "peak_tensor_bytes: the most bytes of tensors that the call itself made and that were alive at once, in "
            "MiB (2**20 bytes)",
        ),
        Column(
            "x base",
            "memory",
            lambda r: units.ratio(group.ratio(r, field)),
            f"{group.measure.name} over that of {base} at the same K",
            rank=1,
        ),
        Column(
            "before MiB",
            "memory",
            lambda r: units.mebibytes(r.base_tensor_bytes),
            "base_tensor_bytes: tensors that were there before the call (data, variables); before + peak is what an "
            "allocator's peak compares with",
            rank=9,
        ),
        Column(
            "CUDA MiB",
            "memory",
            lambda r: units.mebibytes(r.cuda_allocated_bytes),
            "peak of the CUDA allocator, requests rounded up",
            rank=6,
        ),
        Column(
            "CUDA reserved MiB",
            "memory",
            lambda r: units.mebibytes(r.cuda_reserved_bytes),
            "peak of what the CUDA allocator held from the driver, caches included",
            rank=9,
        ),
        Column(
            "CUDA requested MiB",
            "memory",
            lambda r: units.mebibytes(r.cuda_requested_bytes),
            "peak of the bytes asked of the CUDA allocator, before rounding",
            rank=9,
        ),
        Column(
            "CUDA workspace MiB",
            "memory",
            lambda r: units.mebibytes(r.cuda_workspace_bytes),
            "what cuBLAS keeps for itself in the CUDA allocator: no tensor, and no part of what the estimator needs",
            rank=9,
        ),
        Column(
            "CUDA retries",
            "memory",
            lambda r: units.count(r.cuda_retries),
            "how often the CUDA allocator had to give its cache back before it could serve a request: above 0, times "
            "are not to be trusted",
            rank=7,
        ),
        Column(
            "CUDA OOM",
            "memory",
            lambda r: units.count(r.cuda_out_of_memory_events),
            "how often the CUDA allocator ran out of memory during the call",
            rank=7,
        ),
        Column(
            "RSS MiB",
            "memory",
            lambda r: units.mebibytes(r.resident_bytes),
            "peak growth of the process's resident memory: includes heap fragmentation, so never the cost of the "
            "algorithm alone",
            rank=9,
        ),
        Column(
            "RSS x tensors",
            "memory",
            lambda r: units.ratio(_ratio(r.resident_bytes, r.peak_tensor_bytes)),
            _resident(group),
            short="x tensors",
            rank=9,
        ),
    ]


def _time(group: Group) -> list[Column]:
    base = "the baseline" if group.baseline is None else clean(group.baseline)
    return [
        Column(
            "ms",
            "time",
            _time_cell,
            f"median wall time of one hypergradient, device synchronized; {WIDE}: the "
            f"{QUANTILES} of the calls is over {SPREAD:.0%} of it wide",
        ),
        Column("spread ms", "time", _spread, f"{QUANTILES} of the repeated calls", short="spread", rank=5),
        Column(
            "x base",
            "time",
            lambda r: units.ratio(group.ratio(r, "wall_seconds")),
            f"time over that of {base} at the same K",
            rank=1,
        ),
        Column(
            "once s",
            "time",
            lambda r: units.significant(_once(r)),
            "seconds of tracing and compiling that the engine spent once, before the timed calls and in this process; "
            "no part of them",
            rank=4,
        ),
        *_roofline(group),
    ]


def _ranks() -> list[Column]:
    """What goes between processes that run a cell together."""
    return [
        Column("peaks MiB", "ranks", ranks.peaks, ranks.PEAKS, short="MiB", rank=7),
        Column("sent MiB", "ranks", lambda r: units.mebibytes(r.sent_bytes), ranks.SENT, rank=2),
        Column("waited ms", "ranks", ranks.waited, ranks.WAITED, rank=2),
    ]


def _roofline(group: Group) -> list[Column]:
    """A column for each device that a bound was computed for."""
    devices = dict.fromkeys(r.roofline_device for r in group.rows if r.roofline_seconds is not None)
    said = (
        "a lower bound on the time, not a measurement: for each operator the longer of computing and moving its bytes, "
        "on"
    )
    made = []
    for device in devices:
        name = clean(device) or "a device without a name"
        made.append(
            Column(
                f"bound ms, {name}",
                "time",
                _bound(device),
                f"{said} {name}",
                short=f"bound ms {clean(device)}".strip(),
                rank=4,
            )
        )
    return made


def _work(group: Group) -> list[Column]:
    names = dict.fromkeys([*_CALLS, *(name for r in group.rows for name in r.calls)])
    seen = [name for name in names if any(name in r.calls for r in group.rows)]
    made = [
        Column(
            _CALLS.get(name, clean(name)),
            "calls",
            _counter(name),
            f"{_SAID.get(name, f'calls of {clean(name)}')}, in one hypergradient",
            short=_SHORT_CALLS.get(name, clean(name)),
            folds=True,
        )
        for name in seen
    ]
    explanation = "work of matmul-class operations (FlopCounterMode); elementwise work is not counted"
    moved = "bytes that the operators read and wrote, as if none were fused (2**30 bytes)"
    return [
        *made,
        Column("matmul GFLOP", "calls", lambda r: units.gigaflop(r.matmul_flops), explanation, short="GFLOP", rank=3),
        Column(
            "moved GiB",
            "calls",
            lambda r: units.significant(_ratio(r.moved_bytes, 2**30)),
            moved,
            short="GiB moved",
            rank=8,
        ),
    ]


def _errors() -> list[Column]:
    program, solution = "vs K-step program", "vs converged solution"
    exact = "the float64 gradient of the program that takes K inner steps"
    limit = (
        "the float64 hypergradient at a converged inner solution (a different quantity: an exact unroll has an error "
        "here too)"
    )
    return [
        Column(
            "rel. error",
            program,
            lambda r: units.significant(r.program_relative_error),
            f"|estimate - exact| / |exact|, exact = {exact}",
        ),
        Column("cosine", program, lambda r: units.cosine(r.program_cosine), f"cosine of the angle to {exact}", rank=4),
        Column(
            "rel. error", solution, lambda r: units.significant(r.solution_relative_error), f"the same against {limit}"
        ),
        Column(
            "cosine", solution, lambda r: units.cosine(r.solution_cosine), "cosine of the angle to the same", rank=4
        ),
    ]


def folded_calls(group: Group) -> Column | None:
    """All call counts as one column, for narrow views; None where calls were not counted."""
    made = [column for column in _work(group) if column.folds]
    if not made:
        return None
    header = "/".join(column.brief for column in made)
    return Column(
        "calls",
        "calls",
        lambda r: "/".join(c.cell(r) for c in made) if r.calls else units.MISSING,
        header,
        short=header,
        rank=2,
    )


def _counter(name: str) -> Cell:
    return lambda r: units.count(r.calls.get(name))


def _bound(device: str) -> Cell:
    return lambda r: units.milliseconds(r.roofline_seconds) if r.roofline_device == device else units.MISSING


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if units.finite(value) and units.finite(base) and base else None


def _resident(group: Group) -> str:
    """How far resident memory is from the bytes of tensors."""
    found = [ratio for r in group.rows if (ratio := _ratio(r.resident_bytes, r.peak_tensor_bytes)) is not None]
    most = f" (up to {units.significant(max(found))}x tensor bytes in {clean(group.case)})" if found else ""
    return f"resident over tensor bytes{most}: heap fragmentation and libraries, which say nothing about the algorithm"


def _time_cell(record: Record) -> str:
    return (WIDE if wide(record) else "") + units.milliseconds(record.wall_seconds)


def _once(record: Record) -> float | None:
    """What was spent to make an engine's functions."""
    spent = [seconds for seconds in (record.trace_seconds, record.compile_seconds) if seconds is not None]
    return sum(spent) if spent else None


def _spread(record: Record) -> str:
    low, high = record.wall_seconds_low, record.wall_seconds_high
    return (
        units.MISSING
        if not (units.finite(low) and units.finite(high))
        else f"{units.milliseconds(low)}-{units.milliseconds(high)}"
    )


def sections(chosen: Sequence[Column]) -> list[tuple[str, int]]:
    """Runs of neighboring columns under one heading: (heading, how many)."""
    runs: list[tuple[str, int]] = []
    for column in chosen:
        if runs and runs[-1][0] == column.section:
            runs[-1] = (column.section, runs[-1][1] + 1)
        else:
            runs.append((column.section, 1))
    return runs
