"""The tensors meter against the allocator's own record, which torch's profiler keeps: an independent witness, on the
CPU too."""

import gc

import pytest
import torch
from bilevel_profiling.meters.tensors import Tensors
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import bilevel as bl

# Random states, which estimators read and torch makes past the dispatcher, and scratch memory of small kernels.
UNSEEN = 32 * 1024


def allocator_peak(call):
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    events = sorted(
        (event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    )
    peak = live = 0
    for event in events:
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def metered_peak(call):
    gc.collect()
    with Tensors() as meter:
        call()
    assert meter.live_bytes == 0
    return meter.peak_bytes


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(64), nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + self.out(torch.softmax(q @ k.mT / 8, -1) @ v)


NETS = {
    "perceptron": lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)),
    "residual": lambda: nn.Sequential(nn.Linear(64, 64), Residual(), Residual(), nn.GELU(), nn.Linear(64, 10)),
    "attention": lambda: nn.Sequential(
        nn.Unflatten(0, (32, -1)), Attention(), Attention(), nn.Flatten(0, 1), nn.Linear(64, 10)
    ),
    "normalized": lambda: nn.Sequential(
        nn.Linear(64, 64), nn.BatchNorm1d(64, track_running_stats=False), nn.Tanh(), nn.Linear(64, 10)
    ),
}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64))

    def forward(self, x):
        return x + self.inside(x)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(
    "estimator",
    [bl.Unrolled(), bl.Implicit(bl.Neumann(3, 0.1)), bl.FirstOrderCorrected()],
    ids=lambda estimator: type(estimator).__name__,
)
def test_the_peak_is_that_of_the_allocator(net, estimator):
    torch.manual_seed(0)
    call, inner = bl.functional(NETS[net]())
    x, y = torch.randn(1024, 64), torch.randint(0, 10, (1024,))
    problem = bl.Problem(
        lambda w, v, _: (v.sigmoid() * F.cross_entropy(call(w, x), y, reduction="none")).mean(),
        lambda w, v, _: F.cross_entropy(call(w, x), y),
    )
    outer, solver = torch.zeros(1024), bl.Descent(bl.Adam(lr=1e-3), 3)

    def run():
        bl.hypergradient(problem, outer, inner, bl.Batches(None, None), solver=solver, estimator=estimator)

    run()
    metered, allocated = metered_peak(run), allocator_peak(run)
    assert abs(metered - allocated) <= UNSEEN, f"{metered:,} metered, {allocated:,} allocated"
