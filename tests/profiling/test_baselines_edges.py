"""Baselines at the edges: what Betty leaves out of its own account, calls of the library inside a baseline, features
and proximal terms, batches that are spoiled, zero gradients, and sentences for what is wrong."""

import pytest
import torch
from bilevel_profiling.baselines import betty

import bilevel as bl
from bilevel.integrations.betty import release

SGD = bl.SGD(lr=0.05)
needs_betty = pytest.mark.skipif(not release.available(), reason="betty-ml is not installed")


# --- Betty


def ragged():
    """One batch a step, of another size each."""
    draw = torch.Generator().manual_seed(0)
    batches = [torch.randn(rows, 3, generator=draw, dtype=torch.float64) for rows in (4, 2, 5)]

    def g(y, x, batch):
        return (batch @ y - 1).square().mean() + x.exp() * y.square().sum()

    start = torch.randn(3, generator=draw, dtype=torch.float64)
    steps = bl.PerStep(batches, ragged=True)
    problem = bl.Problem(g, lambda y, x, b: (b @ y - 2).square().mean())
    return problem, torch.tensor(0.3, dtype=torch.float64), start, bl.Batches(steps, batches[0])


@needs_betty
@pytest.mark.parametrize("name", ["cg", "neumann", "darts", "sama", "unrolled"])
def test_the_inner_loss_of_betty_is_that_at_the_last_iterate(name):
    if name not in betty.methods():
        pytest.skip(f"the installed release of betty-ml has no {name}")
    problem, x, y, batches = ragged()
    row = betty.baselines()[f"betty {name}"]
    found = bl.hypergradient(problem, x, y, batches, solver=bl.Descent(SGD, 3), estimator=row)
    at_last = problem.inner(found.inner, x, batches.inner_at(2))
    assert float(found.inner_loss) == pytest.approx(float(at_last), rel=1e-13)


def informed(start=None):
    """A loss that takes a gradient inside."""
    points = torch.linspace(0, 1, 7, dtype=torch.float64)

    def u(y, z):
        return 1 + y[0] * z + y[1] * z * z

    def residual(y, x, z):
        z = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(u(y, z).sum(), z, create_graph=True)
        return (slope + x * u(y, z)).square().mean()

    problem = bl.Problem(residual, lambda y, x, z: (u(y, z) - (-2 * z).exp()).square().mean(), init=start)
    inner = torch.zeros(2, dtype=torch.float64) if start is None else None
    return problem, torch.tensor(1.0, dtype=torch.float64), inner, bl.Batches(points, points, curvature=points)


def start_by_a_gradient(x, z):
    at = z.detach().requires_grad_()
    (slope,) = torch.autograd.grad((at**2).sum(), at)
    return slope[:2] * x


@needs_betty
@pytest.mark.parametrize("start", [None, start_by_a_gradient], ids=["given", "of init"])
@pytest.mark.parametrize("name", ["unrolled", "neumann", "darts"])
def test_losses_that_take_gradients_go_through_betty(name, start):
    problem, x, inner, batches = informed(start)
    given = {"solver": bl.Descent(SGD, 3)}
    method = {"unrolled": betty.unrolled(), "neumann": betty.neumann(2), "darts": betty.darts()}[name]
    found = betty.hypergradient_with_betty(problem, x, inner, batches, given["solver"], method)
    ours = bl.hypergradient(problem, x, inner, batches, estimator=bl.Unrolled(), **given)
    assert torch.allclose(found.inner, ours.inner, rtol=1e-12)
    assert torch.allclose(found.inner_loss, ours.inner_loss, rtol=1e-12)
    assert not found.inner_loss.requires_grad
    if name == "unrolled":
        assert torch.allclose(found.grad, ours.grad, rtol=1e-12)
