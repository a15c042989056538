"""Exact second order in less memory: rematerialized blocks beside hand-written torch, call by call in turn.

    python benchmarks/engine.py                  # about ten minutes; results/engine.jsonl and its table, engine.md
    python benchmarks/engine.py --cell hvp 8     # one cell, JSON lines: what the full run starts

Two pieces of work. One product with the Hessian and the mixed derivatives (one weight for each sequence) of a
transformer: width 128, 64 tokens, 16 sequences, 4 heads, attention written out, 8 and 16 blocks. And P3 of
../shared/bench, a learned loss weighting for such a transformer of 2 blocks, K = 8: the hypergradient by a hand-written
tape (plain_ref.py) and by ours that recompute, with and without rematerialized blocks.

All variants of a cell run in one fresh single-threaded process, in turn; time is process CPU seconds, the ratio is that
of the medians over rounds. Memory is the peak of live tensor bytes under the bench folder's own meter, not ours.
"""

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "engine.jsonl"
CELLS = [("hvp", 8), ("hvp", 16), ("P3", 8)]


def hvp(blocks):
    """Variants of one product, and what they are compared with."""
    import torch
    from common import TF, Block
    from torch.nn.functional import cross_entropy

    import bilevel as bl

    torch.manual_seed(0)
    module = TF(n=blocks)
    tokens, labels = torch.randint(0, 64, (16, 64)), torch.randint(0, 64, (16, 64))
    x = torch.randn(16, requires_grad=True)

    def loss(call, params):
        losses = cross_entropy(call(params, tokens).flatten(0, 1), labels.flatten(), reduction="none")
        return (x.sigmoid() * losses.view(16, -1).mean(1)).mean()

    def product(call, params):
        leaves = list(params.values())
        gradient = torch.autograd.grad(loss(call, params), leaves, create_graph=True)
        roots = [torch.autograd.graph.get_gradient_edge(g) for g in gradient]
        del gradient
        return torch.autograd.grad(roots, [*leaves, x], v)

    plain = bl.functional(module, requires_grad=True)
    rematerialized = bl.functional(module, requires_grad=True, rematerialize=Block)
    v = [torch.randn_like(leaf) for leaf in plain[1].values()]
    return {
        "double backward": lambda: product(*plain),
        "a plain gradient": lambda: torch.autograd.grad(loss(*plain), list(plain[1].values())),
        "rematerialized": lambda: product(*rematerialized),
    }


def unroll(K):
    """Variants of the hypergradient of P3, and the hand-written tape."""
    import torch
    from common import Block, Problem
    from plain_ref import make_step

    import bilevel as bl

    p = Problem("P3", K)
    leaves = [leaf.detach() for leaf in p.upper]

    def ours(keep, **options):
        call, params = bl.functional(p.init_module, requires_grad=False, **options)
        problem = bl.Problem(
            lambda y, x, k: p.inner(lambda tokens: call(y, tokens), list(y.values()), x, k, 0),
            lambda y, x, _: p.outer(lambda tokens: call(y, tokens), 0),
        )
        batches = bl.Batches(inner=bl.PerStep(range(K)), outer=0)
        arguments = {"solver": bl.Descent(bl.SGD(lr=p.lr), steps=K), "estimator": bl.Unrolled(keep)}
        return lambda: torch.utils._pytree.tree_leaves(
            bl.hypergradient(problem, leaves, params, batches, **arguments).grad
        )

    return {
        "hand-written tape": make_step(p, "unroll"),
        **{f"{keep}": ours(keep) for keep in ("iterates", "segments")},
        **{f"{keep}, rematerialized": ours(keep, rematerialize=Block) for keep in ("iterates", "segments")},
    }


def cell(work, size, rounds):
    """The records of one cell."""
    import torch
    from bilevel_profiling.measurement.environment import environment
    from common import MemMeter, flat

    torch.set_num_threads(1)
    variants = {"hvp": hvp, "P3": unroll}[work](size)
    first, *_ = variants
    reference = flat(variants[first]())
    differences, seconds, peaks = {}, {label: [] for label in variants}, {}
    for label, function in variants.items():
        found = flat(function())
        same = found.shape == reference.shape
        differences[label] = float((found - reference).norm() / reference.norm()) if same else None
    for _ in range(rounds):
        for label, function in variants.items():
            gc.collect()
            start = time.process_time()
            found = function()
            seconds[label].append(time.process_time() - start)
            del found
    for label, function in variants.items():
        gc.collect()
        with MemMeter() as meter:
            found = function()
        peaks[label] = meter.peak
        del found
    middle = {label: statistics.median(times) for label, times in seconds.items()}
    return [
        {
            "work": work,
            "size": size,
            "variant": label,
            "seconds": middle[label],
            "seconds_quartiles": statistics.quantiles(seconds[label], n=4)[::2],
            "seconds_least": min(seconds[label]),
            "time_ratio": middle[label] / middle[first],
            "peak_bytes": peaks[label],
            "memory_ratio": peaks[label] / peaks[first],
            "difference": differences[label],
            "rounds": rounds,
            "profile_milliseconds": profiled(variants[label]) if work == "hvp" else None,
            "environment": environment(),
        }
        for label in variants
    ]


