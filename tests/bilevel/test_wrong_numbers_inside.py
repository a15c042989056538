"""Losses that differentiate inside, and autocast around many outer steps (issue 7, A14)."""

import gc
import itertools

import pytest
import torch
from right_or_refused import NONE, D, central, close

import bilevel as bl

SECOND_ORDER = {
    **{keep: bl.Unrolled(keep=keep) for keep in ("graph", "iterates", "segments")},
    "CG": bl.Implicit(bl.CG(20, 1e-12)),
    "Dense": bl.Implicit(bl.Dense()),
    "Neumann": bl.Implicit(bl.Neumann(40, 0.3)),
    "memory reduced": bl.MemoryReduced(),
}
FIRST_ORDER = {"corrected": bl.FirstOrderCorrected(), "corrected forward": bl.FirstOrderCorrected(scheme="forward")}


SOME = {**{name: SECOND_ORDER[name] for name in ("graph", "iterates", "CG")}, "corrected": FIRST_ORDER["corrected"]}


def every(estimators):
    return pytest.mark.parametrize("estimator", estimators.values(), ids=estimators)


X = torch.tensor([0.5, 0.7], dtype=D)
Y = torch.tensor([0.3, 0.2], dtype=D)

GRID = torch.linspace(0, 1, 5, dtype=D)


def pinn(y, x, batch):
    """A net u(z; y) with u' = x, as a physics-informed net has it."""
    z = GRID.to(y.dtype).clone().requires_grad_()
    u = torch.tanh(y[0] * z + y[1]) * y[0]
    (slope,) = torch.autograd.grad(u.sum(), z, create_graph=True)
    return (slope - x[0]).square().mean() + 0.3 * (y - x).square().sum()


def penalized(y, x, batch):
    """A penalty on the gradient in the inputs."""
    z = torch.ones(3, 2, dtype=y.dtype, requires_grad=True)
    score = torch.tanh(z * y).sum()
    (slope,) = torch.autograd.grad(score, z, create_graph=True)
    return (slope.norm(dim=1) - 1).square().mean() + 0.5 * (y - x).square().sum()


def sharp(y, x, batch):
    """A penalty on the gradient in y itself, of what the loss is given."""
    value = (y - x).square().sum() + y.pow(4).sum() / 4
    (slope,) = torch.autograd.grad(value, y, create_graph=True)
    return value + 0.05 * slope.square().sum()


INSIDE = {"A14 PINN": pinn, "A14 gradient penalty": penalized, "A14 sharpness": sharp}


def truth_inside(loss, outer_loss, steps):
    def value(x):
        y = Y.clone().requires_grad_()
        for _ in range(steps):
            (g,) = torch.autograd.grad(loss(y, x, None), y)
            y = (y - 0.4 * g).detach().requires_grad_()
        return outer_loss(y, x.detach().requires_grad_(), None).detach()

    return central(value, X)


def plain_outer(y, x, batch):
    return 0.5 * (y - 1).square().sum() + 0.1 * x.square().sum()


@every({**SECOND_ORDER, **FIRST_ORDER})
@pytest.mark.parametrize("outer", [plain_outer, pinn], ids=["plain f", "f differentiates too"])
@pytest.mark.parametrize("loss", INSIDE.values(), ids=INSIDE)
def test_a_loss_that_takes_a_gradient_inside_works_with_every_estimator(loss, outer, estimator):
    steps = 5 if isinstance(estimator, bl.Unrolled) else 40
    solver = bl.Descent(bl.SGD(0.4), steps)
    hg = bl.hypergradient(bl.Problem(loss, outer), X, Y, NONE, solver=solver, estimator=estimator)
    close(hg.grad, truth_inside(loss, outer, steps), 1e-3)


