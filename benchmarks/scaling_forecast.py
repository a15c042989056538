"""A step of a transformer of a billion parameters on 8 to 512 GPUs, forecast: memory of a rank, and bytes it sends.

    python benchmarks/scaling_forecast.py               # writes results/scaling_forecast.jsonl and .md
    python benchmarks/scaling_forecast.py --layers 1 --width 64 --heads 2 --context 16 --out /tmp/scaling

No GPU is there and nothing is sent: each cell is `forecast(case, ranks=N)`, rank 0 of a group that only seems to be,
on tensors without data. Three ways to use N GPUs:

    data      every rank holds the whole model, and 512/N of the 512 sequences of a step (a weight for each is x)
    tasks     every rank adapts the whole model to a task of its own, 8 sequences (x is where all tasks start)
    sharded   every rank holds 1/N of the model (FSDP2, a layer at a time), and 512/N of the sequences
"""

import argparse
import functools
import json
import multiprocessing
import time
from pathlib import Path

import torch
from torch import nn

import bilevel as bl
from bilevel.distributed import Ranks, share
from bilevel.engine import spans

OUT = Path(__file__).parent / "results" / "scaling_forecast"
SIZES = {"layers": 5, "width": 4096, "heads": 32, "context": 512}
GPUS = (8, 16, 64, 128, 256, 512)
SEQUENCES, OF_A_TASK, STEPS, PRODUCTS = 512, 8, 2, 3
CG = bl.Implicit(bl.CG(max_steps=PRODUCTS, damping=1.0))
CELLS = {
    "data": {
        "unrolled segments": bl.Unrolled(keep="segments"),
        "implicit CG": CG,
        "first-order corrected": bl.FirstOrderCorrected(),
    },
    "tasks": {"implicit CG": CG, "first-order": bl.FirstOrder()},
    "sharded": {"first-order corrected": bl.FirstOrderCorrected(), "DARTS": bl.estimators.Darts()},
}
ASSUMPTIONS = f"""\
- float32, SGD inside ({STEPS} inner steps, {PRODUCTS} products with conjugate gradients), Adam on x, one byte a token;
  attention is written out, as second derivatives need it. {SEQUENCES} sequences a step whatever N (data, sharded); one
  task of {OF_A_TASK} sequences a GPU (tasks).
- Memory is that of tensors on rank 0, the first of those with the most rows: what it holds before the step, and the
  peak of what the step adds. Not in it: cuBLAS's and NCCL's workspaces, and what the allocator's cache loses.
- Bytes sent are those of a ring for every collective (`bilevel_profiling.meters.traffic`), per rank and outer step, the
  checks that ranks agree included. NCCL may take trees; protocols come on top; links inside a machine and between
  machines are not told apart.
- No time is forecast: neither overlap of sending with computing, nor waiting for slower ranks, nor congestion.
- Checked against measured ranks at small sizes, 2 and 4 on a CPU: data, tasks and DTensors to the byte
  (tests/profiling/test_ranks_measured.py and test_ranks_sharded.py); memory of FSDP2, which the sharded rows use, to 2%
  (benchmarks/sharded_transformer.py).
"""


def losses(net, sequences):
    read, told = sequences[:, :-1], sequences[:, 1:]
    scores = net(read)
    each = nn.functional.cross_entropy(scores.transpose(1, 2), told, reduction="none")
    return each.mean(1)


def weighted(net, x, batch):
    sequences, index = batch
    return (x["logits"][index].sigmoid() * losses(net, sequences)).mean()


def plain(net, x, batch):
    return losses(net, batch[0]).mean()


def module(sizes):
    from bilevel.problems.transformer import Transformer

    return Transformer(**sizes)


def called(net, loss):
    """A loss of the module as one of its parameters."""
    return lambda y, x, batch: loss(lambda *tokens: torch.func.functional_call(net, y, tokens), x, batch)


def text(context, count=SEQUENCES):
    return torch.zeros(count, context + 1, dtype=torch.long), torch.arange(count)


def of_data(device, *, sizes):
    net = module(sizes)
    problem = bl.Problem(called(net, weighted), called(net, plain))
    batch = text(sizes["context"])
    inner = {name: leaf.detach() for name, leaf in net.named_parameters()}
    return problem, {"logits": torch.zeros(SEQUENCES)}, inner, bl.Batches(batch, batch)


def of_tasks(device, *, sizes):
    net = module(sizes)
    outer = {name: leaf.detach() for name, leaf in net.named_parameters()}
    # One task for each rank, all made here, since each rank takes its own; they are views of one.
    count = Ranks().size
    batch = tuple(leaf.expand(count, *leaf.shape) for leaf in text(sizes["context"], OF_A_TASK))
    near = bl.proximal(bl.Problem(called(net, plain), called(net, plain), init=lambda x, batch: x), 0.5)
    return near, outer, None, bl.Batches(batch, batch)


