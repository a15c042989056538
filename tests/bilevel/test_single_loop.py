"""Single loops: against the recursions written out with matrices, at known optima, and where they must not say OK."""

import dataclasses
import io
import math

import pytest
import torch

import bilevel as bl

D = torch.float64
E = bl.estimators
P, BATCHES, RATE, LR, OUTER_LR = 3, 3, 0.2, 0.25, 0.05


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


# g_i = y'H_i y / 2 - y'C_i x + sum_k exp(x_k) y_k^2 / 2,   f_j = |y - t_j|^2 / 2 + d_j'x
HS = torch.eye(P, dtype=D) + 0.2 * (drawn(0, BATCHES, P, P) + drawn(0, BATCHES, P, P).mT)
CS, TS, DS = drawn(1, BATCHES, P, P), drawn(2, BATCHES, P), drawn(3, BATCHES, P)


def inner_loss(y, x, batch):
    H, C = batch
    return y @ H @ y / 2 - y @ C @ x + (x.exp() * y.square()).sum() / 2


def outer_loss(y, x, batch):
    t, d = batch
    return (y - t).square().sum() / 2 + d @ x


PROBLEM = bl.Problem(inner_loss, outer_loss)
X0, Y0 = 0.3 * drawn(4, P), drawn(5, P)
ORDER = torch.randint(0, BATCHES, (14, 2), generator=torch.Generator().manual_seed(6)).tolist()


def batches(i, j, **more):
    return bl.Batches((HS[i], CS[i]), (TS[j], DS[j]), index=(i, j), **more)


class Written:
    """All that a round is made of, with matrices."""

    def __init__(self, i, j):
        self.H, self.C, self.t, self.d = HS[i], CS[i], TS[j], DS[j]

    def gradient(self, y, x):
        return self.H @ y - self.C @ x + x.exp() * y

    def product(self, y, x, v):
        return self.H @ v + x.exp() * v

    def mixed(self, y, x, v):
        return -self.C.T @ v + x.exp() * y * v

    def right(self, y, x):
        return y - self.t

    def step(self, y, x, v):
        """D_v"""
        return self.product(y, x, v) - self.right(y, x)

    def direction(self, y, x, v):
        return self.d - self.mixed(y, x, v)


def soba(rounds, x, y, v=0 * Y0):
    for w in rounds:
        d = w.direction(y, x, v)
        y, v, x = y - LR * w.gradient(y, x), v - RATE * w.step(y, x, v), x - OUTER_LR * d
        yield d


def masoba(rounds, x, y, v=0 * Y0, h=None):
    for w in rounds:
        d = w.direction(y, x, v)
        h = d if h is None else 0.7 * h + 0.3 * d
        y, v, x = y - LR * w.gradient(y, x), v - RATE * w.step(y, x, v), x - OUTER_LR * h
        yield h


def fsla(rounds, x, y, v=0 * Y0, old=None):
    for w in rounds:
        d = w.direction(y, x, v)
        if old is not None:
            d = d + 0.7 * (old[3] - w.direction(old[0], old[1], old[2]))
        old = y, x, v, d
        y, v, x = y - LR * w.gradient(y, x), v - RATE * w.step(y, x, v), x - OUTER_LR * d
        yield d


def fdehbo(rounds, x, y, v=0 * Y0, old=None):
    for w in rounds:
        new = [w.gradient(y, x), w.step(y, x, v), w.direction(y, x, v)]
        if old is not None:
            a, b, c, momenta = old
            before = [w.gradient(a, b), w.step(a, b, c), w.direction(a, b, c)]
            new = [n + 0.7 * (m - p) for n, m, p in zip(new, momenta, before, strict=True)]
        old = y, x, v, new
        v = v - RATE * new[1]
        y, v, x = y - LR * new[0], v * min(1.0, 0.5 / float(v.norm())), x - OUTER_LR * new[2]
        yield new[2]


