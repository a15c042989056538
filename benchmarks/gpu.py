"""Forecasts against a GPU's own account of its memory, the growth of memory with K, and the time of an oracle call.

    python benchmarks/gpu.py                # on a CUDA machine, under nine minutes: writes results/gpu-<device>-<date>
                                            # .jsonl and prints the tables
    python benchmarks/gpu.py --device cpu   # the same code on small sizes, against the tensors meter; writes nothing
                                            # without --out
    python benchmarks/gpu.py --section engine    # exact second order by the engines against torch by hand
                                                 # (gpu_engine.py; --smoke rehearses it on a CPU)
    python benchmarks/gpu.py --section ranks     # work split over all GPUs (gpu_ranks.py; --smoke likewise)

Needs torch and this repository, no network and no data. Cells (three models x estimators x K) run one after another in
this process, the small K first, so that a run that is cut short has something on everything. A cell that does not fit
the time that is left is not started; what was left out is a row too. Running out of memory, or any other error of a
cell, is that cell's row.

What is compared, in bytes, on CUDA:

    requested   measured peak with forecast + cuBLAS workspaces; a difference is workspaces inside kernels (cuDNN)
    allocated   measured peak with forecast, each tensor in blocks of 512 bytes; those, and what large blocks lose
    reserved    measured peak with forecast allocated; a ratio: the allocator's cache and its fragmentation

The largest differences are the row "margin": what a forecast on such a device has to add.
"""

import argparse
import collections
import contextlib
import dataclasses
import datetime
import gc
import json
import re
import statistics
import sys
import time
from pathlib import Path

import tables
import torch
from bilevel_profiling import Case, measure
from bilevel_profiling.measurement.environment import environment
from bilevel_profiling.measurement.trial import Trial
from bilevel_profiling.meters.cuda import Cuda
from bilevel_profiling.records.failure import of_error
from bilevel_profiling.records.growth import fit

import bilevel as bl
from bilevel.data.imageset import ImageSet
from bilevel.engine import spans
from bilevel.problems import fewshot, hypercleaning, language

try:
    from bilevel_profiling import forecast
except ImportError:  # an older checkout: the rest is still worth measuring
    forecast = None

HERE = Path(__file__).parent
INNER_STEPS = {"cuda": (2, 4, 8), "cpu": (2, 4)}
SIZES = {
    "cuda": {
        "perceptron": {"hidden": 8192, "train": 8192},
        "conv net": {"tasks": 4, "way": 5, "shot": 5, "query": 15, "width": 64, "side": 84, "channels": 3},
        "transformer": {"layers": 4, "width": 512, "heads": 8, "context": 256, "examples": 16, "validation": 16},
    },
    "cpu": {
        "perceptron": {"hidden": 64, "train": 64},
        "conv net": {"tasks": 2, "way": 3, "shot": 2, "query": 2, "width": 4, "side": 28, "channels": 1},
        "transformer": {"layers": 1, "width": 32, "heads": 2, "context": 16, "examples": 8, "validation": 8},
    },
}
LR = {"perceptron": 0.1, "conv net": 0.05, "transformer": 0.05}
# tol=0: the number of products is that of the forecast. Damped, because so few steps leave indefinite Hessians.
ESTIMATORS = {
    "unrolled": bl.Unrolled(),
    "unrolled iterates": bl.Unrolled(keep="iterates"),
    "unrolled segments": bl.Unrolled(keep="segments"),
    "implicit CG": bl.Implicit(bl.CG(max_steps=5, tol=0.0, damping=30.0)),
    "memory-reduced": bl.MemoryReduced(steps=5, tol=0.0, damping=30.0),
    "first-order corrected": bl.FirstOrderCorrected(nu=0.1),
}


