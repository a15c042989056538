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
from torch import nn

import bilevel as bl
from bilevel.problems.conv4 import conv4
from bilevel.problems.transformer import Block, Transformer, transformer

HERE = Path(__file__).parent
CHINCHILLA = {  # name: layers, width, heads (as remembered from the paper's table of models)
    "44M": (8, 512, 8),
    "117M": (12, 768, 12),
    "251M": (16, 1024, 16),
    "587M": (21, 1408, 11),
    "1.4B": (26, 2048, 16),
}
FULL = {
    "sizes": CHINCHILLA,
    "vocabulary": 32_000,
    "context": 1024,
    "sequences": 4,
    "steps": (2, 4, 8),
    "dtypes": ("bfloat16", "float32"),
    "tasks": (4, 32),
    "few_shot_steps": 5,
    "width": 32,
    "rounds": 5,
}
TINY = {
    "sizes": {"tiny": (2, 16, 2)},
    "vocabulary": 32,
    "context": 8,
    "sequences": 2,
    "steps": (2,),
    "dtypes": ("float32", "bfloat16"),
    "tasks": (2,),
    "few_shot_steps": 1,
    "width": 2,
    "rounds": 1,
}
LR, FEW_SHOT_LR = 0.05, 0.05


def engines(device, *, smoke):
    """The engines there are. (A compiler is not asked of a rehearsal.)"""
    found = {"eager": bl.Eager(), "compiled": bl.Compiled(backend="graph") if smoke else bl.Compiled()}
    if hasattr(bl, "Captured"):
        found["captured"] = bl.Captured()
    return found


# --- what is run


def weighting(spec, name, steps, dtype, device, smoke):
    """{variant: function that returns the hypergradient} of MixFlow-MG's setting, and the number of parameters."""
    layers, width, heads = spec["sizes"][name]
    shape = {"vocabulary": spec["vocabulary"], "context": spec["context"], "layers": layers, "width": width}
    _, params = transformer(**shape, heads=heads, dtype=getattr(torch, dtype), device=device)
    with torch.device("meta"):
        module = Transformer(**shape, heads=heads)
    draw = torch.Generator().manual_seed(0)
    places = (steps + 1, spec["sequences"], spec["context"] + 1)
    tokens = torch.randint(spec["vocabulary"], places, generator=draw).to(device)
    x = torch.zeros(spec["sequences"], dtype=getattr(torch, dtype), device=device)

    def losses(call, y, sequences):
        scores = call(y, sequences[:, :-1]).flatten(0, 1)
        return nn.functional.cross_entropy(scores, sequences[:, 1:].flatten(), reduction="none").unflatten(
            0, sequences[:, 1:].shape
        )

    def inner(call):
        return lambda y, x, batch: (x.sigmoid() * losses(call, y, batch).mean(1)).mean()

    def ours(engine, **options):
        call, _ = bl.functional(module, requires_grad=False, **options)
        problem = bl.Problem(inner(call), lambda y, x, batch: losses(call, y, batch).mean())
        batches = bl.Batches(inner=bl.PerStep(list(tokens[:-1])), outer=tokens[-1])
        solver, estimator = bl.Descent(bl.SGD(lr=LR), steps=steps), bl.Unrolled("iterates")

        def step():
            found = bl.hypergradient(problem, x, params, batches, solver=solver, estimator=estimator, engine=engine)
            step.engine = found.stats.get("engine", {})
            return [found.grad]

        return step

    call, _ = bl.functional(module)
    loss = inner(call)

    def gradient(y, x, batch, **options):
        return torch.autograd.grad(loss(y, x, batch), list(y.values()), **options)

    def outer_gradient(y, **options):
        return torch.autograd.grad(losses(call, y, tokens[-1]).mean(), list(y.values()), **options)

    def moved(y, g):
        return {key: leaf - LR * part for (key, leaf), part in zip(y.items(), g, strict=True)}

    def attached(y):
        return {key: leaf.detach().requires_grad_() for key, leaf in y.items()}

    def tape():
        y, leaf = attached(params), x.detach().requires_grad_()
        for batch in tokens[:-1]:
            y = moved(y, gradient(y, leaf, batch, create_graph=True))
        return torch.autograd.grad(losses(call, y, tokens[-1]).mean(), [leaf])

    def stepwise():
        y, leaf, kept, total = params, x.detach().requires_grad_(), [], torch.zeros_like(x)
        for batch in tokens[:-1]:
            kept.append(y)
            y = attached(y)
            y = {key: each.detach() for key, each in moved(y, gradient(y, leaf.detach(), batch)).items()}
        cotangent = outer_gradient(attached(y))
        del y
        for batch in reversed(tokens[:-1]):
            y = attached(kept.pop())
            g = gradient(y, leaf, batch, create_graph=True)
            *products, mixed = torch.autograd.grad(g, [*y.values(), leaf], cotangent)
            del g, y
            cotangent = [each - LR * part for each, part in zip(cotangent, products, strict=True)]
            total = total - LR * mixed
        return [total]

    known = engines(device, smoke=smoke)
    found = {
        "double backward, step by step": stepwise,
        "double backward, kept tape": tape,
        "eager": ours(known["eager"]),
        "rematerialized": ours(known["eager"], rematerialize=Block),
        "compiled": ours(known["compiled"]),
        "compiled, rematerialized": ours(known["compiled"], rematerialize=Block),
    }
    return found, sum(leaf.numel() for leaf in params.values())


