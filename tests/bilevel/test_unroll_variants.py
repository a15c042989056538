"""Revolve: the counts of the binomial rule, its memory, and the gradient of the program."""

import functools

import catalogue
import pytest
import torch
from bilevel_profiling.meters.tensors import Tensors

import bilevel as bl
from bilevel.engine import spans
from bilevel.estimators.reverse.plans import advances

D = torch.float64


@functools.cache
def fewest(steps, snapshots):
    """The recursion that the binomial formula solves."""
    if steps <= 1:
        return 0
    if snapshots == 1:
        return steps * (steps - 1) // 2
    return min(m + fewest(steps - m, snapshots - 1) + fewest(m, snapshots) for m in range(1, steps))


def scalar(steps, estimator, **more):
    problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
    return bl.hypergradient(
        problem,
        torch.tensor(1.0, dtype=D),
        torch.tensor(0.0, dtype=D),
        bl.Batches(None, None),
        solver=bl.Descent(bl.SGD(0.25), steps),
        estimator=estimator,
        **more,
    )


@pytest.mark.parametrize(
    ("steps", "snapshots", "advanced"), [(10, 3, 15), (20, 3, 45), (60, 5, 156), (100, 5, 316), (100, 10, 222)]
)
def test_the_steps_run_again_are_those_of_the_binomial_rule(steps, snapshots, advanced):
    calls = spans.Calls()
    with spans.listen(calls):
        scalar(steps, bl.estimators.Revolve(snapshots))
    assert calls.calls["inner_gradient"] == advanced + 1 + steps
    assert calls.calls["hvp"] == steps
    assert advances(steps, snapshots) == advanced


def test_the_formula_is_the_best_of_all_schedules():
    assert all(advances(l, c) == fewest(l, c) for l in range(1, 60) for c in range(1, 8))
    assert advances(1000, 10) == 3636


@pytest.mark.parametrize("snapshots", [1, 2, 5, 50])
@pytest.mark.parametrize("optimizer", ["momentum", "adam", "learned lr"])
def test_every_number_of_snapshots_gives_the_gradient_of_the_program(snapshots, optimizer):
    problem, outer, inner, batches = catalogue.weighted_net()
    noisy = bl.Problem(
        lambda y, x, b: problem.inner_loss(y, x, (torch.nn.functional.dropout(b[0], 0.3), b[1])), problem.outer_loss
    )
    solver, found = bl.Descent(catalogue.OPTIMIZERS[optimizer], 9), []
    outer = outer if optimizer == "learned lr" else {name: outer[name] for name in ("weights", "decay")}
    for estimator in (bl.Unrolled(), bl.estimators.Revolve(snapshots)):
        torch.manual_seed(3)
        hg = bl.hypergradient(noisy, outer, inner, batches, solver=solver, estimator=estimator)
        found.append((*hg.grad.values(), hg.stats["cotangent_growth"], torch.rand(1)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-11, atol=1e-14)


def test_memory_is_that_of_the_snapshots_and_one_more():
    weights = torch.ones(4_000, dtype=D)

    def peak(steps, snapshots):
        problem = bl.Problem(lambda y, x, b: (x * (y - 1) ** 2).sum(), lambda y, x, b: y.square().sum())
        arguments = problem, torch.tensor(0.3, dtype=D), weights, bl.Batches(None, None)
        solver = bl.Descent(bl.SGD(0.1), steps)
        estimator = bl.estimators.Revolve(snapshots)
        with Tensors() as meter:
            bl.hypergradient(*arguments, solver=solver, estimator=estimator)
        return meter.peak_bytes / weights.nbytes

    assert peak(120, 8) == pytest.approx(peak(30, 8), rel=5e-3)
    assert peak(120, 16) - peak(120, 8) == pytest.approx(8, abs=0.05)


def test_a_number_of_snapshots_is_needed():
    for wrong in (0, True, 2.0):
        with pytest.raises(ValueError, match="snapshots="):
            bl.estimators.Revolve(wrong)