def perceptron(sizes, device, seed):
    """Hyper-cleaning on random numbers: memory and time do not ask what the digits are."""
    generator = torch.Generator().manual_seed(seed)
    count = sizes["train"]
    images, labels = (
        torch.rand(count, 64, generator=generator).to(device),
        torch.randint(10, (count,), generator=generator).to(device),
    )
    data = hypercleaning.Digits(images, labels, labels, labels > 10, images, labels, images, labels)
    return hypercleaning.setup(device, seed, hidden=sizes["hidden"], data=data)


def conv_net(sizes, device, seed):
    """iMAML on random images."""
    sizes = dict(sizes)
    side, channels, each = sizes.pop("side"), sizes.pop("channels"), sizes["shot"] + sizes["query"]
    images = torch.randint(256, (each * 10, channels, side, side), generator=torch.Generator().manual_seed(seed)).to(
        torch.uint8
    )
    data = ImageSet(images, counts=(each,) * 10, names=tuple("abcdefghij"))
    problem, *rest = fewshot.setup(device, seed, data=data, **sizes)
    return (bl.proximal(problem, 0.5), *rest)


def transformer(sizes, device, seed):
    """Reweighting of text."""
    return language.setup(device, seed, **sizes)


MODELS = {"perceptron": perceptron, "conv net": conv_net, "transformer": transformer}


def case_of(model, label, steps, device, sizes):
    """One cell as a Case."""
    estimator = bl.TaskMean(ESTIMATORS[label]) if model == "conv net" else ESTIMATORS[label]

    def setup(device, seed):
        return MODELS[model](sizes, device, seed)

    return Case(setup, bl.Descent(bl.SGD(lr=LR[model]), steps=steps), estimator, device=device, name=model, label=label)


class OracleTimes:
    """A listener that times each oracle call: CUDA events in the stream, or the wall clock.

    An oracle inside another (the backward sweep of a kept graph is the outer gradient and K Hessian products at once)
    gets the time alone; the one around it is not reported for that call.
    """

    def __init__(self, device):
        self.cuda = torch.device(device).type == "cuda"
        self.open, self.spent = [], []

    def mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def enter(self, name, count):
        if name in spans.ORACLES:
            for around in self.open:
                around["shared"] = True
            self.open.append(
                {"name": name.removeprefix("bilevel."), "count": count, "shared": False, "start": self.mark()}
            )

    def exit(self, name):
        if name in spans.ORACLES:
            call = self.open.pop()
            if call["count"] and not call["shared"]:
                self.spent.append((call["name"], call["count"], call["start"], self.mark()))

    def seconds(self):
        """Median seconds of one call, by oracle."""
        if self.cuda:
            torch.cuda.synchronize()
        found = collections.defaultdict(list)
        for name, count, start, end in self.spent:
            found[name].append((start.elapsed_time(end) / 1000 if self.cuda else end - start) / count)
        return {name: statistics.median(values) for name, values in found.items()}


def oracle_seconds(case):
    trial = Trial(case)
    trial.hypergradient()  # warm
    times = OracleTimes(case.device)
    with spans.listen(times):
        trial.hypergradient()
    return times.seconds()


def cell(case):
    """One row: forecast, measurement, their differences, seconds an oracle."""
    row = {"kind": "cell", "model": case.name, "estimator": case.label, "inner_steps": case.solver.max_steps}
    cuda = torch.device(case.device).type == "cuda"
    started = time.perf_counter()
    found = real = None
    try:
        if forecast is not None:
            found = forecast(case)
            row["forecast_seconds"] = time.perf_counter() - started
        if cuda:
            gc.collect()
            torch.cuda.empty_cache()
            row["left_over_bytes"] = torch.cuda.memory_allocated()
        real = measure(case, errors=False, repeats=3)
        row |= {
            "status": real.status,
            "reason": real.reason,
            "inner_size": real.inner_size,
            "outer_size": real.outer_size,
        }
        workspaces = None
        if cuda:
            with Cuda(
                case.device, workspaces=True
            ) as held:  # what the products of this cell left with cuBLAS; it was in the peaks
                pass
            workspaces = held.figures()["cuda_workspace_bytes"]
        row |= compared(found, real, workspaces)
        if real.status != "OUT_OF_MEMORY":
            row["oracle_seconds"] = oracle_seconds(case)
    except Exception as error:
        failure = of_error(error)
        row |= {"status": failure.status, "reason": failure.reason}
    gc.collect()
    if cuda:
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
    row["cell_seconds"] = time.perf_counter() - started
    return row


