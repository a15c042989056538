"""T1T2, Sama and Darts: their known answers, and where one step is all that they see."""

import dataclasses
import math

import catalogue
import pytest
import torch
from test_conformance import flat, quietly

import bilevel as bl
from bilevel.estimators import T1T2, Darts, Sama
from bilevel.testing.catalogue import Quadratic
from bilevel.testing.storages import Storages

D = torch.float64
NO_DATA = bl.Batches(None, None)
SCALAR = bl.Problem(lambda y, x, _: y**2 - x * y, lambda y, x, _: y**2 / 2)
OPTIMIZERS = catalogue.OPTIMIZERS | {
    "elementwise": bl.SGD(lr={"a": 0.2, "b": 0.4}),
    "clipped": bl.optim.ClippedByNorm(bl.SGD(0.3), 1.0),
    "rmsprop": bl.optim.RMSprop(0.05),
    "accumulated": bl.optim.Accumulated(bl.SGD(0.3), 2),
}


def number(value, dtype=D):
    return torch.tensor(value, dtype=dtype)


def scalar(estimator, solver=None, problem=SCALAR):
    solver = bl.Descent(bl.SGD(0.25), 4) if solver is None else solver
    return bl.hypergradient(problem, number(1.0), number(0.0), NO_DATA, solver=solver, estimator=estimator)


@pytest.mark.parametrize(
    ("estimator", "answer"),
    [
        (T1T2(), 0.46875),
        (T1T2(0.25), 0.1171875),
        (T1T2(None), 0.1171875),
        (Sama(), 0.1171875),
        (Sama(scale=4.0), 0.46875),
        (Sama(scale=4.0, radius=10.0), 0.46875),  # a bilinear coupling: any radius
        (Darts(), 0.25 * 0.484375),
        (Darts(xi=0.5), 0.5 * 0.5),
        (Darts(xi=0.5, radius=0.01), 0.5 * 0.5),
    ],
    ids=str,
)
def test_scalar_quadratic_after_four_steps(estimator, answer):
    """TP1 of methods.md."""
    found = scalar(estimator)
    assert found.grad.item() == pytest.approx(answer, abs=1e-10)
    assert found.inner.item() == pytest.approx(0.46875, abs=1e-15)
    assert found.outer_loss.item() == pytest.approx(0.46875**2 / 2, abs=1e-15)
    assert found.inner_loss.item() == pytest.approx(0.46875**2 - 0.46875, abs=1e-15)
    assert found.status is bl.Status.OK


@dataclasses.dataclass(frozen=True)
class Warm(bl.optim.Optimizer):
    """Adam in the middle of a training: its moments are those of many steps."""

    adam: bl.Adam
    count: int = 10**6

    def init(self, inner):
        return {"step": [self.count], "first": [number(0.1)], "second": [number(0.04)]}

    def step(self, grad, state, inner, outer):
        return self.adam.step(grad, state, inner, outer)


def test_the_derivative_of_a_step_of_adam():
    """TP5: after so many steps that nothing is left of the bias correction."""
    problem = bl.Problem(lambda y, x, _: 0.3 * x * y, lambda y, x, _: y)
    found = scalar(Sama(), bl.Descent(Warm(bl.Adam(lr=0.01, eps=0.0)), 1), problem)
    assert -found.grad.item() / 0.3 == pytest.approx(4.951962e-3, rel=1e-6)
    assert found.status is bl.Status.OK


@pytest.mark.parametrize("count", [1, 9, 10**6])
def test_the_bias_correction_counts(count):
    """Against a finite difference of the step, written out; Betty's formula is the last of them."""
    m, n, g, lr, eps, b1, b2 = 0.1, 0.04, 0.3, 0.01, 1e-3, 0.9, 0.999

    def step(g):
        first, second, t = b1 * m + (1 - b1) * g, b2 * n + (1 - b2) * g**2, count + 1
        return lr * first / (1 - b1**t) / (math.sqrt(second / (1 - b2**t)) + eps)

    problem = bl.Problem(lambda y, x, _: 0.3 * x * y, lambda y, x, _: y)
    found = scalar(Sama(), bl.Descent(Warm(bl.Adam(lr=lr, eps=eps), count), 1), problem).grad.item()
    assert -found / 0.3 == pytest.approx((step(g + 1e-6) - step(g - 1e-6)) / 2e-6, rel=1e-8)
    betty = lr * ((1 - b1) * b2 * n - b1 * (1 - b2) * g * m) / (math.sqrt(b2 * n + (1 - b2) * g**2) + eps) ** 3
    assert (abs(-found / 0.3 / betty - 1) < 0.03) == (count == 10**6)


