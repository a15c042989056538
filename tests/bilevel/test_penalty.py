"""The penalty methods: known answers, the same steps written by hand, weight decay, tasks, and what they refuse."""

import dataclasses
import itertools

import pytest
import torch
from torch.utils import _pytree as pytree

import bilevel as bl
from bilevel.estimators import BOME, F2SA, LVHBA, MEHA, PBGD, GradientNormPBGD, Polynomial, Ramp

D = torch.float64
NONE = bl.Batches(None, None)
SCALAR = bl.Problem(lambda y, x, _: y**2 - x * y, lambda y, x, _: y**2 / 2)


def number(value, dtype=D):
    return torch.tensor(value, dtype=dtype)


def flat(tree):
    return torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(tree)])


def inactive(c, **more):
    """LVHBA with a constraint that no solution comes near."""
    return LVHBA(lambda y, x, b: flat(y).sum()[None] - 1e6, lambda y, x, b: y, c, **more)


def called(estimator, calls, *, x=1.0, y=0.0, steps=2, optimizer=None, problem=SCALAR):
    inner, state, solver = number(y), None, bl.Descent(optimizer or bl.SGD(0.25), steps)
    for _ in range(calls):
        hg = bl.hypergradient(problem, number(x), inner, NONE, solver=solver, estimator=estimator, state=state)
        inner, state = hg.next_inner if hg.next_inner is not None else hg.inner, hg.state
    return hg


# TP1 of methods.md


@pytest.mark.parametrize(("penalty", "answer"), [(10.0, 0.2380952), (100.0, 0.2487562)])
def test_f2sa_is_off_by_its_factor(penalty, answer):
    hg = called(F2SA(penalty), 1, steps=120)
    assert hg.grad.item() == pytest.approx(0.25 * penalty * 2 / (1 + penalty * 2), abs=1e-11)
    assert hg.grad.item() == pytest.approx(answer, abs=1e-7)


def test_the_row_of_bome():
    hg = called(BOME(eta=0.5), 1, y=0.4)
    assert hg.stats["multiplier"].item() == pytest.approx(2.2534247, abs=1e-7)
    assert hg.grad.item() == pytest.approx(0.1690068, abs=1e-7)
    assert (0.4 - hg.next_inner.item()) / 0.25 == pytest.approx(-0.0506849, abs=1e-7)
    assert hg.stats["gap"].item() == pytest.approx((0.16 - 0.4) - (0.475**2 - 0.475), abs=1e-15)


def test_the_row_of_meha():
    hg = called(MEHA(10.0, rate=1.0), 1, y=0.4, steps=60)
    assert hg.state.proximal.item() == pytest.approx(0.4666667, abs=1e-7)
    assert hg.grad.item() / 10 == pytest.approx(0.0666667, abs=1e-7)
    assert 0.4 - hg.next_inner.item() == pytest.approx(-0.0933333, abs=1e-7)


def test_bome_with_the_value_of_the_gap():
    hg = called(BOME(eta=0.5, phi="value"), 1, y=0.4)
    q_y, q_x, q = -0.2, 0.075, hg.stats["gap"].item()
    multiplier = max(0.5 * q - 0.4 * q_y, 0) / (q_y**2 + q_x**2)
    assert hg.stats["multiplier"].item() == pytest.approx(multiplier, rel=1e-12)


SETTLED = {
    "bome": (lambda s: BOME(s, rate=0.25 / s), lambda s: 5 * s * 2),
    "pbgd": (lambda s: PBGD(s), lambda s: s * 2),
    "gradient norm": (lambda s: GradientNormPBGD(s, rate=0.1), lambda s: 2 * s * 4),
    "meha": (lambda s: MEHA(s), lambda s: s * 4 / 3),
    "lv-hba": (lambda s: inactive(s), lambda s: s * 4 / 3),
}


