"""Sharded inner variables, attacked: what was silently wrong, or stopped without saying what to write."""

import pathlib
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import bilevel as bl
from bilevel.distributed import Ranks, fully_sharded, gathered

D = torch.float64
DRAWN = torch.Generator().manual_seed(0)
ROWS, WEIGHTS = torch.randn(4, 6, generator=DRAWN, dtype=D), torch.randn(6, 3, generator=DRAWN, dtype=D)
SOLVER = bl.Descent(bl.SGD(0.1), 3)


def fit(y: Any, x: Any, rows: Any) -> Tensor:
    return (rows @ y["w"] * y["s"] - x).square().mean()


def size(y: Any, x: Any, rows: Any) -> Tensor:
    return y["w"].square().sum() + y["s"]


def said(call: Callable[[], Any]) -> str:
    try:
        return f"no error: {call()}"
    except ValueError as error:
        return str(error)


def answers(ranks: Ranks, what: str) -> str:
    """What a call says that one rank makes otherwise than the other, or with plain tensors among DTensors."""
    mesh = DeviceMesh.from_group(ranks.group, "cpu")

    def whole(value: Tensor, *, apart: bool = False) -> DTensor:
        return DTensor.from_local(value + ranks.rank if apart else value, mesh, [Replicate()])

    y = {"w": distribute_tensor(WEIGHTS, mesh, [Shard(0)]), "s": whole(torch.ones((), dtype=D), apart=what == "inner")}
    x = torch.zeros(3, dtype=D)
    rows = whole(ROWS, apart=what == "batch")
    return said(
        lambda: (
            bl.hypergradient(
                bl.Problem(fit, size),
                x if what == "plain x" else whole(x),
                y,
                bl.Batches(rows, rows),
                solver=SOLVER,
                estimator=bl.Unrolled(),
            ).grad
        )
    )


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("inner", r"\(Replicate\) and differ between ranks: \['inner'\]\['s'\]\. Make them with distribute_tensor"),
        ("batch", r"differ between ranks: \['Batches.inner'\], \['Batches.outer'\]\. Make them with distribute_tensor"),
        ("plain x", r"pass outer and the tensors of the batches as distribute_tensor\("),
    ],
)
def test_dtensors_that_differ_or_meet_plain_ones_are_refused_in_words(ranks: Any, what: str, message: str) -> None:
    """They were taken as they came: a scalar of y that of rank 0, rows of a batch mixed from all ranks."""
    for answer in ranks.run(2, answers, what):
        assert re.search(message, answer), answer


class Net(nn.Module):
    """Two layers; the first may be frozen."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 3, dtype=D), nn.Linear(3, 1, dtype=D)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.linspace(-0.5, 0.7, parameter.numel()).reshape(parameter.shape))
        self.first.requires_grad_(not frozen)

    def forward(self, rows: Tensor) -> Tensor:
        found: Tensor = self.last(self.first(rows).tanh())
        return found


def some(net: Any, x: Any, batch: Any) -> Tensor:
    """Rank 0's rows reach one tensor of x, and those of rank 1 another."""
    found: Tensor = (net(batch["rows"]) - x["ab"[int(batch["rank"])]].sum()).square().mean()
    return found


def plainly(net: Any, x: Any, batch: Any) -> Tensor:
    return (net(batch["rows"]) - 1).square().mean()


def penalty(net: Any, x: Any, batch: Any) -> Tensor:
    found: Tensor = plainly(net, x, batch) + x["a"].sum().exp() * sum(p.square().sum() for p in net.parameters())
    return found


X = {"a": torch.full((3,), 0.1, dtype=D), "b": torch.full((2,), 0.2, dtype=D)}


def sharded(ranks: Ranks, what: str) -> str:
    """Which error a module gives that fully_shard has sharded, or how far its hypergradient is from one process's."""
    mesh = DeviceMesh.from_group(ranks.group, "cpu")
    net, one = Net(what == "frozen"), Net()
    fully_shard(net.first, mesh=mesh)
    fully_shard(net, mesh=mesh)
    loss = {"parts of x": some, "penalty": penalty}.get(what, plainly)
    rows = [ROWS * (1 + rank) for rank in range(2)]

    def mean(y: Any, x: Any, batch: Any) -> Tensor:
        def call(rows: Tensor) -> Tensor:
            found: Tensor = torch.func.functional_call(one, y, (rows,))
            return found

        return sum((loss(call, x, {"rows": rows[rank], "rank": rank}) for rank in range(2)), torch.zeros(())) / 2

    def run(problem: Any, y: Any, batch: Any) -> Any:
        return bl.hypergradient(
            problem, X, y, bl.Batches(batch, batch), solver=SOLVER, estimator=bl.FirstOrderCorrected(nu=1e-3)
        )

    def apart() -> float:
        mine = fully_sharded(net, loss)
        batch = {"rows": rows[ranks.rank], "rank": ranks.rank}
        found = run(bl.Problem(mine, mine), dict(net.named_parameters()), batch).grad
        known = run(bl.Problem(mean, mean), dict(one.named_parameters()), None).grad
        return max((found[name] - known[name]).abs().max().item() for name in X)

    return said(apart)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("frozen", r"if p.requires_grad\}, without those that are frozen \(first.weight, first.bias\)"),
        ("penalty", r"write parameter.full_tensor\(\)"),
        ("parts of x", r"no error: (0.0|\d\.\d+e-(09|1\d))$"),
    ],
)
def test_a_sharded_module_is_right_or_refused_in_words(ranks: Any, what: str, message: str) -> None:
    """Frozen parameters shrank by weight decay; where ranks reach tensors of x of other sizes, all of them hung."""
    for answer in ranks.run(2, sharded, what):
        assert re.search(message, answer), answer


def swapped(ranks: Ranks, folder: str) -> list[str]:
    """What each rank is told on loading its own file, and that of the other."""
    mesh = DeviceMesh.from_group(ranks.group, "cpu")

    def made() -> bl.OuterLoop:
        x = torch.zeros(3, dtype=D, requires_grad=True)
        y = {"w": distribute_tensor(WEIGHTS, mesh, [Shard(0)])}
        problem = bl.Problem(
            lambda y, x, rows: (rows @ gathered(y)["w"] - x).square().mean(),
            lambda y, x, rows: gathered(y)["w"].square().sum(),
        )
        optimizer, batches = torch.optim.Adam([x], lr=0.1), [bl.Batches(ROWS, None)] * 2
        return bl.OuterLoop(problem, x, y, batches, solver=SOLVER, estimator=bl.Unrolled(), optimizer=optimizer)

    loop = made()
    next(loop)
    loop.save(pathlib.Path(folder) / str(ranks.rank))
    ranks.agree(None, "saving")
    return [said(lambda rank=rank: made().load(pathlib.Path(folder) / str(rank)).name) for rank in range(2)]  # type: ignore[misc,union-attr]


def test_a_rank_loads_no_other_ranks_part(ranks: Any, tmp_path: pathlib.Path) -> None:
    """The parts of y changed places, and the run went on with OK."""
    for rank, answers in enumerate(ranks.run(2, swapped, str(tmp_path))):
        assert answers[rank].startswith("no error"), answers
        assert (
            f"saved with the part of an inner variable or of its tasks that rank {1 - rank} of 2 has"
            in answers[1 - rank]
        ), answers