def few_shot(spec, tasks, steps, dtype, device, smoke):
    """The same of MAML with some tasks."""
    module = conv4(5, width=spec["width"])
    call, start = bl.functional(module)
    start = {name: leaf.to(device=device, dtype=getattr(torch, dtype)) for name, leaf in start.items()}
    draw = torch.Generator().manual_seed(0)

    def images(each):
        labels = torch.arange(5).repeat_interleave(each).repeat(tasks, 1)
        drawn = torch.randn(tasks, 5 * each, 1, 28, 28, generator=draw) + labels[:, :, None, None, None] / 5
        return drawn.to(device=device, dtype=getattr(torch, dtype)), labels.to(device)

    support, query = images(5), images(15)

    def loss(y, x, batch):
        return nn.functional.cross_entropy(call(y, batch[0]), batch[1])

    problem = bl.Problem(loss, loss, init=lambda x, batch: x)
    outer = {name: leaf.detach() for name, leaf in start.items()}

    def ours(engine, keep):
        solver, estimator = bl.Descent(bl.SGD(lr=FEW_SHOT_LR), steps=steps), bl.TaskMean(bl.Unrolled(keep))
        batches = bl.Batches(inner=support, outer=query)

        def step():
            found = bl.hypergradient(problem, outer, None, batches, solver=solver, estimator=estimator, engine=engine)
            step.engine = found.stats.get("engine", {})
            return list(found.grad.values())

        return step

    def by_hand():
        x = {name: leaf.detach().requires_grad_() for name, leaf in start.items()}
        total = [torch.zeros_like(leaf) for leaf in x.values()]
        for task in range(tasks):
            y = x
            for _ in range(steps):
                value = loss(y, x, (support[0][task], support[1][task]))
                g = torch.autograd.grad(value, list(y.values()), create_graph=True)
                y = {name: leaf - FEW_SHOT_LR * part for (name, leaf), part in zip(y.items(), g, strict=True)}
            value = loss(y, x, (query[0][task], query[1][task])) / tasks
            found = torch.autograd.grad(value, list(x.values()))
            total = [each + part for each, part in zip(total, found, strict=True)]
        return total

    known = engines(device, smoke=smoke)
    found = {"torch by hand, task after task": by_hand, "eager, graph": ours(known["eager"], "graph")}
    found |= {name: ours(engine, "iterates") for name, engine in known.items()}
    return found, sum(leaf.numel() for leaf in start.values())


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
    row["first_seconds"], _ = timed()
    for _ in range(min(1, rounds - 1)):
        timed()  # the second of the checks of a compiled function
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
    functions = engine.get("functions", [])
    row["trace_seconds"] = sum(each["trace_seconds"] for each in functions)
    row["compile_seconds"] = sum(each["compile_seconds"] for each in functions)
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
