"""Data hyper-cleaning with the examples split over processes, and the same hypergradients as one process has.

    torchrun --nproc-per-node 4 examples/distributed/data_parallel.py        # on GPUs with NCCL, else on CPUs with gloo
    python examples/distributed/data_parallel.py                             # one process

One weight for each of 1000 training digits, 40 % of whose labels are wrong; a perceptron is trained with them. Each
rank holds a part of the training and of the validation digits. After the run, rank 0 takes every hypergradient once
more with the whole data and no other process, and prints how far they are apart.
"""

import os

import torch
import torch.distributed as dist

import bilevel as bl
from bilevel.problems import hypercleaning

SMALL = os.environ.get("BILEVEL_EXAMPLE_SMALL") == "1"  # a smoke test: two outer steps
OUTER_STEPS, OUTER_LR = (2 if SMALL else 20), 0.3
INNER_STEPS, INNER_LR = (5 if SMALL else 30), 0.5
ESTIMATORS = {
    "memory reduced": bl.MemoryReduced(steps=10, damping=1.0),
    "unrolled": bl.Unrolled("iterates"),
    "corrected": bl.FirstOrderCorrected(),
}


def start() -> torch.device:
    """Join the processes that torchrun started, or be the only one."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if cuda else "gloo", **alone)
    return device


def run(problem, outer, inner, batches, estimator):
    """Outer steps with Adam; the outer losses and the last hypergradient."""
    logits = outer["logits"].detach().clone().requires_grad_()
    loop = bl.iterate(
        problem,
        {"logits": logits},
        inner,
        [batches] * OUTER_STEPS,
        solver=bl.Descent(bl.SGD(lr=INNER_LR), INNER_STEPS),
        estimator=estimator,
        optimizer=torch.optim.Adam([logits], lr=OUTER_LR),
    )
    steps = list(loop)
    return [step.outer_loss.item() for step in steps], steps[-1].hypergradient.grad["logits"]


def main() -> None:
    device = start()
    ranks = bl.distributed.Ranks()
    # float64: what is left between one process and many is rounding, and is seen to be.
    problem, outer, inner, batches = hypercleaning.setup(device, hidden=64, dtype=torch.float64)
    split = bl.distributed.data_parallel(problem, ranks)
    mine = bl.distributed.split(batches, ranks)
    print(
        f"rank {ranks.rank} of {ranks.size}: {len(mine.inner[0])} training and {len(mine.outer[0])} validation digits"
    )
    for name, estimator in ESTIMATORS.items():
        losses, grad = run(split, outer, inner, mine, estimator)
        if ranks.rank == 0:
            alone, expected = run(problem, outer, inner, batches, estimator)
            apart = ((grad - expected).norm() / expected.norm()).item()
            print(f"{name}: validation loss {losses[0]:.3f} to {losses[-1]:.3f}; {ranks.size} ranks and one process")
            print(f"    differ by {apart:.0e} in the last hypergradient, {abs(losses[-1] - alone[-1]):.0e} in the loss")
            if apart > 1e-6:
                raise SystemExit("they should not")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