def saba(rounds, x, y, v=0 * Y0):
    inner, outer = {}, {}
    for (i, j), w in zip(ORDER, rounds, strict=False):
        q = [w.gradient(y, x), w.product(y, x, v), w.mixed(y, x, v)]
        p = [w.right(y, x), w.d]
        inner.setdefault(i, q)
        outer.setdefault(j, p)
        a, b, c = (q[k] - inner[i][k] + sum(row[k] for row in inner.values()) / len(inner) for k in range(3))
        e, f = (p[k] - outer[j][k] + sum(row[k] for row in outer.values()) / len(outer) for k in range(2))
        inner[i], outer[j] = q, p
        d = f - c
        y, v, x = y - LR * a, v - RATE * (b - e), x - OUTER_LR * d
        yield d


def amigo(rounds, x, y, v=0 * Y0):
    for w in rounds:
        y = y - LR * w.gradient(y, x)
        for _ in range(3):
            v = v - RATE * w.step(y, x, v)
        d = w.direction(y, x, v)
        x = x - OUTER_LR * d
        yield d


def stocbio(rounds, x, y):
    for w in rounds:
        y = y - LR * w.gradient(y, x)
        r = w.right(y, x)
        v = RATE * r
        for _ in range(2):
            r = r - RATE * w.product(y, x, r)
            v = v + RATE * r
        d = w.direction(y, x, v)
        x = x - OUTER_LR * d
        yield d


METHODS = {
    "soba": (E.SOBA(RATE), soba),
    "masoba": (E.MASOBA(RATE, theta=0.3), masoba),
    "fsla": (E.FSLA(RATE, eta=0.3), fsla),
    "saba": (E.SABA(RATE, BATCHES, BATCHES), saba),
    "fdehbo": (E.FdeHBO(RATE, eta=0.3, radius=0.5), fdehbo),
    "amigo": (E.AmIGO(RATE, steps=3), amigo),
    "stocbio": (E.StocBiO(RATE, terms=3), stocbio),
}
BY_METHOD = pytest.mark.parametrize("name", METHODS)
ONE = bl.Descent(bl.SGD(LR), 1)


def turned(name, order=None, problem=PROBLEM, steps=1, engine=None, saved=False, x=X0, y=Y0):
    """The hypergradients of a loop in which x moves."""
    estimator, state = METHODS[name][0], None
    for i, j in ORDER if order is None else order:
        found = bl.hypergradient(
            problem, x, y, batches(i, j), solver=bl.Descent(bl.SGD(LR), steps), estimator=estimator, state=state,
            engine=engine,
        )  # fmt: skip
        x, state = x - OUTER_LR * found.grad, found.state
        if saved:
            file = io.BytesIO()
            torch.save(state.to_dict(), file)
            file.seek(0)
            state = torch.load(file)
        yield found


@BY_METHOD
def test_a_loop_is_the_recursion_written_out(name):
    """Minibatches, x that moves, and curvature that depends on x: so that an old point is another one."""
    expected = list(METHODS[name][1]([Written(i, j) for i, j in ORDER], X0, Y0))
    bound = 1e-8 if name == "fdehbo" else 1e-12
    lengths = []
    for found, written in zip(turned(name), expected, strict=True):
        torch.testing.assert_close(found.grad, written, rtol=bound, atol=bound)
        lengths.append(float(getattr(found.state, "adjoint", Y0).norm()))
    if name == "fdehbo":  # the ball has held it
        assert max(lengths) == pytest.approx(0.5)


@BY_METHOD
def test_a_saved_state_goes_on_exactly(name):
    for kept, saved in zip(turned(name), turned(name, saved=True), strict=True):
        assert torch.equal(kept.grad, saved.grad)
        assert torch.equal(kept.state.inner, saved.state.inner)
    assert int(kept.state.rounds) == len(ORDER)


