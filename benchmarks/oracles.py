"""Time per oracle: one inner step, one Hessian-vector product, one mixed product, one step pulled back, beside torch.

    python benchmarks/oracles.py                      # all cells: a table, results/oracles.jsonl and results/oracles.md
    python benchmarks/oracles.py --only P1 tiny:step  # some cells; the other results stay
    python benchmarks/oracles.py --draw               # the table again, from the committed results

The problems are those of ../shared/bench (P1 few-shot conv4, P2 hyper-cleaning, P3 transformer), and "tiny", P2's loss
on a net of 500 parameters, where the arithmetic is next to nothing and what is left is what a call costs. "By hand" are
the lines of torch that do the same (../shared/bench/plain_ref.py), without a check and without a loss reported.

Both sides run in one single-threaded process, in turn and in an order that changes; a sample is as many calls as take
30 ms of process CPU time, the collector off. The figure is the ratio of the two medians over rounds, with the standard
error of the median of the rounds' ratios; `added` is the difference of the medians, in microseconds.
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
RESULTS = ROOT / "benchmarks" / "results"
ORACLES = ("step", "kept step", "hvp", "mixed", "vjp")
"""An inner step without a graph and with one; H v; M v where H v is not asked for; (H w, M w) of a step rebuilt."""
CELLS = [
    (name, oracle) for name in ("P1", "P2", "P3", "tiny") for oracle in ORACLES if (name, oracle) != ("P1", "mixed")
]
STEPS = 5


def posed(name):
    """The bench's problem, and ours of it."""
    import torch
    from common import Problem

    import bilevel as bl

    if name == "tiny":
        p = Problem("P2", STEPS)
        torch.manual_seed(0)
        p.init_module = torch.nn.Sequential(torch.nn.Linear(20, 20), torch.nn.ReLU(), torch.nn.Linear(20, 4))
        p.names = [key for key, _ in p.init_module.named_parameters()]
        p.X, p.Y = p.X[:, :20].contiguous(), p.Y % 4
        p.XV, p.YV = p.XV[:, :20].contiguous(), p.YV % 4
        os.environ["P2BATCH"] = "20"
    else:
        p = Problem(name, STEPS)
    inner, leaves = None, [leaf.detach() for leaf in p.upper]

    def inner_loss(y, x, k):
        return p.inner(p.fwd(y), y, x, k, 0)

    problem = bl.Problem(
        inner_loss, lambda y, x, _: p.outer(p.fwd(y), 0), init=(lambda x, k: x) if name == "P1" else None
    )
    if name != "P1":
        inner = [leaf.detach() for leaf in p.init_module.parameters()]
    return p, problem, leaves, inner, bl.Batches(inner=bl.PerStep(range(STEPS)), outer=0)


def sides(name, oracle):
    """For ours and for the lines by hand: (what is made before the clock starts, what it measures, calls in it)."""
    import torch
    from plain_ref import back_rr, gstep, plain_inner

    import bilevel as bl
    from bilevel.engine.cotangents import Cotangents
    from bilevel.estimators.base import Instance
    from bilevel.estimators.reverse.tape import Tape
    from bilevel.estimators.reverse.terms import Terms

    p, problem, leaves, inner, batches = posed(name)
    solver = bl.Descent(bl.SGD(lr=p.lr), steps=STEPS)
    found = bl.hypergradient(problem, leaves, inner, batches, solver=solver, estimator=bl.Unrolled())
    assert found.status is bl.Status.OK, found.status
    make = lambda: Instance(problem, leaves, inner, batches, solver)  # noqa: E731
    oracles = make().oracles
    y = oracles.start()
    torch.manual_seed(5)
    v = tuple(torch.randn_like(leaf) for leaf in y)
    attached = lambda: [leaf.detach().requires_grad_() for leaf in y]  # noqa: E731
    ups = [] if name == "P1" else p.upper

    def ours_kept(instance):
        return Tape(instance, solver, 0, None, Terms(instance.oracles, None, STEPS, 0))

    def theirs_kept(_):
        th = p.params0()
        for k in range(STEPS):
            th = [leaf - p.lr * g for leaf, g in zip(th, gstep(p, th, p.upper, k, 0, True), strict=True)]
        return th

    def graph(_=None):
        th = attached()
        return th, gstep(p, th, p.upper, 0, 0, True)

    def numbers():
        th, g = graph()
        return torch.autograd.grad(g, [*th, *ups], v, allow_unused=True)

    exact = numbers()
    lin = oracles.linearize(y, 1)
    for mine, theirs in zip(lin.matvec(v), exact, strict=False):
        torch.testing.assert_close(mine, theirs)
    if oracle == "step":
        return (make, lambda it: it.solve(), STEPS), (lambda: None, lambda _: plain_inner(p, y, 0, STEPS, 0), STEPS)
    if oracle == "kept step":
        return (make, ours_kept, STEPS), (lambda: None, theirs_kept, STEPS)
    if oracle == "hvp":
        th, g = graph()
        return (lambda: lin, lambda it: it.matvec(v), 1), (
            lambda: None,
            lambda _: torch.autograd.grad(g, th, v, retain_graph=True),
            1,
        )
    if oracle == "mixed":
        return (lambda: oracles.linearize(y, 1), lambda it: it.mixed_alone(v), 1), (
            graph,
            lambda made: torch.autograd.grad(made[1], ups, v),
            1,
        )
    return (
        lambda: Cotangents(list(v), None),
        lambda it: oracles.step_vjp(y, None, 0, oracles.embedding(0), it),
        1,
    ), (lambda: None, lambda _: back_rr(p, y, v, 0, 0), 1)


