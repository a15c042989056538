"""Findings on layers and single loops: each test failed before its mend."""

import pytest
import torch

import bilevel as bl

DOUBLE = torch.float64
NONE = bl.Batches(None, None)


# --- single loops


@pytest.mark.parametrize("make", [bl.estimators.AmIGO, bl.estimators.StocBiO])
def test_a_residual_that_grows_for_a_negative_eigenvalue_is_not_blamed_on_the_rate(make):
    """2 / (largest eigenvalue) is 5. v'Hv is positive, and does not tell."""
    h = torch.tensor([0.4, -0.2], dtype=DOUBLE)
    problem = bl.Problem(
        lambda y, x, b: (h * y.square()).sum() / 2 - (x * y).sum(),
        lambda y, x, b: 1.9 * y[0] + y[1],
    )
    arguments = problem, torch.ones(2, dtype=DOUBLE), torch.ones(2, dtype=DOUBLE), NONE
    hg = bl.hypergradient(*arguments, solver=bl.Descent(bl.SGD(0.1), steps=1), estimator=make(2.5, 2))
    assert hg.status is bl.Status.NEGATIVE_CURVATURE


# --- differences


@pytest.mark.parametrize("scheme", ["symmetric", "forward", 4])
@pytest.mark.parametrize("by_layer", [True, False])
def test_an_inner_loss_too_large_for_the_difference_is_not_ok(scheme, by_layer):
    """In float32 a sum over many examples leaves nothing of nu f: the estimate was 0, with the status OK."""

    def loss(y, x, batch):
        return 1e6 * ((y - x).square().sum() + (y.square() * x).sum()) / 2

    x, start, seen = torch.ones(2, requires_grad=True), torch.zeros(2), []
    more = {"solver": bl.Descent(bl.SGD(3e-7), steps=60), "estimator": bl.FirstOrderCorrected(scheme=scheme)}
    if by_layer:
        bl.solution(loss, x, start, NONE, report=seen.append, **more).sum().backward()
    else:
        seen.append(bl.hypergradient(bl.Problem(loss, lambda y, x, b: y.sum()), x, start, NONE, **more))
    assert seen[-1].status is bl.Status.DIGITS_LOST


# --- loops that stop by themselves


@pytest.mark.parametrize("estimator", [bl.Unrolled(last=2), bl.Unrolled("iterates", last=1)], ids=["graph", "iterates"])
@pytest.mark.parametrize("by_layer", [True, False])
def test_a_loop_that_took_no_step_is_stopped_early_and_not_unseen(estimator, by_layer):
    """It was said to see the inner loss, and not to see x, which enters through the inner loss."""

    def loss(y, x, batch):
        return (y - x).square().sum()

    x, start, solver = torch.ones(2, requires_grad=True), torch.zeros(2), bl.Converge(bl.SGD(0.1), tol=10.0)
    if by_layer:
        y = bl.solution(loss, x, start, NONE, solver=solver, estimator=estimator)
        with pytest.raises(bl.BilevelError, match="STOPPED_EARLY"):
            y.sum().backward()
    else:
        problem = bl.Problem(loss, lambda y, x, b: y.sum())
        hg = bl.hypergradient(problem, x, start, NONE, solver=solver, estimator=estimator)
        assert hg.status is bl.Status.STOPPED_EARLY