@BY_METHOD
def test_compiled_rounds_are_eager_ones(name):
    engine = bl.Compiled(backend="graph")
    for eager, compiled in zip(turned(name, ORDER[:4]), turned(name, ORDER[:4], engine=engine), strict=True):
        torch.testing.assert_close(compiled.grad, eager.grad, rtol=1e-7, atol=1e-9)
        assert compiled.stats["calls"] == eager.stats["calls"]


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("soba", (1, 1, 0, 1)),
        ("saba", (1, 1, 0, 1)),
        ("masoba", (1, 1, 0, 1)),
        ("fsla", (2, 2, 0, 2)),
        ("fdehbo", (6, 2, 0, 0)),
        ("amigo", (2, 1, 3, 1)),
        ("stocbio", (2, 1, 2, 1)),
    ],
)
def test_a_later_round_costs_what_the_module_says(name, calls):
    *_, found = turned(name, ORDER[:2])
    assert tuple(found.stats["calls"].values()) == calls


# --- TP1


@BY_METHOD
def test_the_scalar_problem_comes_to_rest_at_a_quarter(name):
    """v = 1/4 and D = 1/4, with the sign of the house; Q = 3 terms of stocBiO leave 1 - (1/2)^3 of it."""
    problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
    estimator = dataclasses.replace(METHODS[name][0], rate=0.25)
    if name == "saba":
        estimator = E.SABA(0.25, 1)
    state, one = None, torch.ones((), dtype=D)
    for _ in range(40):
        found = bl.hypergradient(
            problem, one, 0 * one, bl.Batches(None, None), solver=bl.Descent(bl.SGD(0.25), 1), estimator=estimator,
            state=state,
        )  # fmt: skip
        state = found.state
    short = 0.25 * (1 - 0.5**3) if name == "stocbio" else 0.25
    assert found.grad.item() == pytest.approx(short, abs=1e-6)
    if name != "stocbio":
        assert state.adjoint.item() == pytest.approx(0.25, abs=1e-6)
        assert found.status is bl.Status.OK
    else:
        assert found.status is bl.Status.MAX_STEPS  # an eighth is left of the residual


# --- a known optimum, by minibatches


ROWS, PARTS = 60, 4
A = drawn(7, 2, ROWS, 4)
B = A @ torch.tensor([1.0, -0.5, 0.25, 0.0], dtype=D) + 0.5 * drawn(8, 2, ROWS)


def ridge(y, x, batch):
    return (batch[0] @ y - batch[1]).square().mean() / 2 + (x.exp() * y.square()).sum() / 2


def validation(y, x, batch):
    return (batch[0] @ y - batch[1]).square().mean() / 2 + 0.02 * (x + 1).square().sum()


def optimum():
    """The penalties where the gradient of the closed form of F is zero."""
    x = torch.zeros(4, dtype=D, requires_grad=True)

    def value():
        solution = torch.linalg.solve(A[0].T @ A[0] / ROWS + torch.diag(x.exp()), A[0].T @ B[0] / ROWS)
        loss = validation(solution, x, (A[1], B[1]))
        x.grad = None
        loss.backward()
        return loss

    torch.optim.LBFGS([x], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe").step(
        value
    )
    assert x.grad.norm() < 1e-9
    return x.detach()


def falling(rate):
    return lambda k: rate / (1 + k / 100) ** 0.5


SOLVING = {
    "soba": (E.SOBA(falling(0.3)), 0.05),
    "masoba": (E.MASOBA(falling(0.3), theta=0.1), 0.05),
    "fsla": (E.FSLA(falling(0.3), eta=0.1), 0.05),
    "saba": (E.SABA(0.3, PARTS, PARTS), 1e-4),
    "fdehbo": (E.FdeHBO(falling(0.3), eta=0.3, radius=10.0), 0.05),
    "amigo": (E.AmIGO(falling(0.3), steps=3), 0.1),
    "stocbio": (E.StocBiO(0.4, terms=12), 0.1),
}


