"""Betty's own methods beside ours: error against steps where the answer is known, and cost at equal work.

    python benchmarks/beside_betty.py            # about four minutes on one core
    python benchmarks/beside_betty.py --draw     # the tables and the figure again, from the committed results
    python benchmarks/beside_betty.py --quick    # a few seconds, small sizes, into a temporary folder

Writes results/beside_betty.jsonl, and in docs/coming_from/made/ betty_error.md, betty_error.png, betty_cost.md and
betty_left.md. Needs betty-ml and matplotlib. (The file is not called betty.py: it would be imported in Betty's place.)

error: a quadratic g with 20 inner variables and condition number 10, in float64. Everything starts at the inner
solution, so that what is left is the error of the method: of n products with the Hessian for CG and Neumann, of n inner
steps for the others. The answer is the closed form of bilevel.problems.quadratic.

cost: hyper-cleaning, an MLP 784-300-10 on 5000 examples with a weight for each, minibatches of 500, SGD (P2 of
shared/bench, redrawn here). Both sides are called in turn in one single-threaded process; the ratio is the median over
rounds of ours / Betty's in process CPU seconds, with quartiles; memory is the peak of live tensor bytes of a call.
Betty is driven through bilevel_profiling.baselines.betty: its Engine is built in each call (half a millisecond), its
IterativeProblem is mended. At y_K the Hessian is indefinite: our CG says so and stops, so it is given (H + I/2) v = b,
where it makes ten products as Betty's does. The tiny net shows what each call costs beside the arithmetic.

left: bytes that are never freed, after one outer step of a Betty program with an IterativeProblem.
"""

import argparse
import dataclasses
import functools
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from bilevel_profiling.baselines import betty, betty_program
from bilevel_profiling.measurement.environment import environment
from bilevel_profiling.meters.tensors import Tensors
from torch import nn
from torch.nn.functional import cross_entropy

import bilevel as bl
from bilevel.problems import quadratic

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "beside_betty.jsonl"
MADE = ROOT / "docs" / "coming_from" / "made"
LEARNING_RATE = 0.1


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large a run is."""

    steps: tuple[int, ...] = (1, 2, 3, 5, 10, 20, 40)
    examples: int = 5000
    inputs: int = 784
    hidden: int = 300
    batch: int = 500
    inner_steps: int = 50
    rounds: int = 25


TINY = dataclasses.replace(Sizes(), examples=200, inputs=20, hidden=16, batch=20)
QUICK = dataclasses.replace(TINY, steps=(1, 3, 20), inner_steps=4, rounds=2)


# --- error against the closed form

PRODUCTS, STEPS = "products with the Hessian", "inner steps"
ERRORS = {
    "Implicit(CG(n))": (PRODUCTS, lambda n: bl.Implicit(bl.CG(n, tol=0.0))),
    "MemoryReduced(n)": (PRODUCTS, lambda n: bl.MemoryReduced(n, tol=0.0)),
    "betty cg": (PRODUCTS, betty.cg),
    "Implicit(Neumann(n))": (PRODUCTS, lambda n: bl.Implicit(bl.Neumann(n, step_size=1.0))),
    "betty neumann": (PRODUCTS, betty.neumann),
    "Unrolled()": (STEPS, lambda n: bl.Unrolled()),
    "betty unrolled": (STEPS, lambda n: betty.unrolled()),
    "FirstOrderCorrected()": (STEPS, lambda n: bl.FirstOrderCorrected()),
    "betty darts": (STEPS, lambda n: betty.darts()),
    "betty sama": (STEPS, lambda n: betty.sama()),
}
"""What n counts, and the method for an n."""


def errors(sizes):
    """One record for each method and n."""
    exact = quadratic.random(inner_size=20, outer_size=5, condition=10.0)
    problem, outer, _, batches = exact.pose()
    start, answer = exact.solution(outer.detach()), exact.hypergradient(outer.detach())
    for label, (counts, method) in ERRORS.items():
        if not available(label):
            continue
        for n in sizes.steps:
            solver = bl.Descent(bl.SGD(lr=1.0), steps=n if counts is STEPS else 1)
            found = called(method(n), (problem, outer, start, batches), solver)()
            yield {
                "kind": "error",
                "method": label,
                "counts": counts,
                "n": n,
                "error": float((found.grad - answer).norm() / answer.norm()),
                "status": found.status.name,
            }


def available(label):
    """Whether the installed release of Betty has what is called so, if it is Betty's."""
    return not label.startswith("betty ") or label.split()[1] in betty.methods()


