"""Few-shot accuracy, memory, time and oracle calls of every method of meta-learning, side by side.

    python benchmarks/fewshot_table.py                        # 2 processes, under half an hour on two cores
    python benchmarks/fewshot_table.py --config gpu           # one process on a GPU, a net and batches of its size
    python benchmarks/fewshot_table.py --only MAML FOMAML --shots 1
    python benchmarks/fewshot_table.py --table                # only write the table of what is there

Glyphs (characters drawn from fonts, unseen ones at test), 5-way 1-shot and 5-shot, the 4-conv net. Every method makes
the same outer steps on the same tasks in the same order; its settings (fewshot_methods.py) are usual ones, not tuned.
A cell (method x shot) is a process of its own that leaves a checkpoint every few steps, and a line in
results/fewshot.CONFIG.jsonl at its end: stopped anywhere, the same command goes on. The table is
results/fewshot.CONFIG.md.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import fewshot_methods
import torch
from bilevel_profiling import measure
from bilevel_profiling.measurement.environment import environment

import bilevel as bl
from bilevel.data import Episodes
from bilevel.problems import fewshot
from bilevel.problems.conv4 import conv4

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
WAY, QUERY, CHECKPOINT_EVERY = 5, 15, 20
COLUMNS = ("inner_gradient", "outer_gradient", "hvp", "mixed")


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a run."""

    width: int
    tasks: int
    steps: int
    test_tasks: int
    chunk: int | None
    device: str
    processes: int


