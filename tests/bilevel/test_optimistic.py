"""Learned update rules and optimistic outer steps (papers.md 5.2 to 5.4), against recursions written out here."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch

import bilevel as bl
from bilevel.meta import last_gradient, learned_updates

D = torch.float64


def identity(average, w, batch):
    """phi(x, w) = w."""
    return w


def descend(loss, start, steps, **options):
    """The averages and losses of phi(x, w) = w."""
    options = {"rule": identity, "w": start} | options
    found = list(learned_updates(loss, start=start, loader=itertools.repeat(None, steps), **options))
    return [step.average for step in found], [step.loss.item() for step in found]


# The set-up of papers.md 5.4 b: spectrum uniform in its logarithm, x* = 1, x_0 = 0, L = 1.
CURVATURE = torch.logspace(-9, 0, 600, dtype=D)
SOLUTION = torch.ones(600, dtype=D)


def quadratic(x, batch=None):
    return 0.5 * (CURVATURE * (x - SOLUTION) ** 2).sum()


def optimistic_rate(t):
    """(t - 1) / (2 t L) with L = 1."""
    return (t - 1) / (2 * t)


def slope(losses):
    """Of log loss against log t on t in [200, 2000]."""
    t, y = torch.arange(200, 2001, dtype=D).log(), torch.tensor(losses[199:2000], dtype=D).log()
    return (((t - t.mean()) * (y - y.mean())).sum() / (t - t.mean()).square().sum()).item()


def test_heavy_ball_is_a_special_case():
    """papers.md 5.4 a: phi = w, alpha = 1, constant beta; largest difference over 50 steps at most 1e-13."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, generator=generator, dtype=D)
    hessian, target = root @ root.mT / 10, torch.randn(5, generator=generator, dtype=D)
    start, beta = torch.randn(5, generator=generator, dtype=D), 0.3
    found, _ = descend(lambda x, b: 0.5 * (x - target) @ hessian @ (x - target), start, 51, rate=beta, hint=None)
    previous = current = found[0]
    torch.testing.assert_close(current, start, rtol=0, atol=0)
    for t in range(1, 51):
        gradient = hessian @ (current - target)
        momentum = (t - 1) / (t + 1) * (current - previous)
        previous, current = current, current + momentum - beta / (t + 1) * gradient
        assert (found[t] - current).abs().max() <= 1e-13


def test_classical_heavy_ball_is_the_practical_form_with_weight_decay():
    """papers.md 5.4 a: x <- x + w, w <- m w - beta grad f(x + w), by iterate with K = 1 and SGD on w."""

    @dataclasses.dataclass(frozen=True)
    class Add(bl.inner.Dynamics):
        def step(self, inner, state, outer, at):
            return inner + outer, state

    def loss(y, x, b):
        return (y**4).sum() / 4 + 0.5 * (y - 1).square().sum()

    m, beta = 0.9, 0.02
    w = torch.zeros(3, dtype=D, requires_grad=True)
    start = torch.tensor([1.5, -1.0, 0.3], dtype=D)
    loop = bl.iterate(
        bl.Problem(loss, loss),
        w,
        start,
        itertools.repeat(bl.Batches(None, None), 50),
        solver=bl.Descent(Add(), 1),
        estimator=bl.Unrolled(),
        optimizer=torch.optim.SGD([w], lr=beta, weight_decay=(1 - m) / beta),
    )
    x, velocity = start, torch.zeros(3, dtype=D)
    for step in loop:
        x = x + velocity
        velocity = m * velocity - beta * (x**3 + x - 1)
        torch.testing.assert_close(step.hypergradient.inner, x, rtol=0, atol=1e-13)


def written_out(loss, rule, x, w, steps, rate, alpha, hint):
    """Algorithms B and C of papers.md 5.2, literally."""
    first, total, gradients, path = w, 0.0, torch.zeros_like(w), []
    for t in range(1, steps + 1):
        total += alpha(t)
        share = alpha(t) / total
        answer, pull = torch.func.vjp(lambda v, at=x: rule(at, v, None), w)
        x = (1 - share) * x + share * answer
        gradient = torch.func.grad(loss)(x, None)
        gradients = gradients + alpha(t) * pull(gradient)[0]
        leaning = gradients
        if hint:
            leaning = gradients + alpha(t + 1) * torch.func.vjp(lambda v, at=x: rule(at, v, None), w)[1](gradient)[0]
        w = first - rate(t) * leaning
        path.append((x, w))
    return path