def compared(found, real, workspaces):
    """The figures of a cell, and how far the forecast was off. Differences are measured - forecast."""
    names = (
        "base_tensor_bytes",
        "peak_tensor_bytes",
        "cuda_requested_bytes",
        "cuda_allocated_bytes",
        "cuda_reserved_bytes",
    )
    row = {"wall_seconds": real.wall_seconds, "calls": dict(real.calls), "cuda_workspace_bytes": workspaces}
    row |= {name: getattr(real, name) for name in names}
    if found is None:
        return row
    row |= {f"forecast_{name}": getattr(found, name) for name in names[:-1]}
    if real.peak_tensor_bytes is not None:
        row["tensors_difference"] = real.peak_tensor_bytes - found.peak_tensor_bytes
    if real.cuda_requested_bytes is None or real.status == "OUT_OF_MEMORY":  # then the peaks are those of a torn call
        return row
    held = workspaces or 0
    row["requested_difference"] = real.cuda_requested_bytes - found.cuda_requested_bytes - held
    row["allocated_difference"] = real.cuda_allocated_bytes - found.cuda_allocated_bytes - held
    row["reserved_ratio"] = real.cuda_reserved_bytes / (found.cuda_allocated_bytes + held)
    return row


def conclusions(rows):
    """Rows made from the cells: the law of each estimator's memory, and the margin that a forecast needs."""
    cells = [row for row in rows if row["kind"] == "cell"]
    groups = collections.defaultdict(list)
    for row in cells:
        groups[row["model"], row["estimator"]].append(row)
    for (model, estimator), group in groups.items():
        row = {"kind": "growth", "model": model, "estimator": estimator}
        measured = (
            "cuda_requested_bytes" if any(cell.get("cuda_requested_bytes") for cell in group) else "peak_tensor_bytes"
        )
        for name, field in {"measured": measured, "forecast": f"forecast_{measured}"}.items():
            points = [(cell["inner_steps"], cell[field]) for cell in group if cell.get(field) is not None]
            law = fit(points) if len(points) > 1 else None
            row[name] = dataclasses.asdict(law) | {"text": law.text} if law else None
        yield row
    on_cuda = [row for row in cells if row.get("allocated_difference") is not None]
    if on_cuda:
        yield {
            "kind": "margin",
            "cells": len(on_cuda),
            "requested_difference": max(row["requested_difference"] for row in on_cuda),
            "requested_difference_least": min(row["requested_difference"] for row in on_cuda),
            "allocated_difference": max(row["allocated_difference"] for row in on_cuda),
            "allocated_difference_with_workspaces": max(
                row["allocated_difference"] + (row["cuda_workspace_bytes"] or 0) for row in on_cuda
            ),
            "reserved_ratio": max(row["reserved_ratio"] for row in on_cuda),
            "cuda_workspace_bytes": max(row["cuda_workspace_bytes"] or 0 for row in on_cuda),
        }


