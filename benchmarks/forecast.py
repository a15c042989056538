"""A data-reweighting step of a transformer of a billion parameters, forecast: what each estimator would need.

    python benchmarks/forecast.py                    # about ten minutes on one core; writes results/forecast.jsonl
    python benchmarks/forecast.py --layers 2 --width 64 --steps 1,4 --out /tmp/forecast.jsonl

The problem is `bilevel.problems.language`: x is a weight for each of 64 sequences, y the net's parameters, 8 sequences
of 512 bytes a step, float32. Each cell is one `forecast` in a fresh process on one thread. Its seconds are those of the
call, imports apart, and its resident memory the process's peak, imports included.
"""

import argparse
import functools
import json
import multiprocessing
import platform
import resource
import time
from pathlib import Path

import torch

import bilevel as bl

OUT = Path(__file__).parent / "results" / "forecast.jsonl"
SIZES = {"layers": 20, "width": 2048, "heads": 16, "context": 512}
DATA = {"examples": 64, "batch": 8, "validation": 8}
ESTIMATORS = {
    "unrolled": bl.Unrolled(),
    "unrolled iterates": bl.Unrolled(keep="iterates"),
    "unrolled segments": bl.Unrolled(keep="segments"),
    "implicit CG": bl.Implicit(bl.CG(max_steps=10)),
    "first-order corrected": bl.FirstOrderCorrected(),
}


def cell(label, steps, sizes):
    from bilevel_profiling import Case, forecast
    from bilevel_profiling.forecasting.search import needed

    from bilevel.problems import language

    torch.set_num_threads(1)
    setup = functools.partial(language.setup, steps=steps, **sizes, **DATA)
    case = Case(
        setup,
        solver=bl.Descent(bl.SGD(lr=1e-3), steps),
        estimator=ESTIMATORS[label],
        device="cuda",
        label=label,
        name="language",
    )
    wall, cpu = time.perf_counter(), time.process_time()
    record = forecast(case, on="h100")
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "estimator": label,
        "inner_steps": steps,
        "inner_size": record.inner_size,
        "sizes": sizes,
        "needed_bytes": needed(record),
        "peak_tensor_bytes": record.peak_tensor_bytes,
        "base_tensor_bytes": record.base_tensor_bytes,
        "calls": dict(record.calls),
        "matmul_flops": record.matmul_flops,
        "roofline_seconds": record.roofline_seconds,
        "roofline_device": record.roofline_device,
        "notes": list(record.notes),
        "seconds": wall,
        "cpu_seconds": cpu,
        "resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if platform.system() == "Darwin" else 1024),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--steps", default="1,8,64", help="numbers of inner steps (default 1,8,64)")
    parser.add_argument("--estimators", default=",".join(ESTIMATORS), help="labels, separated by commas")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    environment = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": 1,
    }
    sizes = {name: getattr(options, name) for name in SIZES}
    found = []
    for steps in map(int, options.steps.split(",")):
        for label in options.estimators.split(","):
            with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
                found.append({**pool.apply(cell, (label, steps, sizes)), "environment": environment})
            row = found[-1]
            print(
                f"{label}, K = {steps}: {row['needed_bytes'] / 2**30:,.1f} GiB; said in {row['seconds']:.0f} s "
                f"({row['cpu_seconds']:.0f} s of CPU) and {row['resident_bytes'] / 2**30:.2f} GiB",
                flush=True,
            )
    options.out.write_text("".join(json.dumps(row) + "\n" for row in found))
    print(options.out)


if __name__ == "__main__":
    main()
