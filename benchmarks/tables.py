"""Write benchmarks/README.md from the committed results: python benchmarks/tables.py"""

import collections
import json
import statistics
from pathlib import Path

from plain_reference import table

HERE = Path(__file__).parent


def rows(name):
    path = HERE / "results" / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def environment(records):
    return "; ".join(sorted({", ".join(f"{k} {v}" for k, v in r["environment"].items()) for r in records}))


def cleaning(records):
    lines = [
        "| estimator | seed | test accuracy | equal weights | clean labels only | AUC | statuses of the outer steps |",
        "| --- " * 7 + "|",
    ]
    for r in records:
        statuses = ", ".join(f"{n} {name}" for name, n in r["statuses"].items())
        lines.append(
            f"| {r['estimator']} | {r['seed']} | {r['test_accuracy']:.3f} | {r['baseline_test_accuracy']:.3f} | "
            f"{r['ideal_test_accuracy']:.3f} | {r['corruption_auc']:.3f} | {statuses} |"
        )
    return "\n".join(lines)


def characters(records):
    lines = [
        "| estimator | shot | K | outer steps | accuracy before | after | without adaptation |",
        "| --- " * 7 + "|",
    ]
    for r in records:
        lines.append(
            f"| {r['estimator']} | {r['shot']} | {r['inner_steps']} | {r['outer_steps']} "
            f"| {r['before_accuracy']:.3f} +- {r['before_accuracy_interval']:.3f} "
            f"| {r['accuracy']:.3f} +- {r['accuracy_interval']:.3f} | {r['unadapted_accuracy']:.3f} |"
        )
    return "\n".join(lines)


def overhead(records):
    head = (
        "| case | estimator | K | ms a step | cheap meters add | quartiles | of the medians "
        "| of the least | spans | counted | tensors meter |"
    )
    lines = [head, "| --- " * 11 + "|"]
    for r in records:
        low, high = r["cheap_quartiles"]
        lines.append(
            f"| {r['case']} | {r['estimator']} | {r['inner_steps']} | {1000 * r['bare_seconds']:.1f} "
            f"| {r['cheap_ratio'] - 1:+.1%} +- {r['cheap_ratio_error']:.1%} | {low - 1:+.1%} to {high - 1:+.1%} "
            f"| {r['cheap_ratio_of_medians'] - 1:+.1%} | {r['cheap_ratio_of_least'] - 1:+.1%} | {r['spans']} | "
            f"{r['cheap_counted']:+.2%} | x {r['tensors_ratio']:.2f} |"
        )
    if records:
        weights = [r["cheap_ratio_error"] ** -2 for r in records]
        mean = sum(weight * r["cheap_ratio"] for weight, r in zip(weights, records, strict=True)) / sum(weights)
        most, error = max(r["cheap_counted"] for r in records), sum(weights) ** -0.5
        lines.append(
            f"\nAll cells together, weighted by their errors: {mean - 1:+.1%} +- {error:.1%}. Counted: at most "
            f"{most:.2%} of a step."
        )
    return "\n".join(lines)


# --- GPU


def forecasts(records):
    head = (
        "| estimator | K | GiB needed | of it before the step | TFLOP | s at best on an H100 "
        "| forecast: s | s of CPU | GiB resident |"
    )
    lines = [head, "| --- " * 9 + "|"]
    for r in records:
        lines.append(
            f"| {r['estimator']} | {r['inner_steps']} | {r['needed_bytes'] / 2**30:,.1f} | "
            f"{r['base_tensor_bytes'] / 2**30:,.1f} | {r['matmul_flops'] / 1e12:,.0f} | {r['roofline_seconds']:,.1f} | "
            f"{r['seconds']:.0f} | {r['cpu_seconds']:.0f} | {r['resident_bytes'] / 2**30:.2f} |"
        )
    if records:
        first = records[0]
        sizes = ", ".join(f"{name} {size}" for name, size in first["sizes"].items())
        lines.append(f"\n{first['inner_size']:,} parameters ({sizes}).")
    return "\n".join(lines)