@pytest.mark.parametrize("loss", INSIDE.values(), ids=INSIDE)
def test_first_order_works_with_a_loss_that_takes_a_gradient_inside(loss):
    problem = bl.Problem(loss, plain_outer, init=lambda x, b: x)
    solver = bl.Descent(bl.SGD(0.2), 5)
    hg = bl.hypergradient(problem, X, None, NONE, solver=solver, estimator=bl.FirstOrder())
    close(hg.grad, hg.inner - 1 + 0.2 * X)


@every(SOME)
@pytest.mark.parametrize("loss", INSIDE.values(), ids=INSIDE)
def test_a_loss_that_takes_a_gradient_inside_works_task_by_task(loss, estimator):
    steps = 5 if isinstance(estimator, bl.Unrolled) else 40
    batches = bl.Batches(torch.zeros(2, 1, dtype=D), torch.zeros(2, 1, dtype=D))
    solver = bl.Descent(bl.SGD(0.4), steps)
    hg = bl.hypergradient(
        bl.Problem(loss, plain_outer),
        X,
        torch.stack([Y, Y]),
        batches,
        solver=solver,
        estimator=bl.TaskMean(estimator, chunk=1),
    )
    close(hg.grad, truth_inside(loss, plain_outer, steps), 1e-3)


@pytest.mark.parametrize("keep", ["graph", "iterates", "segments"])
def test_an_init_that_takes_a_gradient_inside_works(keep):
    def init(x, batch):  # one step of something, as a learned initialization may make
        (slope,) = torch.autograd.grad(x.pow(4).sum(), x, create_graph=True)
        return x - 0.1 * slope

    def value(x):
        y = x - 0.4 * x**3
        for _ in range(3):
            y = y - 0.1 * 2 * (y - 1)
        return 0.5 * y.square().sum()

    problem = bl.Problem(lambda y, x, b: (y - 1).square().sum(), lambda y, x, b: 0.5 * y.square().sum(), init=init)
    solver = bl.Descent(bl.SGD(0.1), 3)
    hg = bl.hypergradient(problem, X, None, NONE, solver=solver, estimator=bl.Unrolled(keep=keep))
    close(hg.grad, central(value, X), 1e-5)


@every({**SECOND_ORDER, **FIRST_ORDER})
def test_features_that_take_a_gradient_inside_work(estimator):
    def features(x, batch):
        z = torch.ones_like(x).requires_grad_()
        (slope,) = torch.autograd.grad((z * x).sin().sum(), z, create_graph=True)
        return slope

    problem = bl.Problem(
        lambda y, x, z: (y - z).square().sum(), lambda y, x, b: 0.5 * y.square().sum(), features=features
    )
    steps = 3 if isinstance(estimator, bl.Unrolled) else 60

    def value(x):
        y = Y
        for _ in range(steps):
            y = y - 0.4 * (y - x * x.cos())
        return 0.5 * y.square().sum()

    solver = bl.Descent(bl.SGD(0.2), steps)
    hg = bl.hypergradient(problem, X, Y, NONE, solver=solver, estimator=estimator)
    close(hg.grad, central(value, X), 1e-4)


@every({**SOME, "memory reduced": SECOND_ORDER["memory reduced"]})
def test_an_autocast_that_stays_open_leaks_no_tensors(estimator):
    inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    problem = bl.Problem(
        lambda y, x, b: ((inputs @ y).float() - x).square().mean() + y.square().sum(),
        lambda y, x, b: (inputs @ y).float().square().mean(),
    )
    x = torch.tensor(1.0, requires_grad=True)

    def alive():
        gc.collect()
        return sum(type(value) is torch.Tensor for value in gc.get_objects())

    loop = bl.iterate(
        problem,
        x,
        torch.zeros(4, 3),
        itertools.repeat(NONE, 4),
        solver=bl.Descent(bl.SGD(0.1), 3),
        estimator=estimator,
        optimizer=torch.optim.SGD([x], lr=0.1),
        tolerate=tuple(bl.Status),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        counts = [alive() for _ in loop]
    assert counts[-1] <= counts[1], counts
