"""Exact second order, eager, compiled and in rematerialized blocks, beside hand-written torch and the peers.

    python benchmarks/engine.py                    # the whole table: results/engine.jsonl and engine.md
    python benchmarks/engine.py --cell P2 50       # one cell; its rows replace the old ones
    python benchmarks/engine.py --quick            # three rounds, into the folder of --state; results/ stay as they are
    python benchmarks/engine.py --peak P2 50 "compiled, segments"   # what is alive at the peak of a variant, and where
                                                   # its time goes

A cell (engine_work.py) is a piece of work and a size. All of its variants run in one fresh process on one core and one
thread, in turn; time is process CPU seconds, t is the ratio of medians to the first variant. m is that of the peak
memory by the allocator's events under torch's profiler; of what runs operator by operator the bench folder's meter is
beside it (engine_meters.py).

Before that two more processes make the compiled functions, the first with an empty cache of TorchInductor, the second
with what the first left there: the seconds of tracing and compiling. A run that is stopped goes on where it was, as
long as the commit is the same (--state; --again measures anew). With what is compiled there, a full run takes 15
minutes on an idle machine.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from engine_table import family, reached, table

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "engine.jsonl"
CELLS = [("P2", 50), ("P2", 200), ("P1", 10), ("P1", 50), ("P3", 8), ("hvp", 8), ("hvp", 16), ("cg", 10), ("cg", 50)]
LEAST_ROUNDS, MOST_ROUNDS = 3, 9


# --- inside of a process


def first_calls(work, size):
    """{variant: what its first call cost}, of those that compile."""
    import torch
    from engine_work import variants

    torch.set_num_threads(1)
    counters = torch._dynamo.utils.counters["inductor"]
    found = {}
    for variant in variants(work, size):
        if not variant.compiled or variant.optional:
            continue
        before, reports = dict(counters), []
        try:
            for _ in range(3):  # (a rematerialized block is compiled when it comes again)
                start = time.perf_counter()
                variant()
                reports.append((time.perf_counter() - start, variant.engine.get("functions", [])))
        except Exception as error:
            found[variant.label] = {"error": said(error)}
            continue
        found[variant.label] = {
            "first_seconds": reports[0][0],
            "trace_seconds": sum(each["trace_seconds"] for _, functions in reports for each in functions),
            "compile_seconds": sum(each["compile_seconds"] for _, functions in reports for each in functions),
            "not_in_cache": counters["fxgraph_cache_miss"] - before.get("fxgraph_cache_miss", 0),
            "cache_bypassed": counters["fxgraph_cache_bypass"] - before.get("fxgraph_cache_bypass", 0),
            "functions": reports[-1][1],
        }
    return found


def said(error):
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def cell(work, size, budget, state):
    """The rows of one cell."""
    import engine_meters as meters
    import torch
    from bilevel_profiling.measurement.environment import environment
    from common import flat
    from engine_work import variants

    torch.set_num_threads(1)
    begun, rows, live = time.perf_counter(), {}, []
    exact = known_reference(work, size, state)
    tape = None
    for variant in variants(work, size):
        if variant.optional:
            continue
        row = rows[variant.label] = {"work": work, "size": size, "variant": variant.label, "kind": variant.kind}
        try:
            row["first_seconds"] = meters.seconds(lambda: row.update(found=flat(variant())))  # noqa: B023
        except Exception as error:
            if not live:
                raise
            row["error"] = said(error)
            print(f"{work} {size}, {variant.label}: {row['error']}", file=sys.stderr)
            continue
        found = row.pop("found")
        tape = found if tape is None else tape
        for name, known in (("difference", tape), ("error_float64", exact)):
            same = known is not None and known.shape == found.shape
            row[name] = float((found - known).norm() / known.norm()) if same else None
        row |= {"status": variant.status, "engine": variant.engine}
        live.append(variant)
    spent = {variant.label: [] for variant in live}
    for variant in live:  # one call each that is not counted: caches, and the second of the checks
        spent[variant.label].append(meters.seconds(variant))
    once = sum(times.pop() for times in spent.values())
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(budget / once)))
    for _ in range(rounds):
        for variant in live:
            spent[variant.label].append(meters.seconds(variant))
    for variant in live:
        row, times = rows[variant.label], spent[variant.label]
        row |= {
            "seconds": statistics.median(times),
            "seconds_quartiles": statistics.quantiles(times, n=4)[::2],
            "seconds_least": min(times),
            "rounds": rounds,
            "peak_bytes": meters.allocated(variant),
        }
        if not variant.compiled and variant.label in ONE_OF_EACH_METER:
            row["peak_bytes_dispatched"] = meters.dispatched(variant)
        first = rows[live[0].label]
        row["time_ratio"] = row["seconds"] / first["seconds"]
        row["memory_ratio"] = row["peak_bytes"] / first["peak_bytes"]
    missed = [variant for variant in live if reached(rows[variant.label]) is False]
    for variant in [live[0], *missed] if missed else []:
        rows[variant.label]["profile_milliseconds"] = meters.groups(variant)
    where = environment()
    took = time.perf_counter() - begun
    return [row | {"cell_seconds": took, "environment": where} for row in rows.values()]


ONE_OF_EACH_METER = (
    "hand-written tape",
    "double backward",
    "hand-written CG",
    "eager",
    "eager, graph",
    "eager, segments",
    "rematerialized",
    "rematerialized, segments",
)
"""Variants whose memory is told by both meters. (The dispatch mode takes several times as long as the call.)"""


def known_reference(work, size, state):
    """The float64 reference of a cell, computed once."""
    import torch
    from common import flat
    from engine_work import reference

    path = Path(state) / f"reference-{work}-{size}.pt"
    if not path.exists():
        found = reference(work, size)
        torch.save(None if found is None else flat(found), path)
    return torch.load(path)


def peak(work, size, label):
    """What is alive at the peak of a variant, and the groups of its time."""
    import engine_meters as meters
    import torch
    from engine_work import variants

    torch.set_num_threads(1)
    variant = next(each for each in variants(work, size) if each.label == label)
    for _ in range(3):
        variant()
    print(f"{meters.seconds(variant) * 1e3:,.1f} ms of process CPU time, {variant.engine.get('functions')}")
    for name, value in meters.groups(variant).items():
        print(f"{value:10,.1f} ms  {name}")
    most, found = meters.live_at_peak(variant)
    print(f"{most / 1e6:.2f} MB at the peak, of it")
    for each in found:
        print(f"{each['bytes'] * each['count'] / 1e6:8.2f} MB  {each['count']} x {each['bytes']:,}  {each['made by']}")


# --- the run


class Run:
    """Processes of one run, and what they have found so far."""

    def __init__(self, arguments, bench):
        self.arguments, self.state = arguments, arguments.state
        self.state.mkdir(parents=True, exist_ok=True)
        path = f"{bench}:{ROOT}:{ROOT / 'profiling'}:{ROOT / 'benchmarks'}"
        self.environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self.environment["PYTHONWARNINGS"] = "ignore"
        self.core = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None

    def inside(self, *given, folder):
        """A fresh process of this script; its last line of output, read."""
        command = [sys.executable, __file__, "--inside", *map(str, given), "--state", str(self.state)]
        command += ["--seconds", str(self.arguments.seconds)]
        environment = self.environment | {"TORCHINDUCTOR_CACHE_DIR": str(folder)}
        pin = (lambda: os.sched_setaffinity(0, {self.core})) if self.core is not None else None
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, preexec_fn=pin)
        return json.loads(done.stdout.splitlines()[-1])

    def compiled(self, work, size):
        """(The folder of compiled code, {"cold", "warm"}: what making it cost)."""
        name = family(work, size)
        folder, path = self.state / f"inductor-{name}", self.state / f"compiled-{name}.json"
        if not path.exists():
            shutil.rmtree(folder, ignore_errors=True)
        known = json.loads(path.read_text()) if path.exists() else {}
        if known.get("commit") != commit():
            fresh = not folder.exists()
            first = self.inside("first", work, size, folder=folder)
            if any(each.get("not_in_cache") for each in first.values()) and not fresh:  # other code than that of before
                shutil.rmtree(folder)
                first, fresh = self.inside("first", work, size, folder=folder), True
            if fresh:
                known = {"cold": first, "warm": self.inside("first", work, size, folder=folder)}
            else:
                known["warm"] = first
            known["commit"] = commit()
            path.write_text(json.dumps(known))
        return folder, known

    def measured(self, work, size):
        """(The rows of a cell, what its compiled functions cost), from before or measured now."""
        folder, costs = self.compiled(work, size)
        path = self.state / f"rows-{work}-{size}{'-quick' if self.arguments.quick else ''}.json"
        if path.exists() and not self.arguments.again:
            known = json.loads(path.read_text())
            if known["commit"] == commit():
                return known["rows"], costs
        rows = self.inside("measure", work, size, folder=folder)
        path.write_text(json.dumps({"commit": commit(), "rows": rows}))
        return rows, costs


def commit():
    """Of this checkout, without a word on changes: results of this very run are some."""
    found = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", nargs=2, metavar=("WORK", "SIZE"), action="append", help="one cell; may be repeated")
    parser.add_argument("--quick", action="store_true", help="three rounds; writes nothing to results")
    parser.add_argument("--again", action="store_true", help="measure anew what is known")
    parser.add_argument("--peak", nargs=3, metavar=("WORK", "SIZE", "VARIANT"), help="live tensors at the peak")
    parser.add_argument("--seconds", type=float, default=30, help="for the rounds of a cell (three are made anyway)")
    parser.add_argument("--bench", type=Path, default=ROOT.parent / "shared" / "bench", help="folder with plain_ref.py")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--state", type=Path, default=Path(tempfile.gettempdir()) / "bilevel-engine-benchmark")
    parser.add_argument("--inside", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        kind, work, size, *label = arguments.inside
        if kind == "peak":
            peak(work, int(size), *label)
            print("null")
        elif kind == "first":
            print(json.dumps(first_calls(work, int(size))))
        else:
            print(json.dumps(cell(work, int(size), arguments.seconds, arguments.state)))
        return
    if not (arguments.bench / "plain_ref.py").exists():
        sys.exit(f"{arguments.bench} has no plain_ref.py; give its folder with --bench")
    arguments.seconds = 0 if arguments.quick else arguments.seconds
    with tempfile.TemporaryDirectory() as copy:
        # The bench folder writes next to itself, so it is run from a copy.
        bench = Path(copy) / "bench"
        shutil.copytree(arguments.bench, bench, ignore=shutil.ignore_patterns("ref", "__pycache__"))
        run(Run(arguments, bench), arguments)


def run(started, arguments):
    if arguments.peak:
        work, size, label = arguments.peak
        folder = started.state / f"inductor-{family(work, int(size))}"
        subprocess.run(
            [sys.executable, __file__, "--inside", "peak", work, size, label],
            env=started.environment | {"TORCHINDUCTOR_CACHE_DIR": str(folder)},
            check=True,
        )
        return
    cells = [(work, int(size)) for work, size in arguments.cell or CELLS]
    out = started.state / "quick.jsonl" if arguments.quick else arguments.out
    found = {}
    for work, size in cells:
        begun = time.perf_counter()
        rows, costs = started.measured(work, size)
        for row in rows:
            row["costs"] = {kind: costs.get(kind, {}).get(row["variant"]) for kind in ("cold", "warm")}
        found[work, size] = rows
        print(table(rows, {family(work, size): costs}), flush=True)
        print(f"[{work} {size}: {time.perf_counter() - begun:.0f} s]", file=sys.stderr, flush=True)
    known = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []
    for row in known:
        found.setdefault((row["work"], row["size"]), []).extend(
            [row] if (row["work"], row["size"]) not in cells else []
        )
    records = [row for each in CELLS for row in found.get(each, [])]
    out.write_text("".join(json.dumps(row) + "\n" for row in records), encoding="utf-8")
    costs = {}
    for row in records:
        for kind in ("cold", "warm"):
            if row["costs"][kind]:
                of = costs.setdefault(family(row["work"], row["size"]), {}).setdefault(kind, {})
                of[row["variant"]] = row["costs"][kind]
    out.with_suffix(".md").write_text(table(records, costs), encoding="utf-8")


if __name__ == "__main__":
    main()