@pytest.mark.parametrize("strength", [3.0, 30.0])
@pytest.mark.parametrize("name", SETTLED)
def test_where_y_has_settled_the_bias_is_that_of_a_penalty(name, strength):
    make, strong = SETTLED[name]
    hg = called(make(strength), 90, steps=40 if name == "bome" else 8)
    factor = strong(strength) / (1 + strong(strength))
    assert hg.grad.item() == pytest.approx(0.25 * factor, rel=1e-9)
    assert hg.status is bl.Status.OK
    assert hg.next_inner.item() == pytest.approx(hg.inner.item(), abs=1e-10)
    assert hg.stats["unsettled"].item() < 1e-6
    assert called(make(strength), 1, y=5.0).stats["unsettled"].item() > 0.5


def net():
    """A small problem with two tensors each, not convex far out."""
    g = torch.Generator().manual_seed(3)
    A, t = torch.randn(6, 4, generator=g, dtype=D), torch.randn(6, generator=g, dtype=D)

    def inner_loss(y, x, b):
        fit = (torch.tanh(A @ y["a"]) * y["b"] - t).square()
        return (x["w"].sigmoid() * fit).mean() + x["decay"].exp() * y["a"].square().sum() + 0.1 * y["b"].square()

    def outer_loss(y, x, b):
        return (A @ y["a"] + 0.3 * y["b"] - 1).square().mean() + 0.05 * x["w"].square().sum()

    outer = {"w": torch.randn(6, generator=g, dtype=D), "decay": number(-1.0)}
    inner = {"a": torch.randn(4, generator=g, dtype=D), "b": number(0.7)}
    return bl.Problem(inner_loss, outer_loss), outer, inner


def grads(function, y, x):
    """Gradients in y and in x, as dicts."""
    y, x = ({k: v.detach().requires_grad_() for k, v in each.items()} for each in (y, x))
    found = torch.autograd.grad(function(y, x, None), [*y.values(), *x.values()], materialize_grads=True)
    return dict(zip(y, found, strict=False)), dict(zip(x, found[len(y) :], strict=True))


def plus(a, weight, b):
    return {key: a[key] + weight * b[key] for key in a}


def by_hand(method, problem, x, y, calls, K, lr, rate):
    """Every method as its paper's lines, with penalties 2, 3, 4, ...; yields x's direction and the next y."""
    g, f, w, z = problem.inner_loss, problem.outer_loss, dict(y), dict(y)
    for call in range(calls):
        c = 2.0 + call
        if method == "f2sa":
            for _ in range(K):
                z = plus(z, -lr, grads(g, z, x)[0])
            for _ in range(K):
                w = plus(plus(w, -lr, grads(g, w, x)[0]), -lr / c, grads(f, w, x)[0])
            direction = plus(grads(f, w, x)[1], c, plus(grads(g, w, x)[1], -1.0, grads(g, z, x)[1]))
            moved = z
        elif method == "bome":
            w = dict(y)
            for _ in range(K):
                w = plus(w, -lr, grads(g, w, x)[0])
            q_y, q_x = grads(g, y, x)[0], plus(grads(g, y, x)[1], -1.0, grads(g, w, x)[1])
            f_y, f_x = grads(f, y, x)
            q, d = torch.cat([flat(q_y), flat(q_x)]), torch.cat([flat(f_y), flat(f_x)])
            m = max(0.5 * (q @ q) - d @ q, number(0.0)) / (q @ q)
            direction, moved = plus(f_x, m, q_x), plus(y, -rate, plus(f_y, m, q_y))
        elif method == "pbgd":
            for _ in range(K):
                w = plus(w, -lr, grads(g, w, x)[0])
            direction = plus(grads(f, y, x)[1], c, plus(grads(g, y, x)[1], -1.0, grads(g, w, x)[1]))
            moved = plus(y, -rate * min(1 / c, 1), plus(grads(f, y, x)[0], c, grads(g, y, x)[0]))
        elif method == "gradient norm":
            for _ in range(K):

                def penalized(y, x, b, c=c):
                    norm = [v.square().sum() for v in torch.autograd.grad(g(y, x, b), [*y.values()], create_graph=True)]
                    return f(y, x, b) + c * sum(norm)

                in_y, direction = grads(penalized, y, x)
                moved = y = plus(y, -rate * min(1 / c, 1), in_y)
        else:  # meha; lv-hba with a constraint that is not active
            for _ in range(K):
                w = plus(w, -lr, plus(grads(g, w, x)[0], 1 / 0.8, plus(w, -1.0, y)))
            direction = plus(grads(f, y, x)[1], c, plus(grads(g, y, x)[1], -1.0, grads(g, w, x)[1]))
            pull = plus(y, -1.0, w)
            moved = plus(y, -rate, plus(plus(grads(g, y, x)[0], 1 / c, grads(f, y, x)[0]), -1 / 0.8, pull))
        y = moved if method != "f2sa" else y
        yield direction, moved
        x = plus(x, -0.05, direction)


