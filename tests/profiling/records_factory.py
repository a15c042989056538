"""Records as `bilevel compare` would write them, made up by formulas: two cases, eight estimators, three K, timelines,
outer loops, failures."""

import dataclasses
import math
import random

from bilevel_profiling.records.record import Alive, Iteration, Phase, Point, Record, Target

MIB = 2**20
STEPS = (10, 50, 200)
ENVIRONMENT = {
    "python": "3.11.7",
    "torch": "2.13.0+cpu",
    "platform": "Linux-6.1-x86_64",
    "cpu": "2 cores, 1 thread",
    "bilevel": "0.1.0",
}

SETTINGS = {
    "unrolled": "Unrolled(keep='graph')",
    "unrolled iterates": "Unrolled(keep='iterates')",
    "unrolled segments": "Unrolled(keep='segments')",
    "truncated": "Unrolled(keep='graph', last=5)",
    "implicit": "Implicit(linear=CG(max_steps=10, tol=1e-06, damping=0.0))",
    "memory-reduced": "MemoryReduced(rank=8)",
    "first-order corrected": "FirstOrderCorrected(nu=0.01, scheme='central')",
    "first-order": "FirstOrder()",
}

GROWTH = {"unrolled": "linear", "unrolled iterates": "linear", "unrolled segments": "sqrt"}
"""Contracts on memory against K; constant for all others."""

MAKERS = {
    "inner": (("inner_gradient", "aten.mm"), ("inner_gradient", "aten.relu"), ("inner_step", "aten.sub")),
    "hypergradient": (("hvp", "aten.mm"), ("hvp", "aten.mul"), ("outer_gradient", "aten.addmm"), ("mixed", "aten.mm")),
    "outer": (("", "aten.add_"),),
}
ORIGINS = (
    ("aten.addmm", "Net.layers.0", "model.py:31", False),
    ("aten.mm", "Net.layers.2", "model.py:33", True),
    ("aten.relu", "Net.layers.1", "model.py:32", False),
    ("aten.mul", "", "losses.py:12", False),
    ("aten.sub", "", "", True),
)
WORKSPACE = "The cuBLAS workspace was taken to be that of an H200."
SAMPLED = "Resident memory was sampled every 10 ms in a process of its own."


