"""Forward mode: known answers, unbiasedness and variance, runs that go on, and losses that forward mode is hard on."""

import dataclasses
import itertools
import warnings

import catalogue
import pytest
import torch
from torch.utils import _pytree as pytree

import bilevel as bl

D = torch.float64
FORWARD, ONLINE = bl.estimators.Forward(), bl.estimators.Forward(online=True)


def flat(tree):
    return torch.cat([leaf.reshape(-1).double() for leaf in pytree.tree_leaves(tree)])


def solved(arguments, solver, estimator, **more):
    problem, outer, inner, batches = arguments
    return bl.hypergradient(problem, outer, inner, batches, solver=solver, estimator=estimator, **more)


def agree(arguments, solver, estimator=FORWARD, *, rtol=1e-11, other=None, **more):
    """Equal to the program backwards, with the same status."""
    found = solved(arguments, solver, estimator, **more)
    expected = solved(arguments, solver, other or bl.Unrolled("iterates"))
    torch.testing.assert_close(flat(found.grad), flat(expected.grad), rtol=rtol, atol=rtol)
    assert found.status is expected.status
    return found


def scalar(x=1.0):
    """TP1: g = y^2 - x y, f = y^2 / 2 at lr 0.25; after 4 steps y = 0.46875."""
    problem = bl.Problem(lambda y, x, b: y**2 - x["x"] * y, lambda y, x, b: y**2 / 2)
    return problem, {"x": torch.tensor(x, dtype=D)}, torch.tensor(0.0, dtype=D), bl.Batches(None, None)


def test_the_scalar_example():
    solver = bl.Descent(bl.SGD(0.25), 4)
    for estimator in (
        FORWARD,
        bl.estimators.ForwardGradient(),  # of one number, a Rademacher direction is exact
        bl.estimators.GammaDecay(0.5),  # 1 - lr h
        bl.estimators.Revolve(1),
    ):
        assert solved(scalar(), solver, estimator).grad["x"] == pytest.approx(0.2197265625, rel=1e-13)
    # The increments of each step, lr = 0.25, with df/dy = y at 0.25, 0.375, 0.4375, 0.46875.
    running = sum(0.25 * y * 0.5**k for y, k in zip((0.25, 0.375, 0.4375, 0.46875), (3, 2, 1, 0), strict=True))
    assert solved(scalar(), solver, bl.estimators.GammaDecay(0.5, running=True)).grad["x"] == pytest.approx(running)
    problem, x, y, batches = scalar()
    learned = bl.Descent(bl.SGD(lr=lambda x: x["lr"]), 4)
    x = x | {"lr": torch.tensor(0.25, dtype=D)}
    assert solved((problem, x, y, batches), learned, FORWARD).grad["lr"] == pytest.approx(0.234375, rel=1e-13)


def test_gamma_zero_is_the_last_step_alone():
    arguments, solver = catalogue.weighted_net(), bl.Descent(catalogue.OPTIMIZERS["sgd"], 5)
    arguments[1].pop("log_lr")
    for estimator in (bl.estimators.GammaDecay(0.0), bl.estimators.GammaDecay(0.0, running=True)):
        agree(arguments, solver, estimator, other=bl.Unrolled("iterates", last=1))


@pytest.mark.parametrize("normal", [False, True])
def test_the_variance_of_forward_gradients(normal):
    """TP7: E|error|^2 / |g|^2 = (N - 1) / b for Rademacher directions, (N + 1) / b for normal ones; N = 20, b = 1."""
    size, draws = 20, 600
    weights = torch.linspace(-1, 1, size, dtype=D)
    problem = bl.Problem(lambda y, x, b: ((y - x["x"]) ** 2).sum(), lambda y, x, b: weights @ y)
    x, y = {"x": torch.zeros(size, dtype=D)}, torch.zeros(size, dtype=D)
    solver = bl.Descent(bl.SGD(0.25), 1)
    generator = torch.Generator().manual_seed(0)
    estimator = bl.estimators.ForwardGradient(normal=normal, generator=generator)
    arguments = problem, x, y, bl.Batches(None, None)
    found = torch.stack([solved(arguments, solver, estimator).grad["x"] for _ in range(draws)])
    exact = 0.5 * weights
    relative = (found - exact).square().sum(1) / exact.square().sum()
    # Within 4.5 standard errors, of the mean and of the mean square.
    assert abs(relative.mean() - (size + 1 if normal else size - 1)) < 4.5 * relative.std() / draws**0.5
    assert ((found.mean(0) - exact).abs() < 4.5 * found.std(0) / draws**0.5 + 1e-12).all()
    assert relative.mean() / relative.std() > 0.5