def growing(call):
    return 2.0 + call


METHODS = {
    "f2sa": F2SA(growing),
    "bome": BOME(rate=0.07),
    "pbgd": PBGD(growing, rate=0.07),
    "gradient norm": GradientNormPBGD(growing, rate=0.07),
    "meha": MEHA(growing, gamma=0.8, rate=0.07),
    "lv-hba": inactive(growing, gamma=0.8, rate=0.07),
}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_five_calls_are_the_papers_lines_written_by_hand(method, steps):
    problem, x, inner = net()
    state, solver = None, bl.Descent(bl.SGD(0.2), steps)
    for direction, moved in by_hand(method, problem, x, inner, 5, steps, 0.2, 0.07):
        hg = bl.hypergradient(problem, x, inner, NONE, solver=solver, estimator=METHODS[method], state=state)
        torch.testing.assert_close(flat(hg.grad), flat(direction), rtol=1e-10, atol=1e-12)
        reached = hg.inner if hg.next_inner is None else hg.next_inner
        torch.testing.assert_close(flat(reached), flat(moved), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(hg.outer_loss, problem.outer_loss(hg.inner, x, None))
        torch.testing.assert_close(hg.inner_loss, problem.inner_loss(hg.inner, x, None))
        x, inner, state = plus(x, -0.05, hg.grad), reached, hg.state


def test_f2sa_is_the_forward_correction_with_warm_sides():
    problem, x, inner = net()
    states = [None, None]
    for _ in range(3):
        found = [
            bl.hypergradient(problem, x, inner, NONE, solver=bl.Descent(bl.Adam(0.05), 4), estimator=e, state=s)
            for e, s in zip((F2SA(20.0), bl.FirstOrderCorrected(0.05, "forward", True)), states, strict=True)
        ]
        states = [hg.state for hg in found]
        torch.testing.assert_close(flat(found[0].grad), flat(found[1].grad), rtol=1e-10, atol=1e-12)
        x = plus(x, -0.1, found[0].grad)


@pytest.mark.parametrize("method", METHODS)
def test_weight_decay_of_the_inner_optimizer_is_part_of_the_inner_loss(method):
    problem, x, inner = net()

    def decayed(y, x, b):
        return problem.inner_loss(y, x, b) + 0.15 * sum(leaf.square().sum() for leaf in y.values())

    estimators = [METHODS[method]] + ([BOME(phi="value", rate=0.07)] if method == "bome" else [])
    for estimator in estimators:
        ends = []
        for posed, optimizer in (
            (problem, bl.SGD(0.2, weight_decay=0.3)),
            (bl.Problem(decayed, problem.outer_loss), bl.SGD(0.2)),
        ):
            state = None
            for _ in range(3):
                hg = bl.hypergradient(
                    posed, x, inner, NONE, solver=bl.Descent(optimizer, 2), estimator=estimator, state=state
                )
                state = hg.state
            ends.append(torch.cat([flat(hg.grad), flat(hg.inner)]))
        torch.testing.assert_close(*ends, rtol=1e-11, atol=1e-13)


def test_a_learned_decay_is_seen_by_the_gradient_norm_and_refused_by_the_others():
    """g = y^2 - y and x y^2 / 2 from the optimizer: y* = 1 / (2 + x), dF/dx = -1 / (2 + x)^3."""
    problem = bl.Problem(lambda y, x, b: y**2 - y, lambda y, x, b: y**2 / 2)
    decay = bl.SGD(0.1, weight_decay=lambda x: x)
    hg = called(GradientNormPBGD(1e4, rate=0.1), 2, x=0.5, steps=60, optimizer=decay, problem=problem)
    assert hg.grad.item() == pytest.approx(-1 / 2.5**3, rel=1e-3)
    for name in set(METHODS) - {"gradient norm"}:
        with pytest.raises(ValueError, match=r"weight decay.*Unrolled"):
            called(METHODS[name], 1, optimizer=decay, problem=problem)


# Lower-level constraints


def toy(sign=1.0):
    """The toy of LV-HBA, of one coordinate: x* = -0.3, y* = (0.7, -0.4), with sum(x) + sum(y) = 0 below."""
    problem = bl.Problem(
        lambda y, x, b: y[0] ** 2 / 2 - x * y[0] + y[1], lambda y, x, b: (x - y[1]) ** 2 / 2 + (y[0] - 1) ** 2 / 2
    )
    if sign > 0:
        return problem, lambda y, x, b: x + y.sum(), lambda y, x, b: y - (y.sum() + x) / 2
    return problem, lambda y, x, b: -(x + y.sum()), lambda y, x, b: y - (y.sum() + x).clamp_max(0) / 2


@pytest.mark.parametrize("equality", [True, False])
def test_lvhba_reaches_the_known_optimum_of_its_toy(equality):
    problem, constraint, projection = toy(1.0 if equality else -1.0)
    estimator = LVHBA(
        constraint,
        projection,
        Polynomial(1.0, 0.7, limit=50.0),
        gamma=10.0,
        gamma_dual=10.0,
        rate=0.2,
        rate_dual=0.3,
        equality=equality,
    )
    x, state, history = number(2.0), None, []
    for _ in range(600):
        hg = bl.hypergradient(
            problem,
            x,
            torch.full((2,), 2.0, dtype=D),
            NONE,
            solver=bl.Descent(bl.SGD(0.3), 1),
            estimator=estimator,
            state=state,
        )
        state, x = hg.state, x - 0.1 * hg.grad / hg.stats["c"]
        history.append(hg.status)
    assert x.item() == pytest.approx(-0.3, abs=3e-3)
    torch.testing.assert_close(hg.inner, torch.tensor([0.7, -0.4], dtype=D), atol=5e-3, rtol=0)
    assert abs(state.multipliers.item()) == pytest.approx(1.0, abs=2e-2)  # of 1 + l = 0, or 1 - l = 0
    assert set(history) == {bl.Status.OK}


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["equality", "inequality"])
@pytest.mark.parametrize(
    ("rate", "rate_dual", "lr", "steps"),
    [(0.2, 0.3, 3.0, 1), (3.0, 0.3, 0.3, 1), (0.2, 30.0, 0.3, 3), (3.0, 30.0, 3.0, 3)],
)
def test_lvhba_with_steps_that_are_too_long_is_not_ok(rate, rate_dual, lr, steps, sign):
    """y, w or the multipliers run away long before they leave the numbers; or they stay, and all is well."""
    problem, constraint, projection = toy(sign)
    estimator = LVHBA(
        constraint,
        projection,
        Polynomial(1.0, 0.7, limit=50.0),
        gamma=10.0,
        gamma_dual=10.0,
        rate=rate,
        rate_dual=rate_dual,
        equality=sign > 0,
    )
    state = None
    for _ in range(60):
        hg = bl.hypergradient(
            problem,
            number(2.0),
            torch.full((2,), 2.0, dtype=D),
            NONE,
            solver=bl.Descent(bl.SGD(lr), steps),
            estimator=estimator,
            state=state,
        )
        state = hg.state
    largest = max(float(leaf.abs().max()) for leaf in (state.inner, state.proximal, state.multipliers))
    assert hg.status is not bl.Status.OK or largest < 100


