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