def _costs(name: str, k: int, step: float, iterate: float, work: float) -> tuple[float, float, dict[str, int]]:
    """Peak MiB, inner gradients' worth of time, oracle calls."""
    grads = {"inner_gradient": k, "outer_gradient": 1, "hvp": 0, "mixed": 0}
    match name:
        case "unrolled":
            return step * k + work, 2.1 * k, {**grads, "hvp": k, "mixed": k}
        case "unrolled iterates":
            return iterate * k + 1.6 * work, 3.2 * k, {**grads, "inner_gradient": 2 * k, "hvp": k, "mixed": k}
        case "unrolled segments":
            return (
                (step + iterate) * math.sqrt(k) + 1.2 * work,
                3.1 * k,
                {**grads, "inner_gradient": 2 * k, "hvp": k, "mixed": k},
            )
        case "truncated":
            return step * 5 + work, k + 6.0, {**grads, "hvp": 5, "mixed": 5}
        case "implicit":
            return 2.6 * work, k + 34.0, {**grads, "hvp": 10, "mixed": 1}
        case "memory-reduced":
            return 1.3 * work, 1.6 * k + 4, {**grads, "hvp": k // 2, "mixed": 1}
        case "first-order corrected":
            return 1.15 * work, k + 4.4, {**grads, "inner_gradient": k + 2, "mixed": 2}
    return work, k + 1.2, grads


def _errors(name: str, k: int, rng: random.Random) -> tuple[float, float]:
    """Relative errors against the K-step program and the converged solution."""
    left = 0.9 * math.exp(-k / 60)
    match name:
        case "unrolled" | "unrolled iterates" | "unrolled segments":
            return rng.uniform(1, 4) * 1e-7 * math.sqrt(k), left
        case "truncated":
            return 0.42 * (1 - math.exp(-k / 8)), 0.46 + left / 4
        case "implicit":
            return left * 0.8 + 4e-4, left * 0.5 + 3e-4
        case "memory-reduced":
            return left * 0.5 + 0.011, left * 0.6 + 0.012
        case "first-order corrected":
            return left * 0.9 + 0.031, left * 0.9 + 0.028
    return 0.97, 0.98


def _timeline(name: str, k: int, peak: float, rng: random.Random) -> tuple[Point, ...]:
    """Bytes alive against operations: a rise while the tape grows, a saw while it is rebuilt, a plateau for solvers."""
    points = []
    operations = int(sum(_costs(name, k, 1, 1, 1)[2].values()) * 23)
    floor = peak * (0.35 if name in ("implicit", "memory-reduced") else 0.6 if name.startswith("first") else 0.08)
    for place in range(161):
        share = place / 160
        phase = "inner" if share < 0.45 else "hypergradient" if share < 0.97 else "outer"
        wave = 0.5 + 0.5 * math.sin(place * 2.1)
        if phase == "inner":
            level = floor * (0.6 + 0.4 * wave)
            if name.startswith("unrolled"):
                level = floor + (peak - floor) * share / 0.45 * (0.6 if "segments" in name else 0.93)
        elif phase == "hypergradient":
            down = (0.97 - share) / 0.52
            level = peak * (down * 0.93 + 0.07 * wave) if name.startswith("unrolled") else floor + (peak - floor) * wave
            if "segments" in name:
                level = peak * (0.4 * down + 0.3 + 0.3 * ((place % 12) / 11))
        else:
            level = floor * 0.5
        made_by = (phase, *MAKERS[phase][place % len(MAKERS[phase])])
        points.append((place * operations // 160, int(level * MIB * rng.uniform(0.985, 1.0)), *made_by))
    top = max(point[1] for point in points)
    return tuple((operation, int(level / top * peak * MIB), *names) for operation, level, *names in points)


def _alive(name: str, k: int, peak: float) -> tuple[Alive, ...]:
    """What makes up the peak: the tape where there is one, then work space, then many small things."""
    shares = (
        [0.61, 0.14, 0.1, 0.05, 0.035, 0.02, 0.015, 0.01, 0.006, 0.004]
        if name.startswith("unrolled")
        else [0.52, 0.31, 0.09]
    )
    found = []
    for place, share in enumerate(shares):
        operator, module, line, backward = ORIGINS[place % len(ORIGINS)]
        span = ("inner_gradient", "hvp")[place % 2]
        phase = ("inner", "hypergradient")[place % 2]
        line = line if place < 8 else ""
        size, names = (
            int(share * peak * MIB),
            {"phase": phase, "span": span, "operator": operator, "module": module, "line": line},
        )
        found.append(Alive(bytes=size, count=max(1, k // (1 + place)), backward=backward, **names))
    rest = int(peak * MIB) - sum(entry.bytes for entry in found)
    return (*found, Alive(bytes=rest, count=3 * k))


def _loop(
    name: str, error: float, steps: int, rng: random.Random, peak: float, seconds: float
) -> tuple[Iteration, ...]:
    rate = 0.05 * max(0.12, 1 - min(error, 1.0))
    return tuple(
        Iteration(
            index=place,
            outer_loss=0.31 + 1.9 * math.exp(-rate * place) + rng.gauss(0, 0.012) + 0.2 * min(error, 1.0),
            inner_loss=0.5 * math.exp(-0.01 * place),
            gradient_norm=0.8 * math.exp(-rate * place),
            status="MAX_STEPS" if name == "implicit" and place % 17 == 9 else "OK",
            wall_seconds=seconds * (1 + 0.04 * math.sin(place) + (0.6 if place == 0 else 0.0)),
            peak_tensor_bytes=int(peak * MIB) + 4 * place,
        )
        for place in range(steps)
    )


def _record(case: str, name: str, k: int, rng: random.Random, shape: tuple[float, float, float, float]) -> Record:
    step, iterate, work, unit = shape
    peak, grads, calls = _costs(name, k, step, iterate, work)
    peak += 0.2 * k if case == "fewshot" and name == "first-order corrected" else 0.0  # breaks its contract
    seconds = grads * unit
    program, solution = _errors(name, k, rng)
    hypercleaning = case == "hypercleaning"
    runs = k == STEPS[-1]
    gain = 0.13 * (1 - min(program, 1.0))
    phases = {
        "inner": Phase(peak_tensor_bytes=int(peak * 0.93 * MIB), wall_seconds=seconds * 0.45),
        "hypergradient": Phase(peak_tensor_bytes=int(peak * MIB), wall_seconds=seconds * 0.54),
        "outer": Phase(peak_tensor_bytes=int(work * 0.4 * MIB), wall_seconds=seconds * 0.01),
    }
    return Record(
        case=case,
        estimator=name,
        settings=SETTINGS[name],
        inner_steps=k,
        memory_growth=GROWTH.get(name, "constant"),
        target=Target.PROGRAM if name.startswith("unrolled") else None,
        notes=(SAMPLED,) if hypercleaning else (),
        inner_size=238_510 if hypercleaning else 111_936,
        outer_size=5_000 if hypercleaning else 111_936,
        tasks=None if hypercleaning else 4,
        base_tensor_bytes=int(17.2 * MIB),
        peak_tensor_bytes=int(peak * MIB),
        kept_tensor_bytes=0,
        resident_bytes=int(peak * 2.4 * MIB),
        wall_seconds=seconds,
        wall_seconds_low=seconds * 0.97,
        wall_seconds_high=seconds * 1.06,
        repeats=5,
        matmul_flops=int(grads * 0.7e9),
        calls=calls,
        phases=phases,
        moved_bytes=int(grads * 0.11 * 2**30),
        timeline=_timeline(name, k, peak, rng),
        alive=_alive(name, k, peak),
        program_relative_error=program,
        program_cosine=max(-1.0, 1 - program**2 / 2),
        solution_relative_error=solution if hypercleaning else None,
        solution_cosine=max(-1.0, 1 - solution**2 / 2) if hypercleaning else None,
        reference_note="Program: float64 unroll. Solution: float64 CG at 5,000 inner steps."
        if hypercleaning
        else "Program: float64 unroll. The inner problem has no unique solution, "
        "so there is no reference at convergence.",
        iterations=_loop(name, program, 120 if hypercleaning else 40, rng, peak, seconds) if runs else (),
        metrics_before={"accuracy": 0.812} | ({"AUC of weights": 0.5} if hypercleaning else {}) if runs else {},
        metrics={"accuracy": 0.812 + gain} | ({"AUC of weights": 0.5 + 3.3 * gain} if hypercleaning else {})
        if runs
        else {},
        environment=ENVIRONMENT,
    )


def _failure(record: Record, status: str, reason: str) -> Record:
    return Record(
        case=record.case,
        estimator=record.estimator,
        settings=record.settings,
        target=record.target,
        inner_steps=record.inner_steps,
        inner_size=record.inner_size,
        outer_size=record.outer_size,
        tasks=record.tasks,
        status=status,
        reason=reason,
        environment=ENVIRONMENT,
    )


def _forecast(record: Record, k: int, peak: float) -> Record:
    """What a forecast knows: memory, work and a bound on the time, but neither time nor error."""
    return Record(
        case=record.case,
        estimator=record.estimator,
        source="forecast",
        settings=record.settings,
        target=record.target,
        inner_steps=k,
        inner_size=record.inner_size,
        outer_size=record.outer_size,
        tasks=record.tasks,
        memory_growth=record.memory_growth,
        notes=(WORKSPACE,),
        base_tensor_bytes=record.base_tensor_bytes,
        peak_tensor_bytes=int(peak * MIB),
        calls=record.calls,
        roofline_seconds=k * 2.1e-4,
        roofline_device="H200",
        environment=ENVIRONMENT,
    )


def make() -> list[Record]:
    """51 records: three forecasts, four that are not OK, a contract broken, a time that says little."""
    rng = random.Random(0)
    shapes = {"hypercleaning": (0.68, 0.954, 5.0, 0.0066), "fewshot": (3.9, 0.114, 38.4, 0.0117)}
    records = [_record(case, name, k, rng, shape) for case, shape in shapes.items() for name in SETTINGS for k in STEPS]
    changed = []
    for record in records:
        key = (record.case, record.estimator, record.inner_steps)
        if key == ("fewshot", "unrolled", 200):
            record = _failure(
                record,
                "OUT_OF_MEMORY",
                "The process asked for more than the limit of 512 MiB while the hypergradient was computed.",
            )
        elif key == ("hypercleaning", "implicit", 10):
            reason = (
                "Conjugate gradients met a direction of non-positive curvature: the inner Hessian is not positive "
                "definite there."
            )
            record = _failure(record, "NEGATIVE_CURVATURE", reason)
        elif key == ("fewshot", "memory-reduced", 200):
            record = _failure(record, "TIMEOUT", "The run was stopped after 600 s.")
        elif key == ("hypercleaning", "implicit", 50):
            reason = "The linear solver used all its steps before the residual met its tolerance."
            record = dataclasses.replace(record, status="MAX_STEPS", reason=reason)
        elif key == ("hypercleaning", "truncated", 200):
            record = dataclasses.replace(record, wall_seconds_low=0.8, wall_seconds_high=1.9)
        changed.append(record)
    unrolled = next(record for record in records if (record.case, record.estimator) == ("fewshot", "unrolled"))
    return changed + [_forecast(unrolled, k, 3.9 * k + 38.4) for k in (10, 50, 1000)]