@pytest.mark.parametrize(("x", "answer"), [(0.5, 0.5 - 1.0), (3.0, 1.0 - 1.0 + 0.5)])
def test_a_constraint_that_x_moves_passes_its_pressure_on(x, answer):
    """y in argmin (y - x)^2 / 2 with y <= x / 2 + 0.5 and f = (y - 1)^2 / 2 + ...: dF/dx = (y - 1) dy/dx, dy/dx = 1
    inside and 1 / 2 on the bound, where y = 2 at x = 3."""
    problem = bl.Problem(lambda y, x, b: (y - x) ** 2 / 2, lambda y, x, b: (y - 1) ** 2 / 2)
    estimator = LVHBA(
        lambda y, x, b: y - x / 2 - 0.5, lambda y, x, b: torch.minimum(y, x / 2 + 0.5), 1e4, rate_dual=0.3
    )
    hg = called(estimator, 300, x=x, steps=3, problem=problem, optimizer=bl.SGD(0.3))
    assert hg.grad.item() == pytest.approx(answer, abs=2e-3)
    assert hg.stats["violation"].item() <= 1e-6


def test_what_is_no_projection_on_the_constraint_is_refused():
    problem, constraint, projection = toy()
    x, y = number(2.0), torch.ones(2, dtype=D)

    def call(projection, constraint=constraint, solver=None):
        estimator = LVHBA(constraint, projection, 1.0, equality=True)
        solver = solver or bl.Descent(bl.SGD(0.1), 1)
        return bl.hypergradient(problem, x, y, NONE, solver=solver, estimator=estimator)

    assert call(projection).status is bl.Status.OK
    with pytest.raises(ValueError, match=r"does not depend on the outer variable .*detach"):
        call(lambda y, x, b: projection(y, x.detach(), b))
    with pytest.raises(ValueError, match="ends where its constraint is"):
        call(lambda y, x, b: y + 0 * x)
    with pytest.raises(TypeError, match=r"constraint returned a tensor of torch\.bool"):
        call(projection, lambda y, x, b: y.sum() > x)
    with pytest.raises(ValueError, match="would stop by the gradient of y alone"):
        call(projection, solver=bl.Converge(bl.SGD(0.1)))