@pytest.mark.parametrize("name", SOLVING)
def test_minibatches_lead_to_the_known_optimum(name):
    """Ridge penalties of four features, batches of 15 rows. Constant steps get SABA there, falling ones the others."""
    best, (estimator, bound) = optimum(), SOLVING[name]
    numbers = torch.randint(0, PARTS, (360, 2), generator=torch.Generator().manual_seed(9)).tolist()
    inner, outer = ([(A[s][i::PARTS], B[s][i::PARTS]) for i in range(PARTS)] for s in (0, 1))
    loader = (bl.Batches(inner[i], outer[j], index=(i, j)) for i, j in numbers)
    x = torch.zeros(4, dtype=D, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=1.0)
    loop = bl.iterate(
        bl.Problem(ridge, validation), x, torch.zeros(4, dtype=D), loader, solver=bl.Descent(bl.SGD(0.2), 1),
        estimator=estimator, optimizer=optimizer,
    )  # fmt: skip
    for step in loop:
        optimizer.param_groups[0]["lr"] = 1.0 if name == "saba" else 1.0 / (1 + step.index / 50)
    assert (x.detach() - best).norm() < bound * best.norm()


# --- the noise of the direction


def noise(estimator, rounds=470, skipped=120):
    """E|D - D*|^2 at rest, and how far a mean over so many rounds may be off: blocks of 50 are nearly independent."""
    H, C, t, d = HS.mean(0), CS.mean(0), TS.mean(0), DS.mean(0)
    full = H + torch.diag(X0.exp())
    y = torch.linalg.solve(full, C @ X0)
    v = torch.linalg.solve(full, y - t)
    exact = d + C.T @ v - X0.exp() * y * v
    numbers = torch.randint(0, BATCHES, (rounds, 2), generator=torch.Generator().manual_seed(10)).tolist()
    errors, state = [], None
    for i, j in numbers:
        found = bl.hypergradient(
            PROBLEM, X0, y, batches(i, j), solver=bl.Descent(bl.SGD(0.05), 1), estimator=estimator, state=state
        )
        state = found.state
        errors.append((found.grad - exact).square().sum())
    blocks = torch.stack(errors[skipped:]).reshape(-1, 50).mean(1)
    return float(blocks.mean()), float(blocks.std() / math.sqrt(len(blocks)))


def test_averages_corrections_and_tables_take_the_noise_out_of_the_direction():
    """Each by a factor that holds at 4 standard errors of both means (one-sided, 1 in 30,000 for a normal law)."""
    plain, error = noise(E.SOBA(0.05))
    for estimator, factor in ((E.MASOBA(0.05, theta=0.1), 3), (E.FSLA(0.05, eta=0.1), 3)):
        variance, own = noise(estimator)
        assert factor * (variance + 4 * own) < plain - 4 * error
    variance, _ = noise(E.SABA(0.05, BATCHES, BATCHES), rounds=370)
    assert variance < 1e-6 * plain


def test_a_table_being_filled_has_the_right_mean():
    """Over the draws of two rounds, at a point that stands still: v = 0, so that D = df/dx."""
    still = bl.Descent(bl.SGD(LR), 0)
    total = torch.zeros(P, dtype=D)
    for first in range(BATCHES):
        for second in range(BATCHES):
            state = None
            for j in (first, second):
                found = bl.hypergradient(
                    bl.Problem(inner_loss, lambda y, x, b: b[1] @ x), X0, Y0, batches(0, j), solver=still,
                    estimator=E.SABA(RATE, BATCHES, BATCHES), state=state,
                )  # fmt: skip
                state = found.state
            total += found.grad / BATCHES**2
    torch.testing.assert_close(total, DS.mean(0))


# --- tasks


