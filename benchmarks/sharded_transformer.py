"""A transformer whose hypergradient does not fit in a limit of bytes on one process, and fits when it is sharded.

    python benchmarks/sharded_transformer.py                       # all, to benchmarks/results/sharded_transformer.md
    torchrun --nproc-per-node 2 benchmarks/sharded_transformer.py --one corrected

Inner variable: the transformer of bilevel.problems, sharded by torch's fully_shard, layer by layer. Outer variable: a
weight for each of eight sources of text, half of which are noise. Each rank has its part of the batch. The limit is the
kernel's (RLIMIT_DATA): what a process may take beyond what Python, torch and the process group have taken before the
model is made. Beside it stands the peak of live tensor bytes, measured by the profiler's meter in a run without a
limit, and its forecast: the same meter on tensors without data, in one process, with torch's fake process group in the
place of n ranks.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import platform
import resource
import tempfile
import time
import traceback
import warnings
from typing import Any

import torch
import torch.distributed as dist
from bilevel_profiling.meters.tensors import Tensors
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import bilevel as bl
from bilevel.problems.transformer import Transformer

RESULT = pathlib.Path(__file__).parent / "results" / "sharded_transformer.md"
SIZES = {"layers": 12, "width": 256, "heads": 4, "context": 16, "batch": 8}
SOURCES = 8
ESTIMATORS = {
    "corrected": bl.FirstOrderCorrected(nu=0.01),
    "sama": bl.estimators.Sama(),
    "darts": bl.estimators.Darts(),
}
SOLVER = bl.Descent(bl.SGD(lr=0.05), steps=2)
MIB = 2**20


def data(sizes: dict[str, int], rank: int, ranks: int) -> bl.Batches:
    """This rank's rows: text that repeats itself, and noise where the source is odd."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    count, length = 2 * sizes["batch"], sizes["context"] + 1
    text = (torch.arange(count, device="cpu")[:, None] + torch.arange(length, device="cpu") * 7) % 50 + 32
    noise = torch.randint(0, 256, (count, length), generator=generator, device="cpu")
    source = torch.arange(count, device="cpu") % SOURCES
    rows = torch.where((source % 2 == 1)[:, None], noise, text)
    train, valid = slice(rank, sizes["batch"], ranks), slice(sizes["batch"] + rank, count, ranks)
    return bl.Batches({"rows": rows[train], "source": source[train]}, {"rows": text[valid]})