# Tasks, states, random numbers, tensors that a loss does not use


@pytest.mark.parametrize("method", METHODS)
def test_tasks_at_once_are_tasks_one_by_one_over_several_calls(method):
    """With a schedule, so that the calls are counted, and with a state that was saved."""
    targets = torch.tensor([0.3, -1.0, 2.0], dtype=D)
    problem = bl.Problem(
        lambda y, x, t: ((y - t) ** 2 * x.exp()).sum() + (y - x).square().sum(), lambda y, x, t: (y + t).square().sum()
    )
    x, inner = torch.tensor([0.2, -0.4], dtype=D), torch.zeros(3, 2, dtype=D)
    batches, solver = bl.Batches(targets, targets), bl.Descent(bl.SGD(0.1), 2)
    ends = []
    for chunk in (None, 2, 1):
        state, here = None, inner
        for _ in range(3):
            estimator = bl.TaskMean(METHODS[method], chunk)
            hg = bl.hypergradient(problem, x, here, batches, solver=solver, estimator=estimator, state=state)
            state, here = hg.state.to_dict(), hg.inner if hg.next_inner is None else hg.next_inner
        ends.append(torch.cat([hg.grad, hg.inner.reshape(-1)]))
    alone = []
    for t, y in zip(targets, inner, strict=True):
        state = None
        for _ in range(3):
            hg = bl.hypergradient(
                problem, x, y, bl.Batches(t, t), solver=solver, estimator=METHODS[method], state=state
            )
            state = hg.state
        alone.append(hg)
    mean = torch.cat([sum(hg.grad for hg in alone) / 3, *(hg.inner for hg in alone)])
    for end in ends:
        torch.testing.assert_close(end, mean, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"gradient norm"}))