def nonlinear(average, w, batch=None):
    """A preconditioned rule whose derivative in w depends on both."""
    return torch.tanh(w[:3]) * average.sin() + w[3:]


@pytest.mark.parametrize("alpha", [lambda t: 1.0, float, lambda t: t**0.5], ids=["1", "t", "sqrt t"])
@pytest.mark.parametrize("hint", [None, last_gradient])
def test_a_rule_of_ones_own_follows_the_algorithm_to_the_letter(hint, alpha):
    """papers.md 5.2 B and C; D_w phi at xbar_{t-1} for the gradient, at xbar_t for the hint."""
    start = torch.tensor([0.5, -1.0, 2.0], dtype=D)
    w = torch.tensor([0.1, 0.2, -0.3, 0.4, 0.0, 0.1], dtype=D)

    def loss(x, b):
        return ((x - 1) ** 2).sum() + (x**4).sum() / 8

    def rate(t):
        return 0.05 / t

    expected = written_out(loss, nonlinear, start, w, 30, rate, alpha, hint)
    found = list(learned_updates(loss, nonlinear, start, w, [None] * 30, rate=rate, weights=alpha, hint=hint))
    assert [step.index for step in found] == list(range(30))
    for step, (x, after) in zip(found, expected, strict=True):
        torch.testing.assert_close(step.average, x, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(step.w, after, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(step.loss, loss(x, None), rtol=1e-12, atol=0)


def test_a_hint_of_zero_is_no_hint_bit_for_bit():
    """papers.md 5.4 e."""
    start, options = torch.tensor([0.5, -1.0, 2.0], dtype=D), {"rate": lambda t: 0.02 / t, "weights": float}
    w = torch.linspace(-1, 1, 6, dtype=D)

    def run(hint):
        found = learned_updates(lambda x, b: (x**4).sum(), nonlinear, start, w, [None] * 40, hint=hint, **options)
        return [(step.average, step.w, step.loss) for step in found]

    off = run(None)
    zero = run(lambda seen: torch.zeros_like(seen.w))
    assert all(torch.equal(a, b) for one, other in zip(off, zero, strict=True) for a, b in zip(one, other, strict=True))
    assert not torch.equal(off[-1][1], run(last_gradient)[-1][1])


def test_the_incremental_form_is_the_same_walk():
    """papers.md 5.2 C: w - beta (alpha_t g_t + alpha_{t+1} hint_{t+1} - alpha_t hint_t), by OptimisticSGD on w."""
    start = torch.tensor([2.0, -1.0], dtype=D)

    def loss(x, b=None):
        return (x.cosh()).sum()

    found, _ = descend(loss, start, 40, rate=0.05, weights=float)
    w, x, total = start.clone().requires_grad_(), start, 0.0
    optimizer = bl.OptimisticSGD([w], lr=0.05, power=1.0)
    for t in range(1, 41):
        total += t
        x = (1 - t / total) * x + t / total * w.detach()
        torch.testing.assert_close(found[t - 1], x, rtol=1e-12, atol=1e-14)
        w.grad = x.sinh()
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "options", "expected", "end"),
    [
        ("plain, alpha = 1, beta = 1 / L", {"rate": 1.0, "hint": None}, -1.00, 7.2e-3),
        ("optimistic, alpha = t", {"rate": optimistic_rate, "weights": float}, -1.99, 1.4e-5),
        ("optimistic, alpha = 1", {"rate": 1.0}, -0.98, None),
        ("no hint, alpha = t, beta = 1 / (2 L)", {"rate": 0.5, "weights": float, "hint": None}, -2.00, None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_rates_as_measured_slopes(name, options, expected, end):
    """papers.md 5.4 b and c: slopes on t in [200, 2000]; the bounds of 5.3 hold at every t."""
    _, losses = descend(quadratic, torch.zeros(600, dtype=D), 2000, **options)
    assert slope(losses) == pytest.approx(expected, abs=0.011)
    if end is not None:
        assert losses[-1] == pytest.approx(end, rel=0.02)
        distance = SOLUTION.square().sum().item()
        optimistic = "hint" not in options
        ratios = [
            loss / (2 * distance / (t**2 - 1) if optimistic else distance / (2 * t))
            for t, loss in enumerate(losses, start=1)
            if t > 1
        ]
        assert max(ratios) <= 1.0
        assert ratios[-1] == pytest.approx(0.047 if optimistic else 0.048, abs=1e-3)


def kinked(x, batch=None):
    """papers.md 5.4 c: f' = 25 x below 1, x + 24 up to 2, 25 x - 24 above."""
    middle, upper = 0.5 * x**2 + 24 * x - 12, 12.5 * x**2 - 24 * x + 36
    return torch.where(x < 1, 12.5 * x**2, torch.where(x < 2, middle, upper)).sum()


def test_a_piecewise_quadratic_tells_optimism_from_momentum():
    """papers.md 5.4 c: the tail's maximum over t in [1000, 2000] is 1e-35 with the hint, 9e-7 without."""
    start = torch.tensor([3.3], dtype=D)
    tails = {}
    for hint in (last_gradient, None):
        _, losses = descend(kinked, start, 2000, rate=1 / 50, weights=float, hint=hint)
        tails[hint] = max(losses[999:])
    assert tails[last_gradient] < 1e-33
    assert 5e-7 < tails[None] < 2e-6


def test_twice_the_step_size_diverges_with_a_hint_and_says_so():
    """papers.md 5.4 c: with the hint, beta = 1 / L."""
    start, losses = torch.tensor([3.3], dtype=D), []
    walk = learned_updates(kinked, identity, start, start, [None] * 2000, rate=1 / 25, weights=float)
    with pytest.raises(bl.BilevelError, match=r"NONFINITE.*Lower rate") as failure:
        losses.extend(step.loss.item() for step in walk)
    assert failure.value.status is bl.Status.NONFINITE
    assert max(losses) > 1e100  # all earlier steps stand


def test_the_step_size_condition_has_its_edge_where_it_should():
    """papers.md 5.3: beta alpha_t^2 <= alpha_{1:t-1} / L, which is beta <= (t - 1) / (2 t L) for alpha = t."""
    start = torch.tensor([3.3], dtype=D)
    _, safe = descend(kinked, start, 400, rate=0.9 / 50, weights=float)
    _, schedule = descend(kinked, start, 400, rate=lambda t: (t - 1) / (50 * t), weights=float)
    assert max(safe[200:]) < 1e-4
    assert max(schedule[200:]) < 1e-4


def test_adaptive_rates_divide_by_the_root_of_the_sum_of_squares():
    """papers.md 5.2 F."""
    start = torch.tensor([1.0, -2.0], dtype=D)

    def loss(x, b=None):
        return (torch.tensor([1.0, 9.0], dtype=D) * x**2).sum()

    found = list(
        learned_updates(loss, identity, start, start, [None] * 20, rate=0.1, weights=float, adaptive=True, eps=1e-3)
    )
    x, w, total, gradients, squares = start, start, 0.0, torch.zeros(2, dtype=D), torch.zeros(2, dtype=D)
    for t, step in enumerate(found, start=1):
        total += t
        x = (1 - t / total) * x + t / total * w
        g = torch.func.grad(loss)(x)
        gradients, squares = gradients + t * g, squares + (t * g) ** 2
        w = start - 0.1 * (gradients + (t + 1) * g) / (squares + 1e-3).sqrt()
        torch.testing.assert_close(step.w, w, rtol=1e-13, atol=1e-14)


def test_a_projection_keeps_w_in_its_set_and_solves_the_constrained_step():
    start = torch.tensor([1.0, -2.0, 0.5], dtype=D)
    target = torch.tensor([3.0, 0.0, -3.0], dtype=D)

    def ball(w):
        return w * torch.clamp(1.0 / w.norm(), max=1.0)

    found = list(
        learned_updates(
            lambda x, b: ((x - target) ** 2).sum(),
            identity,
            start,
            torch.zeros(3, dtype=D),
            [None] * 500,
            rate=optimistic_rate,
            weights=float,
            project=ball,
        )
    )
    assert all(step.w.norm() <= 1 + 1e-12 for step in found)
    torch.testing.assert_close(found[-1].average, target / target.norm(), rtol=0, atol=5e-3)


def test_trees_float32_and_batches():
    """x and w are trees of their own; batches reach the loss and the rule; results are nobody else's memory."""
    start = {"a": torch.zeros(2), "b": [torch.ones(1)]}
    w = [torch.zeros(2), torch.zeros(())]
    seen = []

    def rule(average, w, batch):
        seen.append(batch)
        return {"a": average["a"] + w[0] * batch, "b": [average["b"][0] * (1 + w[1])]}

    def loss(x, batch):
        return ((x["a"] - batch) ** 2).sum() + (x["b"][0] - 0.5).square().sum()

    found = []
    for step in learned_updates(loss, rule, start, w, [1.0, 2.0, 1.0] * 30, rate=lambda t: 0.05 / t):
        found.append((step.loss.item(), step.w[0].clone()))
        for leaf in (step.average["a"], step.w[0], step.x["a"]):
            leaf.fill_(float("nan"))  # what is yielded is the caller's
    assert seen[::2][:3] == [1.0, 2.0, 1.0]  # the hint asks once more
    assert len(found) == 90
    assert found[0][1].dtype == torch.float32
    assert all(math.isfinite(loss) for loss, _ in found)
    assert torch.equal(start["a"], torch.zeros(2))
    assert torch.equal(w[0], torch.zeros(2))


def test_gradients_switched_off_outside_change_nothing_and_entries_match_by_key():
    """Under no_grad the cast of a rule's float64 answer to a float32 x had lost its graph, and w stood still."""
    start = {"p": torch.zeros(2), "q": torch.ones(1)}
    w = {"m": torch.zeros(2, dtype=D), "k": torch.ones((), dtype=D, requires_grad=True)}

    def loss(x, b):
        return ((x["p"] - 1) ** 2).sum() + (x["q"] ** 2).sum()

    def rule(average, w, b):
        return {"q": average["q"] * w["k"], "p": average["p"] + w["m"]}

    def turned(seen):
        return dict(reversed(list(last_gradient(seen).items())))

    def run(hint=last_gradient):
        return list(learned_updates(loss, rule, start, w, [None] * 20, rate=0.02, hint=hint))[-1]

    plain, other = run(), run(turned)
    with torch.no_grad():
        off = run()
    assert plain.w["m"].abs().min() > 0.1
    for found in (other, off):
        assert torch.equal(found.loss, plain.loss)
        assert torch.equal(found.w["m"], plain.w["m"])
    assert not plain.w["k"].requires_grad
    for _ in learned_updates(loss, rule, start, w, [None], rate=0.02):
        assert torch.is_grad_enabled()


def test_no_steps_yield_nothing_and_a_rule_without_w_never_moves_it():
    start = torch.ones(2)
    assert list(learned_updates(kinked, identity, start, start, [], rate=1.0)) == []
    found = list(learned_updates(kinked, lambda x, w, b: x / 2, start, start, [None] * 3, rate=1.0))
    assert torch.equal(found[-1].w, start)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"hint": lambda seen: torch.zeros(2)},
            ValueError,
            r"hint returned a Tensor of .*: \(2,\); a tree like w, .*\(3,\).*seen.pull",
        ),
        ({"hint": lambda seen: {"w": torch.zeros(3)}}, ValueError, "hint returned a dict"),
        ({"hint": lambda seen: None}, ValueError, "hint returned a NoneType"),
        ({"hint": lambda seen: seen.pull(torch.zeros(2))}, ValueError, r"seen.pull was given a Tensor .*a tree like x"),
        ({"rule": lambda x, w, b: x.add_(1)}, ValueError, "rule changed the average in place"),
        ({"hint": 1.0}, TypeError, r"hint=1\.0; a function or None"),
        ({"rule": lambda x, w, b: w[:2]}, ValueError, r"rule returned a Tensor of .*\(2,\); a tree like x"),
        ({"project": lambda w: w[0]}, ValueError, "project returned a Tensor"),
        ({"loss": lambda x, b: x}, ValueError, r"loss returned a tensor of shape \(3,\); a floating 0-dim tensor"),
        ({"loss": lambda x, b: 1.0}, ValueError, "loss returned a float"),
        ({"rate": -1.0}, ValueError, r"rate=-1\.0; a number of at least 0"),
        ({"rate": lambda t: math.nan}, ValueError, "whose value at t = 1 is nan"),
        ({"weights": 0.0}, ValueError, r"weights=0\.0; a positive number"),
        ({"weights": lambda t: 2 - t}, ValueError, "whose value at t = 2 is 0; a positive number"),
        ({"eps": 0.0}, ValueError, r"eps=0\.0; a positive number"),
        ({"w": torch.arange(3)}, ValueError, "floating"),
        ({"start": []}, TypeError, r"start with the leaves \[\]; a pytree of floating tensors"),
    ],
)
def test_bad_input_is_refused(options, error, message):
    """Must show 6: among others a hint of the wrong shape."""
    given = {"loss": kinked, "rule": identity, "start": torch.ones(3), "w": torch.ones(3), "loader": [None] * 3}
    given |= {"rate": 0.01} | options
    error = TypeError if "w" in options else error
    with pytest.raises(error, match=message):
        list(learned_updates(**given))