def gpu(found):
    """The Markdown of one run of gpu.py."""
    cells = [row for row in found if row["kind"] == "cell"]
    laws = {(row["model"], row["estimator"]): row for row in found if row["kind"] == "growth"}
    units = _inner_gradients(cells)
    cuda = any(row.get("cuda_requested_bytes") is not None for row in cells)
    kind, difference = (
        ("cuda_requested_bytes", "requested_difference") if cuda else ("peak_tensor_bytes", "tensors_difference")
    )
    extra = "| allocated MiB | forecast | largest difference | reserved / forecast " if cuda else ""
    head = (
        f"| model | estimator | K | {'requested' if cuda else 'peak tensor'} MiB | forecast MiB | largest difference "
        f"over K, bytes {extra}| growth, measured | ms | in inner gradients |"
    )
    lines = [head, "| --- " * (head.count("|") - 1) + "|"]
    groups = collections.defaultdict(list)
    for row in cells:
        groups[row["model"], row["estimator"]].append(row)
    for (model, estimator), group in groups.items():
        known = [row for row in group if row.get(kind) is not None]
        for row in group:
            if row not in known or row["status"] in ("OUT_OF_MEMORY", "ERROR"):
                why = row["reason"][:80].replace("|", "/")
                failed = f"| {model} | {estimator} | {row['inner_steps']} | {row['status']}: {why} |"
                lines.append(failed + " |" * (head.count("|") - 5))
        if not known:
            continue
        row, wall = known[-1], known[-1]["wall_seconds"]
        off = max((entry[difference] for entry in known if entry.get(difference) is not None), key=abs, default=None)
        fields = [
            model,
            estimator,
            row["inner_steps"],
            mib(row[kind]),
            mib(row.get(f"forecast_{kind}")),
            "" if off is None else f"{off:+,}",
        ]
        if cuda:
            most = max(
                (entry["allocated_difference"] for entry in known if "allocated_difference" in entry),
                key=abs,
                default=None,
            )
            ratio = f"{row['reserved_ratio']:.2f}" if "reserved_ratio" in row else ""
            fields += [
                mib(row["cuda_allocated_bytes"]),
                mib(row.get("forecast_cuda_allocated_bytes")),
                "" if most is None else f"{most:+,}",
                ratio,
            ]
        law = (laws.get((model, estimator)) or {}).get("measured")
        fields += [
            law["text"] if law else "",
            f"{1000 * wall:.1f}" if wall else "",
            f"{wall / units[model]:.1f}" if wall and model in units else "",
        ]
        lines.append("| " + " | ".join(map(str, fields)) + " |")
    return "\n".join([*lines, "", *_oracles(cells, units), "", *_margin(found)]).strip()


def _inner_gradients(cells):
    """Seconds of a plain inner gradient, by model: the least of the cells' medians, because in some of them it also
    keeps a graph for a product."""
    found = {}
    for row in cells:
        seconds = row.get("oracle_seconds", {}).get("inner_gradient")
        if seconds:
            found[row["model"]] = min(seconds, found.get(row["model"], seconds))
    return found


def _oracles(cells, units):
    """Time of one oracle call by model and kind of estimator: the median over cells."""
    lines = ["| model | oracle | estimators | ms a call | in inner gradients |", "| --- " * 5 + "|"]
    found = collections.defaultdict(list)
    for row in cells:
        for name, seconds in row.get("oracle_seconds", {}).items():
            kept = name == "hvp" and row["estimator"] == "unrolled"
            which = (
                "unrolled, kept graph" if kept else "unrolled" if row["estimator"].startswith("unrolled") else "others"
            )
            found[row["model"], name, which].append(seconds)
    for (model, name, which), seconds in sorted(found.items()):
        median = statistics.median(seconds)
        lines.append(
            f"| {model} | {name} | {which} | {1000 * median:.3f} | "
            f"{f'{median / units[model]:.2f}' if model in units else ''} |"
        )
    return lines


def _margin(found):
    margin = next((row for row in found if row["kind"] == "margin"), None)
    left_out = next((row["cells"] for row in found if row["kind"] == "left out"), [])
    lines = []
    if margin:
        lines.append(
            f"Margin of a forecast, over {margin['cells']} cells: requested between "
            f"{margin['requested_difference_least']:+,} and {margin['requested_difference']:+,} bytes of it, beside "
            f"cuBLAS workspaces of {mib(margin['cuda_workspace_bytes'])} MiB; allocated at most "
            f"{mib(margin['allocated_difference_with_workspaces'])} MiB above it, workspaces included; reserved at "
            f"most {margin['reserved_ratio']:.2f} times the allocated forecast and workspaces."
        )
    if left_out:
        lines.append(
            f"Left out for want of time: {', '.join(f'{model}, {label}, K = {k}' for model, label, k in left_out)}."
        )
    return lines


