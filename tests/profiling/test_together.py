"""Ranks in processes of their own: one group, and one end for all."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from bilevel_profiling.measurement import together

MIB = 2**20


def total(value: float) -> tuple[int, float]:
    """What all ranks have together."""
    whole = torch.tensor(value * (dist.get_rank() + 1))
    dist.all_reduce(whole)
    return dist.get_rank(), whole.item()


def fails(how: str) -> None:
    """Rank 1 ends; rank 0 waits for it."""
    if dist.get_rank() == 1:
        if how == "killed":
            os.kill(os.getpid(), 9)
        if how == "raised":
            raise KeyError("mine")
        if how == "memory":
            bytearray(2**30)
        time.sleep(60)
    dist.all_reduce(torch.zeros(1))


def test_ranks_run_together():
    assert together.run(total, 2.0, processes=2, time_limit=60).values == ((0, 6.0), (1, 6.0))
    assert together.run(total, 2.0, processes=1, time_limit=60).values == ((0, 2.0),)


@pytest.mark.parametrize(
    ("how", "status", "reason"),
    [
        ("killed", "CRASHED", "Rank 1 of 2: The process was killed by signal 9"),
        ("raised", "ERROR", "Rank 1 of 2: KeyError: 'mine'"),
        ("memory", "OUT_OF_MEMORY", "Rank 1 of 2: The run was given 512 MiB beyond"),
        ("hangs", "TIMEOUT", "time limit of 4 s"),
    ],
)
def test_a_rank_that_ends_ends_all_and_is_named(how, status, reason):
    started = time.monotonic()
    limit = 512 * MIB if how == "memory" else None
    found = together.run(fails, how, processes=2, time_limit=4 if how == "hangs" else 60, memory_limit=limit)
    assert found.failure is not None
    assert found.failure.status == status
    assert reason in found.failure.reason
    assert found.values == ()
    assert time.monotonic() - started < 20


def test_what_cannot_be_is_said():
    for asked, said in ((0, "positive integer"), (True, "positive integer")):
        with pytest.raises(ValueError, match=said):
            together.check_possible(asked, "cpu")
    with pytest.raises(ValueError, match=r"a GPU for each, and there are \d+"):
        together.check_possible(1000, "cuda")
