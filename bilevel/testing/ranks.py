"""Processes that run a function together, kept alive between calls: what tests of many ranks run on."""

import importlib
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

LARGEST = 4
"""How many processes a pool has. A run on fewer leaves the others idle."""


class Pool:
    """LARGEST processes in one gloo group on the CPU, one thread each, started at the first run.

    Args:
        seconds: how long a run may take. Then all processes are ended, and the next run starts others.
        start: how long the processes may take to start.
    """

    def __init__(self, seconds: float = 60.0, start: float = 300.0) -> None:
        self._seconds, self._patience = seconds, start
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder = ""

    def run(self, count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call `function(ranks, *arguments)` on `count` processes at once.

        Args:
            count: 1, 2 or 4 (any number up to LARGEST).
            function: of a module that can be imported by its name; its first argument is the `Ranks` of the group.
            arguments: picklable.

        Returns:
            what each rank returned, in the order of the ranks; an exception's place is taken by a `Failure`.

        Raises:
            TimeoutError: some rank did not answer in time.
        """
        if not self._processes:
            self._start()
        task = pickle.dumps((function.__module__, function.__qualname__, count, arguments))
        for pipe in self._pipes[:count]:
            pipe.send_bytes(task)
        found: list[Any] = []
        for rank, pipe in enumerate(self._pipes[:count]):
            try:
                if not pipe.poll(self._seconds):
                    raise TimeoutError(f"rank {rank} of {count} did not answer in {self._seconds} seconds")
                found.append(pickle.loads(pipe.recv_bytes()))
            except (TimeoutError, EOFError, ConnectionError):
                self.close()
                raise
        return found

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        self._folder = tempfile.mkdtemp()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["torch", "torch._dynamo", "torch.distributed.tensor", "bilevel", "bilevel.testing"]
        )
        for rank in range(LARGEST):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self._folder, there, sys.path), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(self._patience):
                self.close()
                raise TimeoutError(f"rank {rank} did not start in {self._patience} seconds")
            pipe.recv_bytes()


class Failure:
    """What a rank raised."""

    def __init__(self, error: BaseException) -> None:
        self.kind, self.message = type(error).__name__, str(error)
        self.trace = "".join(traceback.format_exception(error))

    def __repr__(self) -> str:
        return f"Failure({self.trace})"


def _serve(rank: int, folder: str, pipe: Connection, path: list[str]) -> None:
    import torch
    import torch.distributed as dist

    from bilevel.space.ranks import Ranks

    sys.path[:] = path
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(os.path.join(folder, "store"), LARGEST)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=LARGEST)
    groups = {count: dist.new_group(list(range(count))) for count in range(1, LARGEST + 1)}
    pipe.send_bytes(b"ready")
    while True:
        try:
            module, name, count, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            function: Any = importlib.import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
            answer = function(Ranks(groups[count]), *arguments)
        except BaseException as error:
            answer = Failure(error)
        pipe.send_bytes(pickle.dumps(answer))