def called(method, posed, solver):
    """A call of one of ours or of Betty's."""
    if isinstance(method, betty.Method):
        return functools.partial(betty.hypergradient_with_betty, *posed, solver, method)
    return functools.partial(bl.hypergradient, *posed, solver=solver, estimator=method)


# --- cost at equal work


def cleaning(sizes):
    """(problem, outer, inner) and a function of K that returns the batches: P2 of shared/bench."""
    draw = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    def labels(count):
        return torch.randint(0, 10, (count,), generator=draw)

    count, centers = sizes.examples, normal(10, sizes.inputs)
    right = labels(count)
    data = (0.3 * centers[right] + normal(count, sizes.inputs)).float()
    wrong = torch.rand(count, generator=draw) < 0.4
    given, asked = torch.where(wrong, labels(count), right), labels(sizes.batch)
    held_out = (0.3 * centers[asked] + normal(sizes.batch, sizes.inputs)).float()
    torch.manual_seed(2)
    net, params = bl.functional(
        nn.Sequential(nn.Linear(sizes.inputs, sizes.hidden), nn.ReLU(), nn.Linear(sizes.hidden, 10))
    )

    def inner_loss(y, x, rows):
        losses = cross_entropy(net(y, data[rows]), given[rows], reduction="none")
        return (x[rows].sigmoid() * losses).mean() + 0.5e-3 * sum((leaf * leaf).sum() for leaf in y.values())

    def batches(steps):
        starts = [(step * sizes.batch) % count for step in range(steps)]
        return bl.Batches(inner=bl.PerStep([slice(start, start + sizes.batch) for start in starts]), outer=None)

    problem = bl.Problem(inner_loss, lambda y, x, _: cross_entropy(net(y, held_out), asked))
    return (problem, torch.zeros(count), {name: leaf.detach() for name, leaf in params.items()}), batches


TEN = "ten products"
PAIRS = [
    ("backpropagation", "Unrolled()", bl.Unrolled(), betty.unrolled()),
    ("backpropagation", 'Unrolled(keep="iterates")', bl.Unrolled(keep="iterates"), betty.unrolled()),
    ("backpropagation", 'Unrolled(keep="segments")', bl.Unrolled(keep="segments"), betty.unrolled()),
    (TEN, "Implicit(Neumann(10))", bl.Implicit(bl.Neumann(10, LEARNING_RATE)), betty.neumann(10)),
    (TEN, "Implicit(CG(10, damping=0.5))", bl.Implicit(bl.CG(10, tol=0.0, damping=0.5)), betty.cg(10)),
    ("the identity for the inverse Hessian", "Unrolled(last=1)", bl.Unrolled(last=1), betty.darts()),
    ("no second derivative", "FirstOrderCorrected()", bl.FirstOrderCorrected(), betty.darts()),
]
"""What the two have in common, our label, ours, Betty's."""
SAME = {"Unrolled()", 'Unrolled(keep="iterates")', 'Unrolled(keep="segments")', "Implicit(Neumann(10))"}
"""Those that compute the same number as Betty's."""


