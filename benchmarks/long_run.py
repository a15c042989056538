"""Whether memory is flat over 10,000 outer steps, for every estimator of the catalogue that carries a state.

    python benchmarks/long_run.py                    # writes results/long_run.jsonl and long_run.md
    python benchmarks/long_run.py soba --steps 1000 --out soba.jsonl
    python benchmarks/long_run.py --collect one.jsonl two.jsonl

One process, one estimator after another; a quadratic with four batches, one inner step; `OuterLoop` with Adam, a
scheduler, clipping, early stopping that sees every loss, and a check of precision every 50 steps. Between the first
steps and the end:

- blocks: Python's own allocations (sys.getallocatedblocks), which see a number appended to a list;
- objects: what the garbage collector knows (len(gc.get_objects()));
- tensor bytes: of the storages made in the last steps, those alive more at the end than half way (Storages): they see
  what only C++ holds, such as a graph behind a tensor;
- resident: the process's own memory in KiB, which the allocator rounds.

tests/bilevel/test_long_run.py runs the same for fewer steps, and three loops that leak.
"""

import argparse
import dataclasses
import gc
import itertools
import json
import math
import pathlib
import platform
import sys
import time
import warnings

import torch

import bilevel as bl
from bilevel import testing
from bilevel.testing import catalogue
from bilevel.testing.catalogue import Quadratic
from bilevel.testing.storages import Storages

RESULTS = pathlib.Path(__file__).parent / "results"
WINDOW = 20
"""Steps at the end whose storages are counted."""


@dataclasses.dataclass(frozen=True)
class Growth:
    """What is there more at the end than after the first steps."""

    blocks: int
    objects: int
    tensor_bytes: int
    resident_kib: int
    seconds: float


def resident():
    """KiB, where the system says."""
    try:
        text = pathlib.Path("/proc/self/statm").read_text()
    except OSError:
        return 0
    return int(text.split()[1]) * 4


def numbers():
    gc.collect()
    return sys.getallocatedblocks(), len(gc.get_objects()), resident()


def grown(steps, warm, count, window=WINDOW):
    """Make steps `warm` to `count` of an iterator, and see what is left of them. Holds none of them itself."""
    if not warm + 1 < count - window:
        raise ValueError(f"warm={warm} must be below {count - window - 1}")
    begun = time.perf_counter()
    gc.collect()
    gc.freeze()  # what was there before is not looked at again and again

    def through(number):
        for _ in itertools.islice(steps, number):
            pass

    through(warm)
    # What a first measurement makes is there before the second one.
    with Storages():
        through(1)
    numbers()
    blocks, objects, kib = numbers()
    through(count - warm - 1 - window)
    with Storages() as storages:
        through(window // 2)
        half = storages.live
        through(window - window // 2)
        tensor_bytes = storages.live - half
    del storages  # which knows each storage that is alive
    after = numbers()
    gc.unfreeze()
    return Growth(after[0] - blocks, after[1] - objects, tensor_bytes, after[2] - kib, time.perf_counter() - begun)


def arguments(label):
    """Of `hypergradient`, without the estimator: a quadratic with four batches."""
    tasks = 2 if label.startswith("tasks of ") else None
    posed = Quadratic.example(1, rate=0.3).posed(tasks=tasks)
    batches = posed.pop("batches")
    posed["loader"] = [bl.Batches(batches.inner, batches.outer * (1 + 0.1 * i)) for i in range(4)]
    return posed


def made(label, estimator):
    """A loop with every option, that does not end."""
    posed = arguments(label)
    x = {name: leaf.clone().requires_grad_() for name, leaf in posed.pop("outer").items()}
    optimizer = torch.optim.Adam(x.values(), lr=1e-4)
    problem = posed.pop("problem")
    return bl.OuterLoop(
        problem,
        x,
        posed.pop("inner"),
        posed.pop("loader"),
        **posed,
        estimator=estimator,
        optimizer=optimizer,
        epochs=None,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100),
        clip=1.0,
        stop=bl.loop.EarlyStopping(patience=10**9, best_of=x),
        check=bl.loop.PrecisionCheck(every=50, reference=problem),
        tolerate=list(bl.Status),
    )


def stateful():
    """Those of the catalogue that carry something, and two of them over tasks."""
    found = {}
    for entry in testing.ENTRIES:
        posed = arguments(entry.label)
        loader = posed.pop("loader")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            carried = bl.hypergradient(
                posed["problem"],
                posed["outer"],
                posed["inner"],
                loader[0],
                solver=posed["solver"],
                estimator=entry.usual,
            ).state
        if carried is not None:
            found[entry.label] = entry.usual
    for label in ("soba", "memory reduced, warm"):
        found[f"tasks of {label}"] = bl.TaskMean(found[label])
    return found


def by_label(label):
    """One of `stateful`."""
    estimator = catalogue.by_label(label.removeprefix("tasks of ")).usual
    return bl.TaskMean(estimator) if label.startswith("tasks of ") else estimator


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("labels", nargs="*", help="estimators; all that carry a state by default")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--warm", type=int, default=None, help="1,000, or a tenth")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "long_run.jsonl")
    parser.add_argument("--collect", type=pathlib.Path, nargs="+", help="files of --out, run side by side, as one")
    options = parser.parse_args()
    if options.collect:
        rows = [json.loads(line) for path in options.collect for line in path.read_text().splitlines()]
    else:
        rows = list(measured(options))
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options.out.with_suffix(".md").write_text(table(rows))


def measured(options):
    torch.set_num_threads(1)
    warm = options.steps // 10 if options.warm is None else options.warm
    estimators = stateful()
    environment = {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    for label in options.labels or estimators:
        torch.manual_seed(0)
        loop = made(label, estimators[label])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = grown(loop, warm, options.steps)
        finite = all(math.isfinite(float(leaf.detach().sum())) for leaf in loop.outer.values())
        row = {"estimator": label, "steps": loop.index, "warm": warm, "finite": finite} | dataclasses.asdict(found)
        print(json.dumps(row), flush=True)
        yield row | {"environment": environment}


def table(rows):
    head = ["estimator", "steps", "Python blocks", "objects", "tensor bytes", "resident KiB", "seconds"]
    lines = [
        f"What is there more after {rows[0]['steps']:,} outer steps than after {rows[0]['warm']:,}. Written by",
        "`python benchmarks/long_run.py`.",
        "",
        "| " + " | ".join(head) + " |",
        "| " + " | ".join("---" for _ in head) + " |",
    ]
    for row in rows:
        cells = [row["estimator"], f"{row['steps']:,}", row["blocks"], row["objects"], row["tensor_bytes"]]
        lines.append("| " + " | ".join(map(str, [*cells, row["resident_kib"], f"{row['seconds']:.0f}"])) + " |")
    return "\n".join(
        [*lines, "", "Environment: " + ", ".join(f"{k} {v}" for k, v in rows[0]["environment"].items()), ""]
    )


if __name__ == "__main__":
    main()