@pytest.mark.parametrize("chunk", [None, 1, 2])
@BY_METHOD
def test_tasks_in_any_order_and_grouping_go_on_as_one_by_one(name, chunk):
    """x moves; tasks come back in another order, which their names set right; chunks change from round to round."""
    T, estimator = 3, METHODS[name][0]
    if name == "saba":
        estimator = E.SABA(RATE, 2, 1)
    data = [(HS, CS, TS, DS), (HS.flip(0) + 0.1 * torch.eye(P, dtype=D), CS, TS.flip(0), DS)]
    x, singles, x_all, state = X0, [None] * T, X0, None
    for turn in range(4):
        H, C, t, d = data[turn % 2]
        where, each = turn % 2, []
        for task in range(T):
            one = bl.Batches((H[task], C[task]), (t[task], d[task]), index=where)
            each.append(bl.hypergradient(PROBLEM, x, Y0, one, solver=ONE, estimator=estimator, state=singles[task]))
            singles[task] = each[-1].state
        rows = torch.tensor([[0, 1, 2], [2, 0, 1]][turn % 2])
        together = bl.Batches((H[rows], C[rows]), (t[rows], d[rows]), index=where, task_ids=rows)
        mean = bl.TaskMean(estimator, chunk if turn else 2)
        found = bl.hypergradient(PROBLEM, x_all, Y0.expand(T, P), together, solver=ONE, estimator=mean, state=state)
        expected = torch.stack([hg.grad for hg in each]).mean(0)
        bound = 1e-7 if name == "fdehbo" else 1e-11
        torch.testing.assert_close(found.grad, expected, rtol=bound, atol=bound)
        state = found.state
        x, x_all = x - OUTER_LR * expected, x_all - OUTER_LR * found.grad


# --- what must not be called OK


def status_after(estimator, rounds, problem, lr=0.1, y=None):
    """The statuses of a loop in which x stands still."""
    state, found = None, []
    y = torch.full((2,), 0.5, dtype=D) if y is None else y
    for _ in range(rounds):
        hg = bl.hypergradient(
            problem, torch.ones(2, dtype=D), y, bl.Batches(None, None), solver=bl.Descent(bl.SGD(lr), 1),
            estimator=estimator, state=state,
        )  # fmt: skip
        state = hg.state
        found.append((hg.status, hg))
    return found


CURVED = torch.tensor([2.0, 0.5], dtype=D)
BOWL = bl.Problem(
    lambda y, x, b: (CURVED * y.square()).sum() / 2 - (x * y).sum(), lambda y, x, b: (y - 3).square().sum()
)
LONG = [
    lambda rate: E.SOBA(rate),
    lambda rate: E.SABA(rate, 1),
    lambda rate: E.MASOBA(rate, theta=0.5),
    lambda rate: E.FSLA(rate, eta=0.5),
    lambda rate: E.FdeHBO(rate, eta=0.5),
    lambda rate: E.AmIGO(rate, steps=4),
    lambda rate: E.StocBiO(rate, terms=12),
]


@pytest.mark.parametrize("make", LONG, ids=lambda make: type(make(1.0)).__name__)
def test_a_rate_of_v_above_two_over_the_curvature_is_not_ok(make):
    """OK is never said of a direction that is more than a tenth off, and in the end it is a failure."""
    good = status_after(make(0.9), 60, BOWL)
    assert not any(status.failed for status, _ in good)
    found = status_after(make(1.06), 60, BOWL)
    for status, hg in found:
        y = hg.inner
        exact = torch.linalg.solve(torch.diag(CURVED), 2 * (y - 3))  # dF/dx at this y: M = -1
        if status is bl.Status.OK:
            assert (hg.grad - exact).norm() < 0.1 * exact.norm()
    assert found[-1][0] is bl.Status.NOT_CONTRACTIVE


@pytest.mark.parametrize("make", LONG[:5], ids=lambda make: type(make(1.0)).__name__)
def test_a_y_that_runs_away_is_seen(make):
    """Of a linear f, whose adjoint does not mind: only the inner loss can say it."""
    level = bl.Problem(BOWL.inner_loss, lambda y, x, b: y.sum() + x.square().sum())
    found = status_after(make(0.3), 40, level, lr=1.06, y=torch.zeros(2, dtype=D))
    assert {status for status, _ in found[-20:]} == {bl.Status.INNER_UNSTABLE}
    calm = status_after(make(0.3), 40, level, lr=0.9, y=torch.zeros(2, dtype=D))
    assert calm[-1][0] is bl.Status.OK