def mib(count):
    return "" if count is None else f"{count / 2**20:,.1f}"


def gpu_runs():
    """All committed runs, the newest first."""
    runs = []
    for path in sorted((HERE / "results").glob("gpu-*.jsonl"), key=lambda path: path.stem[-10:], reverse=True):
        if path.name.startswith("gpu-engine-"):
            continue
        found = rows(path.name)
        runs.append(
            f"`results/{path.name}`. "
            f"{environment([row for row in found if row['kind'] == 'environment'])}.\n\n{gpu(found)}"
        )
    return (
        "\n\n".join(runs)
        or "**Not yet measured on a GPU.** The command is ready and its code runs on a CPU in every test run."
    )


def gpu_engine_runs():
    """All committed runs of the engine section, the newest first."""
    from gpu_engine import table as engine_table

    runs = []
    for path in sorted((HERE / "results").glob("gpu-engine-*.jsonl"), key=lambda path: path.stem[-10:], reverse=True):
        found = rows(path.name)
        where = environment([row for row in found if row["kind"] == "environment"])
        runs.append(f"`results/{path.name}`. {where}.\n\n{engine_table(found)}")
    return (
        "\n\n".join(runs)
        or "**Not yet measured on a GPU.** The command is ready and its code runs on a CPU in every test run."
    )


def engines():
    """The committed table of engine.py."""
    path = HERE / "results" / "engine.md"
    return path.read_text(encoding="utf-8").strip() if path.exists() else "Not yet measured."


def oracles():
    """The committed table of oracles.py."""
    return (HERE / "results" / "oracles.md").read_text(encoding="utf-8").strip()


