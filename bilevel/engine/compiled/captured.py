"""CUDA graphs: the explicit functions of a loss recorded once, and replayed as one launch.

For small nets, whose time is in launching kernels (few-shot steps, learned optimizers). A replay reads inputs that
stand where they stood at the recording, so they are copied there, and results are copied out, because the next replay
overwrites them. Random numbers are drawn before the replay and are inputs, too.

| | cost besides the function's own | memory |
| --- | --- | --- |
| a call | one copy of inputs, one of results | a private pool with the function's peak, while the problem lives |
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from bilevel.engine.base import Engine
from bilevel.engine.compiled import inductor
from bilevel.engine.compiled.engine import Session
from bilevel.engine.compiled.piece import Made

_WARM_UP = 3


@dataclasses.dataclass(frozen=True)
class Captured(Engine):
    """CUDA graphs of the gradients and products that `Compiled` traces.

    It takes over what `Compiled` says: what is shared, what is traced again, what is checked, and the errors. Where
    there is nothing to capture (tensors that are not on a CUDA device) or capturing fails (an operator that waits for
    the device), it computes without, and says so in `hg.stats["engine"]["notes"]`.

    Args:
        backend: "graph" replays the kernels of torch's own operators, "inductor" fused ones.
        check: as of `Compiled`.

    Raises:
        ValueError: an argument is out of range.

    Memory: each function holds its peak in a pool of its own, one for each structure of its arguments.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: ((y - x) ** 2).sum(), lambda y, x, b: (y**2).sum() / 2)
        >>> hg = bl.hypergradient(problem, torch.ones(2), torch.zeros(2), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.5), steps=3), estimator=bl.Unrolled(), engine=bl.Captured())
        >>> hg.grad, hg.stats["engine"]["notes"]
        (tensor([1., 1.]), ['nothing was captured: CUDA graphs need tensors on a CUDA device, and these are on cpu'])
    """

    backend: str = "graph"
    check: bool = True

    def __post_init__(self) -> None:
        inductor.check("Captured", self.backend, self.check)

    def open(self) -> Session:
        make = inductor.make(self.backend)

        def made(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Made:
            return recorded(make(graph, inputs).run, inputs, record)

        return Session(self, "captured", made, check=self.check, unfit=_elsewhere)


def _elsewhere(tensors: Sequence[Tensor]) -> str | None:
    """Why nothing is captured of these tensors; None if they are on one CUDA device. (Fake ones stand for such.)"""
    devices = {each.device.type for each in tensors}
    if devices == {"cuda"} or any(isinstance(each, torch._subclasses.FakeTensor) for each in tensors):
        return None
    return (
        f"nothing was captured: CUDA graphs need tensors on a CUDA device, and these are on "
        f"{' and '.join(sorted(devices))}"
    )


Record = Callable[[Callable[[], Sequence[Tensor]]], tuple[Callable[[], None], Sequence[Tensor]]]
"""A function without arguments -> what replays it, and the results that a replay overwrites."""


def record(function: Callable[[], Sequence[Tensor]]) -> tuple[Callable[[], None], Sequence[Tensor]]:
    """Capture the kernels that a function launches, into a pool of its own."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UP):  # libraries choose kernels and allocate workspaces at their first calls
            function()
    torch.cuda.current_stream().wait_stream(aside)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = function()
    return captured.replay, results


def recorded(run: Callable[..., Any], inputs: Sequence[Tensor], how: Record) -> Made:
    """A function of tensors as a replay, or as it is where it cannot be recorded.

    Args:
        run: the function; always given tensors of these shapes.
        inputs: an example.
        how: records a function.
    """
    if any(isinstance(each, torch._subclasses.FakeTensor) for each in inputs):
        return Made(run)
    standing = [each.clone() for each in inputs]
    try:
        replay, results = how(lambda: run(*standing))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        return Made(run, f"a function was not captured, and ran without: {reason}")

    def replayed(*given: Tensor) -> list[Tensor]:
        if standing:
            torch._foreach_copy_(standing, list(given))
        replay()
        return [each.clone() for each in results]

    return Made(replayed)