def test_a_saddle_is_negative_curvature():
    bent = bl.Problem(lambda y, x, b: (y[0] ** 2 - 0.5 * y[1] ** 2) / 2 - x @ y, lambda y, x, b: (y - 3).square().sum())
    for make in (LONG[0], LONG[5]):
        assert status_after(make(0.3), 30, bent, lr=0.01)[-1][0] is bl.Status.NEGATIVE_CURVATURE


def test_a_ball_that_is_too_small_is_seen_in_the_residual():
    *_, (status, hg) = status_after(E.FdeHBO(0.3, radius=0.5), 60, BOWL)
    assert status is bl.Status.MAX_STEPS
    assert hg.state.adjoint.norm() == pytest.approx(0.5)
    assert hg.stats["linear_residual"] > 0.5


# --- first derivatives in single precision


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e4])
def test_differences_keep_their_digits_in_float32_whatever_the_size_of_v(size):
    def at(dtype, estimator):
        problem = bl.Problem(
            lambda y, x, b: (y - x).cosh().sum() + 0.2 * (y.sum() - 1) ** 2, lambda y, x, b: size * (y**2).sum()
        )
        state, y = None, torch.linspace(-1, 1, 5, dtype=dtype)
        x = torch.linspace(0.5, -0.2, 5, dtype=dtype)
        for _ in range(60):
            hg = bl.hypergradient(
                problem,
                x,
                y,
                bl.Batches(None, None),
                solver=bl.Descent(bl.SGD(0.3), 1),
                estimator=estimator,
                state=state,
            )
            state = hg.state
        return hg.grad.double(), hg.status

    exact, _ = at(D, E.SOBA(0.3))
    found, status = at(torch.float32, E.FdeHBO(0.3))
    assert status is bl.Status.OK
    assert (found - exact).norm() < 3e-4 * exact.norm()


def test_no_second_derivative_is_taken():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            ctx.save_for_backward(y)
            return y.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, weight):
            return 2 * ctx.saved_tensors[0] * weight

    problem = bl.Problem(lambda y, x, b: (Once.apply(y) - x * y).sum(), lambda y, x, b: (y**2).sum() / 2)
    *_, (status, hg) = status_after(E.FdeHBO(0.25), 60, problem, lr=0.25)
    assert status is bl.Status.OK
    torch.testing.assert_close(hg.grad, torch.full((2,), 0.25, dtype=D), rtol=1e-8, atol=1e-8)
    with pytest.raises(Exception, match="second derivative"):
        status_after(E.SOBA(0.25), 1, problem)


# --- trees


def net(y, x, batch):
    return ((batch @ y["a"]).tanh() @ y["b"] - 1).square().mean() + x["decay"].exp() * sum(
        y[name].square().sum() for name in ("a", "b")
    )


@BY_METHOD
def test_a_tensor_that_no_loss_uses_stays_where_it_is_and_changes_nothing(name):
    data = bl.Batches(drawn(11, 6, 3), drawn(12, 6, 3))
    problem = bl.Problem(net, lambda y, x, b: ((b @ y["a"]).tanh() @ y["b"]).square().mean())
    y = {"a": drawn(13, 3, 2), "b": drawn(14, 2)}
    estimator = E.SABA(RATE, 1) if name == "saba" else METHODS[name][0]
    ends = []
    for inner in (y, {"unused": torch.ones(2, 2, dtype=D), **y}):
        x, state = {"decay": torch.tensor(-2.0, dtype=D)}, None
        for _ in range(3):
            found = bl.hypergradient(
                problem,
                x,
                inner,
                data,
                solver=bl.Descent(bl.SGD(LR, momentum=0.5), 2),
                estimator=estimator,
                state=state,
            )
            x, state = {"decay": x["decay"] - found.grad["decay"]}, found.state
        ends.append(x["decay"])
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)
    assert torch.equal(state.inner["unused"], torch.ones(2, 2, dtype=D))


