"""Run a function on N ranks: each a fresh process (see `isolate`), all in one group of torch.distributed.

Whatever ends one rank ends all: the others are given a moment to say what they saw, and are killed. What is reported is
the cause, as far as it can be told: a process that died or ran out of memory before one that raised, and that before
one that only missed the other.
"""

import contextlib
import dataclasses
import datetime
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from bilevel_profiling.measurement.isolate import Child, Outcome, wait
from bilevel_profiling.records.failure import CRASHED, ERROR, OUT_OF_MEMORY, TIMEOUT, Failure

_GRACE = 3.0
"""Seconds that ranks are given when one has failed."""
_MISSED = ("RankError", "Connection closed by peer", "Connection reset by peer", "gloo", "NCCL")
"""Words of a rank that noticed another's end."""


@dataclasses.dataclass(frozen=True)
class Joint:
    """How the ranks ended: with a value each, in their order, or with one failure; and what they printed."""

    values: tuple[Any, ...] = ()
    failure: Failure | None = None
    log: str = ""


def run(
    function: Callable[..., Any],
    *arguments: Any,
    processes: int,
    device: str = "cpu",
    time_limit: float,
    around: Callable[[int, int], AbstractContextManager[Any]] | None = None,
    memory_limit: int | None = None,
) -> Joint:
    """Call `function(*arguments)` on each of N ranks and wait for all.

    Args:
        function: importable by name, like its arguments.
        arguments: the same for each; it learns its rank from torch.distributed.
        processes: N.
        device: "cpu", where they talk by gloo; or "cuda", by NCCL, rank r on GPU r.
        time_limit: seconds after which all are killed.
        around: what watches a process, made from the rank and the process id; see `isolate.run`.
        memory_limit: of each, beyond what its process has with the group made.

    Raises:
        TypeError, AttributeError, pickle.PicklingError: the function or an argument cannot be sent to another process.
        KeyboardInterrupt: after the processes have been killed.

    Example:
        >>> import os
        >>> len(set(run(os.getpid, processes=2, time_limit=60).values))
        2
    """
    with tempfile.TemporaryDirectory(prefix="bilevel-ranks-") as folder:
        store = os.path.join(folder, "store")
        children = [
            Child(
                function,
                arguments,
                around=None if around is None else functools.partial(around, rank),
                memory_limit=memory_limit,
                surroundings=functools.partial(_member, rank, processes, store, device, time_limit),
            )
            for rank in range(processes)
        ]
        with contextlib.ExitStack() as alive:
            for child in children:
                alive.enter_context(child)
            wait(children, time_limit, _GRACE)
    return _joint([child.outcome for child in children])


def check_possible(processes: int, device: str) -> None:
    """Whether so many ranks can run here.

    Raises:
        ValueError: fewer than one, more than there are GPUs, or torch was built without torch.distributed.
    """
    if not isinstance(processes, int) or isinstance(processes, bool) or processes < 1:
        raise ValueError(f"processes is {processes!r}; a positive integer was needed")
    import torch

    if not torch.distributed.is_available():
        raise ValueError(f"{processes} processes were asked for, and this torch was built without torch.distributed")
    if device == "cuda" and processes > torch.cuda.device_count():
        raise ValueError(
            f"{processes} processes were asked for on cuda, a GPU for each, and there are {torch.cuda.device_count()}; "
            f"write at most as many, or --device cpu"
        )


@contextlib.contextmanager
def _member(rank: int, processes: int, store: str, device: str, seconds: float) -> Iterator[None]:
    """What surrounds the call in each process."""
    import torch
    import torch.distributed as dist

    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(rank)
    elif sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # these ranks are on one machine
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.FileStore(store, processes),
        rank=rank,
        world_size=processes,
        timeout=datetime.timedelta(seconds=seconds),
        device_id=torch.device("cuda", rank) if cuda else None,
    )
    # Connections, threads and buffers are made by the first collective, and are no part of what is measured.
    dist.all_reduce(torch.zeros(1, device=device))
    try:
        yield
    finally:
        if sys.exc_info()[0] is None:
            dist.destroy_process_group()  # after an error the others may never come to it


def _joint(outcomes: Sequence[Outcome]) -> Joint:
    several = len(outcomes) > 1
    log = "".join(f"--- rank {rank} ---\n{each.log}" if several else each.log for rank, each in enumerate(outcomes))
    failures = [(rank, each.failure) for rank, each in enumerate(outcomes) if each.failure is not None]
    if not failures:
        return Joint(tuple(each.value for each in outcomes), None, log)
    rank, failure = min(failures, key=lambda found: _remote(found[1]))
    said = failure.reason if failure.status == TIMEOUT else f"Rank {rank} of {len(outcomes)}: {failure.reason}"
    return Joint((), dataclasses.replace(failure, reason=said), log)


def _remote(failure: Failure) -> int:
    """How far a failure is from the cause."""
    if failure.status == ERROR and any(word in failure.reason for word in _MISSED):
        return 3
    return {OUT_OF_MEMORY: 0, CRASHED: 1}.get(failure.status, 4 if failure.status == TIMEOUT else 2)