def test_directions_leave_out_what_acts_in_f_alone_and_f_itself_is_exact():
    problem, x, y, batches = scalar()
    direct = bl.Problem(problem.inner_loss, lambda y, x, b: problem.outer_loss(y, x, b) + (x["w"] ** 3).sum())
    x = x | {"w": torch.linspace(0.5, 1.5, 30, dtype=D)}
    solver = bl.Descent(bl.SGD(0.25), 4)
    for estimator, products in ((bl.estimators.ForwardGradient(), 8), (FORWARD, 8)):
        hg = agree((direct, x, y, batches), solver, estimator)
        assert hg.stats["calls"]["hvp"] == products


def test_directions_are_drawn_beside_the_losses_numbers():
    """The same seed gives the losses the numbers that every estimator gives them; calls draw other directions."""
    problem, outer, inner, batches = catalogue.weighted_net()
    outer.pop("log_lr")
    noisy = bl.Problem(
        lambda y, x, b: problem.inner_loss(y, x, (torch.nn.functional.dropout(b[0], 0.4), b[1])), problem.outer_loss
    )
    arguments, solver, found = (noisy, outer, inner, batches), bl.Descent(bl.SGD(0.3), 5), []
    for estimator in (bl.Unrolled(), bl.estimators.ForwardGradient(2), bl.estimators.ForwardGradient(4, chunk=3)):
        torch.manual_seed(2)
        found.append(solved(arguments, solver, estimator))
    for each in found[1:]:
        torch.testing.assert_close(flat(each.inner), flat(found[0].inner), rtol=1e-12, atol=0)
    torch.manual_seed(2)
    one, other = (flat(solved(arguments, solver, bl.estimators.ForwardGradient()).grad) for _ in range(2))
    assert not torch.allclose(one, other, rtol=0.1)