def test_both_sides_of_a_difference_draw_the_same():
    """A gradient with a random part that is the same everywhere must cancel, and not be divided by the width."""

    def noisy(y, x, b):
        return inner_loss(y, x, b) + 50 * (torch.randn(P, dtype=D) * y).sum()

    ends, still = [], bl.Descent(bl.SGD(LR), 0)
    for loss in (inner_loss, noisy):
        torch.manual_seed(0)
        problem, x, state = bl.Problem(loss, outer_loss), X0, None
        for i, j in ORDER[:4]:
            found = bl.hypergradient(problem, x, Y0, batches(i, j), solver=still, estimator=E.FdeHBO(RATE), state=state)
            x, state = x - OUTER_LR * found.grad, found.state
        ends.append(x)
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)


# --- batches


def test_each_product_sees_its_curvature_batch():
    """StocBiO and AmIGO with a PerStep as curvature: products written out, the mixed one on the inner batch."""
    curvature = bl.PerStep([(HS[k], CS[k]) for k in (1, 2, 0)])
    w, (y, x) = Written(0, 0), (Y0, X0)
    y = y - LR * w.gradient(y, x)
    r, total, v = w.right(y, x), RATE * w.right(y, x), 0 * y
    for k in (1, 2):
        r = r - RATE * Written(k, 0).product(y, x, r)
        total = total + RATE * r
    for k in (1, 2, 0):
        v = v - RATE * Written(k, 0).step(y, x, v)
    for name, solved in (("stocbio", total), ("amigo", v)):
        given = batches(0, 0, curvature=curvature)
        found = bl.hypergradient(PROBLEM, X0, Y0, given, solver=ONE, estimator=METHODS[name][0])
        torch.testing.assert_close(found.grad, w.direction(y, x, solved), rtol=1e-12, atol=1e-12)
        short = batches(0, 0, curvature=bl.PerStep([(HS[0], CS[0])]))
        with pytest.raises(ValueError, match="PerStep of 1 batches"):
            bl.hypergradient(PROBLEM, X0, Y0, short, solver=ONE, estimator=METHODS[name][0])


def test_differences_are_taken_on_the_curvature_batch():
    ends = []
    for name in ("soba", "fdehbo"):
        state, estimator = None, dataclasses.replace(METHODS[name][0])
        if name == "fdehbo":
            estimator = E.FdeHBO(RATE, eta=1.0)
        for i, j in ORDER[:3]:
            given = batches(i, j, curvature=(HS[2 - i], CS[2 - i]))
            found = bl.hypergradient(PROBLEM, X0, Y0, given, solver=ONE, estimator=estimator, state=state)
            state = found.state
        ends.append(found.grad)
    torch.testing.assert_close(*ends, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "given",
    [
        bl.Batches((HS[0], CS[0]), (TS[0], DS[0])),
        bl.Batches((HS[0], CS[0]), (TS[0], DS[0]), index=0),
        bl.Batches((HS[0], CS[0]), (TS[0], DS[0]), index=(0, BATCHES)),
        bl.Batches((HS[0], CS[0]), (TS[0], DS[0]), index=(-1, 0)),
        bl.Batches((HS[0], CS[0]), (TS[0], DS[0]), index=(True, 0)),
        bl.Batches((HS[0], CS[0]), (TS[0], DS[0]), index=(0, 0), curvature=(HS[1], CS[1])),
        bl.Batches(bl.PerStep([(HS[0], CS[0])]), (TS[0], DS[0]), index=(0, 0)),
    ],
    ids=["none", "one of two", "beyond", "negative", "no number", "curvature", "per step"],
)
def test_saba_refuses_batches_that_it_cannot_tell_apart(given):
    with pytest.raises(ValueError, match="SABA"):
        bl.hypergradient(PROBLEM, X0, Y0, given, solver=ONE, estimator=METHODS["saba"][0])


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("soba", 2 * P),
        ("masoba", 2 * P + P),
        ("fsla", 4 * P + 2 * P),
        ("fdehbo", 6 * P + 2 * P),
        ("amigo", 2 * P),
        ("stocbio", P),
        # n (2 P + Q) + m (P + Q) of the tables, the same of their sums, and a mark for each batch
        ("saba", 2 * P + (BATCHES + 1) * (2 * P + P) + (BATCHES + 1) * (P + P) + 2 * BATCHES),
    ],
)
def test_a_state_holds_what_the_module_says(name, numbers):
    """With Q = P here, and the number of rounds."""
    *_, found = turned(name, ORDER[:2])
    leaves = torch.utils._pytree.tree_leaves(found.state.to_dict())
    assert sum(leaf.numel() for leaf in leaves if isinstance(leaf, torch.Tensor)) == numbers + 1


