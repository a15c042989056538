"""What a rank sends, counted where every collective passes: known traffic to the byte."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from bilevel_profiling.meters.collectives import Collectives
from torch import Tensor

from bilevel.distributed import Ranks

SIZE = 1000
"""float32 numbers: 4000 bytes."""


def _halves(n: int) -> list[Tensor]:
    return [torch.empty(SIZE) for _ in range(n)]


def traffic(ranks: Ranks) -> dict[str, Any]:
    """Each operator once: what the meter said, by its name, and what the operator did."""
    import torch.distributed._functional_collectives as functional

    group, n, me = ranks.group, ranks.size, ranks.rank
    x = torch.full((SIZE,), float(me))
    calls: dict[str, Any] = {
        "all_reduce": lambda: dist.all_reduce(x.clone(), group=group),
        "all_reduce, later": lambda: dist.all_reduce(x.clone(), group=group, async_op=True).wait(),
        "all_reduce, functional": lambda: functional.all_reduce(x, "sum", group) + 0,
        "all_gather": lambda: dist.all_gather(_halves(n), x, group=group),
        "all_gather, one tensor": lambda: dist.all_gather_into_tensor(torch.empty(n * SIZE), x, group=group),
        "all_gather, functional": lambda: functional.all_gather_tensor(x, 0, group) + 0,
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(torch.empty(SIZE // n), x, group=group),
        "reduce_scatter, functional": lambda: functional.reduce_scatter_tensor(x, "sum", 0, group) + 0,
        "broadcast": lambda: dist.broadcast(x.clone(), group_src=0, group=group),
        "reduce": lambda: dist.reduce(x.clone(), group_dst=0, group=group),
        "gather": lambda: dist.gather(x, _halves(n) if me == 0 else None, group_dst=0, group=group),
        "scatter": lambda: dist.scatter(torch.empty(SIZE), _halves(n) if me == 0 else None, group_src=0, group=group),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty(SIZE), x, group=group),
        "barrier": lambda: dist.barrier(group),
        "nothing": lambda: (x * 2).sum(),
    }
    found = {}
    for name, call in calls.items():
        with Collectives() as meter:
            call()
        found[name] = meter.figures()
    return found


@pytest.mark.parametrize("count", [1, 2, 4])
def test_known_traffic_is_measured_to_the_byte(ranks: Any, count: int) -> None:
    whole = 4 * SIZE
    parts = whole * (count - 1) // count
    expected = {
        "all_reduce": 2 * parts,
        "all_gather": whole * (count - 1),
        "reduce_scatter": parts,
        "all_to_all": parts,
        "barrier": 0,
    }
    by_root = {"broadcast": whole if count > 1 else 0, "reduce": 0, "gather": 0, "scatter": whole * (count - 1)}
    by_last = {"broadcast": 0, "reduce": whole, "gather": whole, "scatter": 0}
    for rank, found in enumerate(ranks.run(count, traffic)):
        assert isinstance(found, dict), found
        assert found.pop("nothing") == {"sent_bytes": 0, "collectives": {}, "collective_seconds": 0.0, "notes": ()}
        for said, figures in found.items():
            name = said.partition(",")[0]
            assert figures["collectives"] == {name: 1}, said
            assert figures["collective_seconds"] > 0, said
            if name in expected:
                assert figures["sent_bytes"] == expected[name], said
            elif rank == 0:
                assert figures["sent_bytes"] == by_root[name], said
            elif rank == count - 1:
                assert figures["sent_bytes"] == by_last[name], said


def sharded(ranks: Ranks) -> dict[str, Any]:
    """A loss of a net that FSDP2 shards, with its gradient, and a norm of a DTensor, under two counters."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = DeviceMesh.from_group(ranks.group, "cpu")
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    for layer in (net[0], net[2], net):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    spread = distribute_tensor(torch.arange(64.0).reshape(8, 8), mesh, [Shard(0)])

    def fsdp() -> None:
        net(torch.ones(2, 8)).square().sum().backward()

    def norm() -> float:
        return float((spread * spread).sum().full_tensor())

    found: dict[str, Any] = {}
    for name, call in {"fsdp": fsdp, "norm": norm}.items():
        call()
        with Collectives() as meter:
            call()
        with CommDebugMode() as theirs:
            call()
        found[name] = meter.figures(), theirs.get_total_counts()
    return {**found, "value": norm()}


def test_collectives_of_fsdp_and_dtensor_are_seen(ranks: Any) -> None:
    numbers = (8 * 16 + 16) + (16 * 4 + 4)
    for found in ranks.run(2, sharded):
        assert isinstance(found, dict), found
        (fsdp, theirs), (norm, calls) = found["fsdp"], found["norm"]
        # Parameters are gathered in the forward pass and again in the backward pass, then gradients are reduced.
        assert fsdp["collectives"] == {"all_gather": 4, "reduce_scatter": 2}
        assert theirs == 6
        assert fsdp["sent_bytes"] == 3 * 4 * numbers // 2
        assert norm["collectives"] == {"all_reduce": calls} == {"all_reduce": 1}
        assert norm["sent_bytes"] == 4
        assert found["value"] == sum(i * i for i in range(64))