@pytest.mark.parametrize("chunk", [1, 4, 26])
def test_chunks_rerun_the_same_program(chunk):
    problem, outer, inner, batches = catalogue.weighted_net()
    noisy = bl.Problem(
        lambda y, x, b: problem.inner_loss(y, x, (torch.nn.functional.dropout(b[0], 0.4), b[1])), problem.outer_loss
    )
    arguments, solver, found = (noisy, outer, inner, batches), bl.Descent(catalogue.OPTIMIZERS["learned lr"], 4), []
    for estimator in (bl.Unrolled(), bl.estimators.Forward(chunk)):
        torch.manual_seed(1)
        found.append((flat(solved(arguments, solver, estimator).grad), torch.rand(1)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-11, atol=1e-14)


# --- a run that goes on


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "learned lr"])
def test_a_run_in_pieces_is_the_run(optimizer):
    arguments, optimizer = catalogue.weighted_net(), catalogue.OPTIMIZERS[optimizer]
    problem, outer, inner, batches = arguments
    state, y = None, inner
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="outer variable")
        for steps in (1, 2, 1, 3):
            found = solved((problem, outer, y, batches), bl.Descent(optimizer, steps), ONLINE, state=state)
            y, state = found.inner, found.state.to_dict()
        whole = solved(arguments, bl.Descent(optimizer, 7), bl.Unrolled())
    torch.testing.assert_close(flat(found.grad), flat(whole.grad), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(found.outer_loss, whole.outer_loss, rtol=1e-12, atol=0)


def test_x_may_change_during_the_run():
    """RTHO: tangents are those of the run as it was: here, of one that had another x in each of its two halves."""
    problem, _, y, batches = scalar()
    solver = bl.Descent(bl.SGD(0.25), 2)
    first = solved((problem, {"x": torch.tensor(1.0, dtype=D)}, y, batches), solver, ONLINE)
    second = solved(
        (problem, {"x": torch.tensor(3.0, dtype=D)}, first.inner, batches), solver, ONLINE, state=first.state
    )
    # y_2 = 0.375 x_1; y_4 = y_2 / 4 + 0.375 x_2, and both halves move as x does.
    assert second.inner == pytest.approx(0.375 / 4 + 0.375 * 3)
    assert second.grad["x"] == pytest.approx((0.375 / 4 + 0.375) * second.inner)


def test_outer_steps_on_the_way_raise_a_rate_that_is_too_low():
    """Hypergradient descent on log lr, one inner step an outer step, through `iterate`."""
    h = torch.tensor([1.0, 0.3], dtype=D)
    problem = bl.Problem(lambda y, x, b: (h * y**2).sum() / 2, lambda y, x, b: (h * y**2).sum() / 2)
    x, y = {"log_lr": torch.tensor(-4.0, dtype=D, requires_grad=True)}, torch.ones(2, dtype=D)
    loop = bl.iterate(
        problem,
        x,
        y,
        [bl.Batches(None, None)] * 25,
        solver=bl.Descent(bl.SGD(lr=lambda x: x["log_lr"].exp()), 1),
        estimator=ONLINE,
        optimizer=torch.optim.SGD(x.values(), lr=2.0),
    )
    found = [(x["log_lr"].item(), step.hypergradient.grad["log_lr"].abs().item()) for step in loop]
    assert found[-1][0] > -3.0
    assert all(after[0] >= before[0] for before, after in itertools.pairwise(found))
    # The run remembers its earlier steps: their part of the gradient is most of it.
    assert found[10][1] > 3 * found[0][1]


def test_a_run_that_cannot_go_on_is_refused():
    problem, x, y, batches = scalar()
    solver = bl.Descent(bl.SGD(0.25), 2)
    hg = solved((problem, x, y, batches), solver, ONLINE)
    with pytest.raises(ValueError, match="another inner variable"):
        solved((problem, x, y + 1, batches), solver, ONLINE, state=hg.state)
    started = bl.Problem(problem.inner_loss, problem.outer_loss, init=lambda x, b: x["x"])
    with pytest.raises(ValueError, match="begins anew"):
        solved((started, x, None, batches), solver, ONLINE)
    with pytest.raises(ValueError, match="carries all tangents"):
        bl.estimators.Forward(chunk=2, online=True)
    with pytest.raises(ValueError, match="carries nothing"):
        solved((problem, x, y, batches), solver, FORWARD, state=hg.state)
    still = solved((problem, x, hg.inner, batches), bl.Descent(bl.SGD(0.25), 0), ONLINE, state=hg.state)
    assert still.grad["x"] == hg.grad["x"]


@pytest.mark.parametrize("optimizer", [bl.SGD(0.1, momentum=0.5), bl.SGD(0.2)])
def test_tasks_that_go_on(optimizer):
    data = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=D)
    problem = bl.Problem(lambda y, x, b: ((y - b * x) ** 2).sum(), lambda y, x, b: (y**4).sum() + x.sum())
    x, y = torch.tensor([0.5, -1.0], dtype=D), torch.zeros(3, 2, dtype=D)
    whole = solved((problem, x, y, bl.Batches(data, data)), bl.Descent(optimizer, 5), bl.TaskMean(bl.Unrolled()))
    for chunk in (None, 1, 2):
        state, now = None, y
        for steps in (2, 3):
            hg = solved(
                (problem, x, now, bl.Batches(data, data)),
                bl.Descent(optimizer, steps),
                bl.TaskMean(ONLINE, chunk),
                state=state,
            )
            now, state = hg.inner, hg.state
        torch.testing.assert_close(hg.grad, whole.grad, rtol=1e-11, atol=1e-13)