@BY_METHOD
def test_results_are_not_the_tensors_of_the_state_that_was_given(name):
    first, second = turned(name, ORDER[:2])
    carried = torch.utils._pytree.tree_leaves(first.state.to_dict())
    given = {leaf.data_ptr() for leaf in carried if isinstance(leaf, torch.Tensor)}
    results = torch.utils._pytree.tree_leaves([second.grad, second.inner, second.next_inner])
    assert not given & {leaf.data_ptr() for leaf in results if isinstance(leaf, torch.Tensor)}


# --- rates and other arguments


def test_a_rate_may_follow_the_rounds():
    seen = []

    def rate(k):
        seen.append(k)
        return torch.tensor(0.2 / (1 + k))

    state = None
    for i, j in ORDER[:3]:
        state = bl.hypergradient(PROBLEM, X0, Y0, batches(i, j), solver=ONE, estimator=E.SOBA(rate), state=state).state
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, "fast", None, lambda k: 0.0, lambda k: None])
def test_a_rate_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match="rate"):
        bl.hypergradient(PROBLEM, X0, Y0, batches(0, 0), solver=ONE, estimator=E.SOBA(value))


@pytest.mark.parametrize(
    "make",
    [
        lambda: E.MASOBA(0.1, theta=1.5),
        lambda: E.FSLA(0.1, eta=0.0),
        lambda: E.SABA(0.1, 0),
        lambda: E.AmIGO(0.1, steps=0),
        lambda: E.StocBiO(0.1, terms=0),
        lambda: E.FdeHBO(0.1, radius=0.0),
        lambda: E.FdeHBO(0.1, width=-1.0),
        lambda: E.SOBA(0.1, tol=-1.0),
    ],
)
def test_arguments_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="was given"):
        make()


def test_weight_decay_is_part_of_the_curvature_and_one_that_learns_is_refused_where_it_is_not_seen():
    decayed = bl.Descent(bl.SGD(LR, weight_decay=0.5), 1)
    for name in ("soba", "fdehbo", "amigo"):
        state, estimator = None, dataclasses.replace(METHODS[name][0], rate=0.25)
        if name == "fdehbo":
            estimator = dataclasses.replace(estimator, radius=math.inf)
        for _ in range(60):
            found = bl.hypergradient(PROBLEM, X0, Y0, batches(0, 0), solver=decayed, estimator=estimator, state=state)
            state = found.state
        exact = bl.hypergradient(
            PROBLEM, X0, Y0, batches(0, 0), solver=bl.Descent(bl.SGD(LR, weight_decay=0.5), 200),
            estimator=bl.Implicit(bl.Dense()),
        )  # fmt: skip
        torch.testing.assert_close(found.grad, exact.grad, rtol=1e-6, atol=1e-6)
    learned = bl.Descent(bl.SGD(LR, weight_decay=lambda x: x[0].exp()), 1)
    with pytest.raises(ValueError, match="weight decay"):
        bl.hypergradient(PROBLEM, X0, Y0, batches(0, 0), solver=learned, estimator=E.FdeHBO(0.2))