def of_shards(device, *, sizes):
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    from bilevel.distributed import fully_sharded

    net, ranks = module(sizes), Ranks()
    with spans.span(spans.ASIDE):
        mesh = DeviceMesh.from_group(torch.distributed.group.WORLD, "cpu")
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    problem = bl.Problem(fully_sharded(net, weighted), fully_sharded(net, plain))
    part = share(SEQUENCES, ranks)
    batch = tuple(leaf[part] for leaf in text(sizes["context"]))
    return problem, {"logits": torch.zeros(SEQUENCES)}, dict(net.named_parameters()), bl.Batches(batch, batch)


def cell(way, label, gpus, sizes):
    from bilevel_profiling import DATA, TASKS, Case, Parallel, forecast
    from bilevel_profiling.forecasting.search import needed
    from bilevel_profiling.measurement.environment import environment

    torch.set_num_threads(1)
    setup, parallel = {
        "data": (of_data, DATA),
        "tasks": (of_tasks, TASKS),
        "sharded": (of_shards, Parallel("sharded")),  # setup has split it already
    }[way]
    estimator = CELLS[way][label]
    case = Case(
        functools.partial(setup, sizes=sizes),
        solver=bl.Descent(bl.SGD(lr=1e-3), STEPS),
        estimator=bl.TaskMean(estimator, chunk=1) if way == "tasks" else estimator,
        label=label,
        name=way,
        parallel=parallel,
    )
    started = time.perf_counter()
    record = forecast(case, ranks=gpus)
    return {
        "way": way,
        "estimator": label,
        "gpus": gpus,
        "sizes": sizes,
        "inner_steps": STEPS,
        "base_tensor_bytes": record.base_tensor_bytes,
        "peak_tensor_bytes": record.peak_tensor_bytes,
        "needed_bytes": needed(record),
        "sent_bytes": record.sent_bytes,
        "collectives": dict(record.collectives),
        "calls": dict(record.calls),
        "notes": [str(note) for note in record.notes],
        "seconds": time.perf_counter() - started,
        "environment": dict(environment()),
    }


def each(asked):
    return cell(*asked)


def table(rows):
    sizes, numbers = rows[0]["sizes"], sorted({row["gpus"] for row in rows})
    found = {(row["way"], row["estimator"], row["gpus"]): row for row in rows}
    lines = [
        f"A transformer of {sizes['layers']} layers of width {sizes['width']}, {sizes['heads']} heads, "
        f"{sizes['context']} tokens. Memory of a rank in GiB / GiB that it sends in an outer step.",
        "",
        "| split | estimator | " + " | ".join(f"{count} GPUs" for count in numbers) + " |",
        "| --- | --- |" + " --- |" * len(numbers),
    ]
    for way, estimator in dict.fromkeys((row["way"], row["estimator"]) for row in rows):
        cells = []
        for count in numbers:
            row = found.get((way, estimator, count))
            cells.append("-" if row is None else f"{row['needed_bytes'] / 2**30:.1f} / {row['sent_bytes'] / 2**30:.1f}")
        lines.append(f"| {way} | {estimator} | " + " | ".join(cells) + " |")
    where = rows[-1]["environment"]
    lines += ["", "Assumptions:", "", ASSUMPTIONS.rstrip(), ""]
    lines += [f"Environment: torch {where['torch']}, python {where['python']}, bilevel {where['bilevel']}; no GPU.", ""]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--gpus", default=",".join(map(str, GPUS)), help="numbers, separated by commas")
    parser.add_argument("--ways", default=",".join(CELLS), help="of data, tasks, sharded; separated by commas")
    parser.add_argument("--out", type=Path, default=OUT, help="without an ending")
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in SIZES}
    rows, context = [], multiprocessing.get_context("spawn")
    for way in options.ways.split(","):
        asked = [(way, label, int(gpus), sizes) for label in CELLS[way] for gpus in options.gpus.split(",")]
        with context.Pool(1) as pool:
            for row in pool.imap(each, asked):
                rows.append(row)
                needs, sends = row["needed_bytes"] / 2**30, row["sent_bytes"] / 2**30
                said = f"{way} {row['estimator']}, {row['gpus']}: {needs:.2f} GiB, {sends:.2f} GiB sent"
                print(f"{said}, {row['seconds']:.0f} s", flush=True)
                lines = "".join(json.dumps(known) + "\n" for known in rows)
                options.out.with_suffix(".jsonl").write_text(lines, encoding="utf-8")
                options.out.with_suffix(".md").write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