# --- losses, dynamics and types that forward mode is hard on


class NoGradient(torch.autograd.Function):
    """A backward that is no gradient of anything: its derivative is not symmetric."""

    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        return y.sum()

    @staticmethod
    def backward(ctx, weight):
        (y,) = ctx.saved_tensors
        return weight * torch.stack([y[1] ** 2, y[0] * y[1]])


class Cubed(torch.autograd.Function):
    """y^3 with a derivative that can be taken again, and a wrong forward-mode formula."""

    @staticmethod
    def forward(y):
        return y**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx, weight):
        return 3 * ctx.saved_tensors[0] ** 2 * weight

    @staticmethod
    def jvp(ctx, tangent):
        return 0 * tangent


INPUTS = torch.randn(6, 4, generator=torch.Generator().manual_seed(3), dtype=D)


def _attention(y):
    q = (INPUTS @ y.reshape(4, 4)).reshape(1, 1, 6, 4)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.nn.functional.scaled_dot_product_attention(q, q, q).square().sum()


def _norms(y):
    h = INPUTS @ y.reshape(4, 4)
    h = torch.nn.functional.layer_norm(h, (4,)) + torch.nn.functional.batch_norm(h, None, None, training=True)
    return (h.tanh() ** 3).sum()


LOSSES = {
    "log_softmax": lambda y: torch.log_softmax(INPUTS @ y.reshape(4, 4), -1)[:, 0].sum(),
    "logsumexp": lambda y: torch.logsumexp(INPUTS @ y.reshape(4, 4), -1).square().sum(),
    "softmax": lambda y: (torch.softmax(INPUTS @ y.reshape(4, 4), -1)[:, 1] ** 2).sum(),
    "detached": lambda y: (y.detach().exp() * y**2).sum(),
    "no_grad": lambda y: _frozen(y),
    "wrong jvp": lambda y: (Cubed.apply(y) * y).sum(),
    "attention": _attention,
    "norms": _norms,
    "embedding": lambda y: torch.nn.functional.embedding(torch.tensor([1, 3, 1]), y.reshape(8, 2)).cos().sum(),
    "conv, pool": lambda y: (
        torch.nn.functional.max_pool1d(torch.nn.functional.conv1d(INPUTS.reshape(1, 4, 6), y[:12].reshape(1, 4, 3)), 2)
        .square()
        .sum()
    ),
    "eigenvalues": lambda y: torch.linalg.eigvalsh(y.reshape(4, 4) + y.reshape(4, 4).mT).square().sum(),
}


def _frozen(y):
    with torch.no_grad():
        scale = y.exp()
    return (scale * y**2).sum()


@pytest.mark.parametrize("name", LOSSES)
def test_operators_without_a_right_forward_mode(name):
    """The products equal those backwards, whatever an operator says of its forward derivative."""
    loss = LOSSES[name]
    problem = bl.Problem(
        lambda y, x, b: 0.1 * x[0].exp() * loss(y) + (y - x[1]).square().sum() + 0.1 * (y * x[2:]).square().sum(),
        lambda y, x, b: (y.cos() * torch.arange(16, dtype=D)).sum(),
    )
    x = torch.randn(18, generator=torch.Generator().manual_seed(5), dtype=D)
    y = torch.randn(16, generator=torch.Generator().manual_seed(6), dtype=D)
    agree((problem, x, y, bl.Batches(None, None)), bl.Descent(bl.SGD(0.02, momentum=0.5), 4), rtol=1e-10)