def test_copies_that_agree_agree_under_dropout(method):
    """Without a step the copies are one point: with common random numbers the penalty adds exactly nothing to x."""
    problem, x, inner = net()

    def noisy(y, x, b):
        return problem.inner_loss({k: torch.nn.functional.dropout(v, 0.4) for k, v in y.items()}, x, b)

    torch.manual_seed(0)
    hg = bl.hypergradient(
        bl.Problem(noisy, problem.outer_loss),
        x,
        inner,
        NONE,
        solver=bl.Descent(bl.SGD(0.1), 0),
        estimator=METHODS[method],
    )
    torch.testing.assert_close(flat(hg.grad), flat(grads(problem.outer_loss, inner, x)[1]), rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_that_the_inner_loss_does_not_use_follows_the_outer_loss(method):
    problem = bl.Problem(
        lambda y, x, b: (y["a"] - x).square().sum(),
        lambda y, x, b: (y["a"] - 1).square().sum() + (y["free"] - 2).square().sum(),
    )
    inner, state, x = {"a": torch.zeros(2, dtype=D), "free": torch.zeros(2, dtype=D)}, None, number(0.3)
    for _ in range(120):
        rate = {"f2sa": {}, "bome": {"rate": 0.02}, "gradient norm": {"rate": 0.1}}.get(method, {"rate": 0.25})
        estimator = dataclasses.replace(METHODS[method], **rate)
        hg = bl.hypergradient(
            problem, x, inner, NONE, solver=bl.Descent(bl.SGD(0.2), 2), estimator=estimator, state=state
        )
        state = hg.state
    copy = state.penalized if method == "f2sa" else state.inner
    assert hg.status is bl.Status.OK
    assert (copy["free"] > 0.2).all()
    assert (copy["free"] < 2 + 1e-9).all()


def test_features_that_are_computed_apart_change_nothing():
    problem, x, inner = net()
    apart = bl.Problem(
        lambda y, x, b: problem.inner_loss(y, {**x, "w": b}, None),
        lambda y, x, b: problem.outer_loss(y, {**x, "w": b}, None),
        features=lambda x, b: x["w"] * 1,
    )
    for estimator in METHODS.values():
        found = [
            bl.hypergradient(p, x, inner, NONE, solver=bl.Descent(bl.SGD(0.2), 3), estimator=estimator)
            for p in (problem, apart)
        ]
        torch.testing.assert_close(flat(found[0].grad), flat(found[1].grad), rtol=1e-11, atol=1e-13)


# In a loop


@pytest.mark.parametrize("method", METHODS)
def test_minibatches_and_a_moving_x_arrive_near_the_optimum(method):
    """g = |y - x|^2 + rows, f = |y - (1, -1)|^2 + 0.1 |x|^2 over bl.iterate, with a batch for each inner step."""
    target = torch.tensor([1.0, -1.0], dtype=D)
    problem = bl.Problem(
        lambda y, x, b: (y - x + b).square().sum(), lambda y, x, b: (y - target).square().sum() + 0.1 * x.square().sum()
    )
    strong = {
        "f2sa": F2SA(Ramp(2.0, 10.0, 60)),
        "bome": BOME(1.0, rate=0.03),
        "pbgd": PBGD(Ramp(2.0, 10.0, 60)),
        "gradient norm": GradientNormPBGD(Ramp(1.0, 3.0, 60), rate=0.1),
        "meha": MEHA(Ramp(2.0, 10.0, 60)),
        "lv-hba": inactive(Ramp(2.0, 10.0, 60)),
    }[method]
    noise = 0.01 * torch.randn(200, 2, 2, generator=torch.Generator().manual_seed(0), dtype=D)
    x = torch.zeros(2, dtype=D, requires_grad=True)
    loop = bl.iterate(
        problem,
        x,
        torch.zeros(2, dtype=D),
        (bl.Batches(bl.PerStep(list(each - each.mean(0))), None) for each in noise),
        solver=bl.Descent(bl.SGD(0.2), 2),
        estimator=strong,
        optimizer=torch.optim.SGD([x], lr=0.04),
    )
    for step in loop:
        assert not step.hypergradient.status.failed
    torch.testing.assert_close(x.detach(), target / 1.1, atol=0.12 if method == "bome" else 0.06, rtol=0)


# Wrong numbers


def test_a_multiplier_that_leaves_no_digits_is_said():
    _, x, inner = net()
    x, inner = {"w": x["w"].float()}, {k: v.float() for k, v in inner.items()}
    A = torch.randn(6, 4, generator=torch.Generator().manual_seed(3)).double()
    single = bl.Problem(
        lambda y, x, b: (
            (x["w"].sigmoid() * (A.to(y["a"]) @ y["a"] - y["b"]).square()).mean() + (y["a"] - 1).square().sum()
        ),
        lambda y, x, b: (A.to(y["a"]) @ y["a"] - 1).square().mean(),
    )
    for estimator in (F2SA(1e8), PBGD(1e8, rate=0.1), MEHA(1e8, rate=0.1)):
        state = None
        for _ in range(2):
            hg = bl.hypergradient(
                single, x, inner, NONE, solver=bl.Descent(bl.SGD(0.1), 300), estimator=estimator, state=state
            )
            state = hg.state
        assert hg.status is bl.Status.DIGITS_LOST or hg.stats["digits"] > 0.5
    hg = bl.hypergradient(single, x, inner, NONE, solver=bl.Descent(bl.SGD(0.1), 300), estimator=F2SA(1e8))
    assert hg.status is bl.Status.DIGITS_LOST
    assert hg.stats["digits"] < 0.5


@pytest.mark.parametrize("method", ["bome", "pbgd", "gradient norm", "meha"])
def test_steps_of_y_that_are_too_long_are_said(method):
    estimator = dataclasses.replace(METHODS[method], rate=1.4)
    seen = {called(estimator, calls, y=0.9, steps=3).status for calls in (2, 6, 12)}
    assert bl.Status.INNER_UNSTABLE in seen


def test_a_penalty_too_weak_for_a_concave_outer_loss_is_said():
    problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: -3 * y**2)
    assert called(F2SA(2.0), 1, steps=20, problem=problem).status is bl.Status.UNBOUNDED
    assert called(F2SA(20.0), 3, steps=40, problem=problem).status is bl.Status.OK