def run(device, sizes, models, estimators, steps, budget, write):
    """All cells that fit the budget; each row goes to `write` when it is there."""
    started, rows, seconds = time.perf_counter(), [], {}

    def done(row):
        rows.append(row)
        write(row)

    done(
        {
            "kind": "environment",
            "device": device,
            "environment": environment(device=device),
            "sizes": sizes,
            "budget_seconds": budget,
        }
    )
    todo = [(model, label, k) for k in sorted(steps) for model in models for label in estimators]
    left_out = []
    for number, (model, label, k) in enumerate(todo, 1):
        left = budget - (time.perf_counter() - started)
        before = seconds.get((model, label))  # (K, seconds) of the last K: a larger one takes longer in proportion
        if left <= 0 or (before and before[1] * k / max(before[0], 1) > left):
            left_out.append([model, label, k])
            continue
        row = cell(case_of(model, label, k, device, sizes[model]))
        seconds[model, label] = (k, row["cell_seconds"])
        done(row)
        print(
            f"[{time.perf_counter() - started:5.0f} s] {number}/{len(todo)} {model}, {label}, K = {k}: {_line(row)}",
            flush=True,
        )
    for row in conclusions(rows):
        done(row)
    done({"kind": "left out", "cells": left_out})
    if left_out:
        print(
            f"{len(left_out)} of {len(todo)} cells did not fit the budget of {budget:g} s: "
            + ", ".join(f"{m}, {e}, K = {k}" for m, e, k in left_out)
        )
    return rows


def _line(row):
    if row["status"] in ("ERROR", "OUT_OF_MEMORY"):
        return f"{row['status']}: {row['reason'][:200]}"
    kind = "cuda_requested_bytes" if row.get("cuda_requested_bytes") is not None else "peak_tensor_bytes"
    off = row.get("requested_difference" if kind.startswith("cuda") else "tensors_difference")
    said = "" if off is None else f", {off:+,} bytes from the forecast"
    return f"{row['status']}, {row[kind] / 2**20:,.1f} MiB{said}, {row['wall_seconds'] * 1000:.1f} ms"


def main(arguments=None):
    listed = list(sys.argv[1:] if arguments is None else arguments)
    if listed[:2] == ["--section", "engine"]:
        import gpu_engine

        return gpu_engine.main(listed[2:])
    if listed[:2] == ["--section", "ranks"]:
        import gpu_ranks

        return gpu_ranks.main(listed[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda (default), or cpu for a rehearsal at small sizes")
    parser.add_argument(
        "--budget-seconds", type=float, default=480, help="no cell is started that would end later (default 480)"
    )
    parser.add_argument("--models", default=",".join(MODELS), help="which, by comma")
    parser.add_argument("--estimators", default=",".join(ESTIMATORS), help="which, by comma")
    parser.add_argument("--inner-steps", default="", help="the K, by comma")
    parser.add_argument(
        "--out", type=Path, help="file of rows; default results/gpu-<device>-<date>.jsonl on CUDA, none on a CPU"
    )
    sections = ("forecasts", "engine", "ranks")
    parser.add_argument("--section", choices=sections, default="forecasts", help="any but the first: comes first")
    given = parser.parse_args(listed)
    if given.section != "forecasts":
        parser.error(f"--section {given.section} comes before its own options")
    kind = torch.device(given.device).type
    if kind not in SIZES:
        parser.error(f"--device {given.device}: cuda or cpu was needed")
    if kind == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu rehearses the run at small sizes", file=sys.stderr)
        return 2
    models, estimators = given.models.split(","), given.estimators.split(",")
    for name, known in (*((model, MODELS) for model in models), *((label, ESTIMATORS) for label in estimators)):
        if name not in known:
            parser.error(f"{name!r} is none of {', '.join(known)}")
    steps = tuple(int(k) for k in given.inner_steps.split(",")) if given.inner_steps else INNER_STEPS[kind]
    out = given.out
    if out is None and kind == "cuda":
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(given.device).lower()).strip("-")
        out = HERE / "results" / f"gpu-{name}-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}.jsonl"
    with contextlib.ExitStack() as around:
        stream = None
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            stream = around.enter_context(out.open("w", encoding="utf-8"))

        def write(row):
            if stream:
                stream.write(json.dumps(row) + "\n")
                stream.flush()

        rows = run(given.device, SIZES[kind], models, estimators, steps, given.budget_seconds, write)
    print("\n" + tables.gpu(rows))
    if out is not None:
        print(f"\nrows: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
