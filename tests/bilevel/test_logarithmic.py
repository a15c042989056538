"""The logarithm of a homogeneous problem, its trajectory rescaled: equal where both fit, right where one does not."""

import pytest
import torch

import bilevel as bl
from bilevel.problems.logarithmic import logarithmic, restored

H = torch.tensor([2.0, 0.5], dtype=torch.float64)


def run(eta, steps, dtype, estimator=None, *, scaled=True, **sgd):
    h = H.to(dtype)
    plain = bl.Problem(*2 * [lambda y, x, b: 0.5 * (h * y["w"] * y["w"]).sum()])
    x, y, batches = torch.tensor(eta, dtype=dtype), {"w": torch.ones(2, dtype=dtype)}, bl.Batches(None, None)
    solver = bl.Descent(bl.SGD(lr=lambda x: x, **sgd), steps)
    if scaled:
        problem, y, solver = logarithmic(plain, x, y, batches, solver)
    else:
        problem = bl.Problem(plain.inner_loss, lambda y, x, b: plain.outer_loss(y, x, b).log() / steps)
    return bl.hypergradient(problem, x, y, batches, solver=solver, estimator=estimator or bl.Unrolled())


@pytest.mark.parametrize(
    ("eta", "steps", "slope"),
    [(0.5, 80, -4 / 3), (0.8, 400, 5.0), (1.9, 80, 10 / 7), (3.0, 80, 0.8), (20.0, 80, 4 / 39)],
)
def test_the_five_cases_in_float32(eta, steps, slope):
    """TP3 of the methods' dossier; without the wrapper all but the first are NaN, or 0 without a word."""
    assert run(eta, steps, torch.float32).grad.item() == pytest.approx(slope, rel=2e-6)
    naive = run(eta, steps, torch.float32, scaled=False)
    assert naive.status.failed == ((eta, steps) != (0.5, 80))


@pytest.mark.parametrize("estimator", [bl.Unrolled(), bl.Unrolled("iterates"), bl.Unrolled("segments")], ids=repr)
@pytest.mark.parametrize(
    "sgd", [{}, {"momentum": 0.7}, {"momentum": 0.7, "nesterov": True}, {"weight_decay": 0.1}], ids=repr
)
def test_equal_to_the_plain_logarithm_where_that_fits(sgd, estimator):
    one, other = (run(0.3, 30, torch.float64, estimator, scaled=scaled, **sgd) for scaled in (True, False))
    assert one.grad.item() == pytest.approx(other.grad.item(), rel=1e-11)
    assert one.outer_loss.item() == pytest.approx(other.outer_loss.item(), rel=1e-12)
    torch.testing.assert_close(restored(one.inner)["w"], other.inner["w"], rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    ("inner_loss", "outer_loss", "name"),
    [
        (lambda y, x, b: ((y - 1) ** 2).sum(), lambda y, x, b: (y**2).sum(), "inner_loss"),
        (lambda y, x, b: (y**4).sum(), lambda y, x, b: (y**2).sum(), "inner_loss"),
        (lambda y, x, b: (y**2).sum(), lambda y, x, b: (y**2).sum() + 1, "outer_loss"),
        (lambda y, x, b: (y**2).sum(), lambda y, x, b: y.abs().sum(), "outer_loss"),
    ],
)
def test_what_is_not_homogeneous_is_refused(inner_loss, outer_loss, name):
    x, y = torch.ones(()), torch.full((2,), 0.7)
    with pytest.raises(ValueError, match=f"{name} is not homogeneous of degree 2"):
        logarithmic(bl.Problem(inner_loss, outer_loss), x, y, bl.Batches(None, None), bl.Descent(bl.SGD(0.1), 3))


def test_another_degree_another_optimizer_and_a_start_at_zero():
    problem = bl.Problem(lambda y, x, b: (y**2).sum(), lambda y, x, b: y.abs().sum())
    x, y, batches = torch.ones(()), torch.full((2,), 0.7), bl.Batches(None, None)
    made, start, solver = logarithmic(problem, x, y, batches, bl.Descent(bl.SGD(lr=lambda x: 0.1 * x), 5), degree=1.0)
    hg = bl.hypergradient(made, x, start, batches, solver=solver, estimator=bl.Unrolled())
    assert hg.grad.item() == pytest.approx(-0.2 / 0.8, rel=1e-5)
    with pytest.raises(TypeError, match="linear in y"):
        logarithmic(problem, x, y, batches, bl.Descent(bl.Adam(0.1), 5), degree=1.0)
    with pytest.raises(ValueError, match="a start of 0 shows nothing"):
        logarithmic(problem, x, 0 * y, batches, bl.Descent(bl.SGD(0.1), 5), degree=1.0)
