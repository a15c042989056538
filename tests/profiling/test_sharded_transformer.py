"""The benchmark of the sharded transformer, at a small size: bytes of each rank, as measured and as forecast."""

import pathlib
import sys
from typing import Any

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))
import sharded_transformer as benchmark
from torch.distributed.device_mesh import DeviceMesh

from bilevel.distributed import Ranks

SIZES = {"layers": 4, "width": 48, "heads": 2, "context": 8, "batch": 8}


def on_ranks(ranks: Ranks, estimator: str) -> dict[str, Any]:
    mesh = DeviceMesh.from_group(ranks.group, "cpu") if ranks.size > 1 else None
    return benchmark.measured(SIZES, estimator, mesh, (ranks.rank, ranks.size), None)


@pytest.mark.parametrize("estimator", ["corrected"])
def test_a_step_that_exceeds_a_limit_fits_when_it_is_sharded(ranks: Any, estimator: str) -> None:
    alone, *_ = ranks.run(1, on_ranks, estimator)
    several = ranks.run(4, on_ranks, estimator)
    limit = 0.7 * benchmark.forecast(SIZES, estimator, 1)
    assert alone["peak"] > limit
    said = benchmark.forecast(SIZES, estimator, 4)
    for each in several:
        assert each["peak"] < limit
        assert each["peak"] == pytest.approx(said, rel=0.02)
        assert each["grad"] == pytest.approx(alone["grad"], rel=1e-2, abs=1e-4)
