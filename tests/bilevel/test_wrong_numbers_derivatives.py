"""Second derivatives that are missing, losses that differentiate inside, autocast (issue 7, A4, A14)."""

import functools
import gc
import itertools

import pytest
import torch
from right_or_refused import NONE, D, central, close, right_or_refused
from torch.autograd.function import once_differentiable

import bilevel as bl

F = torch.nn.functional
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


def square(y, x):
    return (y - x).square().sum()


def wave(y, x):
    return (y * x).sin().sum() + y.pow(4).sum()


def soft(y, x):
    return (1 + (y - x).exp()).log().sum() + (y * x).tanh().sum()


class Once(torch.autograd.Function):
    """square, with a derivative that is marked as the last one."""

    @staticmethod
    def forward(ctx, y, x):
        ctx.save_for_backward(y, x)
        return square(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, weight):
        y, x = ctx.saved_tensors
        return 2 * weight * (y - x), 2 * weight * (x - y)


class Constant(torch.autograd.Function):
    """square, with a derivative made of tensors that forgot where they came from."""

    @staticmethod
    def forward(ctx, y, x):
        ctx.difference = (y - x).detach()
        return square(y, x)

    @staticmethod
    def backward(ctx, weight):
        return 2 * weight * ctx.difference, -2 * weight * ctx.difference


class Sine(torch.autograd.Function):
    """A layer whose derivative is a constant; the loss above it is an ordinary one."""

    @staticmethod
    def forward(ctx, z):
        ctx.cosine = z.detach().cos()
        return z.sin()

    @staticmethod
    def backward(ctx, weight):
        return weight * ctx.cosine


def _numpy(y, x):
    """The first derivative computed outside of autograd."""

    class Outside(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y, x):
            ctx.slope = torch.from_numpy(2 * (y - x).detach().numpy())
            return square(y, x)

        @staticmethod
        def backward(ctx, weight):
            return weight * ctx.slope, -weight * ctx.slope

    return Outside.apply(y, x)


LOSSES = {
    "A4 once_differentiable": (Once.apply, square),
    "A4 detached in backward": (Constant.apply, square),
    "A4 detached layer": (lambda y, x: Sine.apply(y - x).square().sum(), lambda y, x: (y - x).sin().square().sum()),
    "A4 numpy": (_numpy, square),
}
# What stands beside the loss: nothing, a regularizer (H is then not zero), one with x in it (x is then not unused).
BESIDE = {
    "alone": lambda y, x: 0.0,
    "regularized": lambda y, x: 0.5 * y.square().sum(),
    "and x": lambda y, x: 0.5 * (y - 0.1 * x).square().sum(),
}


def truth(loss, at_solution, steps=3, lr=0.1):
    """By hand: gradient descent, and f = |y|^2 / 2 at its end."""
    x = X.clone().requires_grad_()
    y = Y.clone().requires_grad_()
    for _ in range(60 if at_solution else steps):
        (g,) = torch.autograd.grad(loss(y, x), y, create_graph=True)
        y = y - (0.3 if at_solution else lr) * g
    return torch.autograd.grad(0.5 * y.square().sum(), x)[0]


def run(loss, estimator, at_solution, beside=lambda y, x: 0.0):
    problem = bl.Problem(lambda y, x, b: loss(y, x) + beside(y, x), lambda y, x, b: 0.5 * y.square().sum())
    solver = bl.Descent(bl.SGD(0.3), 60) if at_solution else bl.Descent(bl.SGD(0.1), 3)
    return bl.hypergradient(problem, X, Y, NONE, solver=solver, estimator=estimator)


@every(SOME)
@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
@pytest.mark.parametrize(("loss", "plain"), LOSSES.values(), ids=LOSSES)
def test_a_second_derivative_that_is_silently_missing_is_found(loss, plain, beside, estimator):
    at_solution = not isinstance(estimator, bl.Unrolled)
    right = truth(lambda y, x: plain(y, x) + beside(y, x), at_solution)
    hg = right_or_refused(lambda: run(loss, estimator, at_solution, beside), right, 1e-3)
    if isinstance(estimator, bl.FirstOrderCorrected):
        assert hg is not None, "this one needs no second derivative"


compiled = functools.cache(lambda plain: torch.compile(plain, backend="aot_eager"))


@pytest.mark.parametrize("beside", [BESIDE["regularized"], BESIDE["and x"]], ids=["regularized", "and x"])
@pytest.mark.parametrize("plain", [square, wave, soft], ids=["A4 square", "A4 wave", "A4 softplus"])
@every({name: SOME[name] for name in ("graph", "CG", "corrected")})
def test_a_compiled_loss_gives_the_right_number_or_says_what_it_lacks(plain, beside, estimator):
    loss = compiled(plain)
    at_solution = not isinstance(estimator, bl.Unrolled)
    right = truth(lambda y, x: plain(y, x) + beside(y, x), at_solution)
    hg = right_or_refused(lambda: run(loss, estimator, at_solution, beside), right, 1e-3)
    if isinstance(estimator, bl.FirstOrderCorrected):
        assert hg is not None, "this one needs no second derivative"


