"""The engine section of benchmarks/gpu.py: exact second order against double backward by hand.

    python benchmarks/gpu.py --section engine             # on CUDA: results/gpu-engine-<device>-<date>.jsonl, the table
    python benchmarks/gpu.py --section engine --smoke     # the same code at tiny sizes on a CPU

Two settings. MixFlow-MG's (Kemaev et al. 2025, arXiv 2505.00793): a weight for each sequence, learned through K steps
of a transformer of Chinchilla's shapes, from 44 million parameters to what fits, in bfloat16 and float32; double
backward through a kept tape, and step by step from kept iterates, by hand; ours from kept iterates, eager, in
rematerialized blocks, compiled, and both. Few-shot: MAML of a 4-conv net with 4 and 32 tasks; torch by hand in the way
of `higher`, task after task, against ours over all tasks at once, eager, compiled and captured.

Dynamic memory is the allocator's peak above what was there before (parameters, data). Every cell runs in a process of
its own (--smoke: in this one), within what is left of --budget-seconds; running out of memory or of time is a row. Once
a variant of a size does not fit, larger sizes of it are not tried.
"""

import argparse
import contextlib
import datetime
import gc
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import engine_meters
import torch
from bilevel_profiling.measurement.environment import environment
from gpu_engine_work import CHINCHILLA, FULL, TINY, few_shot, weighting

HERE = Path(__file__).parent


# --- how it is measured


def measured(function, device, rounds):
    """Seconds of the first call and, as medians, of others; dynamic bytes at the peak; the result."""
    cuda = torch.device(device).type == "cuda"

    def timed():
        gc.collect()
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        found = function()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start, found

    row = {}
    reports = []
    for _ in range(min(3, rounds + 1)):  # compiling, and the second of the checks; a block is compiled at its second
        seconds = timed()[0]
        row.setdefault("first_seconds", seconds)
        reports.append(getattr(function, "engine", {}).get("functions", []))
    times = [timed()[0] for _ in range(rounds)]
    row |= {"seconds": statistics.median(times), "seconds_least": min(times), "rounds": rounds}
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found = function()
        torch.cuda.synchronize()
        row["dynamic_bytes"] = torch.cuda.max_memory_allocated() - before
        row["reserved_bytes"] = torch.cuda.max_memory_reserved()
    else:
        row["dynamic_bytes"] = engine_meters.allocated(function)
        found = function()
    engine = getattr(function, "engine", {})
    for name in ("trace_seconds", "compile_seconds"):  # each function counts where it was made
        row[name] = sum(each[name] for functions in reports for each in functions)
    row["notes"] = engine.get("notes", [])
    return row, [leaf.detach().double().cpu() for leaf in found]


def cell(setting, name, steps, dtype, device, spec, write, *, smoke=False, skip=()):
    """The rows of one cell, each given to `write` when it is there."""
    make = weighting if setting == "weighting" else few_shot
    variants, size = make(spec, name, steps, dtype, device, smoke)
    first = None
    for label, function in variants.items():
        row = {"kind": "engine", "setting": setting, "name": str(name), "inner_steps": steps, "dtype": dtype}
        row |= {"variant": label, "parameters": size, "status": "OK"}
        if label in skip:
            write(row | {"status": "LEFT_OUT", "reason": "it did not fit at a smaller size"})
            continue
        try:
            found, result = measured(function, device, spec["rounds"])
            row |= found
            if first is None:
                first = row, result
            base, exact = first
            norm = sum(leaf.square().sum() for leaf in exact).sqrt()
            off = sum((a - b).square().sum() for a, b in zip(result, exact, strict=True)).sqrt()
            row |= {"against": base["variant"], "difference": float(off / norm)}
            row["time_ratio"] = row["seconds"] / base["seconds"]
            row["memory_ratio"] = row["dynamic_bytes"] / max(1, base["dynamic_bytes"])
        except torch.OutOfMemoryError as error:
            row |= {"status": "OUT_OF_MEMORY", "reason": str(error).splitlines()[0][:200]}
        except Exception as error:
            row |= {"status": "ERROR", "reason": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        write(row)
        gc.collect()
        if torch.device(device).type == "cuda":
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()


def cells(spec):
    """All cells, few-shot first, then the small transformers."""
    for tasks in spec["tasks"]:
        yield "few-shot", tasks, spec["few_shot_steps"], "float32"
    for name in spec["sizes"]:
        for dtype in spec["dtypes"]:
            for steps in spec["steps"]:
                yield "weighting", name, steps, dtype


def run(device, spec, budget, write, *, smoke=False, only=None):
    """Rows of every cell that the budget leaves time for."""
    started, rows = time.perf_counter(), []
    place = {"kind": "environment", "device": device, "environment": environment(device=device), "sizes": spec}

    def done(row):
        rows.append(row)
        write(row)

    done(place | {"smoke": smoke, "budget_seconds": budget})
    for setting, name, steps, dtype in cells(spec):
        if only and not only(setting, name, steps, dtype):
            continue
        left = budget - (time.perf_counter() - started)
        said = {"kind": "engine", "setting": setting, "name": str(name), "inner_steps": steps, "dtype": dtype}
        if left <= 0:
            done(said | {"variant": "all", "status": "LEFT_OUT", "reason": "no time left"})
            continue
        failed = [r for r in rows if r.get("status") in ("OUT_OF_MEMORY", "TIMEOUT") and r["setting"] == setting]
        skip = sorted({r["variant"] for r in failed if r["dtype"] == dtype and _smaller(r, name, steps, spec)})
        if smoke:
            cell(setting, name, steps, dtype, device, spec, done, smoke=True, skip=skip)
            continue
        for row in _apart((setting, name, steps, dtype), device, left, skip):
            done(row)
        last = rows[-1]
        print(f"[{time.perf_counter() - started:5.0f} s] {setting} {name}, K = {steps}, {dtype}: {last['status']}")
    return rows


def _smaller(row, name, steps, spec):
    """Whether a row is of a cell that is no larger than one of this size and number of steps."""
    order = list(map(str, spec["sizes"]))
    if row["setting"] != "weighting":
        return False
    before, now = order.index(row["name"]), order.index(str(name))
    return before < now if row["inner_steps"] > steps else before <= now


def _apart(which, device, limit, skip):
    """The rows of a cell from a process of its own; one more where it did not end by itself."""
    setting, name, steps, dtype = which
    command = [sys.executable, __file__, "--cell", setting, str(name), str(steps), dtype, "--device", device]
    command += ["--skip", ",".join(skip).replace(", ", ";")]
    said = {"kind": "engine", "setting": setting, "name": str(name), "inner_steps": steps, "dtype": dtype}
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=limit, check=False)
        output, ended = done.stdout, None if done.returncode == 0 else ("ERROR", f"exit status {done.returncode}")
    except subprocess.TimeoutExpired as error:
        output = error.stdout or ""
        output, ended = output.decode() if isinstance(output, bytes) else output, ("TIMEOUT", f"after {limit:.0f} s")
    yield from (json.loads(line) for line in output.splitlines() if line.startswith("{"))
    if ended:
        yield said | {"variant": "the next", "status": ended[0], "reason": ended[1]}


