"""MAML on characters drawn from fonts, its tasks shared by processes: 16 tasks a step, each rank takes its own.

    torchrun --nproc-per-node 1 examples/distributed/fewshot.py
    torchrun --nproc-per-node 2 examples/distributed/fewshot.py        # the same losses, to rounding, in less time

On a machine with GPUs each process takes one, and NCCL sums the hypergradients; without, gloo does it on the CPU.
5-way 1-shot; x, which all ranks hold, is the initialization. Ranks say what came of their tasks in one gather, and sum
the hypergradient in one all-reduce, once for each outer step.
"""

import os
import string
import time

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

import bilevel as bl
from bilevel.data import Episodes, glyphs
from bilevel.problems.conv4 import conv4

SMALL = os.environ.get("BILEVEL_EXAMPLE_SMALL") == "1"  # a smoke test: two outer steps, a small net, Latin letters only
WAY, SHOT, QUERY, TASKS = 5, 1, (3 if SMALL else 15), (5 if SMALL else 16)
STEPS, WIDTH, INNER_STEPS = (2, 4, 1) if SMALL else (60, 32, 3)
JUDGED = 6 if SMALL else 160  # new tasks

if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
else:
    device = torch.device("cpu")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["WORLD_SIZE"])))
dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
ranks = bl.distributed.Ranks()

letters = string.ascii_letters if SMALL else None
if ranks.rank == 0:
    glyphs.load(letters)  # drawn once, and cached
dist.barrier()
parts = glyphs.load(letters).split(seed=0)


def shared(split, tasks, steps, seed):
    """This rank's tasks of each batch. The same seed gives the same batches everywhere, so nobody has to send any."""
    loader = Episodes(parts[split], tasks=tasks, way=WAY, shot=SHOT, query=QUERY, steps=steps, seed=seed, device=device)
    return (bl.distributed.split(batches, ranks) for batches in loader)


learner = bl.meta.Learner(
    conv4(WAY, width=WIDTH, seed=0).to(device),  # the same x on every rank
    cross_entropy,
    solver=bl.Descent(bl.SGD(lr=0.1), steps=INNER_STEPS),
    estimator=bl.Unrolled(),
    optimizer=lambda xs: torch.optim.Adam(xs, lr=2e-3),
    group=ranks,
)
torch.manual_seed(1 + ranks.rank)  # for what is drawn on the way (dropout, say): other numbers for other tasks
outer = learner.outer()


def report(*words):
    if ranks.rank == 0:
        print(*words, flush=True)


def judge(when):
    found = learner.evaluate(outer, shared("test", JUDGED, 1, seed=1), solver=bl.Descent(bl.SGD(lr=0.1), steps=10))
    report(f"{when}: accuracy on unseen characters {found}")


judge("untrained")
began = time.perf_counter()
for step in learner.train(outer, shared("train", TASKS, STEPS, seed=0)):
    if step.index % 10 == 0 or step.index == STEPS - 1:
        tasks, status = step.hypergradient.stats["tasks"], step.hypergradient.status.name
        report(f"outer step {step.index:3d}   query loss {step.outer_loss.item():.4f}   {tasks} tasks   {status}")
report(f"{STEPS} outer steps on {ranks.size} ranks: {time.perf_counter() - began:.1f} s")
judge(f"after {STEPS} outer steps")
dist.destroy_process_group()
