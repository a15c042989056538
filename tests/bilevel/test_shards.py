"""An inner variable that is sharded over ranks: every hypergradient is that of one process, or is refused."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import bilevel as bl
from bilevel import testing
from bilevel.distributed import Ranks

D = torch.float64
G = torch.Generator().manual_seed(0)
X = {"a": torch.randn(3, generator=G, dtype=D), "decay": torch.tensor(-1.0, dtype=D)}
Y = {
    "w": torch.randn(5, 3, generator=G, dtype=D),
    "b": torch.randn(3, generator=G, dtype=D),
    "s": torch.tensor(0.4, dtype=D),
    "v": torch.randn(2, 6, generator=G, dtype=D),
}
PLACES = {"w": Shard(0), "b": Replicate(), "s": Replicate(), "v": Shard(1)}
BATCH = {"rows": torch.randn(4, 5, generator=G, dtype=D), "goal": torch.randn(2, 6, generator=G, dtype=D)}


def inner_loss(y: Any, x: Any, batch: Any) -> Tensor:
    hidden = batch["rows"] @ y["w"] + y["b"]
    fit = ((hidden - x["a"]).square().mean() + 0.1 * (y["s"] * hidden).sin().mean()) / 2
    decay = 0.3 * x["decay"].exp() * sum(leaf.square().sum() for leaf in y.values())
    return fit + decay + (0.2 * (y["v"] - batch["goal"]).square().sum())


def outer_loss(y: Any, x: Any, batch: Any) -> Tensor:
    return (batch["rows"] @ y["w"] * y["s"]).square().mean() + (y["v"] * y["b"].sum()).tanh().sum() + x["a"].square().sum()


def spread(value: dict[str, Tensor], mesh: DeviceMesh, places: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        name: distribute_tensor(leaf, mesh, [places[name] if places else Replicate()]) for name, leaf in value.items()
    }


def whole(value: Any) -> Any:
    return {name: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf for name, leaf in value.items()}


SGD = bl.Descent(bl.SGD(0.2), 5)
ESTIMATORS = {entry.label: entry.usual for entry in testing.ENTRIES} | {
    "implicit neumann": bl.Implicit(bl.Neumann(steps=4, step_size=0.5)),
}


def estimate(estimator: Any, solver: Any, mesh: DeviceMesh | None, **options: Any) -> dict[str, Any]:
    """Two calls, the second with what the first carries."""
    warnings.simplefilter("ignore")
    x, y, batch = X, Y, BATCH
    if mesh is not None:
        x, y, batch = spread(X, mesh), spread(Y, mesh, PLACES), spread(BATCH, mesh)
    torch.manual_seed(0)
    problem, state, codes = bl.Problem(inner_loss, outer_loss), None, []
    for _ in range(2):
        found = bl.hypergradient(
            problem, x, y, bl.Batches(batch, batch), solver=solver, estimator=estimator, state=state, **options
        )
        state, y = found.state, found.inner if found.next_inner is None else found.next_inner
        codes.append(found.status.name)
    figures = {key: float(found.stats[key]) for key in ("inner_residual", "linear_residual") if key in found.stats}
    return {
        **{f"grad {key}": leaf for key, leaf in whole(found.grad).items()},
        **{f"inner {key}": leaf for key, leaf in whole(found.inner).items()},
        **{f"next {key}": leaf for key, leaf in whole(y).items()},
        "outer": found.outer_loss,
        "inner": found.inner_loss,
        "codes": codes,
        **figures,
    }


def attempt(estimator: Any, solver: Any, mesh: DeviceMesh | None) -> Any:
    try:
        return estimate(estimator, solver, mesh)
    except (ValueError, TypeError, bl.BilevelError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def mesh_of(ranks: Ranks) -> DeviceMesh:
    return DeviceMesh.from_group(ranks.group, "cpu")


def all_estimators(ranks: Ranks) -> dict[str, Any]:
    mesh = mesh_of(ranks)
    return {label: attempt(estimator, SGD, mesh) for label, estimator in ESTIMATORS.items()}


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU(), torch.nn.Linear(7, 3)).double()


def weighted(module: Any, x: Any, batch: Any) -> Tensor:
    losses = torch.nn.functional.cross_entropy(module(batch["rows"]), batch["labels"], reduction="none")
    return (x["weights"][batch["index"]].sigmoid() * losses).mean() + 0.01 * sum(p.square().sum() for p in x.values())


def clean(module: Any, x: Any, batch: Any) -> Tensor:
    return torch.nn.functional.cross_entropy(module(batch["rows"]), batch["labels"])


def fsdp_data(part: slice = slice(None)) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(16, 5, generator=generator, dtype=D)
    labels = torch.randint(0, 3, (16,), generator=generator)
    index = torch.arange(8)
    inner = {"rows": rows[:8][part], "labels": labels[:8][part], "index": index[part]}
    outer = {"rows": rows[8:][part], "labels": labels[8:][part]}
    return {"weights": torch.linspace(-1, 1, 8, dtype=D)}, bl.Batches(inner, outer)


FIRST = {
    "corrected": bl.FirstOrderCorrected(0.01),
    "sama": bl.estimators.Sama(),
    "darts": bl.estimators.Darts(),
    "pbgd": bl.estimators.PBGD(2.0),
}


def fsdp(ranks: Ranks, split: bool) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    warnings.simplefilter("ignore")
    mesh, module, found = mesh_of(ranks), net(), {}
    for layer in (module[0], module[2], module):
        fully_shard(layer, mesh=mesh)
    x, batches = fsdp_data(slice(ranks.rank, None, ranks.size) if split else slice(None))
    inner_loss, outer_loss = (bl.distributed.fully_sharded(module, loss) for loss in (weighted, clean))
    problem, before = bl.Problem(inner_loss, outer_loss), [p.full_tensor().clone() for p in module.parameters()]
    y = dict(module.named_parameters())
    for name, estimator in FIRST.items():
        hg = bl.hypergradient(problem, x, y, batches, solver=bl.Descent(bl.SGD(0.3), 4), estimator=estimator)
        found[name] = {"x": hg.grad["weights"], **whole(hg.inner), "f": hg.outer_loss, "g": hg.inner_loss}
    for a, b in zip(before, module.parameters(), strict=True):
        assert torch.equal(a, b.full_tensor()), "the module's own parameters moved"
        assert b.grad is None
    for name, estimator in {"unrolled": bl.Unrolled(), "implicit": bl.Implicit(bl.CG(2))}.items():
        try:
            bl.hypergradient(problem, x, y, batches, solver=bl.Descent(bl.SGD(0.3), 2), estimator=estimator)
        except bl.NotTwiceDifferentiableError as error:
            found[name] = str(error)
    return found
