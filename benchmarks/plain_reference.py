"""Ours beside hand-written torch without a library (../shared/bench/plain_ref.py), call by call in turn.

    python benchmarks/plain_reference.py                      # all cells: a table, results/plain_reference_<host>.jsonl
    python benchmarks/plain_reference.py --cell P2 50 graph   # one cell, one JSON line: what the full run starts

A cell is one problem (P1: MAML of a 4-conv net, one task; P2: hyper-cleaning with an MLP 784-300-10, 5000 weights,
minibatch 500), one K and one pair of methods. Both sides run in one fresh single-threaded process, alternately; time is
process CPU seconds, the ratio is the median over rounds of (ours / theirs); memory is the peak of live tensor bytes
under the bench folder's own meter, not ours.
"""

import argparse
import gc
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAIRS = {"graph": "unroll", "iterates": "mixedrr", "segments": "mixedsq", "implicit": "cg", "implicit damped": "cg"}
CELLS = [
    *[("P2", K, ours) for K in (10, 50, 200) for ours in PAIRS],
    *[("P1", K, ours) for K in (5, 10, 20) for ours in PAIRS],
]


def our_step(p, ours):
    import torch

    import bilevel as bl

    leaves = [leaf.detach() for leaf in p.upper]
    if p.name == "P1":
        problem = bl.Problem(
            lambda y, x, k: p.inner(p.fwd(y), y, x, k, 0), lambda y, x, _: p.outer(p.fwd(y), 0), init=lambda x, k: x
        )
        inner = None
        if ours.startswith("implicit"):
            problem = bl.proximal(problem, 2.0)
    else:
        problem = bl.Problem(lambda y, x, k: p.inner(p.fwd(y), y, x, k, 0), lambda y, x, _: p.outer(p.fwd(y), 0))
        inner = [leaf.detach() for leaf in p.init_module.parameters()]
    batches = bl.Batches(inner=bl.PerStep(range(p.K)), outer=0, curvature=0)
    # Both nets have an indefinite Hessian at y_K: our CG stops there, theirs goes on. Damped, ours goes on to the end
    # as well.
    linear = bl.CG(max_steps=10, tol=0.0, damping=10.0 if ours == "implicit damped" else 0.0)
    estimator = bl.Implicit(linear) if ours.startswith("implicit") else bl.Unrolled(keep=ours)
    solver = bl.Descent(bl.SGD(lr=p.lr), steps=p.K)

    def step():
        found = bl.hypergradient(problem, leaves, inner, batches, solver=solver, estimator=estimator)
        step.found = (found.status.name, found.stats)
        return torch.utils._pytree.tree_leaves(found.grad)

    return step


def cell(name, K, ours, rounds):
    import torch
    from common import MemMeter, Problem, flat
    from plain_ref import make_step

    p = Problem(name, K)
    mine, theirs = our_step(p, ours), make_step(p, PAIRS[ours])
    a, b = flat(mine()), flat(theirs())
    record = {
        "problem": name,
        "K": K,
        "ours": ours,
        "theirs": PAIRS[ours],
        "difference": float((a - b).norm() / b.norm()),
    }
    record["status"], stats = mine.found
    record["calls"] = stats["calls"]
    del a, b
    seconds = {"ours": [], "theirs": []}
    for _ in range(rounds):
        for label, function in (("ours", mine), ("theirs", theirs)):
            gc.collect()
            start = time.process_time()
            result = function()
            seconds[label].append(time.process_time() - start)
            del result
    ratios = [x / y for x, y in zip(seconds["ours"], seconds["theirs"], strict=True)]
    record["time_ratio"] = statistics.median(ratios)
    record["time_ratio_quartiles"] = [statistics.quantiles(ratios, n=4)[0], statistics.quantiles(ratios, n=4)[2]]
    record["seconds"] = statistics.median(seconds["ours"])
    record["seconds_theirs"] = statistics.median(seconds["theirs"])
    for label, function in (("ours", mine), ("theirs", theirs)):
        gc.collect()
        meter = MemMeter()
        with meter:
            result = function()
        record[f"peak_bytes_{label}"] = meter.peak
        del result
    record["memory_ratio"] = record["peak_bytes_ours"] / record["peak_bytes_theirs"]
    record["environment"] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": 1,
    }
    return record


def table(records):
    lines = [
        "| problem | K | ours | hand-written | time ratio (quartiles) | memory ratio | ours MiB | difference | status, "
        "HVPs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in records:
        low, high = r["time_ratio_quartiles"]
        lines.append(
            f"| {r['problem']} | {r['K']} | {r['ours']} | {r['theirs']} | {r['time_ratio']:.3f} ({low:.2f} to "
            f"{high:.2f}) | {r['memory_ratio']:.3f} | {r['peak_bytes_ours'] / 2**20:.1f} | {r['difference']:.1e} | "
            f"{r['status']}, {r['calls']['hvp']} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cell", nargs=3, metavar=("PROBLEM", "K", "OURS"), help="measure one cell and print one JSON line"
    )
    parser.add_argument(
        "--only",
        nargs="*",
        default=[],
        help="restrict the run to these cells, such as P2:50 P1:10:graph; other results stay",
    )
    parser.add_argument("--rounds", type=int, default=9, help="alternating calls of each side")
    parser.add_argument("--bench", type=Path, default=ROOT.parent / "shared" / "bench", help="folder with plain_ref.py")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "plain_reference.jsonl")
    arguments = parser.parse_args()
    if arguments.cell:
        name, K, ours = arguments.cell
        print(json.dumps(cell(name, int(K), ours, arguments.rounds)))
        return 0
    if not (arguments.bench / "plain_ref.py").exists():
        print(f"{arguments.bench} has no plain_ref.py; give its folder with --bench", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as copy:
        # The bench folder writes next to itself, so it is run from a copy.
        bench = Path(
            shutil.copytree(arguments.bench, Path(copy) / "bench", ignore=shutil.ignore_patterns("ref", "__pycache__"))
        )
        environment = {**os.environ, "PYTHONPATH": f"{bench}:{ROOT}", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        records = []
        known = (
            [json.loads(line) for line in arguments.out.read_text().splitlines()]
            if arguments.only and arguments.out.exists()
            else []
        )
        for name, K, ours in CELLS:
            if arguments.only and not any(f"{name}:{K}:{ours}".startswith(prefix) for prefix in arguments.only):
                continue
            command = [sys.executable, __file__, "--cell", name, str(K), ours, "--rounds", str(arguments.rounds)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return 1
            records.append(json.loads(done.stdout.splitlines()[-1]))
            print(table(records[-1:]).splitlines()[-1], flush=True)
    fresh = {(r["problem"], r["K"], r["ours"]) for r in records}
    kept = [r for r in known if (r["problem"], r["K"], r["ours"]) not in fresh]
    records = sorted(records + kept, key=lambda r: (r["problem"] != "P2", r["K"], list(PAIRS).index(r["ours"])))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("".join(json.dumps(record) + "\n" for record in records))
    print(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