def posed(optimizer, steps, dtype=D):
    arguments = Quadratic.example(steps).posed(dtype)
    return arguments | {"solver": bl.Descent(optimizer, steps)}


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize(
    "name", ["sgd", "momentum", "nesterov", "adam", "adamw", "elementwise", "clipped", "rmsprop", "accumulated"]
)
def test_sama_is_the_last_step_backpropagated(name, steps):
    """Where the coupling of y and x is bilinear, whatever the optimizer."""
    arguments = posed(OPTIMIZERS[name], steps)
    found = bl.hypergradient(**arguments, estimator=Sama())
    last = bl.hypergradient(**arguments, estimator=bl.Unrolled(last=1))
    torch.testing.assert_close(flat(found.grad), flat(last.grad), rtol=1e-9, atol=1e-11)
    assert found.status is (bl.Status.FLAT_STEP if name == "accumulated" and steps % 2 else bl.Status.OK)


def test_sama_of_a_rule_takes_the_step_that_would_come_next():
    q = Quadratic.example(1)
    solver = bl.Converge(bl.SGD(q.rate, momentum=0.5), tol=1e-10, max_steps=500)
    found = bl.hypergradient(**(q.posed() | {"solver": solver}), estimator=Sama())
    expected = q.gradient(q.rate * torch.eye(4, dtype=D), q.solution)
    assert (flat(found.grad) - expected).norm() < 1e-8 * expected.norm()


@dataclasses.dataclass(frozen=True)
class Sign(bl.optim.Optimizer):
    def init(self, inner):
        return None

    def step(self, grad, state, inner, outer):
        return {name: inner[name] - 0.01 * grad[name].sign() for name in inner}, state