def test_a_gradient_that_is_no_gradient_takes_the_longer_way():
    """Its derivative is not symmetric, which is noticed: what the program does is differentiated nevertheless."""
    problem = bl.Problem(lambda y, x, b: (x * y**2).sum() + x[0] * NoGradient.apply(y), lambda y, x, b: (y**3).sum())
    arguments = problem, torch.tensor([0.4, 0.9], dtype=D), torch.tensor([0.3, -0.7], dtype=D), bl.Batches(None, None)
    agree(arguments, bl.Descent(bl.SGD(0.1), 4))
    assert [symmetric for _, symmetric in problem.memo["forward"]] == [False]


def test_no_second_derivative_is_an_error_with_a_name():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            ctx.save_for_backward(y)
            return y.exp()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, weight):
            return weight * ctx.saved_tensors[0].exp()

    problem = bl.Problem(lambda y, x, b: (x * Once.apply(y)).sum(), lambda y, x, b: y.sum())
    arguments = problem, torch.ones(2, dtype=D), torch.ones(2, dtype=D), bl.Batches(None, None)
    with pytest.raises(bl.outcome.NotTwiceDifferentiableError, match="Once"):
        solved(arguments, bl.Descent(bl.SGD(0.1), 2), FORWARD)


@dataclasses.dataclass(frozen=True)
class Lookahead(bl.optim.Optimizer):
    """A user's own: a slow copy that starts at y, a rate that is a function of x, a term of its own."""

    def init(self, inner):
        return {"slow": inner, "count": 0}

    def step(self, grad, state, inner, outer):
        rate = outer["log_lr"].exp()
        fast = pytree.tree_map(lambda y, g: y - rate * (g + 0.1 * y**3), inner, grad)
        slow = pytree.tree_map(lambda a, b: 0.7 * a + 0.3 * b, state["slow"], fast)
        return (slow if state["count"] % 2 else fast), {"slow": slow, "count": state["count"] + 1}


@dataclasses.dataclass(frozen=True)
class Babylonian(bl.inner.Dynamics):
    def step(self, inner, state, outer, at):
        root = pytree.tree_map(lambda y: (y + outer["decay"].exp() / y) / 2, inner)
        gradient = at.gradient(root)
        return pytree.tree_map(lambda y, g: y - 0.1 * g, root, gradient), state


@pytest.mark.parametrize("engine", [None, bl.Compiled(backend="graph")])
@pytest.mark.parametrize("dynamics", [Lookahead(), Babylonian(), bl.Adam(0.05), bl.SGD(0.3)])
def test_dynamics_of_all_kinds_on_both_engines(dynamics, engine):
    arguments = catalogue.weighted_net()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="outer variable")
        agree(arguments, bl.Descent(dynamics, 5), **({} if engine is None else {"engine": engine}))


