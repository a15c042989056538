"""The ranks section of benchmarks/gpu.py: cases split over GPUs, measured with NCCL and beside their forecasts.

    python benchmarks/gpu.py --section ranks             # on CUDA: results/gpu-ranks-<device>-<date>.jsonl, the table
    python benchmarks/gpu.py --section ranks --smoke     # the same code at tiny sizes on a CPU, with gloo; no file

Data in parallel (a perceptron whose batch is split) and tasks in parallel, on 1, 2, 4, ... GPUs, as many as there are:
time of a hypergradient, time in collectives, memory of each rank, bytes sent; and what the forecast says of the last
two. Every cell runs in fresh processes (`bilevel_profiling.measurement.together`); one that fails is a row.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import re
import sys
from pathlib import Path

import torch
from bilevel_profiling import DATA, TASKS, Case, forecast, measure
from bilevel_profiling.measurement import together
from bilevel_profiling.records.ranks import joined
from bilevel_profiling.records.record import Record

import bilevel as bl
from bilevel.distributed import Ranks
from bilevel.problems import fewshot, hypercleaning

HERE = Path(__file__).parent
SIZES = {
    "cuda": {"perceptron": {"hidden": 16384}, "conv net": {"tasks": 32, "shot": 5, "query": 15, "width": 64}},
    "cpu": {"perceptron": {"hidden": 8}, "conv net": {"tasks": 4, "shot": 1, "query": 1, "width": 2}},
}
ESTIMATORS = {"unrolled": bl.Unrolled(), "first-order corrected": bl.FirstOrderCorrected(nu=0.1)}


def case(model, label, device):
    size = SIZES[device][model]
    data = model == "perceptron"
    return Case(
        functools.partial(hypercleaning.setup if data else fewshot.setup, **size),
        solver=bl.Descent(bl.SGD(lr=0.05), 5 if device == "cuda" else 2),
        estimator=ESTIMATORS[label] if data else bl.TaskMean(ESTIMATORS[label], chunk=None if device == "cuda" else 1),
        device=device,
        name=model,
        label=label,
        parallel=DATA if data else TASKS,
    )


def measured(model, label, device):
    return measure(dataclasses.replace(case(model, label, device), ranks=Ranks()), errors=False)


def cell(model, label, device, processes):
    """(measured, forecast) of a cell."""
    known = case(model, label, device)
    wanted = forecast(known, ranks=processes)
    found = together.run(measured, model, label, device, processes=processes, device=device, time_limit=300)
    if found.failure is not None:
        row = Record(case=model, estimator=label, device=device, inner_steps=known.solver.max_steps)
        failed = dataclasses.replace(row, status=found.failure.status, reason=found.failure.reason)
        return dataclasses.replace(failed, processes=processes, split=known.parallel.name), wanted
    return joined(found.values), wanted


def table(rows):
    lines = [
        "| model | estimator | GPUs | ms | in collectives, ms | MiB (forecast) | MiB sent (forecast) | status |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for real, wanted in rows:
        peak, sent = real.peak_tensor_bytes or 0, real.sent_bytes or 0
        lines.append(
            f"| {real.case} | {real.estimator} | {real.processes} | {1e3 * (real.wall_seconds or 0):.1f} "
            f"| {1e3 * (real.collective_seconds or 0):.1f} "
            f"| {peak / 2**20:.1f} ({wanted.peak_tensor_bytes / 2**20:.1f}) "
            f"| {sent / 2**20:.2f} ({wanted.sent_bytes / 2**20:.2f}) | {real.status} {real.reason} |"
        )
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU, 1 and 2 processes")
    parser.add_argument("--models", default=",".join(SIZES["cpu"]), help="which, by comma")
    parser.add_argument("--estimators", default=",".join(ESTIMATORS), help="which, by comma")
    parser.add_argument(
        "--out", type=Path, help="file of rows; default results/gpu-ranks-<device>-<date>.jsonl on CUDA"
    )
    given = parser.parse_args(arguments)
    device = "cpu" if given.smoke else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; --smoke rehearses the run on a CPU", file=sys.stderr)
        return 2
    most = 2 if given.smoke else torch.cuda.device_count()
    counts = [2**power for power in range(most.bit_length()) if 2**power <= most]
    out = given.out
    if out is None and device == "cuda":
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
        out = HERE / "results" / f"gpu-ranks-{name}-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}.jsonl"
    rows = []
    for model in given.models.split(","):
        for label in given.estimators.split(","):
            for processes in counts:
                rows.append(cell(model, label, device, processes))
                print(table(rows[-1:]).splitlines()[-1], flush=True)
                if out is not None:
                    lines = [json.dumps({"row": json.loads(each.to_json())}) for pair in rows for each in pair]
                    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n" + table(rows))
    return 0