@pytest.mark.parametrize("optimizer", [bl.SGD(0.1, momentum=0.9), bl.Adam(0.01)], ids=str)
@pytest.mark.parametrize(
    "estimator",
    [F2SA(10.0), bl.FirstOrderCorrected(0.1, "forward", True), bl.FirstOrderCorrected(0.1, warm_sides=True)],
    ids=str,
)
def test_copies_that_rest_do_not_run_away(estimator, optimizer):
    """At rest a gradient of nearly nothing grows by many times when momentum or Adam's first steps overshoot it."""
    problem = bl.Problem(lambda y, x, _: y**2 - x * y, lambda y, x, _: (y - 2) ** 2 / 2)
    state, seen = None, set()
    for _ in range(60):
        hg = bl.hypergradient(
            problem, number(1.0), number(0.0), NONE, solver=bl.Descent(optimizer, 20), estimator=estimator, state=state
        )
        state = hg.state
        seen.add(hg.status)
    assert seen == {bl.Status.OK}


# Refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: F2SA(0.0), r"F2SA was given multiplier=0\.0; a positive number, or a function of the call"),
        (lambda: F2SA("10"), "multiplier='10'"),
        (lambda: PBGD(-1.0), r"gamma=-1\.0"),
        (lambda: PBGD(1.0, rate=0.0), r"rate=0\.0; None or a positive number"),
        (lambda: GradientNormPBGD(float("inf")), "gamma=inf"),
        (lambda: BOME(eta=0.0), r"eta=0\.0"),
        (lambda: BOME(phi="norm"), "phi='norm'; one of 'gradient', 'value'"),
        (lambda: MEHA(1.0, gamma=-1.0), r"gamma=-1\.0"),
        (lambda: inactive(1.0, limit=0.0), r"limit=0\.0"),
        (lambda: Polynomial(0.0, 0.3), r"start=0\.0"),
        (lambda: Polynomial(1.0, -0.3), r"power=-0\.3"),
        (lambda: Ramp(1.0, 2.0, 0), "calls=0"),
        (lambda: called(PBGD(lambda call: 1.0 - call), 2), r"gamma\(1\)=0\.0; a positive number"),
        (lambda: called(PBGD(1.0), 1, optimizer=bl.SGD(0.1, momentum=0.9)), r"PBGD\(\.\.\., rate=0\.1\)"),
        (lambda: called(MEHA(1.0), 1, optimizer=bl.Adam(0.1)), r"the Adam of the solver has no one step size"),
        (lambda: called(F2SA(1.0), 1, optimizer=bl.AdamW(0.1, weight_decay=0.1)), "AdamW does not say"),
        (lambda: called(PBGD(1.0, rate=0.1), 1, optimizer=bl.inner.Langevin(0.1, 0.1)), "Langevin need not follow"),
    ],
)
def test_arguments_and_solvers_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("method", METHODS)
def test_paths_that_a_penalty_cannot_see_are_refused(method):
    start = bl.Problem(lambda y, x, b: y**2, lambda y, x, b: (y - 1) ** 2, init=lambda x, b: x)
    solver = bl.Descent(bl.SGD(0.1), 2)
    with pytest.raises(ValueError, match=r"Problem\.init"):
        bl.hypergradient(start, number(1.0), None, NONE, solver=solver, estimator=METHODS[method])
    learned = bl.Problem(lambda y, x, b: (y - 1) ** 2, lambda y, x, b: y**2)
    with pytest.raises(ValueError, match="a hyper-parameter of the inner optimizer"):
        called(METHODS[method], 1, problem=learned, optimizer=bl.SGD(lr=lambda x: x.exp()))
    other = called(METHODS[method], 1).state
    wrong = next(each for name, each in METHODS.items() if name != method)
    with pytest.raises(ValueError, match="of its own last call was needed"):
        bl.hypergradient(SCALAR, number(1.0), number(0.0), NONE, solver=solver, estimator=wrong, state=other)