def costs(sizes):
    """One record for each net, K and pair."""
    tiny = dataclasses.replace(TINY, rounds=4 * sizes.rounds)
    gc.collect()
    gc.freeze()  # the modules imported so far: a collection before each round then takes no time
    for size, steps in ((sizes, sizes.inner_steps), (sizes, 1), (tiny, 1)):
        (problem, outer, inner), batches = cleaning(size)
        posed, solver = (problem, outer, inner, batches(steps)), bl.Descent(bl.SGD(lr=LEARNING_RATE), steps=steps)
        for work, label, ours, theirs in PAIRS:
            if steps == 1 and label.startswith("Unrolled(keep"):
                continue
            yield {
                "kind": "cost",
                "net": f"{size.inputs}-{size.hidden}-10",
                "K": steps,
                "work": work,
                "ours": label,
                "betty": f"betty {theirs.name}",
                **beside(called(ours, posed, solver), called(theirs, posed, solver), size.rounds),
            }
    gc.unfreeze()


def beside(mine, theirs, rounds):
    """Both called in turn: seconds, their ratio, peak bytes, and how far apart the hypergradients are."""
    a, b = mine(), theirs()
    found = {
        "status": a.status.name,
        "status_betty": b.status.name,
        "difference": float((a.grad - b.grad).norm() / b.grad.norm()),
        "cosine": float(torch.nn.functional.cosine_similarity(a.grad, b.grad, dim=0)),
        "calls": a.stats["calls"],
    }
    del a, b
    seconds = {mine: [], theirs: []}
    for index in range(rounds):
        gc.collect()
        for call in (mine, theirs) if index % 2 else (theirs, mine):
            began = time.process_time()
            result = call()
            seconds[call].append(time.process_time() - began)
            del result
    ratios = [x / y for x, y in zip(seconds[mine], seconds[theirs], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    for name, call in (("", mine), ("_betty", theirs)):
        found[f"seconds{name}"] = statistics.median(seconds[call])
        gc.collect()
        with Tensors() as meter:
            result = call()
        found[f"peak_tensor_bytes{name}"] = meter.peak_bytes
        del result
    return {**found, "time_ratio": statistics.median(ratios), "time_ratio_quartiles": [low, high], "rounds": rounds}


# --- what an IterativeProblem never frees


def left(sizes):
    """Bytes that are alive after an outer step whose results are gone: with Betty's own optimizer step, and mended."""
    (problem, outer, inner), batches = cleaning(sizes)
    steps = sizes.inner_steps
    lower = betty_program.classes().steps
    mended, released = lower.optimizer_step, lower.__mro__[1].optimizer_step
    posed, solver = (problem, outer, inner, batches(steps)), bl.Descent(bl.SGD(lr=LEARNING_RATE), steps=steps)
    step, bytes_left = called(betty.unrolled(), posed, solver), {}
    for name, method in (("released", released), ("mended", mended)):
        lower.optimizer_step = method
        try:
            with Tensors() as meter:
                step()
                gc.collect()
            bytes_left[name] = meter.live_bytes
        finally:
            lower.optimizer_step = mended
    yield {"kind": "left", "K": steps, "inner_bytes": 4 * sum(leaf.numel() for leaf in inner.values()), **bytes_left}


# --- tables and figure


def error_table(records):
    """Markdown: a row for each method, a column for each n."""
    rows = [row for row in records if row["kind"] == "error"]
    counts = list(dict.fromkeys(row["n"] for row in rows))
    lines = [f"| method | n counts | {' | '.join(f'n = {n}' for n in counts)} |", "| --- " * (2 + len(counts)) + "|"]
    for label in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == label]
        lines.append(f"| {label} | {own[0]['counts']} | " + " | ".join(f"{row['error']:.1e}" for row in own) + " |")
    return _made(lines, records, "Relative error of the hypergradient against its closed form, in float64")


def cost_table(records):
    """Markdown: a row for each pair and K."""
    lines = [
        "| net | K | ours | Betty's | time, ours / Betty's (quartiles) | peak MiB, ours | Betty's | ratio | apart |",
        "| --- " * 9 + "|",
    ]
    for row in (row for row in records if row["kind"] == "cost"):
        low, high = row["time_ratio_quartiles"]
        mine, theirs = row["peak_tensor_bytes"] / 2**20, row["peak_tensor_bytes_betty"] / 2**20
        apart = f"{row['difference']:.0e}" if row["ours"] in SAME else "another estimate"
        lines.append(
            f"| {row['net']} | {row['K']} | {row['ours']} | {row['betty']} "
            f"| {row['time_ratio']:.2f} ({low:.2f} to {high:.2f}) "
            f"| {mine:.3g} | {theirs:.3g} | {mine / theirs:.2f} | {apart} |"
        )
    rounds = next(row["rounds"] for row in records if row["kind"] == "cost")
    return _made(
        lines,
        records,
        f"Process CPU seconds, median of {rounds} rounds in turns (four times as many of the smallest net); "
        f"peak of live tensor bytes of one call; "
        '"apart": relative difference of the two hypergradients, where both compute the same number',
    )


def left_table(records):
    """Markdown: bytes by K."""
    lines = ["| K | MiB of y | never freed, MiB an outer step | mended |", "| --- | --- | --- | --- |"]
    for row in (row for row in records if row["kind"] == "left"):
        own, released, mended = (row[name] / 2**20 for name in ("inner_bytes", "released", "mended"))
        lines.append(f"| {row['K']} | {own:.2f} | {released:.2f} | {mended:.2f} |")
    return _made(lines, records, "IterativeProblem, after all results of the outer step were deleted and gc.collect()")


def _made(lines, records, what):
    facts = next(row for row in records if row["kind"] == "environment")
    where = ", ".join(f"{name} {value}" for name, value in facts.items() if name != "kind")
    return "\n".join(lines) + f"\n\nMade by `python benchmarks/beside_betty.py`. {what}. {where}.\n"


def draw(records, path):
    """Error against n, on logarithmic axes: ours solid, Betty's dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    styles = {
        "Implicit(CG(n))": ("tab:blue", "-", "o"),
        "betty cg": ("tab:blue", "--", "x"),
        "Implicit(Neumann(n))": ("tab:orange", "-", "o"),
        "betty neumann": ("tab:orange", "--", "x"),
        "Unrolled()": ("tab:green", "-", "o"),
        "betty unrolled": ("tab:green", "--", "x"),
        "betty darts": ("tab:gray", "--", "x"),
    }
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2))
    for label, (color, line, marker) in styles.items():
        own = [row for row in records if row["kind"] == "error" and row["method"] == label]
        points = [(row["n"], row["error"]) for row in own]
        axes.plot(*zip(*points, strict=True), color=color, linestyle=line, marker=marker, markersize=4, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(1e-6, 4)  # CG goes on to rounding
    shown = sorted({row["n"] for row in records if row["kind"] == "error"})
    axes.set_xticks(shown, [str(n) for n in shown])
    axes.minorticks_off()
    axes.set_xlabel("n: products with the Hessian (CG, Neumann) or inner steps")
    axes.set_ylabel("relative error of the hypergradient")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def publish(records, folder):
    """The tables and the figure."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in (("error", error_table), ("cost", cost_table), ("left", left_table)):
        text = table(records)
        (folder / f"betty_{name}.md").write_text(text, encoding="utf-8")
        print(text)
    draw(records, folder / "betty_error.png")
    print(f"in {folder}")


def main(arguments=None):
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, into a temporary folder")
    parser.add_argument("--draw", action="store_true", help="no measuring: tables and figure of the committed results")
    parser.add_argument("--out", type=Path, help="folder for the results, the tables and the figure")
    options = parser.parse_args(arguments)
    if options.quick:
        options.out = options.out or Path(tempfile.mkdtemp(prefix="bilevel-"))
    results = options.out / RESULTS.name if options.out else RESULTS
    if options.draw:
        publish([json.loads(line) for line in results.read_text().splitlines()], options.out or MADE)
        return
    sizes = QUICK if options.quick else Sizes()
    torch.set_num_threads(1)
    facts = environment()
    facts["betty-ml"] = betty.baselines()["betty cg"].version
    records = [{"kind": "environment", **facts}]
    for record in (record for part in (errors, costs, left) for record in part(sizes)):
        records.append(record)
        print(json.dumps(record), flush=True)
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    publish(records, options.out or MADE)


if __name__ == "__main__":
    main()
