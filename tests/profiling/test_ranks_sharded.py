"""A case whose inner variable is sharded: what each rank measures, and what a forecast for so many says."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bilevel_profiling import Case, Parallel, Record, forecast, measure

import bilevel as bl
from bilevel.distributed import Ranks
from bilevel.engine import spans
from bilevel.space import tree

WIDTH, HIDDEN, ROWS = 64, 256, 16
LARGEST = 4 * WIDTH * HIDDEN
"""Bytes of the largest tensor: a gathered weight."""


def spread(sharded: bool) -> Callable[[Any, Ranks], Any]:
    """Tensors as DTensors: cut along their first dimension, or whole on every rank."""

    def made(value: Any, ranks: Ranks) -> Any:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        with spans.span(spans.ASIDE):
            mesh = DeviceMesh.from_group(ranks.group or dist.group.WORLD, "cpu")
        places = [Shard(0) if sharded else Replicate()]
        return tree.tree_map(lambda leaf: distribute_tensor(leaf, mesh, places), value)

    return made


def batches(given: bl.Batches, ranks: Ranks) -> bl.Batches:
    """Whole on every rank."""
    return bl.Batches(spread(False)(given.inner, ranks), spread(False)(given.outer, ranks))


def net(device: str) -> Any:
    """A small net with one penalty."""
    generator = torch.Generator().manual_seed(0)
    y = {
        "first": torch.randn(WIDTH, HIDDEN, generator=generator) / 8,
        "second": torch.randn(HIDDEN, WIDTH, generator=generator) / 16,
    }
    batch = tuple(torch.randn(ROWS, WIDTH, generator=generator) for _ in range(2))

    def off(y: Any, batch: Any) -> torch.Tensor:
        return ((batch[0] @ y["first"]).tanh() @ y["second"] - batch[1]).square().mean()

    def inner(y: Any, x: Any, batch: Any) -> torch.Tensor:
        return off(y, batch) + x["decay"].exp() * sum(leaf.square().sum() for leaf in y.values())

    problem = bl.Problem(inner, lambda y, x, batch: off(y, batch))
    return problem, {"decay": torch.tensor(-2.0)}, y, bl.Batches(batch, batch)


SHARDED = Parallel("sharded", outer=spread(False), inner=spread(True), batches=batches)
CASES = {
    label: Case(net, bl.Descent(bl.SGD(lr=0.1), 2), estimator, name="net", label=label, parallel=SHARDED)
    for label, estimator in {"corrected": bl.FirstOrderCorrected(), "graph": bl.Unrolled()}.items()
}


def measured(ranks: Ranks) -> dict[str, Record]:
    return {
        label: measure(dataclasses.replace(case, ranks=ranks), repeats=1, errors=False) for label, case in CASES.items()
    }


@pytest.mark.parametrize("count", [2, 4])
def test_a_forecast_of_shards_is_what_each_rank_measures(ranks: Any, count: int) -> None:
    """Bytes sent exactly. A measured peak may hold a buffer longer, until gloo gives it back; never less."""
    found = ranks.run(count, measured)
    assert all(isinstance(each, dict) for each in found), found
    for label, case in CASES.items():
        wanted = forecast(case, ranks=count)
        for each in (rank[label] for rank in found):
            assert each.status == "OK"
            assert each.collectives == wanted.collectives, label
            assert each.sent_bytes == wanted.sent_bytes > 0, label
            assert each.base_tensor_bytes == wanted.base_tensor_bytes, label
            assert 0 <= each.peak_tensor_bytes - wanted.peak_tensor_bytes <= 2 * LARGEST, label
        assert min(rank[label].peak_tensor_bytes for rank in found) < forecast(case, ranks=1).peak_tensor_bytes
