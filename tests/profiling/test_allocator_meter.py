"""The allocator meter: what compiled code takes, which a dispatch mode does not see. It is held against the meter of
tensors where both see everything, and against tensors that only it can see."""

import gc

import pytest
import torch
from bilevel_profiling import Case
from bilevel_profiling.measurement.trial import Trial
from bilevel_profiling.meters import Allocator, Tensors
from torch.utils._python_dispatch import _disable_current_modes

import bilevel as bl
from bilevel.engine import spans
from bilevel.problems import hypercleaning

UNSEEN = 32 * 1024
"""Random states, 5,056 bytes each, and scratch memory of small kernels."""
MEMORY = 4 * 1024
"""Bytes of 1,024 numbers."""


def metered(call, tidy=lambda: None):
    gc.collect()
    with Allocator() as meter:
        result = call()
        del result
        tidy()
        gc.collect()
    return meter


ESTIMATORS = {
    "graph": bl.Unrolled(),
    "iterates": bl.Unrolled("iterates"),
    "segments": bl.Unrolled("segments"),
    "implicit": bl.Implicit(bl.CG(3)),
}


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_it_agrees_with_the_meter_of_tensors_where_that_sees_everything(estimator):
    solver = bl.Descent(bl.SGD(lr=0.1), steps=6)
    trial = Trial(Case(hypercleaning.setup, solver=solver, estimator=estimator))
    trial.hypergradient()
    trial.tidy()
    gc.collect()
    with Tensors() as tensors:
        result = trial.hypergradient()
    del result
    allocator = metered(trial.hypergradient, trial.tidy)
    assert 0 <= allocator.peak_bytes - tensors.peak_bytes <= UNSEEN
    assert tensors.peak_bytes > 100 * UNSEEN, "the agreement is one of 1 %, at least"
    assert allocator.live_bytes == 0
    mine, others = allocator.phases(), tensors.phases()
    assert mine.keys() == others.keys()
    for phase, found in others.items():
        assert 0 <= mine[phase]["peak_tensor_bytes"] - found["peak_tensor_bytes"] <= UNSEEN, phase


def test_a_leak_is_seen():
    kept = []
    assert metered(lambda: torch.ones(1024)).live_bytes == 0
    leaking = metered(lambda: kept.append(torch.ones(1024)))
    assert leaking.live_bytes == leaking.figures()["kept_tensor_bytes"] == MEMORY

    def loop(steps):
        held = []
        for _ in range(steps):
            held.append(torch.ones(1024))

    peaks = [metered(lambda steps=steps: loop(steps)).peak_bytes for steps in (1, 11)]
    assert peaks[1] - peaks[0] == 10 * MEMORY


def test_what_a_dispatch_mode_does_not_see_is_seen():
    def hidden():
        with _disable_current_modes():
            return torch.ones(1024)

    with Tensors() as tensors:
        hidden()
    assert tensors.peak_bytes == 0
    assert metered(hidden).peak_bytes == MEMORY


def test_memory_that_was_there_before_counts_for_nothing():
    before = [torch.ones(1024), torch.ones(2048)]

    def call():
        before.clear()
        return torch.ones(512)

    meter = metered(call)
    assert (meter.peak_bytes, meter.live_bytes) == (MEMORY // 2, 0)


def test_phases_are_told_by_the_spans():
    def call():
        outside = torch.ones(1024)
        with spans.span(spans.INNER):
            held = torch.ones(1024)
            with spans.span(spans.HVP):
                (held + 1).sum()
        del held
        with spans.span(spans.OUTER):
            pass
        return outside

    meter = metered(call)
    peaks = {phase: found["peak_tensor_bytes"] for phase, found in meter.phases().items()}
    assert peaks == {"inner": meter.peak_bytes, "outer": MEMORY}
    assert 0 < meter.peak_bytes - 3 * MEMORY <= 64  # the sum, and the number 1
    places = {(entry.phase, entry.span, entry.operator): entry.bytes for entry in meter.alive()}
    assert places["", "", "aten.ones"] == places["inner", "", "aten.ones"] == MEMORY
    assert places["inner", "hvp", "aten.add"] == MEMORY
    points = meter.figures()["timeline"]
    assert max(level for _, level, phase, *_ in points if phase == "inner") == meter.peak_bytes
    assert points[-1][1] == meter.live_bytes == 0


def test_its_numbers_are_there_after_an_error():
    def call():
        torch.ones(1024)
        raise ValueError

    meter = Allocator()
    with pytest.raises(ValueError), meter:
        call()
    assert meter.peak_bytes == MEMORY