def test_a_batch_of_features_of_x_with_dropout():
    g = torch.Generator().manual_seed(0)
    steps = [torch.randn(5, 3, generator=g, dtype=D) for _ in range(4)]

    def features(x, b):
        return torch.nn.functional.dropout((b @ x["w"]).tanh(), 0.3)

    problem = bl.Problem(
        lambda y, x, z: (z @ y - 1).square().mean() + x["decay"] * y.square().sum(),
        lambda y, x, z: (z @ y - 1).square().mean(),
        features=features,
    )
    x = {"w": torch.randn(3, 2, generator=g, dtype=D), "decay": torch.tensor(0.1, dtype=D)}
    for inner in (steps[0], bl.PerStep(steps)):
        arguments, found = (problem, x, torch.zeros(2, dtype=D), bl.Batches(inner, steps[1])), []
        for estimator in (bl.Unrolled(), FORWARD, bl.estimators.Forward(2), bl.estimators.GammaDecay(0.0)):
            torch.manual_seed(0)
            hg = solved(arguments, bl.Descent(bl.SGD(0.2), 4), estimator)
            found.append((flat(hg.grad), torch.rand(1)))
        torch.testing.assert_close(found[1], found[0], rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(found[2], found[0], rtol=1e-11, atol=1e-13)
        torch.manual_seed(0)
        last = solved(arguments, bl.Descent(bl.SGD(0.2), 4), bl.Unrolled("iterates", last=1))
        torch.testing.assert_close(found[3][0], flat(last.grad), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("chunk", [None, 1])
def test_tasks_that_stop_by_themselves(chunk):
    data = torch.tensor([[1.0, 0.2], [0.3, -4.0], [0.1, 0.1]], dtype=D)
    problem = bl.Problem(lambda y, x, b: (x * (y - b) ** 2).sum() + (y**4).sum() / 10, lambda y, x, b: (y * b).sum())
    arguments = problem, torch.tensor([0.6, 0.8], dtype=D), torch.zeros(3, 2, dtype=D), bl.Batches(data, data)
    solver = bl.Converge(bl.SGD(0.3, momentum=0.2), tol=1e-3, max_steps=200)
    agree(arguments, solver, bl.TaskMean(FORWARD, chunk), other=bl.TaskMean(bl.Unrolled("iterates"), chunk))
    at_rest = bl.hypergradient(*arguments, solver=solver, estimator=bl.TaskMean(FORWARD)).inner
    again = bl.hypergradient(
        problem, arguments[1], at_rest, arguments[3], solver=solver, estimator=bl.TaskMean(FORWARD)
    )
    assert again.status is bl.Status.STOPPED_EARLY


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types(dtype):
    exact = solved(catalogue.meta_start(), bl.Descent(bl.SGD(0.3), 6), bl.Unrolled())
    found = solved(catalogue.meta_start(dtype), bl.Descent(bl.SGD(0.3), 6), FORWARD)
    assert {leaf.dtype for leaf in found.grad.values()} == {dtype}
    bound = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 0.1}[dtype]
    assert (flat(found.grad) - flat(exact.grad)).norm() < bound * flat(exact.grad).norm()
    assert found.status is bl.Status.OK


def test_an_unstable_loop_is_told():
    problem = bl.Problem(lambda y, x, b: (x * y**2).sum(), lambda y, x, b: (y - 1).square().sum())
    arguments = problem, torch.tensor(1.0, dtype=D), torch.full((2,), 1e-8, dtype=D), bl.Batches(None, None)
    for steps, status in ((3, bl.Status.INNER_ROSE), (25, bl.Status.INNER_ROSE)):
        hg = solved(arguments, bl.Descent(bl.SGD(1.3), steps), FORWARD)
        assert hg.status is status
        assert hg.stats["tangent_growth"] == pytest.approx(1.6**steps)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: bl.estimators.Forward(0), "chunk="),
        (lambda: bl.estimators.ForwardGradient(0), "directions="),
        (lambda: bl.estimators.ForwardGradient(chunk=1.5), "chunk="),
        (lambda: bl.estimators.GammaDecay(1.1), "gamma="),
        (lambda: bl.estimators.GammaDecay(True), "gamma="),
    ],
)
def test_arguments_are_checked(make, match):
    with pytest.raises(ValueError, match=match):
        make()
    with pytest.raises(TypeError, match="on the CPU"):
        bl.estimators.ForwardGradient(generator=3)


@pytest.mark.parametrize("running", [False, True])
def test_gamma_decay_refuses_what_its_weights_do_not_see(running):
    arguments = catalogue.weighted_net()
    with pytest.raises(ValueError, match="carries a state"):
        solved(arguments, bl.Descent(bl.SGD(0.1, momentum=0.9), 3), bl.estimators.GammaDecay(0.5, running))
    data = torch.ones(2, 2, dtype=D)
    problem = bl.Problem(lambda y, x, b: (x * (y - b) ** 2).sum(), lambda y, x, b: y.sum())
    tasks = problem, torch.tensor(0.5, dtype=D), torch.zeros(2, 2, dtype=D), bl.Batches(data, data)
    solver = bl.Converge(bl.SGD(0.1), tol=1e-2, max_steps=50)
    with pytest.raises(ValueError, match="every task"):
        solved(tasks, solver, bl.TaskMean(bl.estimators.GammaDecay(0.5, running)))
