"""Sixteen few-shot tasks on two cores: two ranks with a thread each, against one process with one thread and with two.

    python benchmarks/ranks_speedup.py                    # ten minutes on an idle machine; results/ranks_speedup.*
    python benchmarks/ranks_speedup.py --small            # a smoke test, of which nothing is kept

One hypergradient of MAML over 16 tasks of 5-way 1-shot characters with conv4, 5 inner steps, by TaskMean(Unrolled()).
The strongest rival of two ranks is one process whose operators use both cores, each way with the chunk that suits it:
all chunks are measured for all three. Each round measures every way in turn, and ratios are taken within a round, so
that a machine that is slow for a while is slow for all. Before a measurement all ranks meet; its end is the slower
rank's. Losses of all three must agree, or nothing is reported.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import torch.distributed as dist
from bilevel_profiling.measurement.environment import environment
from torch.nn.functional import cross_entropy

import bilevel as bl
from bilevel.data import glyphs
from bilevel.data.episodes import episodes
from bilevel.problems.conv4 import conv4

OUT = pathlib.Path(__file__).parent / "results" / "ranks_speedup.jsonl"
TASKS, STEPS = 16, 5
WAYS = {"1 rank, 1 thread": (1, 1), "1 rank, 2 threads": (1, 2), "2 ranks, 1 thread each": (2, 1)}
NETS = (16, 32)
CHUNKS = (1, 8)
"""Tasks at once: a loop, and a vmapped loss of half of them (all that a rank has)."""


def worker(rank, ranks, threads, store, small):
    """One process: takes `chunk width` from its standard input, answers with seconds and the loss."""
    torch.set_num_threads(threads)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    group = None
    if ranks > 1:
        dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
        group = bl.distributed.Ranks()
    problems = {}
    for line in sys.stdin:
        chunk, width = map(int, line.split())
        if width not in problems:
            problems[width] = made(width, group, small)
        problem, outer, batches = problems[width]
        if group is not None:
            dist.barrier()
        began = time.perf_counter()
        hg = bl.hypergradient(
            problem,
            outer,
            None,
            batches,
            solver=bl.Descent(bl.SGD(lr=0.1), STEPS),
            estimator=bl.TaskMean(bl.Unrolled(), chunk, group=group),
        )
        print(time.perf_counter() - began, hg.outer_loss.item(), hg.stats["tasks"], flush=True)


def made(width, group, small):
    """The problem of one task, x, and this rank's tasks."""
    call, params = bl.functional(conv4(5, width=width, seed=0))
    letters = glyphs.load("ABCDEFGHIJ" if small else None)
    support, query = episodes(letters, tasks=4 if small else TASKS, way=5, shot=1, query=3 if small else 15, seed=0)
    batches = bl.Batches(support, query)
    batches = batches if group is None else bl.distributed.split(batches, group)

    def loss(y, x, batch):
        return cross_entropy(call(y, batch[0]), batch[1])

    return bl.Problem(loss, loss, init=lambda x, batch: x), params, batches


class Way:
    """The processes of one way, which wait while they are not asked."""

    def __init__(self, ranks, threads, store, small):
        self._tasks = 4 if small else TASKS
        command = [sys.executable, __file__, "--worker", *map(str, (ranks, threads)), store, *(["--small"] * small)]
        variables = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._processes = [
            subprocess.Popen([*command, "--rank", str(rank)], env=variables, **pipes) for rank in range(ranks)
        ]

    def ask(self, chunk, width):
        """Seconds of the slower rank, and the loss."""
        for process in self._processes:
            process.stdin.write(f"{chunk} {width}\n")
            process.stdin.flush()
        answers = [process.stdout.readline().split() for process in self._processes]
        if any(len(answer) != 3 or answer[2] != str(self._tasks) for answer in answers):
            raise RuntimeError(f"a worker failed: {answers}")
        return max(float(seconds) for seconds, *_ in answers), float(answers[0][1])

    def close(self):
        for process in self._processes:
            process.stdin.close()
            process.wait()


def measured(rounds, small, folder):
    """Rows: of each net, way and chunk the seconds of each round."""
    glyphs.load("ABCDEFGHIJ" if small else None)  # drawn once, and cached
    ways = {name: Way(*how, str(folder / name.replace(" ", "-")), small) for name, how in WAYS.items()}
    seconds = {}
    try:
        for width in (4,) if small else NETS:
            losses = {}
            for round_ in range(rounds + 1):
                for chunk in CHUNKS:
                    for name, way in ways.items():
                        took, losses[name, chunk] = way.ask(chunk, width)
                        if round_:  # the first is to warm up
                            seconds.setdefault((width, name, chunk), []).append(took)
            spread = max(losses.values()) - min(losses.values())
            if not spread < 1e-4:
                raise RuntimeError(f"the losses of the ways differ: {losses}")
    finally:
        for way in ways.values():
            way.close()
    return [
        {"width": width, "way": name, "chunk": chunk, "seconds": values}
        for (width, name, chunk), values in seconds.items()
    ]


def table(rows, where):
    """The table of the best chunk of each way, with ratios within rounds."""
    lines = [
        "| conv4 of | way | chunk | seconds | two ranks are faster by (quartiles over rounds) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for width in sorted({row["width"] for row in rows}):
        best = {}
        for row in rows:
            if row["width"] == width:
                best.setdefault(row["way"], []).append(row)
        best = {name: min(each, key=lambda row: statistics.median(row["seconds"])) for name, each in best.items()}
        ours = best["2 ranks, 1 thread each"]
        for name, row in best.items():
            ratios = sorted(a / b for a, b in zip(row["seconds"], ours["seconds"], strict=True))
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            gain = "" if row is ours else f"{middle:.2f} ({low:.2f} to {high:.2f})"
            lines.append(f"| {width} | {name} | {row['chunk']} | {statistics.median(row['seconds']):.2f} | {gain} |")
    return "\n".join([*lines, "", f"Measured on {where}.", ""])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", nargs=3)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    if given.worker:
        return worker(given.rank, int(given.worker[0]), int(given.worker[1]), given.worker[2], given.small)
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        rows = measured(2 if given.small else given.rounds, given.small, pathlib.Path(folder))
    about = environment("python benchmarks/ranks_speedup.py") | {"cores": os.cpu_count(), "load_before": round(busy, 2)}
    shown = table(rows, f"{about['cores']} cores, torch {torch.__version__}, load {about['load_before']} before")
    print(shown)
    if not given.small:
        OUT.write_text("".join(json.dumps(row | {"environment": about}) + "\n" for row in rows))
        OUT.with_suffix(".md").write_text(shown)
    return None


if __name__ == "__main__":
    main()
