"""Kill a training run with SIGKILL again and again; let it go on each time; compare its end with an undisturbed run.

    python benchmarks/kill_resume.py --kills 100

Everything in the run is random: a shuffled DataLoader with noise, dropout in both losses, an estimator with memories of
tasks, Adam with a scheduler. It saves after every step. Half of the kills come at a random time after the start of the
process (also before its first step, and while it loads), half within 8 ms of the beginning of a save. torch is imported
once: the runs are forked from a process that has started no thread.
"""

import argparse
import os
import pathlib
import random
import signal
import tempfile
import time
import traceback
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch.utils.data import DataLoader, Dataset

import bilevel as bl


class Noisy(Dataset[torch.Tensor]):
    """Rows with noise from three generators."""

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.full((4,), row / 10) + 0.1 * torch.randn(4) + random.random() + float(numpy.random.rand())

    def __len__(self) -> int:
        return 18


def collated(rows: list[torch.Tensor]) -> bl.Batches:
    """Three tasks, in another order each time."""
    tasks = random.sample("abc", 3)
    return bl.Batches(torch.stack(rows), -torch.stack(rows), task_ids=tasks)


def inner_loss(y: torch.Tensor, x: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    """A quadratic with dropout."""
    kept = (torch.rand_like(y) < 0.8).to(y)
    return (y**2).sum() / 2 - (kept * y) @ (x + batch)


def outer_loss(y: torch.Tensor, x: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    """With dropout, too."""
    return ((y - batch) ** 2 * (torch.rand_like(y) < 0.8).to(y)).sum() / 2 + (x**2).sum() / 10


def train(folder: pathlib.Path, until: int | None) -> None:
    """Begin, or go on from what is there, and save every step."""
    for seed in (torch.manual_seed, random.seed, numpy.random.seed):
        seed(os.getpid() if steps_in(folder) else 0)  # what a file says goes before
    x = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=0.05)
    loop = bl.OuterLoop(
        bl.Problem(inner_loss, outer_loss),
        x,
        torch.zeros(3, 4),
        DataLoader(Noisy(), batch_size=3, shuffle=True, collate_fn=collated),
        solver=bl.Descent(bl.SGD(lr=0.3), steps=2),
        estimator=bl.TaskMean(bl.MemoryReduced(steps=2, warm_inner=True, warm_adjoint=True)),
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, step_size=50, gamma=0.9),
        tolerate=set(bl.Status),
        epochs=None,
    )
    loop.load(folder, missing_ok=True)
    while until is None or loop.index < until:
        next(loop)
        loop.save(folder)


def forked(folder: pathlib.Path, until: int | None) -> int:
    """The number of a process that trains."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        train(folder, until)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def finish(child: int) -> None:
    """Wait for a process that ends by itself."""
    if os.waitpid(child, 0)[1] != 0:
        raise SystemExit("a run failed; see above")


def writes(child: int, folder: pathlib.Path) -> bool:
    """Whether a process is writing a file, or was when it was killed."""
    return any(str(child) in path.name and path.suffix == ".tmp" for path in folder.glob("*.tmp"))


def runs(child: int) -> bool:
    """Whether a process has not ended."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def kill(child: int, folder: pathlib.Path, times: random.Random, *, in_a_save: bool) -> bool:
    """Kill a process at a random moment; whether it was writing a file."""
    if in_a_save:
        for state in (True, False, True)[times.choice((0, 2)) :]:  # its first save, or its second
            while writes(child, folder) != state and runs(child):
                time.sleep(0.0005)
        time.sleep(times.uniform(0, 0.008))
    else:
        time.sleep(times.uniform(0, 0.12))
    os.kill(child, signal.SIGKILL)
    if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
        raise SystemExit("a run failed before it was killed; see above")
    return writes(child, folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Kill, let go on, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    times, in_saves, lives = random.Random(chosen.seed), 0, set[int]()
    with tempfile.TemporaryDirectory() as scratch:
        killed, whole = pathlib.Path(scratch, "killed"), pathlib.Path(scratch, "whole")
        train(pathlib.Path(scratch, "first"), 1)  # what torch imports when it is first used
        for number in range(chosen.kills):
            in_saves += kill(forked(killed, None), killed, times, in_a_save=bool(number % 2))
            lives.add(steps_in(killed))
        until = steps_in(killed) + 5
        for folder in (killed, whole):
            finish(forked(folder, until))
        ends = [torch.load(max(folder.iterdir()), weights_only=True) for folder in (killed, whole)]
    same = [same_bits(*(end[name] for end in ends)) for name in ends[0]]
    print(
        f"{chosen.kills} kills, {in_saves} of them while a file was written, at {len(lives)} different steps; after "
        f"{until} steps {sum(same)} of {len(same)} parts of the state are those of the undisturbed run, to the bit"
    )
    if not all(same):
        raise SystemExit(f"differing: {[name for name, alike in zip(ends[0], same, strict=True) if not alike]}")


def steps_in(folder: pathlib.Path) -> int:
    """The steps of the newest file."""
    names = sorted(path.name for path in folder.glob("*.pt")) if folder.exists() else []
    return int(names[-1].removesuffix(".pt").split("-")[-1]) if names else 0


def same_bits(one: Any, other: Any) -> bool:
    """Whether two states are the same, to the bit."""
    if isinstance(one, torch.Tensor):
        return (
            one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()
        )
    if isinstance(one, dict):
        return list(one) == list(other) and all(same_bits(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_bits, one, other))
    return repr(one) == repr(other)


if __name__ == "__main__":
    main()
