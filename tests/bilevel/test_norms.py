"""Norms of long vectors: as accurate and as safe as sums in float64, without a copy in float64."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bilevel.space.inner_product import Space


@pytest.mark.parametrize("scale", [1.0, 1e25, 1e-30, 0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("tasks", [None, 3])
@pytest.mark.parametrize("length", [5, 4096, 70_001])
def test_the_norm_is_that_of_float64(length, tasks, scale):
    leaf = torch.randn(*([] if tasks is None else [tasks]), length, generator=torch.Generator().manual_seed(0)) * scale
    leaves = (leaf, leaf[..., :7] * 2)
    found = Space(tasks).norm(leaves)
    wide = [leaf.double().reshape(tasks or 1, -1) for leaf in leaves]
    exact = torch.linalg.vector_norm(torch.cat(wide, dim=1), dim=1)
    torch.testing.assert_close(found.reshape(-1), exact, rtol=1e-7, atol=0, equal_nan=True)
    assert found.shape == (() if tasks is None else (tasks,))
    assert found.dtype == torch.float64


def test_one_large_number_among_small_ones_is_seen():
    leaf = torch.full((70_001,), 1e-20)
    leaf[69_990] = 3e20
    assert float(Space().norm((leaf,))) == pytest.approx(3e20, rel=1e-7)


def test_the_norm_maps_over_vmap_and_runs_on_fake_tensors():
    rows = torch.randn(4, 5000)
    mapped = torch.func.vmap(lambda row: Space().norm((row,)))(rows)
    torch.testing.assert_close(mapped, torch.linalg.vector_norm(rows.double(), dim=1), rtol=1e-7, atol=0)
    mode = FakeTensorMode()
    fake = mode.from_tensor(rows[0])
    with mode:
        assert Space().norm((fake,)).shape == ()