def sample(side, repeats):
    """CPU seconds of one call."""
    prepare, call, count = side
    total = 0.0
    for _ in range(repeats):
        given = prepare()
        began = time.process_time()
        result = call(given)
        total += time.process_time() - began
        del result, given
    return total / repeats / count


def cell(name, oracle, limit):
    """One record."""
    import torch

    pair = dict(zip(("ours", "theirs"), sides(name, oracle), strict=True))
    for side in pair.values():
        sample(side, 2)
    repeats = max(1, round(0.03 / (sample(pair["theirs"], 1) * pair["theirs"][2])))
    seconds, started, ratios = {label: [] for label in pair}, time.perf_counter(), []
    while len(ratios) < 9 or (time.perf_counter() - started < limit and (len(ratios) < 25 or error(ratios) > 0.002)):
        gc.collect()
        gc.disable()
        for label in ("ours", "theirs") if len(ratios) % 2 else ("theirs", "ours"):
            seconds[label].append(sample(pair[label], repeats))
        gc.enable()
        ratios.append(seconds["ours"][-1] / seconds["theirs"][-1])
    middle = {label: statistics.median(values) for label, values in seconds.items()}
    return {
        "problem": name,
        "oracle": oracle,
        "rounds": len(ratios),
        "repeats": repeats,
        "seconds": middle["ours"],
        "seconds_by_hand": middle["theirs"],
        "ratio": middle["ours"] / middle["theirs"],
        "median_of_ratios": statistics.median(ratios),
        "standard_error": error(ratios),
        "ratio_of_least": min(seconds["ours"]) / min(seconds["theirs"]),
        "added_microseconds": 1e6 * (middle["ours"] - middle["theirs"]),
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "threads": 1,
        },
    }


def error(ratios):
    """The standard error of their median, from the distances to it."""
    middle = statistics.median(ratios)
    return 1.2533 * 1.4826 * statistics.median(abs(each - middle) for each in ratios) / len(ratios) ** 0.5


def table(records):
    """Markdown."""
    lines = [
        "| problem | oracle | by hand, ms | ratio | its error | ratio of the least | added, µs |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in records:
        lines.append(
            f"| {r['problem']} | {r['oracle']} | {1e3 * r['seconds_by_hand']:.3f} | {r['ratio']:.3f} | "
            f"{r['standard_error']:.3f} | {r['ratio_of_least']:.3f} | {r['added_microseconds']:.0f} |"
        )
    environment = ", ".join(f"{key} {value}" for key, value in records[0]["environment"].items())
    return "\n".join([*lines, "", f"Environment: {environment}", ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", nargs=2, metavar=("PROBLEM", "ORACLE"), help="measure one, print one JSON line")
    parser.add_argument("--only", nargs="*", default=[], help="restrict the run to these cells, such as P1 P3:hvp")
    parser.add_argument("--seconds", type=float, default=25, help="at most, for the rounds of a cell")
    parser.add_argument("--draw", action="store_true", help="write the table again, from the results")
    parser.add_argument("--bench", type=Path, default=ROOT.parent / "shared" / "bench", help="folder with plain_ref.py")
    parser.add_argument("--out", type=Path, default=RESULTS / "oracles.jsonl")
    given = parser.parse_args()
    if given.cell:
        print(json.dumps(cell(*given.cell, given.seconds)))
        return 0
    known = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    records = {(r["problem"], r["oracle"]): r for r in known if given.only or given.draw}
    if not given.draw:
        if not (given.bench / "plain_ref.py").exists():
            print(f"{given.bench} has no plain_ref.py; give its folder with --bench", file=sys.stderr)
            return 2
        with tempfile.TemporaryDirectory() as copy:
            # The bench folder writes next to itself, so it is run from a copy.
            left_out = shutil.ignore_patterns("ref", "__pycache__")
            bench = Path(shutil.copytree(given.bench, Path(copy) / "bench", ignore=left_out))
            bench.chmod(0o755)
            variables = {"PYTHONPATH": f"{bench}:{ROOT}", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            for name, oracle in CELLS:
                if given.only and not any(f"{name}:{oracle}".startswith(prefix) for prefix in given.only):
                    continue
                command = [sys.executable, __file__, "--cell", name, oracle, "--seconds", str(given.seconds)]
                done = subprocess.run(
                    command, capture_output=True, text=True, env={**os.environ, **variables}, check=False
                )
                if done.returncode:
                    print(done.stderr, file=sys.stderr)
                    return 1
                records[name, oracle] = json.loads(done.stdout.splitlines()[-1])
                print(table([records[name, oracle]]).splitlines()[2], flush=True)
                write(records, given.out)
    print(write(records, given.out))
    return 0


def write(records, out):
    """All records, in order, and their table, which is returned."""
    ordered = [records[key] for key in CELLS if key in records]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(record) + "\n" for record in ordered))
    out.with_suffix(".md").write_text(table(ordered))
    return table(ordered)


if __name__ == "__main__":
    sys.exit(main())
