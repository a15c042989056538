"""Sixteen tasks at once: vmapped chunks against a loop, time and memory.

    python benchmarks/tasks_at_once.py        # about five minutes; results/tasks_at_once.jsonl and its table

One hypergradient over 16 tasks, for chunks of 1 (a plain loop) to 16 (one vmapped loss): a regression net of the
sinusoid literature, whose operators are small, and the 4-conv net, whose operators are not. Times are medians of rounds
that visit every chunk in turn, over that of chunk 1; memory is peak tensor bytes.
"""

import functools
import json
import pathlib
import statistics
import time

import torch
from bilevel_profiling import measure
from bilevel_profiling.measurement.environment import environment
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import bilevel as bl
from bilevel.data import glyphs
from bilevel.data.episodes import episodes
from bilevel.problems.conv4 import conv4

OUT = pathlib.Path(__file__).parent / "results" / "tasks_at_once.jsonl"
TASKS, CHUNKS, ROUNDS = 16, (1, 2, 4, 8, 16), 5
METHODS = {"MAML": {}, "FOMAML": {"estimator": bl.FirstOrder()}}


def sinusoids(device):
    phase, amplitude = torch.rand(TASKS, 1, 1) * torch.pi, 0.1 + 4.9 * torch.rand(TASKS, 1, 1)

    def draw(x):
        return x.to(device), (amplitude * torch.sin(x + phase)).to(device)

    net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    batches = bl.Batches(*(draw(10 * torch.rand(TASKS, 10, 1) - 5) for _ in range(2)))
    return net.to(device), mse_loss, batches, 0.01


def characters(width):
    def make(device):
        support, query = episodes(glyphs.load(), tasks=TASKS, way=5, shot=1, query=15, device=device)
        return conv4(5, width=width).to(device), cross_entropy, bl.Batches(support, query), 0.1

    return make


PROBLEMS = {
    "sinusoids, 1-40-40-1": sinusoids,
    "glyphs, conv4 of 16": characters(16),
    "glyphs, conv4 of 32": characters(32),
}


def rows(device):
    for problem, make in PROBLEMS.items():
        torch.manual_seed(0)
        net, loss, batches, lr = make(device)
        for method, arguments in METHODS.items():
            learners = {
                chunk: bl.meta.Learner(net, loss, solver=bl.Descent(bl.SGD(lr=lr), 5), chunk=chunk, **arguments)
                for chunk in CHUNKS
            }
            x, times = learners[1].outer(), {chunk: [] for chunk in CHUNKS}
            for _ in range(ROUNDS + 1):
                for chunk, learner in learners.items():
                    began = time.perf_counter()
                    learner.hypergradient(x, batches)
                    if device == "cuda":
                        torch.cuda.synchronize()
                    times[chunk].append(time.perf_counter() - began)
            middle = {chunk: statistics.median(values[1:]) for chunk, values in times.items()}
            for chunk, learner in learners.items():
                record = measure(functools.partial(learner.hypergradient, x, batches), repeats=1)
                yield {
                    "problem": problem,
                    "method": method,
                    "chunk": chunk,
                    "seconds": middle[chunk],
                    "time_over_loop": middle[chunk] / middle[1],
                    "peak_tensor_bytes": record.peak_tensor_bytes,
                    "environment": environment(device=device),
                }


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    found = []
    for row in rows(device):
        found.append(row)
        print(
            f"{row['problem']:22} {row['method']:8} chunk {row['chunk']:2}: {row['time_over_loop']:5.2f} of the loop, "
            f"{row['peak_tensor_bytes'] / 2**20:7.1f} MiB",
            flush=True,
        )
    OUT.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    OUT.with_suffix(".md").write_text(table(found), encoding="utf-8")


def table(found):
    """Markdown: time over that of the loop, and MiB, for each chunk."""
    lines = ["| problem | method | " + " | ".join(f"chunk {chunk}" for chunk in CHUNKS) + " |"]
    lines.append("| --- " * (2 + len(CHUNKS)) + "|")
    for problem in PROBLEMS:
        for method in METHODS:
            own = {row["chunk"]: row for row in found if (row["problem"], row["method"]) == (problem, method)}
            cells = [f"{own[c]['time_over_loop']:.2f}, {own[c]['peak_tensor_bytes'] / 2**20:.1f} MiB" for c in CHUNKS]
            lines.append(f"| {problem} | {method} | " + " | ".join(cells) + " |")
    where = ", ".join(f"{key} {value}" for key, value in found[0]["environment"].items())
    return "\n".join(lines) + (
        f"\n\nMade by `python benchmarks/tasks_at_once.py`: time of one hypergradient over {TASKS} tasks over "
        f"that of the plain loop (chunk 1), median of {ROUNDS} rounds in turns, and peak tensor memory. {where}.\n"
    )


if __name__ == "__main__":
    main()