def losses(net: Any, rows: Tensor) -> Tensor:
    scores = net(rows[:, :-1])
    each = nn.functional.cross_entropy(scores.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    return each.unflatten(0, (len(rows), -1)).mean(1)


def weighted(net: Any, x: Any, batch: Any) -> Tensor:
    return (torch.sigmoid(x["logits"][batch["source"]]) * losses(net, batch["rows"])).mean()


def clean(net: Any, x: Any, batch: Any) -> Tensor:
    return losses(net, batch["rows"]).mean()


def drawn(name: str, shape: torch.Size, place: int) -> Tensor:
    """The start of one parameter: the same on every rank and for every number of ranks."""
    if "bias" in name:
        return torch.zeros(shape)
    if "norm" in name:
        return torch.ones(shape)
    generator = torch.Generator(device="cpu").manual_seed(place)
    return torch.randn(shape, generator=generator, device="cpu") * 0.02


def unsharded(sizes: dict[str, int]) -> tuple[bl.Problem, dict[str, Tensor]]:
    call, shapes = bl.functional(made(sizes))
    y = {name: drawn(name, leaf.shape, i) for i, (name, leaf) in enumerate(shapes.items())}
    return bl.Problem(
        lambda y, x, batch: weighted(lambda rows: call(y, rows), x, batch),
        lambda y, x, batch: clean(lambda rows: call(y, rows), x, batch),
    ), y


def sharded(sizes: dict[str, int], mesh: Any) -> tuple[bl.Problem, dict[str, Tensor]]:
    net = made(sizes)
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    net.to_empty(device="cpu")
    for i, (name, leaf) in enumerate(net.named_parameters()):
        # (One parameter at a time is whole.)
        parts = drawn(name, leaf.shape, i).chunk(mesh.size())
        if mesh.get_local_rank() < len(parts):
            leaf.to_local().data.copy_(parts[mesh.get_local_rank()])
    problem = bl.Problem(bl.distributed.fully_sharded(net, weighted), bl.distributed.fully_sharded(net, clean))
    return problem, dict(net.named_parameters())


def made(sizes: dict[str, int]) -> Transformer:
    with torch.device("meta"):
        return Transformer(**{key: sizes[key] for key in ("layers", "width", "heads", "context")})


def step(sizes: dict[str, int], estimator: str, mesh: Any, part: tuple[int, int]) -> bl.Hypergradient:
    """One hypergradient, from the making of the model on."""
    problem, y = unsharded(sizes) if mesh is None else sharded(sizes, mesh)
    x = {"logits": torch.zeros(SOURCES)}
    return bl.hypergradient(problem, x, y, data(sizes, *part), solver=SOLVER, estimator=ESTIMATORS[estimator])


def taken() -> int:
    """The private writable memory of this process."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))


def limited(limit: int | None, run: Any) -> Any:
    """`run()` where this process may take `limit` bytes more than it has; its failure as a sentence."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (taken() + limit, hard))
    try:
        return run()
    except (RuntimeError, MemoryError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        return "does not fit: " + str(error).splitlines()[0].split("alloc.cpp")[-1].rpartition("]")[2].strip()[:80]
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


SMALL = {"layers": 1, "width": 32, "heads": 2, "context": 8, "batch": 8}


def measured(
    sizes: dict[str, int], estimator: str, mesh: Any, part: tuple[int, int], limit: int | None
) -> dict[str, Any]:
    """A step, metered or under a limit, after a small one that takes what torch itself takes."""
    warnings.simplefilter("ignore")
    step(SMALL, estimator, mesh, part)
    began = time.perf_counter()
    if limit is None:
        with Tensors() as meter:
            found = step(sizes, estimator, mesh, part)
        peak = meter.peak_bytes
    else:
        found, peak = limited(limit, lambda: step(sizes, estimator, mesh, part)), None
    if isinstance(found, str):
        return {"failed": found, "peak": None}
    return {
        "grad": found.grad["logits"].tolist(),
        "loss": found.outer_loss.item(),
        "status": found.status.name,
        "peak": peak,
        "seconds": time.perf_counter() - began,
    }


def forecast(sizes: dict[str, int], estimator: str, ranks: int) -> int:
    """The peak of live tensor bytes of rank 0 of n, without data and without the others."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    warnings.simplefilter("ignore")
    mesh = None
    if ranks > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        mesh = init_device_mesh("cpu", (ranks,))
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), Tensors() as meter:
            step(sizes, estimator, mesh, (0, ranks))
        return meter.peak_bytes
    finally:
        if ranks > 1:
            dist.destroy_process_group()


def worker(rank: int, ranks: int, folder: str, job: tuple[Any, ...], answers: Any) -> None:
    try:
        torch.set_num_threads(1)
        kind, sizes, estimator, limit = job
        if kind == "forecast":
            answers.put((rank, {"peak": forecast(sizes, estimator, ranks)}))
            return
        mesh = None
        if ranks > 1:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            store = dist.FileStore(os.path.join(folder, "store"), ranks)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
            mesh = init_device_mesh("cpu", (ranks,))
        answers.put((rank, measured(sizes, estimator, mesh, (rank, ranks), limit)))
        if ranks > 1:
            dist.destroy_process_group()
    except BaseException:
        answers.put((rank, {"failed": traceback.format_exc()[-2000:], "peak": None}))


def run(ranks: int, job: tuple[Any, ...]) -> list[dict[str, Any]]:
    """What each rank answers, each in a process of its own; of a forecast, rank 0 alone."""
    # Memory that is freed goes back to the kernel at once; else the limit would also count what malloc keeps.
    os.environ.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_ARENA_MAX="1")
    context, count = multiprocessing.get_context("spawn"), 1 if job[0] == "forecast" else ranks
    answers: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=worker, args=(r, ranks, folder, job, answers)) for r in range(count)]
        for process in processes:
            process.start()
        found = dict(answers.get(timeout=600) for _ in processes)
        for process in processes:
            process.join()
    return [found[rank] for rank in range(count)]


def table(sizes: dict[str, int], share: float) -> str:
    """The rows of the page, measured."""
    count = sum(leaf.numel() for leaf in made(sizes).parameters())
    lines = [
        "| estimator | limit | ranks | live tensor bytes of each rank | forecast | under the limit | off by |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in ESTIMATORS:
        whole: list[float] = []
        limit = 0
        for ranks in (1, 2, 4):
            said = run(ranks, ("forecast", sizes, name, None))[0]["peak"]
            limit = limit or int(share * said)
            free, bound = run(ranks, ("run", sizes, name, None)), run(ranks, ("run", sizes, name, limit))
            whole = whole or free[0]["grad"]
            apart = max(abs(a - b) for each in free for a, b in zip(each["grad"], whole, strict=True))
            # (Of a rank whose neighbour has failed, the neighbour's word says more.)
            said_by = [each.get("failed", "fits") for each in bound]
            ends = next((each for each in said_by if each.startswith("does not")), said_by[0][-200:])
            if ends == "fits":
                ends += " with the same numbers" if bound[0]["grad"] == free[0]["grad"] else " WITH OTHER NUMBERS"
            peaks = ", ".join(f"{each['peak'] / MIB:.1f}" for each in free)
            lines.append(
                f"| {name} | {limit / MIB:.0f} MiB | {ranks} | {peaks} MiB | {said / MIB:.1f} MiB | {ends} | "
                f"{apart / max(map(abs, whole)):.0e} |"
            )
            print(lines[-1], flush=True)
    head = (
        f"{count:,} parameters ({4 * count / MIB:.0f} MiB) of the inner variable: {sizes}; {SOLVER.max_steps} inner "
        f"steps. The limit is {share:g} of what the forecast says of one process, on the private memory that a process "
        f"takes from the making of the model on. The last column is the hypergradient's distance from that of one "
        f"process, relative to its largest number.\n\n"
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores,"
        f" gloo.\n\n"
    )
    return head + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=0.9, help="the limit, of the forecast for one process")
    parser.add_argument("--limit", type=int, help="MiB, with --one")
    parser.add_argument("--one", choices=ESTIMATORS, help="under torchrun: one step on the ranks that it started")
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    sizes = {name: getattr(given, name) for name in SIZES}
    if given.one:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        part = (dist.get_rank(), dist.get_world_size())
        limit = None if given.limit is None else given.limit * MIB
        print(json.dumps(measured(sizes, given.one, mesh, part, limit)), flush=True)
        dist.destroy_process_group()
        return
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(
        f"# A transformer under a limit of bytes\n\nMade by benchmarks/{pathlib.Path(__file__).name}.\n\n"
        + table(sizes, given.share)
    )


if __name__ == "__main__":
    main()