GROUPS = {  # by the beginnings of operators' names; the rest is Python and autograd's own work
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "activations": ("aten::gelu", "aten::_softmax", "aten::native_layer_norm", "NativeLayerNorm", "aten::exp"),
    "sums and products": ("aten::add", "aten::mul", "aten::sub", "aten::sum", "aten::neg", "aten::pow", "aten::div"),
    "copies": ("aten::copy_", "aten::cat", "aten::fill_"),
}


def profiled(function, runs=3):
    """Milliseconds of one call by group of operators, under torch's profiler, which itself slows Python down."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(runs):
            function()
    found = dict.fromkeys([*GROUPS, "the rest"], 0.0)
    for event in profile.key_averages():
        group = next((name for name, begins in GROUPS.items() if event.key.startswith(begins)), "the rest")
        found[group] += event.self_cpu_time_total / 1e3 / runs
    return found


def table(records):
    """Markdown: time and memory of every variant, and both over those of the first of its cell."""
    lines = ["| work | variant | ms | of the first | MB | of the first | difference |", "| --- " * 7 + "|"]
    names = {"hvp": "one product, {} blocks", "P3": "P3, K = {}"}
    for r in records:
        difference = "" if r["difference"] in (0, None) else f"{r['difference']:.0e}"
        lines.append(
            f"| {names[r['work']].format(r['size'])} | {r['variant']} | {r['seconds'] * 1e3:,.0f} | "
            f"{r['time_ratio']:.2f} | {r['peak_bytes'] / 1e6:.1f} | {r['memory_ratio']:.2f} | {difference} |"
        )
    lines += ["", "Where the time of a product goes, in ms under torch's profiler:", ""]
    lines += ["| work | variant | " + " | ".join([*GROUPS, "the rest"]) + " |", "| --- " * (3 + len(GROUPS)) + "|"]
    for r in records:
        if r["profile_milliseconds"]:
            cells = " | ".join(f"{value:,.0f}" for value in r["profile_milliseconds"].values())
            lines.append(f"| {names[r['work']].format(r['size'])} | {r['variant']} | {cells} |")
    where = ", ".join(f"{key} {value}" for key, value in records[0]["environment"].items())
    return "\n".join(lines) + (
        f"\n\nMade by `python benchmarks/engine.py`: process CPU time, medians over {records[0]['rounds']} rounds that "
        f"visit every variant in turn, and peak live tensor bytes. {where}.\n"
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--cell", nargs=2, metavar=("WORK", "SIZE"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--bench", type=Path, default=ROOT.parent / "shared" / "bench", help="folder with plain_ref.py")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    if arguments.cell:
        for record in cell(arguments.cell[0], int(arguments.cell[1]), arguments.rounds):
            print(json.dumps(record), flush=True)
        return
    if not (arguments.bench / "plain_ref.py").exists():
        sys.exit(f"{arguments.bench} has no plain_ref.py; give its folder with --bench")
    records = []
    with tempfile.TemporaryDirectory() as copy:
        # The bench folder writes next to itself, so it is run from a copy.
        bench = Path(copy) / "bench"
        shutil.copytree(arguments.bench, bench, ignore=shutil.ignore_patterns("ref", "__pycache__"))
        path = f"{bench}:{ROOT}:{ROOT / 'profiling'}"
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        for work, size in CELLS:
            command = [sys.executable, __file__, "--cell", work, str(size), "--rounds", str(arguments.rounds)]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            records += [json.loads(line) for line in done.stdout.splitlines()]
            print(table(records[-len(done.stdout.splitlines()) :]), flush=True)
    arguments.out.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    arguments.out.with_suffix(".md").write_text(table(records), encoding="utf-8")


if __name__ == "__main__":
    main()