def test_of_element_wise_rates_the_gradient_is_a_product_of_two_gradients():
    """papers.md 5.6: for K = 1, dF/dw = -exp(w) grad g(y_0) grad f(y_1), element by element."""
    y0, w = torch.tensor([0.3, -0.7, 1.2], dtype=D), torch.tensor([-1.0, -2.0, -0.5], dtype=D)
    problem = bl.Problem(lambda y, x, b: (y**4).sum(), lambda y, x, b: y.cosh().sum())
    solver = bl.Descent(bl.SGD(lr=lambda x: x.exp()), 1)
    hg = bl.hypergradient(problem, w, y0, bl.Batches(None, None), solver=solver, estimator=bl.Unrolled())
    y1 = y0 - w.exp() * 4 * y0**3
    torch.testing.assert_close(hg.grad, -w.exp() * 4 * y0**3 * y1.sinh(), rtol=1e-14, atol=0)


# The outer optimizers


def walk(make, gradients, start=None):
    x = (torch.zeros_like(gradients[0]) if start is None else start.clone()).requires_grad_()
    optimizer, path = make([x]), []
    for gradient in gradients:
        x.grad = gradient.clone()
        optimizer.step()
        path.append(x.detach().clone())
    return path


def drawn(count=6, dtype=D):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, generator=generator, dtype=D).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("power", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("optimism", [0.0, 1.0, 0.3])
def test_optimistic_steps_are_their_formula_and_dual_averaging_walks_the_same_way(optimism, power):
    """papers.md 5.2 C, incremental and summed."""
    gradients, start = drawn(), torch.tensor([1.0, 2.0, 3.0], dtype=D)
    a = walk(lambda p: bl.OptimisticSGD(p, lr=0.1, optimism=optimism, power=power), gradients, start)
    b = walk(lambda p: bl.DualAveraging(p, lr=0.1, optimism=optimism, power=power), gradients, start)
    x, hint = start, torch.zeros(3, dtype=D)
    for t, g in enumerate(gradients, start=1):
        ahead = optimism * (t + 1) ** power * g
        x, hint = x - 0.1 * (t**power * g + ahead - hint), ahead
        torch.testing.assert_close(a[t - 1], x, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(b[t - 1], x, rtol=1e-13, atol=1e-14)


def test_without_optimism_it_is_torchs_sgd_bit_for_bit():
    gradients = drawn(dtype=torch.float32)
    a = walk(lambda p: bl.OptimisticSGD(p, lr=0.1, optimism=0.0), gradients)
    b = walk(lambda p: torch.optim.SGD(p, lr=0.1), gradients)
    assert all(torch.equal(*pair) for pair in zip(a, b, strict=True))


def test_adaptive_dual_averaging_is_adagrads_first_step_and_its_formula_after():
    gradients = drawn()
    path = walk(lambda p: bl.DualAveraging(p, lr=0.1, adaptive=True, eps=1e-6, power=1.0), gradients)
    total, squares = torch.zeros(3, dtype=D), torch.zeros(3, dtype=D)
    for t, g in enumerate(gradients, start=1):
        total, squares = total + t * g, squares + (t * g) ** 2
        torch.testing.assert_close(path[t - 1], -0.1 * total / (squares + 1e-6).sqrt(), rtol=1e-12, atol=1e-14)


def test_a_changed_lr_weighs_all_gradients_of_dual_averaging():
    x = torch.zeros(1, dtype=D, requires_grad=True)
    optimizer = bl.DualAveraging([x], lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    for expected in (-0.1, -0.1, -0.075):  # -lr_t times the sum
        x.grad = torch.ones(1, dtype=D)
        optimizer.step()
        schedule.step()
        assert x.item() == pytest.approx(expected, rel=1e-12)


MAKERS = {
    "optimistic": lambda p, **k: bl.OptimisticSGD(p, **({"lr": 0.1, "power": 1.0} | k)),
    "dual averaging": lambda p, **k: bl.DualAveraging(p, **({"lr": 0.1, "optimism": 0.5, "adaptive": True} | k)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", MAKERS)
def test_state_dict_round_trip_is_bit_exact(name, dtype):
    gradients = drawn(8, dtype)
    whole = walk(MAKERS[name], gradients)
    x = torch.zeros(3, dtype=dtype, requires_grad=True)
    optimizer = MAKERS[name]([x])
    for index, gradient in enumerate(gradients):
        if index == 4:
            saved = copy.deepcopy(optimizer.state_dict())
            x = x.detach().clone().requires_grad_()
            optimizer = type(optimizer)([x], lr=7.0)  # its settings come back with the state
            optimizer.load_state_dict(saved)
        x.grad = gradient.clone()
        optimizer.step()
        assert torch.equal(x.detach(), whole[index])


@pytest.mark.parametrize("name", MAKERS)
def test_groups_missing_sparse_and_empty_gradients(name):
    a, b, idle = (torch.zeros(2, dtype=D, requires_grad=True) for _ in range(3))
    empty = torch.zeros(0, 3, requires_grad=True)
    optimizer = MAKERS[name]([{"params": [a, empty]}, {"params": [b, idle], "lr": 0.01}])
    a.grad, b.grad, empty.grad = torch.ones(2, dtype=D), torch.ones(2, dtype=D), torch.zeros(0, 3)
    optimizer.step()
    torch.testing.assert_close(b.detach(), a.detach() / 10)
    assert torch.equal(idle.detach(), torch.zeros(2, dtype=D))
    assert idle not in optimizer.state
    tables = [torch.nn.Embedding(4, 2, sparse=sparse, dtype=D) for sparse in (True, False)]
    for table in tables:
        torch.nn.init.constant_(table.weight, 0.5)
        moving = MAKERS[name](table.parameters())
        for tokens in ([0, 2, 2], [1, 2]):
            moving.zero_grad()
            table(torch.tensor(tokens)).pow(3).sum().backward()
            moving.step()
    torch.testing.assert_close(tables[0].weight, tables[1].weight, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", MAKERS)
def test_closures_are_called_with_gradients_enabled(name):
    x = torch.ones(1, dtype=D, requires_grad=True)
    optimizer = MAKERS[name]([x])

    def closure():
        optimizer.zero_grad()
        loss = (x**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 1.0
    assert x.item() < 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: bl.OptimisticSGD([x], lr=-1.0), r"OptimisticSGD was given lr=-1\.0; a number of at least 0"),
        (lambda x: bl.OptimisticSGD([x], lr=0.1, optimism=-0.5), r"optimism=-0\.5"),
        (lambda x: bl.OptimisticSGD([x], lr=0.1, power=math.nan), "power=nan"),
        (lambda x: bl.OptimisticSGD([{"params": [x], "power": "t"}], lr=0.1), "power='t'"),
        (lambda x: bl.DualAveraging([x], lr=math.inf), "DualAveraging was given lr=inf"),
        (lambda x: bl.DualAveraging([x], lr=0.1, adaptive="yes"), "adaptive='yes'; True or False"),
        (lambda x: bl.DualAveraging([x], lr=0.1, eps=0.0), r"eps=0\.0; a positive number"),
        (lambda x: bl.DualAveraging([x.detach().to(torch.complex64)], lr=0.1), "use torch.view_as_real"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(torch.zeros(1, requires_grad=True))


def test_optimistic_steps_converge_where_gradient_steps_spin():
    """A bilinear game: descent on x, ascent on y. (Popov 1980: what the guess is for.)"""
    distances = {}
    for name, make in {"optimistic": bl.OptimisticSGD, "plain": torch.optim.SGD}.items():
        x, y = (torch.ones(1, dtype=D, requires_grad=True) for _ in range(2))
        optimizer = make([x, y], lr=0.1)
        for _ in range(2000):
            x.grad, y.grad = y.detach().clone(), -x.detach().clone()
            optimizer.step()
        distances[name] = math.hypot(x.item(), y.item())
    assert distances["optimistic"] < 1e-3
    assert distances["plain"] > 100
