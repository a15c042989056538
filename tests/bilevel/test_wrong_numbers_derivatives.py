"""Second derivatives that are missing without an error, and no false alarm (issue 7, A4)."""

import functools

import pytest
import torch
from right_or_refused import NONE, D, close, right_or_refused
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


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("inside", ["torch.func", "torch.autograd"])
@pytest.mark.parametrize(
    ("norm", "right"),
    [(torch.nn.LayerNorm(4), False), (torch.nn.BatchNorm1d(4, track_running_stats=False), False),
     (torch.nn.GroupNorm(2, 4), True), (torch.nn.BatchNorm1d(4).eval(), True)],
    ids=["layer", "batch", "group", "batch in eval"],
)  # fmt: skip
def test_a_gradient_inside_the_loss_through_a_normalization(norm, right, inside, chunk):
    """torch 2.13: the third derivative of fused layer and batch normalization is wrong, by up to a half."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), norm, torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    call, params = bl.functional(net, requires_grad=False)
    inputs = torch.randn(2, 6, 3, dtype=torch.float64)

    def slope(y, batch):
        if inside == "torch.func":
            return torch.func.grad(lambda z: (call(y, z).pow(2) * torch.arange(6.0)[:, None]).sum())(batch)
        batch = batch.detach().requires_grad_()
        with torch.enable_grad():
            value = (call(y, batch).pow(2) * torch.arange(6.0)[:, None]).sum()
        return torch.autograd.grad(value, batch, create_graph=True)[0]

    problem = bl.Problem(
        lambda y, x, batch: (slope(y, batch) - x).square().mean(), lambda y, x, batch: call(y, batch).square().mean()
    )
    start = {name: value.expand(2, *value.shape) for name, value in params.items()}

    def at(x):
        return bl.hypergradient(
            problem,
            torch.tensor(x, dtype=torch.float64),
            start,
            bl.Batches(inputs, inputs),
            solver=bl.Descent(bl.SGD(lr=0.1), steps=3),
            estimator=bl.TaskMean(bl.Unrolled(), chunk=chunk),
        )

    if inside == "torch.autograd" and chunk is None:
        pytest.skip("torch.autograd.grad inside vmap sums over the tasks, and torch refuses it")
    if right:
        difference = (at(0.3 + 1e-5).outer_loss - at(0.3 - 1e-5).outer_loss) / 2e-5
        torch.testing.assert_close(at(0.3).grad, difference, rtol=1e-6, atol=1e-10)
    else:
        with pytest.raises(bl.NotTwiceDifferentiableError, match="GroupNorm"):
            at(0.3)
