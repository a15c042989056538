"""A run in which everything is random, and its bits: what tests of stopping and going on compare."""

import random
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch import Tensor

import bilevel as bl

H = torch.tensor([[1.2, 0.2, 0.0, 0.1], [0.2, 0.9, 0.1, 0.0], [0.0, 0.1, 0.8, 0.2], [0.1, 0.0, 0.2, 1.1]])
C = torch.tensor([[0.5, -0.3, 0.2], [0.1, 0.4, -0.2], [-0.6, 0.1, 0.3], [0.2, 0.2, 0.5]])


def inner_loss(y: dict[str, Tensor], x: dict[str, Tensor], batch: Tensor) -> Tensor:
    """A quadratic with dropout in its linear part."""
    z = torch.cat([y["a"], y["b"]])
    kept = (torch.rand_like(z) < 0.8).to(z)
    return z @ (H.to(z) @ z) / 2 - (kept * z) @ (C.to(z) @ x["u"] + batch) + x["v"].sum() * (z**2).sum() / 20


def outer_loss(y: dict[str, Tensor], x: dict[str, Tensor], batch: Tensor) -> Tensor:
    """With dropout, too."""
    z = torch.cat([y["a"], y["b"]])
    return (
        ((z - batch) ** 2 * (torch.rand_like(z) < 0.8).to(z)).sum() / 2 + (x["u"] ** 2).sum() / 10 + x["v"].sum() / 50
    )


PROBLEM = bl.Problem(inner_loss, outer_loss)
FROM_X = bl.Problem(inner_loss, outer_loss, init=lambda x, b: {"a": x["u"][:2], "b": x["u"][1:]})


class Draws:
    """Batches from every global generator, read anew each time; with tasks in another order each time."""

    def __init__(self, steps: int, tasks: int | None = None, **more: Any) -> None:
        self.steps, self.tasks, self.more = steps, tasks, more

    def __iter__(self) -> Iterator[bl.Batches]:
        for _ in range(self.steps):
            shape = (4,) if self.tasks is None else (self.tasks, 4)
            order = None if self.tasks is None else random.sample("abcdefgh"[: self.tasks], self.tasks)
            noise = torch.from_numpy(numpy.random.randn(*shape)).float()
            yield bl.Batches(0.3 * torch.randn(shape), noise, task_ids=order, **self.more)


def made(
    estimator: bl.Estimator,
    loader: Any,
    *,
    tasks: int | None = None,
    optimizer: Any = torch.optim.Adam,
    device: str = "cpu",
    **options: Any,
) -> bl.OuterLoop:
    """A loop over `PROBLEM` that is made the same way each time, whatever the generators are."""
    here = torch.device(device)
    x = {"u": torch.tensor([0.5, -0.4, 0.3], device=here), "v": torch.tensor([0.2], device=here)}
    x = options.pop("outer", None) or {name: leaf.requires_grad_() for name, leaf in x.items()}
    start = torch.tensor([0.1, 0.2], device=here), torch.tensor([-0.1, 0.3], device=here)
    y = {name: leaf if tasks is None else leaf.expand(tasks, 2).clone() for name, leaf in zip("ab", start, strict=True)}
    moved = optimizer(x.values(), lr=0.05)
    arguments: dict[str, Any] = {
        "problem": PROBLEM,
        "inner": y,
        "solver": bl.Descent(bl.SGD(lr=0.3), steps=4),
        "tolerate": set(bl.Status),
        "scheduler": torch.optim.lr_scheduler.StepLR(moved, step_size=2, gamma=0.7),
    } | options
    problem, inner = arguments.pop("problem"), arguments.pop("inner")
    return bl.OuterLoop(problem, x, inner, loader, estimator=estimator, optimizer=moved, **arguments)


def seeded(seed: int) -> None:
    """All three."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)


def bits(value: Any) -> Any:
    """A state as something that is equal where all bits are."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format)
        return tuple(value.shape), value.dtype, flat.view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(part) for part in value]
    return repr(value)