# --- the table


def table(rows):
    """Markdown: every row, over the first variant of its cell."""
    lines = [
        "| setting | parameters | K | dtype | variant | ms | of the first | dynamic MiB | of the first | difference "
        "| compile s |",
        "| --- " * 11 + "|",
    ]
    for r in (row for row in rows if row["kind"] == "engine"):
        place = f"| {r['setting']}, {r['name']}{' tasks' if r['setting'] == 'few-shot' else ''} | "
        place += f"{r.get('parameters', 0) / 1e6:,.1f}M | {r['inner_steps']} | {r['dtype']} | {r['variant']} | "
        if r["status"] != "OK":
            lines.append(place + f"{r['status']}: {r.get('reason', '')[:80].replace('|', '/')} |" + " |" * 5)
            continue
        lines.append(
            place + f"{r['seconds'] * 1e3:,.1f} | {r['time_ratio']:.2f} | {r['dynamic_bytes'] / 2**20:,.1f} | "
            f"{r['memory_ratio']:.3f} | {r['difference']:.0e} | {r['trace_seconds'] + r['compile_seconds']:.1f} |"
        )
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU, in this process")
    parser.add_argument("--budget-seconds", type=float, default=560)
    parser.add_argument("--settings", default="few-shot,weighting")
    parser.add_argument("--sizes", default="", help="of transformers, by comma; all by default")
    parser.add_argument("--inner-steps", default="", help="the K of transformers, by comma")
    parser.add_argument("--dtypes", default="", help="of transformers, by comma")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cell", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--skip", default="", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.cell:
        setting, name, steps, dtype = given.cell
        name = int(name) if setting == "few-shot" else name
        skip = given.skip.replace(";", ", ").split(",,") if given.skip else ()
        cell(
            setting,
            name,
            int(steps),
            dtype,
            given.device,
            FULL,
            lambda row: print(json.dumps(row), flush=True),
            skip=skip,
        )
        return 0
    device, spec = ("cpu", dict(TINY)) if given.smoke else (given.device, dict(FULL))
    if given.smoke:
        torch.set_num_threads(1)  # (tests run beside each other)
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; --smoke runs the same code at tiny sizes", file=sys.stderr)
        return 2
    if given.sizes:
        spec["sizes"] = {name: CHINCHILLA[name] for name in given.sizes.split(",")}
    if given.inner_steps:
        spec["steps"] = tuple(int(k) for k in given.inner_steps.split(","))
    if given.dtypes:
        spec["dtypes"] = tuple(given.dtypes.split(","))
    out = given.out
    if out is None and not given.smoke:
        gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
        out = HERE / "results" / f"gpu-engine-{gpu}-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}.jsonl"
    with contextlib.ExitStack() as around:
        stream = around.enter_context(out.open("w", encoding="utf-8")) if out else None

        def write(row):
            if stream:
                stream.write(json.dumps(row) + "\n")
                stream.flush()

        settings = given.settings.split(",")
        rows = run(
            device, spec, given.budget_seconds, write, smoke=given.smoke, only=lambda setting, *_: setting in settings
        )
    print("\n" + table(rows))
    if out:
        print(f"\nrows: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
