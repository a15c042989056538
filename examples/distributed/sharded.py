"""A transformer that is sharded over processes learns which sources of text to trust.

    torchrun --nproc-per-node 2 examples/distributed/sharded.py

Each process holds its part of the model, of its gradients and of the perturbed sides, and its rows of the batch. On
GPUs the same script runs with NCCL.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import bilevel as bl
from bilevel.problems.transformer import Transformer

SOURCES, ROWS, CONTEXT = 4, 16, 16


def text(rank: int, ranks: int, device: torch.device) -> bl.Batches:
    """Rows that count, of which every other source is noise; clean rows to judge by."""
    generator = torch.Generator().manual_seed(0)
    clean = (torch.arange(2 * ROWS)[:, None] + torch.arange(CONTEXT + 1)) % 64
    noise = torch.randint(0, 64, (ROWS, CONTEXT + 1), generator=generator)
    source = torch.arange(ROWS) % SOURCES
    rows = torch.where((source % 2 == 1)[:, None], noise, clean[:ROWS])
    mine = slice(rank, None, ranks)
    inner = {"rows": rows[mine].to(device), "source": source[mine].to(device)}
    return bl.Batches(inner, {"rows": clean[ROWS:][mine].to(device)})


def losses(net: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    scores = net(rows[:, :-1]).flatten(0, 1)
    each = torch.nn.functional.cross_entropy(scores, rows[:, 1:].flatten(), reduction="none")
    return each.unflatten(0, (len(rows), -1)).mean(1)


def inner_loss(net, x, batch):
    return (torch.sigmoid(x["logits"][batch["source"]]) * losses(net, batch["rows"])).mean()


def outer_loss(net, x, batch):
    return losses(net, batch["rows"]).mean()


def main() -> None:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device(kind, rank % torch.cuda.device_count()) if kind == "cuda" else torch.device("cpu")
    mesh = init_device_mesh(kind, (ranks,))
    torch.manual_seed(0)
    net = Transformer(vocabulary=64, context=CONTEXT, layers=2, width=32, heads=2).to(device)
    for name, parameter in net.named_parameters():
        if name == "positions":
            torch.nn.init.normal_(parameter, std=0.02)
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)

    x = {"logits": torch.zeros(SOURCES, device=device, requires_grad=True)}
    problem = bl.Problem(bl.distributed.fully_sharded(net, inner_loss), bl.distributed.fully_sharded(net, outer_loss))
    loop = bl.iterate(
        problem,
        x,
        dict(net.named_parameters()),
        [text(rank, ranks, device)] * 5,
        solver=bl.Descent(bl.SGD(lr=0.2), steps=5),
        estimator=bl.FirstOrderCorrected(nu=0.01),
        optimizer=torch.optim.Adam(x.values(), lr=0.3),
    )
    for step in loop:
        if rank == 0:
            print(f"{step.index}: outer loss {step.outer_loss:.3f}")
    net.load_state_dict(step.hypergradient.inner)
    if rank == 0:
        weights = torch.sigmoid(x["logits"]).tolist()
        print("weights of the sources:", [f"{weight:.2f}" for weight in weights])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