@every({"graph": SECOND_ORDER["graph"], "iterates": SECOND_ORDER["iterates"], "CG": SECOND_ORDER["CG"]})
@pytest.mark.parametrize("plain", [square, wave], ids=["A4 silent", "A4 raw message"])
def test_what_a_compiled_loss_lacks_has_the_name_of_its_error(plain, estimator):
    loss = compiled(plain)
    with pytest.raises(bl.NotTwiceDifferentiableError):
        run(loss, estimator, not isinstance(estimator, bl.Unrolled), BESIDE["and x"])


@every({"graph": SECOND_ORDER["graph"], "CG": SECOND_ORDER["CG"]})
def test_a_compiled_module_inside_a_loss_gives_the_right_number_or_says_what_it_lacks(estimator):
    inputs = torch.linspace(-1, 1, 6, dtype=D).reshape(3, 2)
    layer = torch.compile(lambda y, z: torch.tanh(z * y).sum(1), backend="aot_eager")

    def loss(net):
        return lambda y, x: (net(y, inputs) - x.sum()).square().sum() + 0.5 * y.square().sum()

    at_solution = not isinstance(estimator, bl.Unrolled)
    right = truth(loss(lambda y, z: torch.tanh(z * y).sum(1)), at_solution)
    right_or_refused(lambda: run(loss(layer), estimator, at_solution), right, 1e-3)


@every({"graph": SECOND_ORDER["graph"], "CG": SECOND_ORDER["CG"]})
def test_a_missing_second_derivative_is_found_under_tasks_too(estimator):
    at_solution = not isinstance(estimator, bl.Unrolled)
    problem = bl.Problem(
        lambda y, x, b: Constant.apply(y, x) + BESIDE["and x"](y, x), lambda y, x, b: 0.5 * y.square().sum()
    )
    right = truth(lambda y, x: square(y, x) + BESIDE["and x"](y, x), at_solution)
    batches = bl.Batches(torch.zeros(2, 1, dtype=D), None)
    solver = bl.Descent(bl.SGD(0.3), 60) if at_solution else bl.Descent(bl.SGD(0.1), 3)
    right_or_refused(
        lambda: bl.hypergradient(
            problem, X, torch.stack([Y, Y]), batches, solver=solver, estimator=bl.TaskMean(estimator, chunk=1)
        ),
        right,
        1e-3,
    )


# No false alarm: losses whose second derivative is rightly zero, or noisy in float32.


def hinge(y, x):
    return (1 - torch.tensor([1.0, -1.0], dtype=y.dtype) * (y + x)).relu().sum() + (x * y).sum()


def pooled(y, x):
    image = (torch.arange(16.0, dtype=y.dtype).reshape(1, 1, 4, 4) / 8 * y[0]).cos() + y[1] * x[0]
    return F.max_pool2d(image, 2).sum() + 0.5 * (y - x).square().sum()


def rectified(y, x):
    inputs = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.3, -2.0]], dtype=y.dtype)
    hidden = (inputs * y).relu()
    return (x.sum() * hidden.sum(1) - 1).square().mean() + 0.05 * y.square().sum()


def linear(y, x):
    return (y * x).sum()


def absolute(y, x):
    return (y - 2 * x).abs().sum() + 0.5 * (y * x).sum()


def leaky(y, x):
    return F.leaky_relu(y - x, 0.1).sum() + F.huber_loss(y * x, torch.ones_like(y))


SHARP = {"hinge": hinge, "max pool": pooled, "relu": rectified, "linear": linear, "absolute": absolute, "leaky": leaky}


@every({keep: SECOND_ORDER[keep] for keep in ("graph", "iterates", "segments")})
@pytest.mark.parametrize("dtype", [D, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("loss", SHARP.values(), ids=[f"A4 {name}" for name in SHARP])
def test_a_second_derivative_that_is_rightly_zero_raises_no_alarm(loss, dtype, estimator):
    problem = bl.Problem(lambda y, x, b: loss(y, x), lambda y, x, b: 0.5 * y.square().sum())
    solver = bl.Descent(bl.SGD(0.1), 3)
    hg = bl.hypergradient(problem, X.to(dtype), Y.to(dtype), NONE, solver=solver, estimator=estimator)
    assert hg.status is bl.Status.OK
    close(hg.grad, truth(loss, at_solution=False), 1e-9 if dtype is D else 1e-4)


@every(SECOND_ORDER)
@pytest.mark.parametrize("dtype", [D, torch.float32], ids=["A4 float64", "A4 float32"])
def test_a_net_of_kinks_with_a_regularizer_raises_no_alarm(dtype, estimator):
    def loss(y, x):
        return rectified(y, x) + 0.5 * y.square().sum() + 0.1 * (y + x + 1).relu().sum()

    problem = bl.Problem(lambda y, x, b: loss(y, x), lambda y, x, b: 0.5 * y.square().sum())
    at_solution = not isinstance(estimator, bl.Unrolled)
    solver = bl.Descent(bl.SGD(0.3), 60) if at_solution else bl.Descent(bl.SGD(0.1), 3)
    hg = bl.hypergradient(problem, X.to(dtype), Y.to(dtype), NONE, solver=solver, estimator=estimator)
    assert not hg.status.failed
    close(hg.grad, truth(loss, at_solution), 1e-3)


# Losses that take a gradient inside.

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
    gc.collect()
    gc.freeze()  # what other tests left is not looked at, which is quick
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            counts = [alive() for _ in loop]
    finally:
        gc.unfreeze()
    assert counts[-1] <= counts[1], counts
