"""Every entry of the catalogue against the closed form of what it returns, its bias and its variance included."""

import math
import warnings

import pytest
import torch

import bilevel as bl
from bilevel.testing.catalogue import ENTRIES, Quadratic

STEPS = {"program": 7, "solution": 130}
DRAWS = 400
BY_ESTIMATOR = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.label)


def flat(tree):
    return torch.cat([leaf.reshape(-1).double() for leaf in torch.utils._pytree.tree_leaves(tree)])


def settled(entry, posed, estimator=None):
    """The last of as many calls as it needs, each going on from the one before."""
    inner, state, solver = posed.pop("inner"), None, posed["solver"]
    if entry.settles > 1:  # the steps are shared out: y is carried as well
        posed["solver"] = bl.Descent(solver.optimizer, 1 + math.ceil(solver.steps / entry.settles))
    for _ in range(entry.settles):
        found = bl.hypergradient(inner=inner, state=state, estimator=estimator or entry.estimator, **posed)
        inner, state = inner if found.next_inner is None else found.next_inner, found.state
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@BY_ESTIMATOR
def test_what_it_returns_on_a_quadratic_is_its_closed_form(entry, dtype):
    quadratic = Quadratic.example(STEPS[entry.target])
    posed = quadratic.posed(dtype)
    if entry.variance is not None:
        return  # (below)
    found, expected = settled(entry, posed), entry.expected(quadratic)
    assert not found.status.failed
    assert {leaf.dtype for leaf in torch.utils._pytree.tree_leaves(found.grad)} == {dtype}
    # A difference quotient with its default width keeps the root of rounding, or a power near it.
    stated = entry.bias is None or entry.on_quadratic is not None
    bound = {torch.float64: 1e-9 if stated else 1e-6, torch.float32: 2e-5 if stated else 5e-3}[dtype]
    assert (flat(found.grad) - expected).norm() <= bound * expected.norm()


RANDOM = [entry for entry in ENTRIES if entry.variance is not None]


@pytest.mark.parametrize("entry", RANDOM, ids=lambda entry: entry.label)
def test_mean_and_variance_of_one_that_draws(entry):
    """The mean within 4.5 standard errors in each number; the variance within 4.5 of its own (as of a normal law,
    doubled for heavier tails)."""
    quadratic = Quadratic.example(STEPS[entry.target])
    torch.manual_seed(0)
    draws = torch.stack([flat(settled(entry, quadratic.posed()).grad) for _ in range(DRAWS)])
    expected = entry.expected(quadratic)
    error = (draws.mean(0) - expected).abs()
    assert (error <= 4.5 * draws.std(0) / math.sqrt(DRAWS) + 1e-9 * expected.norm()).all()
    variance, promised = float(draws.var(0).sum()), float(entry.variance(quadratic))
    assert abs(variance - promised) <= 2 * 4.5 * promised * math.sqrt(2 / DRAWS)


def smooth(quadratic):
    """The quadratic with a convex term that is none, and its exact hypergradient by a long unroll."""
    posed = quadratic.posed()
    problem = posed["problem"]

    def inner_loss(y, x, batch):
        bent = sum((leaf - 0.3).cosh().log().sum() for leaf in y.values())
        return problem.inner_loss(y, x, batch) + 0.5 * bent

    posed["problem"] = bl.Problem(inner_loss, problem.outer_loss)
    exact = bl.hypergradient(**posed, estimator=bl.Unrolled("iterates"))
    return posed, flat(exact.grad)


@pytest.mark.parametrize(
    "entry", [entry for entry in ENTRIES if entry.slope is not None], ids=lambda entry: entry.label
)
def test_the_bias_falls_with_its_order(entry):
    quadratic = Quadratic.example(STEPS[entry.target])
    errors = []
    for value in entry.slope.values:
        posed, exact = smooth(quadratic)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = settled(entry, posed, entry.slope.make(value))
        assert not found.status.failed
        errors.append(float((flat(found.grad) - exact).norm()))
    values = entry.slope.values
    for one, other, a, b in zip(errors, errors[1:], values, values[1:], strict=False):
        assert abs(math.log(one / other) / math.log(a / b) - entry.slope.order) < 0.15