def test_tasks_that_were_called_a_different_number_of_times_are_refused():
    problem = bl.Problem(lambda y, x, t: (y - x * t) ** 2, lambda y, x, t: y**2)
    t = torch.tensor([1.0, 2.0], dtype=D)

    def call(state=None):
        estimator = bl.TaskMean(PBGD(growing))
        solver = bl.Descent(bl.SGD(0.1), 1)
        return bl.hypergradient(
            problem, number(1.0), 0 * t, bl.Batches(t, t), solver=solver, estimator=estimator, state=state
        )

    state = call().state
    with pytest.raises(ValueError, match=r"called \[1, 7\] times"):
        call(dataclasses.replace(state, calls=torch.tensor([1, 7])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_other_dtypes_come_back_as_they_came(method, dtype):
    problem = bl.Problem(
        lambda y, x, b: sum(((1 + x) * leaf - 1).square().sum() for leaf in y), lambda y, x, b: y[0].square().sum()
    )
    x, inner, state = torch.tensor(0.3, dtype=dtype), [torch.ones(2, dtype=dtype), torch.ones((), dtype=dtype)], None
    for _ in range(3):
        hg = bl.hypergradient(
            problem, x, inner, NONE, solver=bl.Descent(bl.SGD(0.1), 2), estimator=METHODS[method], state=state
        )
        state = hg.state
    leaves = [hg.grad, *hg.inner, *itertools.chain(*(hg.next_inner or [],))]
    assert {leaf.dtype for leaf in leaves} == {dtype}
    assert hg.grad.isfinite()
