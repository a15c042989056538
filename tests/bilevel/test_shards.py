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


SOLVERS = {
    "sgd": bl.Descent(bl.SGD(0.2), 6),
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
    return {entry.label: attempt(entry.estimator, SOLVERS["sgd"], mesh) for entry in testing.ENTRIES}
