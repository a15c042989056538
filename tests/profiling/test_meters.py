"""The meters, against numbers that can be counted by hand."""

import pytest
import torch
from bilevel_profiling.meters.clock import Clock
from bilevel_profiling.meters.cuda import Cuda
from bilevel_profiling.meters.oracles import Oracles
from bilevel_profiling.meters.storages import storage_bytes
from bilevel_profiling.meters.tensors import Tensors
from bilevel_profiling.meters.work import Work

import bilevel as bl

KIB = 256  # float32 numbers


def test_each_storage_counts_once_and_views_never():
    x = torch.ones(4 * KIB)
    with Tensors() as meter:
        x[:KIB].view(2, -1).t().detach()
        assert meter.live_bytes == 0
        y = x + 1
        kept = [y, y[1:], y.view(2, -1), y.detach()]
        assert meter.live_bytes == 4096
        del kept, y
    assert meter.live_bytes == 0
    assert meter.peak_bytes == 4096


def test_resized_and_written_storages_count_with_their_growth():
    old = torch.ones(KIB)
    with Tensors() as meter:
        fresh = torch.empty(KIB)
        fresh.resize_(3 * KIB)
        assert meter.live_bytes == 3072
        old.resize_(2 * KIB)
        assert meter.live_bytes == 4096
        torch.add(torch.ones(KIB), 1, out=torch.empty(0))
    assert meter.peak_bytes >= 4096


def test_meters_nest_and_each_counts_from_its_own_start():
    with Tensors() as outside:
        a = torch.ones(KIB)
        with Tensors() as inside:
            b = torch.ones(2 * KIB) + a[0]
            del b
        c = torch.ones(KIB)
    assert inside.peak_bytes == 2 * 2048
    assert outside.peak_bytes == 1024 + 2 * 2048
    assert outside.live_bytes == 2048
    del a, c


def test_an_exception_leaves_the_meter_readable_and_torch_as_it_was():
    meter = Tensors()

    def fail():
        with meter:
            x = torch.ones(KIB)
            raise RuntimeError(f"{x.shape}")

    with pytest.raises(RuntimeError):
        fail()
    assert meter.peak_bytes == 1024
    assert torch.utils._python_dispatch._len_torch_dispatch_stack() == 0


def backward(loss, x, make, second):
    if make == "func":
        first = torch.func.grad(loss)
        torch.func.grad(lambda x: first(x).sum())(x) if second else first(x)
    else:
        (gradient,) = torch.autograd.grad(loss(x), x, create_graph=second)
        if second:
            torch.autograd.grad(gradient.sum(), x)


@pytest.mark.parametrize("make", ["autograd", "func"])
def test_what_backward_passes_hold_is_seen(make):
    """sin(x).sin().sum(): forward keeps one intermediate; double backward needs more than backward."""
    x = torch.ones(KIB * 4, requires_grad=make == "autograd")

    def loss(x):
        return x.sin().sin().sum()

    peaks = []
    for second in (False, True):
        with Tensors() as meter:
            backward(loss, x, make, second)
        assert meter.live_bytes == 0
        peaks.append(meter.peak_bytes)
    assert 3 * 4096 <= peaks[0] < peaks[1]


def test_checkpointing_lowers_the_peak_that_is_measured():
    layers = torch.nn.Sequential(*[torch.nn.Tanh() for _ in range(16)])
    x = torch.randn(16 * KIB, requires_grad=True)

    def peak(run):
        with Tensors() as meter:
            torch.autograd.grad(run().sum(), x)
        return meter.peak_bytes

    kept = peak(lambda: layers(x))
    recomputed = peak(lambda: torch.utils.checkpoint.checkpoint_sequential(layers, 4, x, use_reentrant=False))
    assert recomputed < 0.7 * kept


SCALAR = bl.Problem(lambda y, x, _: (y**2 - x * y).sum(), lambda y, x, _: (y**2).sum() / 2)


def hypergradient(estimator, steps=6):
    y, x = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    return bl.hypergradient(
        SCALAR, x, y, bl.Batches(None, None), solver=bl.Descent(bl.SGD(0.25), steps), estimator=estimator
    )


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (bl.Unrolled(), {"inner_gradient": 6, "outer_gradient": 1, "hvp": 6, "mixed": 0}),
        (bl.Unrolled("iterates"), {"inner_gradient": 12, "outer_gradient": 1, "hvp": 6, "mixed": 0}),
        (bl.Unrolled("iterates", last=2), {"inner_gradient": 8, "outer_gradient": 1, "hvp": 2, "mixed": 0}),
        # 6 = 3 + 2 + 1: forward 6, recomputed 2 + 1, rebuilt 6
        (bl.Unrolled("segments"), {"inner_gradient": 15, "outer_gradient": 1, "hvp": 6, "mixed": 0}),
        (bl.Implicit(bl.Neumann(4, 0.2)), {"inner_gradient": 7, "outer_gradient": 1, "hvp": 4, "mixed": 1}),
        (bl.Implicit(bl.Dense()), {"inner_gradient": 7, "outer_gradient": 1, "hvp": 3, "mixed": 1}),
        (bl.FirstOrderCorrected(0.1), {"inner_gradient": 14, "outer_gradient": 14, "hvp": 0, "mixed": 0}),
        (bl.FirstOrderCorrected(0.1, "forward"), {"inner_gradient": 14, "outer_gradient": 8, "hvp": 0, "mixed": 0}),
    ],
    ids=str,
)
def test_oracle_calls_are_exact(estimator, expected):
    with Oracles() as meter:
        found = hypergradient(estimator)
    assert meter.figures()["calls"] == expected == found.stats["calls"]
    per_phase = [phase["calls"] for phase in meter.phases().values()]
    assert {name: sum(calls.get(name, 0) for calls in per_phase) for name in expected} == expected


def test_matmul_flops_are_those_of_the_products():
    a, b = torch.ones(8, 16), torch.ones(16, 4)
    with Work() as meter:
        (a @ b).tanh()
    assert meter.figures()["matmul_flops"] == 2 * 8 * 16 * 4


def test_the_clock_knows_the_phases():
    clock = Clock()
    for _ in range(3):
        with clock:
            hypergradient(bl.Unrolled("iterates"), 20)
    figures = clock.figures()
    assert figures["wall_seconds_low"] <= figures["wall_seconds"] <= figures["wall_seconds_high"]
    assert figures["repeats"] == 3
    inside = sum(phase["wall_seconds"] for phase in clock.phases().values())
    assert 0.3 * figures["wall_seconds"] < inside <= 1.5 * figures["wall_seconds_high"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without CUDA")
def test_the_cuda_meter_finds_nothing_without_a_device():
    with Cuda() as meter:
        torch.ones(3)
    assert set(meter.figures().values()) == {None}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_cuda_meter_agrees_with_the_tensors_meter():
    torch.ones(1, device="cuda")
    with Cuda() as cuda, Tensors() as tensors:
        x = torch.ones(2**20, device="cuda")
        y = x + 1
    assert cuda.figures()["cuda_requested_bytes"] == tensors.peak_bytes == 2 * 4 * 2**20
    del x, y


def test_shared_storages_are_counted_once_in_the_base():
    x = torch.zeros(KIB)
    assert storage_bytes({"a": x, "b": [x[:10], torch.zeros(2)]}) == 1024 + 8