@pytest.mark.parametrize(
    ("optimizer", "steps", "status"),
    [
        (bl.Adam(0.05), 1, bl.Status.FLAT_STEP),
        (bl.Adam(0.05), 0, bl.Status.FLAT_STEP),
        (bl.AdamW(0.05), 1, bl.Status.FLAT_STEP),
        (Sign(), 5, bl.Status.FLAT_STEP),
        (bl.optim.Lion(0.01), 5, bl.Status.FLAT_STEP),
        (bl.optim.RMSprop(0.01), 1, bl.Status.FLAT_STEP),
        (bl.optim.Accumulated(bl.SGD(0.3), 2), 5, bl.Status.FLAT_STEP),
        (bl.Adam(0.05), 2, bl.Status.OK),
        (bl.Adam(0.05, eps=1.0), 1, bl.Status.OK),
        (bl.SGD(0.3), 0, bl.Status.OK),
        (bl.SGD(0.3), 1, bl.Status.OK),
        (bl.SGD(0.3, momentum=0.9, nesterov=True), 1, bl.Status.OK),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [D, torch.float32], ids=str)
def test_a_step_that_does_not_see_its_gradient_is_named(optimizer, steps, status, dtype):
    found = bl.hypergradient(**posed(optimizer, steps, dtype), estimator=Sama())
    assert found.status is status
    assert found.status.failed == (status is not bl.Status.OK)


def test_of_no_steps_sama_differentiates_the_first():
    q = Quadratic.example(0)
    found = bl.hypergradient(**q.posed(), estimator=Sama())
    torch.testing.assert_close(flat(found.grad), q.gradient(q.rate * torch.eye(4, dtype=D), q.start), rtol=1e-9, atol=0)


def test_an_outer_loss_without_y_is_no_flat_step():
    problem = bl.Problem(SCALAR.inner_loss, lambda y, x, _: x**2 / 2 + 0 * y)
    found = scalar(Sama(), problem=problem)
    assert found.grad.item() == 1.0
    assert found.status is bl.Status.OK


def written_out(problem, outer, inner, batches, xi, steps):
    """DARTS by double backward: f at the virtual step from y_K, differentiated in x with y_K a constant."""
    y = inner
    for _ in range(steps):
        gradient = torch.func.grad(problem.inner_loss)(y, outer, batches.inner)
        y = {name: y[name] - 0.3 * gradient[name] for name in y}

    def virtual(x):
        gradient = torch.func.grad(problem.inner_loss)(y, x, batches.inner)
        return problem.outer_loss({name: y[name] - xi * gradient[name] for name in y}, x, batches.outer)

    return torch.func.grad(virtual)(outer)


@pytest.mark.parametrize("xi", [0.05, None])
def test_darts_is_its_virtual_step_backpropagated(xi):
    problem, outer, inner, batches = catalogue.weighted_net()
    solver = bl.Descent(bl.SGD(0.3), 4)
    expected = flat(written_out(problem, outer, inner, batches, xi or 0.3, 4))
    errors = []
    for radius in (1e-2, 1e-3, None):
        found = quietly(
            lambda radius=radius: bl.hypergradient(
                problem, outer, inner, batches, solver=solver, estimator=Darts(xi, radius)
            )
        )
        errors.append(float((flat(found.grad) - expected).norm() / expected.norm()))
    assert errors[2] < 1e-9
    assert 90 < errors[0] / errors[1] < 110  # O(radius^2)
    assert 8 < found.stats["digits"] < 16


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_sama_is_one_mixed_product_at_the_last_iterate(optimizer):
    """On a net: -d/dx <dg/dy(y_K), v> with v by hand, from the step itself."""
    problem, outer, inner, batches = catalogue.weighted_net()
    update, y = catalogue.OPTIMIZERS[optimizer], inner
    state = update.init(y)
    for _ in range(4):
        gradient, before, moments = torch.func.grad(problem.inner_loss)(y, outer, batches.inner), y, state
        y, state = update.step(gradient, state, y, outer)
    b, direct = torch.func.grad(problem.outer_loss, argnums=(0, 1))(y, outer, batches.outer)
    pull = torch.func.vjp(lambda g: update.step(g, moments, before, outer)[0], gradient)[1]
    (v,) = pull(b)

    def product(x):
        g = torch.func.grad(problem.inner_loss)(y, x, batches.inner)
        return sum((g[name] * v[name]).sum() for name in v)

    mixed = torch.func.grad(product)(outer)
    expected = torch.cat([(direct[name] + mixed[name]).reshape(-1) for name in outer])
    found = quietly(
        lambda: bl.hypergradient(problem, outer, inner, batches, solver=bl.Descent(update, 4), estimator=Sama())
    )
    torch.testing.assert_close(flat(found.grad), expected, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("estimator", [Sama(), Darts(xi=0.3)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-3), (torch.float16, 0.1), (torch.bfloat16, 0.3)], ids=str
)
def test_coarse_numbers_lose_what_the_radius_promises(dtype, bound, estimator):
    answers = []
    for each in (D, dtype):
        p, outer, inner, batches = catalogue.weighted_net(each)
        found = quietly(
            lambda p=p, o=outer, i=inner, b=batches: bl.hypergradient(
                p, o, i, b, solver=bl.Descent(bl.SGD(0.3), 4), estimator=estimator
            )
        )
        answers.append(found.grad["weights"].double())
        assert found.grad["weights"].dtype == each
    direct = 0.02 * outer["weights"].double()
    assert (answers[1] - answers[0]).norm() < bound * (answers[0] - direct).norm()


def test_under_autocast_the_radius_is_that_of_sixteen_bits():
    p, outer, inner, batches = catalogue.weighted_net(torch.float32)

    def grad(estimator):
        solver = bl.Descent(bl.SGD(0.3), 4)
        return (
            quietly(lambda: bl.hypergradient(p, outer, inner, batches, solver=solver, estimator=estimator)).grad[
                "weights"
            ]
            - 0.02 * outer["weights"]
        )

    exact = grad(Sama())
    with torch.autocast("cpu", torch.bfloat16):
        wide, narrow = grad(Sama()), grad(Sama(radius=1e-3))
    assert (wide - exact).norm() < 0.3 * exact.norm()
    assert (narrow - exact).norm() > 3 * (wide - exact).norm()


@pytest.mark.parametrize("estimator", [Sama, lambda radius: Darts(0.3, radius)], ids=["sama", "darts"])
def test_both_sides_draw_the_same_masks(estimator):
    p, outer, inner, batches = catalogue.weighted_net()
    noisy = bl.Problem(lambda y, x, b: p.inner_loss(y, x, (torch.nn.functional.dropout(b[0], 0.4), b[1])), p.outer_loss)

    def run(radius):
        torch.manual_seed(5)
        made = estimator(radius=radius)
        found = quietly(
            lambda: bl.hypergradient(noisy, outer, inner, batches, solver=bl.Descent(bl.SGD(0.3), 5), estimator=made)
        )
        return flat(found.grad)

    assert (run(1e-4) - run(1e-5)).norm() < 1e-6 * run(1e-4).norm()


def test_curvature_batches_are_where_the_product_is_taken():
    p, outer, inner, batches = catalogue.weighted_net()
    apart = dataclasses.replace(batches, curvature=[batches.inner[0].flip(0), batches.inner[1].flip(0)])
    solver = bl.Descent(bl.SGD(0.3), 3)
    grads = [
        flat(quietly(lambda e=e: bl.hypergradient(p, outer, inner, apart, solver=solver, estimator=e)).grad)
        for e in (Sama(), T1T2(0.3))
    ]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_the_radius_follows_the_units_of_y(unit):
    problem = bl.Problem(
        lambda y, x, _: ((y / unit - x).cosh() + (y / unit) ** 2).sum(), lambda y, x, _: ((y / unit) ** 2).sum()
    )
    x, y, rate = torch.tensor([0.3, -0.2], dtype=D), torch.zeros(2, dtype=D), 0.1 * unit**2
    found, exact = (
        bl.hypergradient(problem, x, y, NO_DATA, solver=bl.Descent(bl.SGD(rate), 4), estimator=estimator)
        for estimator in (Sama(), T1T2(rate))
    )
    torch.testing.assert_close(found.grad, exact.grad, rtol=1e-8, atol=0)
    assert found.status is bl.Status.OK


def test_a_difference_that_is_lost_in_rounding_says_so():
    """x weighs y once, and a million besides."""
    problem = bl.Problem(lambda y, x, _: (y - x) ** 2 + 1e6 * x, SCALAR.outer_loss)
    for radius, status in ((1e-14, bl.Status.DIGITS_LOST), (1e-2, bl.Status.OK)):
        found = scalar(Sama(radius=radius), problem=problem)
        assert found.status is status
        assert not status.failed
        assert (found.stats["digits"] < 1) == (status is bl.Status.DIGITS_LOST)


@pytest.mark.parametrize(
    ("estimator", "optimizer", "most"),
    [
        (T1T2(0.1), bl.SGD(1e-5), 3),
        (Darts(0.1), bl.SGD(1e-5), 4),
        (Sama(), bl.SGD(1e-5), 7),
        (Sama(), bl.Adam(1e-3), 17),
    ],
    ids=lambda value: type(value).__name__,
)
def test_so_many_vectors_are_held(estimator, optimizer, most):
    """Of a loss whose graph holds nothing of the size of y."""
    size = 20_000
    rows, start = torch.ones(3, size) / size, torch.zeros(size)
    problem = bl.Problem(lambda y, x, _: (x * (rows @ y - 1) ** 2).sum(), lambda y, x, _: (rows[0] @ y - 0.3) ** 2)
    for _ in range(2):  # what is looked at once per problem, is
        with Storages() as storages:
            bl.hypergradient(
                problem,
                torch.ones(3),
                start,
                NO_DATA,
                solver=bl.Descent(optimizer, 6),
                estimator=estimator,
            )
    assert storages.peak <= (most + 0.02) * 4 * size


def refused(estimator, match, *, solver=None, problem=SCALAR, outer=None):
    outer = number(1.0) if outer is None else outer
    inner = None if problem.init else number(0.0)
    solver = bl.Descent(bl.SGD(0.25), 4) if solver is None else solver
    with pytest.raises(ValueError, match=match):
        bl.hypergradient(problem, outer, inner, NO_DATA, solver=solver, estimator=estimator)


@dataclasses.dataclass(frozen=True)
class Halving(bl.inner.Dynamics):
    def step(self, inner, state, outer, at):
        return (inner + outer) / 2, state

    def stationarity(self, inner, outer, at):
        return inner - outer


@dataclasses.dataclass(frozen=True)
class Plain(bl.inner.Dynamics):
    def step(self, inner, state, outer, at):
        return inner - 0.1 * at.gradient(inner), state


OPEN = bl.Problem(lambda y, x, _: y**2, lambda y, x, _: y**2 / 2)


@pytest.mark.parametrize("estimator", [T1T2(), Sama(), Darts(0.1)], ids=lambda e: type(e).__name__)
def test_paths_that_are_not_seen_are_refused(estimator):
    name = type(estimator).__name__
    refused(estimator, f"{name} cannot see.*start", problem=dataclasses.replace(OPEN, init=lambda x, _: x))
    refused(estimator, f"{name} cannot see.*hyper", problem=OPEN, solver=bl.Descent(bl.SGD(lambda x: 0.1 * x), 3))
    decay = bl.Descent(bl.SGD(0.1, weight_decay=lambda x: x), 3)
    if isinstance(estimator, T1T2):
        weighed = scalar(estimator, decay, bl.Problem(lambda y, x, _: (y - 1) ** 2 / 2, OPEN.outer_loss))
        y = weighed.inner
        assert weighed.grad.item() == pytest.approx((-y * y).item(), rel=1e-12)  # M = y
    else:
        refused(estimator, f"{name} cannot see.*weight decay", problem=OPEN, solver=decay)


def test_what_has_no_step_size_is_refused():
    for solver in (bl.Descent(bl.Adam(0.1), 3), bl.Descent(bl.SGD(0.1, momentum=0.5), 3)):
        refused(T1T2(None), "Write T1T2\\(scale=0.1\\)", solver=solver)
        refused(Darts(), "Write Darts\\(xi=0.1\\)", solver=solver)
    refused(T1T2(None), "one of Halving", solver=bl.Descent(Halving(), 3))
    refused(Sama(), "Plain is no optimizer", solver=bl.Descent(Plain(), 3))
    refused(Darts(0.0), "Darts cannot see.*the inner loss")
    refused(T1T2(), "does not say", solver=bl.Descent(bl.AdamW(0.1), 3))
    for bad in (0.0, -1.0, math.inf, math.nan, "lr", True):
        for make in (T1T2, Sama, lambda v: Sama(radius=v), lambda v: Darts(radius=v)):
            with pytest.raises(ValueError, match="positive number"):
                make(bad)
    with pytest.raises(ValueError, match="scale=None"):
        Sama(scale=None)


def test_a_learned_step_size_is_a_scale_as_any_other():
    """The rate of an SGD that is a function of x: its value; x acts through the inner loss as well."""
    q = Quadratic.example(3)
    arguments = q.posed() | {"solver": bl.Descent(bl.SGD(lambda x: q.rate + 0 * x["a"].sum()), 3)}
    expected = q.gradient(q.rate * torch.eye(4, dtype=D), q.last)
    for estimator in (T1T2(None), Sama()):
        assert (flat(bl.hypergradient(**arguments, estimator=estimator).grad) - expected).norm() < 1e-9


def test_tasks_have_their_own_radius():
    """Tasks whose df/dy differ by three orders of magnitude: each is what it is alone."""
    problem = bl.Problem(lambda y, x, b: ((y - x).cosh() + y**2).sum(), lambda y, x, b: b * (y**2).sum())
    size = torch.tensor([1.0, 1e-3], dtype=D)
    x, y = torch.tensor([0.3, -0.2], dtype=D), torch.zeros(2, 2, dtype=D)
    solver = bl.Descent(bl.SGD(0.2), 3)

    def run(tasks, start):
        batches = bl.Batches(tasks, tasks)
        return bl.hypergradient(problem, x, start, batches, solver=solver, estimator=bl.TaskMean(Sama())).grad

    alone = run(size[1:], y[1:])
    together, large = run(size, y), run(size[:1], y[:1])
    torch.testing.assert_close(2 * together - large, alone, rtol=1e-7, atol=0)
    exact = bl.hypergradient(
        problem, x, y[1:], bl.Batches(size[1:], size[1:]), solver=solver, estimator=bl.TaskMean(T1T2(0.2))
    ).grad
    torch.testing.assert_close(alone, exact, rtol=1e-8, atol=0)


def test_t1t2_by_a_difference_is_t1t2_in_the_memory_of_the_inner_loop():
    """To the square of the radius; and a path that a difference of dg/dx does not show is refused."""
    problem = bl.Problem(
        lambda y, x, b: (y.exp() * x.sin() + y.square()).sum(), lambda y, x, b: (y - 1).square().sum() + (x * y).sum()
    )
    x, y = torch.linspace(0.2, 1, 5, dtype=D), torch.linspace(-1, 1, 5, dtype=D)
    solver = bl.Descent(bl.SGD(0.1, weight_decay=0.1), 4)
    one, other = (
        bl.hypergradient(problem, x, y, bl.Batches(None, None), solver=solver, estimator=T1T2(0.3, difference=each))
        for each in (False, True)
    )
    torch.testing.assert_close(other.grad, one.grad, rtol=1e-9, atol=0)
    assert other.digits > 8
    learned = bl.Descent(bl.SGD(0.1, weight_decay=lambda x: x.sum()), 4)
    bl.hypergradient(problem, x, y, bl.Batches(None, None), solver=learned, estimator=T1T2(0.3))
    with pytest.raises(ValueError, match="cannot see"):
        bl.hypergradient(problem, x, y, bl.Batches(None, None), solver=learned, estimator=T1T2(0.3, difference=True))