def main():
    plain, problems, meters = rows("plain_reference.jsonl"), rows("problems.jsonl"), rows("overhead.jsonl")
    billion = rows("forecast.jsonl")
    text = f"""# Benchmarks

Every table here is written by `python benchmarks/tables.py` from `results/`, and every result by the script named above
it. (The tables of meta-learning and of Betty, at the end, are files of their own.)

## Beside hand-written torch

    python benchmarks/plain_reference.py

`../shared/bench/plain_ref.py` is torch by hand, without a library. Both sides do the same work in one fresh
single-threaded process, call by call in turn; the time ratio is the median over rounds of ours / theirs in process CPU
seconds, with quartiles (other work on the machine moves it by several percent; memory is exact). P1: MAML of a 4-conv
net, one task, 5-way 5-shot. P2: hyper-cleaning, MLP 784-300-10, 5000 weights, minibatch 500. Memory is the peak of live
tensor bytes under that folder's meter. "difference" is the relative difference of the two hypergradients.

"implicit": at the K-th iterate of these nets the Hessian is indefinite. Our CG says so and stops (status, HVPs made);
the hand-written one goes on through negative curvature for its ten products, so the two numbers differ and the time
ratio is not like for like. In "implicit damped" ours solves (H + 10 I) v = b: on P1 it then makes all ten products,
plus an eleventh in the mixed product, from which the true residual comes; the hand-written one has no residual, and on
P1 its mixed product is a multiplication by hand. On P2 four products meet float32's precision.

{table(plain)}

Environment: {environment(plain)}

## A billion parameters, forecast

    python benchmarks/forecast.py

One outer step of data reweighting for a transformer, in float32: a weight for each of 64 sequences, 8 sequences of 512
bytes a step. Nothing of it is allocated: each row is a forecast in a fresh process on one thread. "GiB needed" counts
each tensor in the CUDA allocator's blocks of 512 bytes, data and variables included; cuBLAS and cuDNN workspaces and
fragmentation come on top. CG is forecast at its limit of ten products. Attention is written out (fused kernels have no
second derivative), which is most of the memory of a kept tape. "s at best": a roofline from the data sheet's peaks (as
remembered), one operator at a time; no GPU was measured. Seconds: while the test suite ran on the same two processors.

{forecasts(billion)}

Environment: {environment(billion)}

## Forecasts on a GPU

    python benchmarks/gpu.py                          # on a CUDA machine, under nine minutes; needs no data, no network
    python benchmarks/gpu.py --budget-seconds 120     # what fits two minutes, the small K first
    python benchmarks/gpu.py --device cpu             # a rehearsal at small sizes, against the tensors meter

Three models (a perceptron with a weight for each example, iMAML of a conv net, a transformer with a weight for each
sequence), six estimators, three K: the forecast against the peaks of the CUDA allocator (requested, allocated,
reserved), the growth of each estimator's memory with K, and the time of each oracle by CUDA events, in milliseconds and
in plain inner gradients of the same model. "unrolled, kept graph": one K-th of the backward sweep. The margin, what a
forecast on such a device has to add, is a row of the file.

{gpu_runs()}

## Engines

    python benchmarks/engine.py                       # the whole table; 15 minutes once its functions are compiled
    python benchmarks/engine.py --cell P2 50          # one cell of it
    python benchmarks/engine.py --peak P2 50 "compiled, segments"

Exact second order, eager, compiled and in rematerialized blocks, beside hand-written torch and the peers, on one core.

{engines()}

## Time per oracle

    python benchmarks/oracles.py                      # about five minutes on one core; needs ../shared/bench

An inner step, H v, M v and a step pulled back, each beside the lines of torch that do the same.

{oracles()}

## Engines on a GPU

    python benchmarks/gpu.py --section engine         # on a CUDA machine; needs no data, no network
    python benchmarks/gpu.py --section engine --smoke # a rehearsal at tiny sizes on a CPU

Transformers of Chinchilla's shapes with a learned weight for each sequence (MixFlow-MG's setting), and few-shot
learning, beside double backward by hand. Dynamic memory is the allocator's peak above what was there before.

{gpu_engine_runs()}

## What the meters cost

    python benchmarks/overhead.py

One hypergradient, bare, under the meters that need no pass of their own (oracles, clock, CUDA, phases; "cheap"), and
under the tensors meter, in turn in one single-threaded process, in process CPU seconds. "cheap meters add": the median
of the rounds' ratios, less one, with its standard error; then their quartiles, the ratio of the two medians, and of the
two least. Other work on the machine moves all of these by several percent. "counted" is no difference of two long
times: what the meters cost around an empty block with as many spans as the step has, over the bare step.

{overhead(meters)}

Environment: {environment(meters)}

## The ready problems

    python benchmarks/problems.py

Hyper-cleaning, 50 outer steps of Adam, K = 30, y carried on; accuracies of a fresh net trained with the learned
weights:

{cleaning([r for r in problems if r["problem"] == "hypercleaning"])}

Few-shot characters of the DejaVu fonts, 5-way, accuracy on 40 tasks of unseen characters after 10 steps:

{characters([r for r in problems if r["problem"] == "fewshot"])}

Environment: {environment(problems)}

## Meta-learning

    python benchmarks/fewshot_table.py      # accuracy, memory, time and oracle calls of every method; resumable
    python benchmarks/tasks_at_once.py      # vmapped chunks against a loop over 16 tasks

Both write their own tables, results/fewshot.cpu.md and results/tasks_at_once.md, which docs/meta_learning.md shows. The
first takes about half an hour on two cores; `--config gpu` is the same at the size of a GPU, not run yet.

## Beside Betty

    python benchmarks/beside_betty.py             # about five minutes on one core; needs betty-ml and matplotlib
    python benchmarks/beside_betty.py --quick     # the same at small sizes, a few seconds, nothing overwritten

The error of each of Betty's methods and of ours against a closed form, their time and memory at equal work, and what
Betty's IterativeProblem never frees. The tables and the figure are in docs/coming_from/made, which
docs/coming_from/betty.md shows.

What they say: Betty's CG is right for one product and gets worse with every further one; its Neumann series and its
unrolling are ours to rounding; its darts and sama stay where the identity for the inverse Hessian puts them. Of time
and memory, on the net 784-300-10 and K = 50: unrolling takes 0.90 of Betty's time and 0.95 of its memory (0.34 with
keep="segments", for 1.69 of the time; keep="iterates" does not pay where y is larger than the tape of a step).
Neumann and CG take 1.05 and 1.03 of the time, and 0.72 and 0.53 of the memory: each of our products is followed by a
norm of the residual and a guarded update, two passes over y that buy the status, and the mixed product also yields the
true residual; on a net of 500 parameters, where that is most of the work, the ratios are 1.6 and 1.8. One step of
backpropagation beside darts (the same direction): 1.02 of the time and one y more, because our steps are out of place.
FirstOrderCorrected takes 3.7 times as long as darts, for two inner loops, and converges where darts does not.
"""
    (HERE / "README.md").write_text(text)


if __name__ == "__main__":
    main()