CONFIGS = {
    "cpu": Config(width=16, tasks=4, steps=100, test_tasks=600, chunk=1, device="cpu", processes=2),
    "gpu": Config(width=64, tasks=16, steps=3000, test_tasks=1000, chunk=None, device="cuda", processes=1),
    "small": Config(width=4, tasks=2, steps=3, test_tasks=4, chunk=1, device="cpu", processes=1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=CONFIGS, default="cpu")
    parser.add_argument("--only", nargs="+", metavar="METHOD", choices=names(), default=names())
    parser.add_argument("--shots", nargs="+", type=int, choices=(1, 5), default=[1, 5])
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only write the table of what is there")
    parser.add_argument("--cell", nargs=2, metavar=("METHOD", "SHOT"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    config, path = CONFIGS[chosen.config], chosen.out / f"fewshot.{chosen.config}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    if chosen.cell is not None:
        run(chosen.cell[0], int(chosen.cell[1]), config, path)
        return
    if config.device == "cuda" and not torch.cuda.is_available() and not chosen.table:
        parser.error("the gpu configuration needs a CUDA device; this machine has none")
    if not chosen.table:
        fewshot.load("train")  # drawn once, before there are processes
        cells = [(name, shot) for shot in chosen.shots for name in chosen.only]
        left = [cell for cell in cells if key(*cell, config) not in done(path)]
        print(f"{len(cells) - len(left)} of {len(cells)} cells are there; {len(left)} to go", flush=True)
        if run_all(left, chosen.config, config, chosen.out):
            sys.exit("some cells failed; the same command tries them again")
    text = table(path, config)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def names() -> list[str]:
    return [fewshot_methods.UNTRAINED, *fewshot_methods.methods()]


def key(name: str, shot: int, config: Config) -> str:
    """What a cell depends on: another setting is another cell."""
    arguments = repr(sorted((k, repr(v)) for k, v in fewshot_methods.methods().get(name, {}).items()))
    arguments = "".join(part.split(" at 0x")[0] for part in arguments.split(">"))
    # (An option that came after the results, where it is not used, makes no other cell.)
    arguments = arguments.replace(", offload=False, budget=None", "").replace(", preconditioner=None", "")
    said = json.dumps([name, shot, dataclasses.asdict(config) | {"processes": 0}, arguments])
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def done(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The last line of each cell."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return {line["key"]: line for line in lines}


def run_all(cells: list[tuple[str, int]], config_name: str, config: Config, out: pathlib.Path) -> int:
    """Each cell in a process of its own, a few at once; how many failed."""
    waiting, running, failed, began = list(cells), dict[Any, tuple[str, int]](), 0, time.monotonic()
    while waiting or running:
        while waiting and len(running) < config.processes:
            name, shot = waiting.pop(0)
            command = [sys.executable, __file__, "--config", config_name, "--out", str(out), "--cell", name, str(shot)]
            threads = {"OMP_NUM_THREADS": "1"} if config.processes > 1 else {}
            running[subprocess.Popen(command, env=os.environ | threads)] = (name, shot)
        time.sleep(0.2)
        for process in [process for process in running if process.poll() is not None]:
            name, shot = running.pop(process)
            failed += process.returncode != 0
            word = "done" if process.returncode == 0 else f"FAILED with exit code {process.returncode}"
            left = len(waiting) + len(running)
            print(f"[{time.monotonic() - began:5.0f} s] {name}, {shot}-shot: {word}; {left} cells to go", flush=True)
    return failed


def run(name: str, shot: int, config: Config, path: pathlib.Path) -> None:
    """One cell: train (or go on), judge, measure, write a line."""
    device, identity = torch.device(config.device), key(name, shot, config)
    saved = path.parent / ".fewshot" / f"{identity}.pt"
    saved.parent.mkdir(exist_ok=True)
    splits = {split: fewshot.load(split) for split in ("train", "test")}
    sizes = {"way": WAY, "shot": shot, "query": QUERY, "device": device}
    method = fewshot_methods.learner(name, conv4(WAY, width=config.width, seed=0).to(device), config.chunk)
    x = method.outer()
    optimizer = method.optimizer([leaf for group in x.values() for leaf in group.values()])
    steps = 0 if name == fewshot_methods.UNTRAINED else config.steps
    at, seconds, statuses = 0, 0.0, Counter[str]()
    if saved.exists():
        past = torch.load(saved, map_location=device, weights_only=True)
        with torch.no_grad():
            for group, leaves in past["x"].items():
                for leaf_name, leaf in leaves.items():
                    x[group][leaf_name].copy_(leaf)
        optimizer.load_state_dict(past["optimizer"])
        at, seconds, statuses = past["at"], past["seconds"], Counter(past["statuses"])
    tasks = Episodes(splits["train"], tasks=config.tasks, steps=steps, seed=0, **sizes)
    tasks.seek(at)
    loader = map(joined, tasks) if name == "Reptile" else iter(tasks)
    began = time.perf_counter()
    for step in method.train(x, loader, optimizer=optimizer, tolerate=tuple(bl.Status)):
        statuses[step.hypergradient.status.name] += 1
        now = at + step.index + 1
        if now % CHECKPOINT_EVERY == 0 or now == steps:
            seconds, began = seconds + time.perf_counter() - began, time.perf_counter()
            state = {"x": x, "optimizer": optimizer.state_dict(), "at": now, "seconds": seconds}
            torch.save(state | {"statuses": dict(statuses)}, saved.with_suffix(".new"))
            saved.with_suffix(".new").replace(saved)
            print(f"{name}, {shot}-shot: step {now} of {steps}, loss {step.outer_loss.item():.3f}", flush=True)
    tests = Episodes(splits["test"], tasks=min(20, config.test_tasks), seed=1, **sizes)
    judged = method.evaluate(x, tests, tasks=config.test_tasks)
    line = {
        "key": identity,
        "method": name,
        "shot": shot,
        "config": dataclasses.asdict(config),
        "accuracy": judged.score,
        "interval": judged.interval,
        "test_tasks": judged.tasks,
        "test_status": judged.status.name,
        "training_seconds": seconds,
        "statuses": dict(statuses),
        **cost(method, x, config, sizes, splits["train"], name),
        "environment": environment(device=device),
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    saved.unlink(missing_ok=True)


def joined(batches: bl.Batches) -> bl.Batches:
    """Reptile adapts on all of a task's data."""
    inner = tuple(torch.cat(pair, dim=1) for pair in zip(batches.inner, batches.outer, strict=True))
    return dataclasses.replace(batches, inner=inner)


def cost(method: Any, x: Any, config: Config, sizes: Any, data: Any, name: str) -> dict[str, Any]:
    """Peak memory and oracle calls of one hypergradient; its time beside FOMAML's, taken in turns."""
    (batches,) = Episodes(data, tasks=config.tasks, steps=1, seed=2, **sizes)
    batches = joined(batches) if name == "Reptile" else batches
    net = conv4(WAY, width=config.width, seed=0).to(config.device)
    other = fewshot_methods.learner("FOMAML", net, config.chunk)
    pairs = {"own": (method, x), "first order": (other, other.outer())}
    seconds: dict[str, list[float]] = {label: [] for label in pairs}
    calls: dict[str, int] = {}
    for _ in range(6):
        for label, (learner, outer) in pairs.items():
            began = time.perf_counter()
            found = learner.hypergradient(outer, batches)
            if config.device == "cuda":
                torch.cuda.synchronize()
            seconds[label].append(time.perf_counter() - began)
            calls = found.stats["calls"] if label == "own" else calls
    record = measure(lambda: method.hypergradient(x, batches), repeats=1)
    times = {label: statistics.median(values[1:]) for label, values in seconds.items()}
    return {
        "peak_tensor_bytes": record.peak_tensor_bytes,
        "cuda_allocated_bytes": record.cuda_allocated_bytes,
        "seconds": times["own"],
        "time_over_first_order": times["own"] / times["first order"],
        "calls": {oracle: calls.get(oracle, 0) for oracle in COLUMNS},
    }


def table(path: pathlib.Path, config: Config) -> str:
    """Markdown: a row for each method, a group of columns for each shot."""
    lines = {(line["method"], line["shot"]): line for line in done(path).values()}
    shots = sorted({shot for _, shot in lines})
    accuracies = [f"{shot}-shot, %" for shot in shots]
    each = " / ".join(f"{shot}-shot" for shot in shots)
    head = ["method", *accuracies, f"MiB, {each}", f"time / FOMAML's, {each}", "calls: g, f, HVP, mixed", "failed, %"]
    rows = [head, ["---"] * len(head)]
    for name in names():
        found = [lines.get((name, shot)) for shot in shots]
        known = [line for line in found if line is not None]
        if not known:
            continue
        tasks = config.tasks if config.chunk == 1 else 1
        seen = sum((Counter(line["statuses"]) for line in known), Counter())
        bad = sum(count for status, count in seen.items() if bl.Status[status].failed)
        rows.append(
            [
                name,
                *(
                    "" if line is None else f"{100 * line['accuracy']:.1f} ± {100 * line['interval']:.1f}"
                    for line in found
                ),
                " / ".join("-" if line is None else f"{line['peak_tensor_bytes'] / 2**20:.0f}" for line in found),
                " / ".join("-" if line is None else f"{line['time_over_first_order']:.2f}" for line in found),
                ", ".join(f"{known[-1]['calls'][oracle] / tasks:g}" for oracle in COLUMNS),
                f"{100 * bad / seen.total():.0f}" if seen else "-",
            ]
        )
    some = next(iter(lines.values()), None)
    where = "" if some is None else ", ".join(f"{key} {value}" for key, value in some["environment"].items())
    return (
        "\n".join("| " + " | ".join(row) + " |" for row in rows)
        + "\n\nMade by `python benchmarks/fewshot_table.py`. 5-way glyphs, conv4 of width "
        + f"{config.width}, {config.tasks} tasks a step, {config.steps} outer steps, {config.test_tasks} test tasks, "
        + "95 % intervals over them. Memory: peak tensor bytes that one hypergradient adds. Time: median of one "
        + "hypergradient over FOMAML's, taken in turns in one process. Calls: gradients of g "
        + "and f, Hessian-vector and mixed products, for one task. Failed: outer steps of a failed status (negative "
        + "curvature, an unsolved linear system); they are made all the same. "
        + f"{where}.\n"
    )


if __name__ == "__main__":
    main()
