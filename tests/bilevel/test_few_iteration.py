"""Steepest descent with an exact line search, and the few-iteration base learner: methods.md A6."""

import dataclasses
import functools

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import bilevel as bl
from bilevel.meta.few_iteration import FewIteration

D = torch.float64
KEEPS = [bl.Unrolled(), bl.Unrolled(keep="iterates"), bl.Unrolled(keep="segments"), bl.Unrolled("segments", segment=2)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=D):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


# --- the dynamics


def linear(w, x, batch):
    return batch[0] @ w - batch[1]


A6 = torch.diag(torch.tensor([1.0, 2.0], dtype=D)), torch.tensor([1.0, 2.0], dtype=D)


@pytest.mark.parametrize(("damping", "alpha"), [(0.0, 17 / 65), (0.05, 17 / 65.85)], ids=["exact", "damped"])
def test_a6_the_step_of_two_numbers(damping, alpha):
    """methods.md A6: X = diag(1, 2), y = (1, 2), w = 0: gradient (-1, -4), alpha .2615385, damped .2581625."""
    problem = bl.Problem(bl.inner.half_square(linear), lambda w, x, b: w.sum())
    solver = bl.Descent(bl.inner.SteepestDescent(linear, damping=damping, floor=1e-8), steps=1)
    found = bl.adapt(problem, torch.zeros(1, dtype=D), torch.zeros(2, dtype=D), bl.Batches(A6, A6), solver=solver)
    assert found.inner.tolist() == pytest.approx([alpha, 4 * alpha], rel=1e-14)
    assert alpha == pytest.approx({0.0: 0.2615385, 0.05: 0.2581625}[damping], abs=5e-8)


def test_a_step_ends_where_the_loss_is_least_along_it():
    X, t, w = randn(7, 4), randn(7, seed=1), randn(4, seed=2)
    problem = bl.Problem(bl.inner.half_square(linear), lambda w, x, b: w.sum())
    found = bl.adapt(
        problem, torch.zeros(1, dtype=D), w, bl.Batches((X, t), (X, t)),
        solver=bl.Descent(bl.inner.SteepestDescent(linear), steps=1),
    )  # fmt: skip
    before, after = X.T @ (X @ w - t), X.T @ (X @ found.inner - t)
    assert float(before @ after) == pytest.approx(0, abs=1e-10 * float(before @ before))


def small_net(y, x, batch):
    """Residuals that are no linear function of a tree, and depend on x; one tensor of the tree is unused."""
    inputs, targets = batch
    hidden = torch.tanh(inputs @ y["a"])
    return {"fit": x["scale"] * (hidden @ y["b"][0] - targets), "decay": (x["ridge"] * y["a"], x["ridge"] * y["b"][0])}


def net_case(dtype=D):
    y = {"a": randn(3, 4, dtype=dtype), "unused": randn(2, dtype=dtype), "b": [randn(4, seed=1, dtype=dtype)]}
    x = {"scale": torch.tensor(0.7, dtype=dtype), "ridge": torch.tensor(0.3, dtype=dtype)}
    support = randn(6, 3, seed=2, dtype=dtype), randn(6, seed=3, dtype=dtype)
    query = randn(5, 3, seed=4, dtype=dtype), randn(5, seed=5, dtype=dtype)
    problem = bl.Problem(
        bl.inner.half_square(small_net),
        lambda y, x, b: (torch.tanh(b[0] @ y["a"]) @ y["b"][0] - b[1]).square().mean(),
    )
    return problem, x, y, bl.Batches(support, query)


def along(vector, y, d):
    """J d, row by row of the Jacobian."""
    rows = [torch.autograd.grad(each, y, create_graph=True) for each in vector]
    return torch.stack([sum((a * b).sum() for a, b in zip(row, d, strict=True)) for row in rows])


def by_hand(residuals, outer_loss, x, y, support, query, steps, *, damping=0.0, floor=0.0):
    """The program; y a list of tensors."""
    for _ in range(steps):
        loss = sum(each.square().sum() for each in residuals(y, x, support)) / 2
        d = torch.autograd.grad(loss, y, create_graph=True)
        slope = sum(each.square().sum() for each in d)
        bend = along(torch.cat([each.flatten() for each in residuals(y, x, support)]), y, d).square().sum()
        rate = slope / (bend.clamp_min(floor) + damping * slope)
        y = [leaf - rate * each for leaf, each in zip(y, d, strict=True)]
    loss = outer_loss(y, x, query)
    return loss, torch.autograd.grad(loss, list(x.values())), y


@pytest.mark.parametrize("estimator", KEEPS, ids=repr)
def test_the_hypergradient_is_that_of_the_program(estimator):
    """Residuals of a tree that are not linear, every way of keeping the trajectory: 1e-12 from Jacobians."""
    problem, x, y, batches = net_case()
    solver = bl.Descent(bl.inner.SteepestDescent(small_net, damping=0.1), steps=5)
    found = bl.hypergradient(problem, x, y, batches, solver=solver, estimator=estimator)

    def residuals(leaves, x, batch):
        r = small_net({"a": leaves[0], "b": [leaves[1]]}, x, batch)
        return r["fit"], *r["decay"]

    attached = {name: leaf.clone().requires_grad_() for name, leaf in x.items()}
    start = [leaf.clone().requires_grad_() for leaf in (y["a"], y["b"][0])]
    loss, grad, end = by_hand(
        residuals,
        lambda leaves, x, b: problem.outer({"a": leaves[0], "b": [leaves[1]]}, x, b),
        attached, start, batches.inner, batches.outer, 5, damping=0.1,
    )  # fmt: skip
    assert found.status is bl.Status.OK
    assert found.outer_loss == pytest.approx(loss.item(), rel=1e-13)
    assert torch.equal(found.inner["unused"], y["unused"])
    torch.testing.assert_close(found.inner["a"], end[0].detach(), rtol=1e-12, atol=1e-13)
    for name, expected in zip(x, grad, strict=True):
        torch.testing.assert_close(found.grad[name], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", [bl.Unrolled(), bl.Unrolled("iterates"), bl.FirstOrder()], ids=repr)
def test_tasks_at_once_take_the_steps_that_they_take_alone(dtype, estimator):
    """methods.md A6: a step length for each task, in chunks of any size."""
    problem, x, y, _ = net_case(dtype)
    if isinstance(estimator, bl.FirstOrder):  # sees the start alone
        fixed, x = x, {"a": y["a"]}
        problem = bl.Problem(
            lambda y, x, b: bl.inner.half_square(small_net)(y, fixed, b),
            problem.outer_loss,
            init=lambda x, b: {**y, "a": x["a"]},
        )
    residuals = small_net if "scale" in x else lambda y, x, b: small_net(y, fixed, b)
    sizes = torch.tensor([0.1, 1.0, 3.0, 1.0], dtype=dtype)
    batches = bl.Batches(
        [sizes[:, None, None] * randn(4, 6, 3, dtype=dtype), randn(4, 6, seed=7, dtype=dtype)],
        [randn(4, 5, 3, seed=8, dtype=dtype), randn(4, 5, seed=9, dtype=dtype)],
    )
    solver = bl.Descent(bl.inner.SteepestDescent(residuals), steps=3)

    def found(chunk):
        every = None if problem.init else {k: v.expand(4, *v.shape) for k, v in y.items() if k != "b"}
        every = every and {**every, "b": [y["b"][0].expand(4, 4)]}
        return bl.hypergradient(problem, x, every, batches, solver=solver, estimator=bl.TaskMean(estimator, chunk))

    alone, tol = found(1), 1e-12 if dtype is D else 2e-5
    assert alone.inner["a"].shape == (4, 3, 4)
    for chunk in (None, 2, 3):
        together = found(chunk)
        for name in x:
            torch.testing.assert_close(together.grad[name], alone.grad[name], rtol=tol, atol=tol)
        torch.testing.assert_close(together.inner["a"], alone.inner["a"], rtol=tol, atol=tol)


def ridge_case(dtype=D):
    def residuals(w, x, batch):
        return torch.cat([batch[0] @ w - batch[1], x["log"].exp().sqrt() * w])

    X, t, Xq, tq = randn(9, 3), randn(9, seed=1), randn(8, 3, seed=2), randn(8, seed=3)
    problem = bl.Problem(bl.inner.half_square(residuals), lambda w, x, b: (b[0] @ w - b[1]).square().mean() / 2)
    return problem, residuals, (X, t), (Xq, tq)


@pytest.mark.parametrize("estimator", [bl.Implicit(bl.Dense()), bl.Implicit(bl.CG(20, tol=1e-13))], ids=repr)
def test_at_rest_the_implicit_hypergradient_is_that_of_ridge_regression(estimator):
    problem, residuals, (X, t), (Xq, tq) = ridge_case()
    x = torch.tensor(-0.5, dtype=D, requires_grad=True)
    w = torch.linalg.solve(X.T @ X + x.exp() * torch.eye(3, dtype=D), X.T @ t)
    (expected,) = torch.autograd.grad((Xq @ w - tq).square().mean() / 2, x)
    found = bl.hypergradient(
        problem, {"log": x.detach()}, torch.zeros(3, dtype=D), bl.Batches((X, t), (Xq, tq)),
        solver=bl.Converge(bl.inner.SteepestDescent(residuals), tol=1e-11, max_steps=300), estimator=estimator,
    )  # fmt: skip
    assert found.status is bl.Status.OK
    assert float(found.grad["log"]) == pytest.approx(float(expected), rel=1e-9)


def test_tasks_that_rest_wait_for_the_others():
    """One task starts at its solution: gradient and curvature are zero there, and nothing becomes NaN."""
    problem, residuals, (X, t), _ = ridge_case()
    batches = bl.Batches((torch.stack([X, X]), torch.stack([0 * t, t])), (torch.stack([X, X]), torch.stack([t, t])))
    x, start = {"log": torch.tensor(-0.5, dtype=D)}, torch.zeros(2, 3, dtype=D)
    for solver, estimator in (
        (bl.Converge(bl.inner.SteepestDescent(residuals), tol=1e-10, max_steps=500), bl.Implicit(bl.Dense())),
        (bl.Descent(bl.inner.SteepestDescent(residuals), steps=60), bl.Unrolled()),
    ):
        found = bl.hypergradient(problem, x, start, batches, solver=solver, estimator=bl.TaskMean(estimator))
        assert torch.equal(found.inner[0], torch.zeros(3, dtype=D))
        assert found.status is bl.Status.OK
        w = torch.linalg.solve(X.T @ X + x["log"].exp() * torch.eye(3, dtype=D), X.T @ t)
        torch.testing.assert_close(found.inner[1], w, rtol=1e-9, atol=1e-9)
        assert found.grad["log"].isfinite()


def test_batches_of_their_own_for_each_step():
    problem, _, (X, t), query = ridge_case()
    problem = dataclasses.replace(problem, inner_loss=bl.inner.half_square(linear))
    batches = [(X[i : i + 3], t[i : i + 3]) for i in (0, 3, 6)]
    found = bl.adapt(
        problem, torch.zeros(1, dtype=D), torch.zeros(3, dtype=D), bl.Batches(bl.PerStep(batches), query),
        solver=bl.Descent(bl.inner.SteepestDescent(linear), steps=3),
    )  # fmt: skip
    w = torch.zeros(3, dtype=D)
    for inputs, targets in batches:
        d = inputs.T @ (inputs @ w - targets)
        w = w - (d @ d) / (inputs @ d).square().sum() * d
    torch.testing.assert_close(found.inner, w, rtol=1e-12, atol=1e-13)


def test_curvature_of_the_rest_of_the_loss_lengthens_nothing():
    """With h = |y|^2 / 2 told as `curvature`, the step is that of residuals that hold y too."""
    X, t, w = randn(5, 3), randn(5, seed=1), randn(3, seed=2)
    whole = bl.Problem(bl.inner.half_square(lambda w, x, b: (linear(w, x, b), w)), lambda w, x, b: w.sum())
    ends = [
        bl.adapt(whole, torch.zeros(1, dtype=D), w, bl.Batches((X, t), (X, t)), solver=bl.Descent(dynamics, 4)).inner
        for dynamics in (
            bl.inner.SteepestDescent(lambda w, x, b: (linear(w, x, b), w)),
            bl.inner.SteepestDescent(linear, lambda w, d, x, b: d @ d),
        )
    ]
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("estimator", "gradients", "products"), [(KEEPS[0], 3, 6), (KEEPS[1], 6, 9)], ids=repr)
def test_products_are_counted(estimator, gradients, products):
    """A step is one gradient and one product; one more product pulls it back; iterates are stepped from twice."""
    problem, x, y, batches = net_case()
    solver = bl.Descent(bl.inner.SteepestDescent(small_net), steps=3)
    calls = bl.hypergradient(problem, x, y, batches, solver=solver, estimator=estimator).stats["calls"]
    assert (calls["inner_gradient"], calls["hvp"], calls["outer_gradient"]) == (gradients, products, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_summed_in_more_and_an_overflow_is_reported(dtype):
    def found(size, steps):
        X, t = (size * randn(8, 3)).to(dtype), (size * randn(8, seed=1)).to(dtype)

        def residuals(w, x, batch):
            return linear(w, x, batch).float()

        w = torch.linalg.lstsq(X.float(), t.float()[:, None]).solution[:, 0]
        problem = bl.Problem(bl.inner.half_square(residuals), lambda w, x, b: (w * x).sum())
        return w, bl.hypergradient(
            problem, torch.ones(3, dtype=dtype), torch.zeros(3, dtype=dtype), bl.Batches((X, t), (X, t)),
            solver=bl.Descent(bl.inner.SteepestDescent(residuals, floor=1e-8), steps), estimator=bl.Unrolled(),
        )  # fmt: skip

    w, inside = found(30.0, 6)  # |d|^2 is 1e6, above what float16 holds
    assert inside.inner.dtype == dtype
    torch.testing.assert_close(inside.inner.float(), w, rtol=0.05, atol=0.005)
    w, beyond = found(100.0, 1)  # J d itself is beyond float16: a curvature of infinity is no step of length zero
    if dtype is torch.float16:
        assert beyond.status is bl.Status.DIVERGED
    else:
        assert beyond.status is bl.Status.OK
        assert beyond.inner.abs().max() > 0.05


def test_zero_steps_and_no_curvature_leave_the_start():
    problem = bl.Problem(bl.inner.half_square(linear), lambda w, x, b: w.sum())
    for steps, t in ((0, A6[1]), (3, 0 * A6[1])):
        found = bl.adapt(
            problem, torch.zeros(1, dtype=D), torch.zeros(2, dtype=D), bl.Batches((A6[0], t), A6),
            solver=bl.Descent(bl.inner.SteepestDescent(linear), steps=steps),
        )  # fmt: skip
        assert torch.equal(found.inner, torch.zeros(2, dtype=D))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((3,), TypeError, "residuals=3; a function was needed"),
        ((linear, 3), TypeError, "curvature=3; a function was needed"),
        ((linear, None, -1.0), ValueError, "damping=-1.0; a number of at least 0"),
        ((linear, None, True), ValueError, "damping=True"),
        ((linear, None, 0.0, float("nan")), ValueError, "floor=nan"),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        bl.inner.SteepestDescent(*arguments)


@pytest.mark.parametrize(
    ("dynamics", "error", "words"),
    [
        (bl.inner.SteepestDescent(lambda w, x, b: b[1]), ValueError, "does not depend on the inner variable"),
        (bl.inner.SteepestDescent(lambda w, x, b: w.detach()), ValueError, "does not depend on the inner variable"),
        (bl.inner.SteepestDescent(lambda w, x, b: [w, 3.0]), TypeError, "returned float; floating tensors"),
        (bl.inner.SteepestDescent(lambda w, x, b: (w, w.long())), TypeError, "torch.int64; floating tensors"),
        (bl.inner.SteepestDescent(linear, lambda w, d, x, b: d), TypeError, "0-dim tensor"),
        (bl.inner.SteepestDescent(linear, lambda w, d, x, b: 1.0), TypeError, "0-dim tensor"),
    ],
)
@pytest.mark.parametrize("estimator", [bl.FirstOrder(), bl.Unrolled(), bl.TaskMean(bl.Unrolled())], ids=repr)
def test_functions_that_return_something_else(dynamics, error, words, estimator):
    problem = bl.Problem(bl.inner.half_square(linear), lambda w, x, b: (w + x).sum(), init=lambda x, b: x)
    batch = [leaf.expand(3, *leaf.shape) for leaf in A6] if isinstance(estimator, bl.TaskMean) else A6
    with pytest.raises(error, match=words):
        bl.hypergradient(
            problem, torch.zeros(2, dtype=D), None, bl.Batches(batch, batch),
            solver=bl.Descent(dynamics, 2), estimator=estimator,
        )  # fmt: skip


def test_an_estimator_that_perturbs_the_loss_refuses_it():
    problem, residuals, support, query = ridge_case()
    with pytest.raises(ValueError, match="SteepestDescent need not follow its gradient"):
        bl.hypergradient(
            problem, {"log": torch.tensor(-0.5, dtype=D)}, torch.zeros(3, dtype=D), bl.Batches(support, query),
            solver=bl.Converge(bl.inner.SteepestDescent(residuals), max_steps=2), estimator=bl.FirstOrderCorrected(),
        )  # fmt: skip


def test_a_dynamics_of_the_users_own_is_admitted_task_by_task():
    """TaskMean called init and losses with the batches of all tasks, to look at a dynamics that is no optimizer;
    functions that look at shapes failed there."""

    @dataclasses.dataclass(frozen=True)
    class Halfway(bl.inner.Dynamics):
        def step(self, inner, state, outer, at):
            return tuple((inner[0] - 0.5 * g) for g in at.gradient(inner)), state

    def loss(y, x, batch):
        (rows,) = batch.shape
        return ((y[0] - batch) ** 2).sum() / rows

    problem = bl.Problem(loss, loss, init=lambda x, batch: (x.expand(*batch.shape),))
    tasks = torch.arange(6, dtype=D).reshape(3, 2)
    found = bl.hypergradient(
        problem, torch.zeros(1, dtype=D), None, bl.Batches(tasks, tasks),
        solver=bl.Descent(Halfway(), 1), estimator=bl.TaskMean(bl.Unrolled()),
    )  # fmt: skip
    assert found.inner[0].tolist() == [[0.0, 0.5], [1.0, 1.5], [2.0, 2.5]]


# --- the base learner


def episodes(tasks=3, ways=3, shots=4, queries=5, size=6, seed=0, dtype=D):
    g = generator(seed)
    centers = 2 * torch.randn(tasks, ways, 1, size, generator=g, dtype=dtype)

    def drawn(each):
        inputs = centers + torch.randn(tasks, ways, each, size, generator=g, dtype=dtype)
        return inputs.flatten(1, 2), torch.arange(ways).repeat_interleave(each).expand(tasks, -1)

    return drawn(shots), drawn(queries)


def made(transductive, *, dtype=D, size=6, **settings):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(size, 5), nn.Tanh()).to(dtype)
    learner = FewIteration(ways=3, transductive=transductive, **settings)
    problem, x = learner.problem(body)
    with torch.no_grad():  # away from the special values of the start
        x["objective"]["slope"].copy_(torch.tensor([0.8, 0.3]))
        x["objective"]["weight"].copy_(torch.tensor([1.2, 0.7]))
        x["objective"]["ridge"].copy_(torch.tensor(0.2))
        if transductive:
            x["objective"]["temperature"].copy_(torch.tensor(1.3))
    return learner, problem, x


def batches_of(support, query, transductive):
    return bl.Batches(inner=(*support, query[0]) if transductive else support, outer=query)


def test_a6_the_closed_form_meets_its_targets():
    """methods.md A6: w f+ = y+ and w f- = y- for each class, f+ the class's mean feature, f- that of the others."""
    (support, labels), _ = episodes(tasks=1)
    learner = FewIteration(ways=3)
    z, labels, variables = support[0], labels[0], learner.variables(support)
    w = learner.start(z, labels, variables)
    for k in range(3):
        assert float(w[k] @ z[labels == k].mean(0)) == pytest.approx(5, rel=1e-12)
        assert float(w[k] @ z[labels != k].mean(0)) == pytest.approx(-5, rel=1e-12)


def written_out(x, support, query, steps, *, transductive, damping=0.05, floor=1e-8):
    """One task of methods.md A6, as it stands there: loops over classes, the Jacobian row by row."""
    p, o = x["parameters"], x["objective"]
    z, zq = (torch.tanh(each[0] @ p["0.weight"].T + p["0.bias"]) for each in (support, query))
    labels, rows = support[1], []
    for k in range(3):
        fp, fm = z[labels == k].mean(0), z[labels != k].mean(0)
        ff, bb, fb, yp, ym = fp @ fp, fm @ fm, fp @ fm, *o["target"]
        rows.append(((yp * bb - ym * fb) * fp - (yp * fb - ym * ff) * fm) / (ff * bb - fb**2))
    w = torch.stack(rows)

    def phi(a, t):
        return (1 - a) / 2 * t.abs() + (1 + a) / 2 * t

    def residuals(w):
        out = []
        for row, label in zip(z, labels, strict=True):
            for k in range(3):
                which = 0 if k == label else 1
                sign = 1 if k == label else -1
                out.append(o["weight"][which] * phi(o["slope"][which], sign * (o["target"][which] - row @ w[k])))
        return torch.cat([torch.stack(out), (o["ridge"] * w).flatten()])

    def entropy(w):
        chances = (o["temperature"] * zq @ w.T).softmax(1)
        return o["entropy"] / len(zq) * -(chances * chances.log()).sum()

    lengths = []
    for _ in range(steps):
        loss = residuals(w).square().sum() / 2 + (entropy(w) if transductive else 0)
        (d,) = torch.autograd.grad(loss, w, create_graph=True)
        bend = along(residuals(w), [w], [d]).square().sum()
        if transductive:
            for row in zq:
                chances, change = (o["temperature"] * w @ row).softmax(0), o["temperature"] * d @ row
                metric = torch.diag(chances) - torch.outer(chances, chances)
                bend = bend + o["entropy"] / len(zq) * (change @ metric @ change).clamp_min(0)
        alpha = (d * d).sum() / (bend.clamp_min(floor) + damping * (d * d).sum())
        lengths.append(alpha.item())
        w = w - alpha * d
    return cross_entropy(zq @ w.T, query[1]), w, lengths


@functools.cache
def expected_of_two_tasks(transductive):
    """The mean hypergradient, the classifiers and the step lengths of the written-out program."""
    _, _, x = made(transductive, entropy=2.0)
    support, query = episodes(tasks=2, shots=2, queries=3)
    total, ends, lengths = torch.zeros((), dtype=D), [], []
    for task in range(2):
        one = [[leaf[task] for leaf in part] for part in (support, query)]
        loss, w, taken = written_out(x, *one, 5, transductive=transductive)
        total, ends, lengths = total + loss / 2, [*ends, w.detach()], [*lengths, taken]
    leaves = [(group, name) for group in x for name in x[group]]
    grads = torch.autograd.grad(total, [x[group][name] for group, name in leaves])
    return dict(zip(leaves, grads, strict=True)), ends, lengths


@pytest.mark.parametrize("transductive", [False, True])
@pytest.mark.parametrize("estimator", KEEPS, ids=repr)
def test_a6_gradients_through_five_steps_are_those_of_the_written_out_program(transductive, estimator):
    """methods.md A6: N = 5, float64, 1e-12 for all ways of keeping the trajectory; two tasks."""
    learner, problem, x = made(transductive, entropy=2.0)
    found = bl.hypergradient(
        problem, x, None, batches_of(*episodes(tasks=2, shots=2, queries=3), transductive),
        solver=learner.solver(5), estimator=bl.TaskMean(estimator),
    )  # fmt: skip
    expected, ends, lengths = expected_of_two_tasks(transductive)
    torch.testing.assert_close(found.inner, torch.stack(ends), rtol=1e-12, atol=1e-12)
    assert found.status is bl.Status.OK
    assert abs(lengths[0][1] / lengths[1][1] - 1) > 1e-3  # each task has a length of its own
    for (group, name), each in expected.items():
        assert each.abs().max() > 0, name
        torch.testing.assert_close(found.grad[group][name], each, rtol=1e-12, atol=1e-12 * each.abs().max().item())


@pytest.mark.parametrize("transductive", [False, True])
def test_a6_step_lengths_in_chunks_are_those_of_a_loop(transductive):
    """methods.md A6: TaskMean(chunk) of 1, 2, 3 and all: the same iterates."""
    learner, problem, x = made(transductive)
    batches = batches_of(*episodes(tasks=4), transductive)
    ends = [
        bl.hypergradient(
            problem, x, None, batches, solver=learner.solver(), estimator=bl.TaskMean(bl.Unrolled(), chunk)
        )
        for chunk in (1, 2, 3, None)
    ]
    for each in ends[1:]:
        torch.testing.assert_close(each.inner, ends[0].inner, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(each.grad, ends[0].grad, rtol=1e-10, atol=1e-12)


def test_the_loss_falls_and_the_gradient_agrees_with_differences():
    learner, problem, x = made(True)
    batches = batches_of(*episodes(), True)

    def value(x, steps=5):
        return bl.adapt(problem, x, None, batches, solver=learner.solver(steps), tasks=True)

    losses = [value(x, steps).inner_loss.mean() for steps in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[3] < losses[0]
    found = bl.hypergradient(
        problem, x, None, batches, solver=learner.solver(), estimator=bl.TaskMean(bl.Unrolled("iterates"))
    )
    for name in ("target", "slope", "weight"):
        with torch.no_grad():
            side = [{g: {n: v.clone() for n, v in each.items()} for g, each in x.items()} for _ in range(2)]
            for sign, each in zip((1, -1), side, strict=True):
                each["objective"][name][0] += sign * 1e-5
        up, down = (value(each).outer_loss.mean() for each in side)
        assert float((up - down) / 2e-5) == pytest.approx(float(found.grad["objective"][name][0]), rel=1e-4, abs=1e-8)


def test_training_learns_the_objective_and_the_body():
    learner, problem, x = made(True, dtype=torch.float32)
    x = {group: {n: v.detach().clone().requires_grad_() for n, v in each.items()} for group, each in x.items()}

    def loader(steps):
        for seed in range(steps):
            support, query = episodes(seed=seed + 1, dtype=torch.float32)
            yield batches_of([*support], [*query], True)

    leaves = [leaf for group in x.values() for leaf in group.values()]
    before = {name: leaf.detach().clone() for name, leaf in x["objective"].items()}
    steps = bl.iterate(
        problem, x, None, loader(20), solver=learner.solver(), estimator=bl.TaskMean(bl.Unrolled()),
        optimizer=torch.optim.Adam(leaves, lr=0.05),
    )  # fmt: skip
    losses = [step.outer_loss.item() for step in steps]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(not torch.equal(before[name], leaf) for name, leaf in x["objective"].items() if name != "ridge")


def test_it_works_on_one_task_and_with_zero_steps():
    learner, problem, x = made(False)
    support, query = ([leaf[0] for leaf in part] for part in episodes())
    with pytest.warns(UserWarning, match="'weight'.*'slope'.*'ridge'.*influences neither loss"):
        found = bl.hypergradient(
            problem, x, None, bl.Batches(support, query), solver=learner.solver(0), estimator=bl.Unrolled()
        )
    loss, w, _ = written_out(x, support, query, 0, transductive=False)
    torch.testing.assert_close(found.inner, w.detach(), rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(loss, [*x["parameters"].values(), x["objective"]["target"]])
    given = [*found.grad["parameters"].values(), found.grad["objective"]["target"]]
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_the_module_and_its_flags_are_left_alone():
    module = nn.Linear(4, 3)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    _, x = FewIteration(2).problem(module)
    x["parameters"]["weight"].data.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert all(leaf.is_leaf and leaf.requires_grad for group in x.values() for leaf in group.values())


def test_frozen_parameters_are_not_learned_and_there_may_be_none():
    support, query = episodes(dtype=torch.float32)
    body = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    body[0].requires_grad_(False)
    for module, names in ((body, ["1.weight", "1.bias"]), (nn.Flatten(), [])):
        problem, x = FewIteration(3).problem(module)
        found = bl.hypergradient(
            problem, x, None, bl.Batches(support, query),
            solver=FewIteration(3).solver(), estimator=bl.TaskMean(bl.Unrolled()),
        )  # fmt: skip
        assert list(x["parameters"]) == list(found.grad["parameters"]) == names
        assert found.grad["objective"]["slope"].abs().min() > 0


@pytest.mark.parametrize("chunk", [1, None])
@pytest.mark.parametrize("labels", [[0, 1, 1], [0, 1, 5], [0, 1, -1]], ids=["a class is missing", "above", "below"])
def test_labels_that_make_no_classifier_are_reported(labels, chunk):
    """Labels cannot be read under vmap; the start is not finite, and the status says so."""
    learner, problem, x = made(False)
    (support, _), query = episodes(tasks=2, shots=1)
    hg = bl.hypergradient(
        problem, x, None, bl.Batches((support, torch.tensor([labels, labels])), query),
        solver=learner.solver(), estimator=bl.TaskMean(bl.Unrolled(), chunk),
    )  # fmt: skip
    assert hg.status is not bl.Status.OK
    with pytest.raises(bl.BilevelError):
        hg.raise_if_failed()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ways": 1}, "ways=1; an integer of at least 2"),
        ({"ways": 2.0}, "ways=2.0"),
        ({"ways": 2, "entropy": -1.0}, "entropy=-1.0"),
        ({"ways": 2, "floor": -1.0}, "floor=-1.0"),
        ({"ways": 2, "damping": "much"}, "damping='much'"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        FewIteration(**settings)


@pytest.mark.parametrize("chunk", [1, None])
def test_batches_of_the_wrong_form(chunk):
    support, query = episodes()

    def run(transductive, batches, module=None):
        learner, problem, x = made(transductive)
        problem, x = (problem, x) if module is None else learner.problem(module)
        bl.hypergradient(
            problem, x, None, batches, solver=learner.solver(), estimator=bl.TaskMean(bl.Unrolled(), chunk)
        )

    with pytest.raises(ValueError, match=r"inner batch of 2 entries; \(inputs, labels, query inputs\) was needed"):
        run(True, batches_of(support, query, False))
    with pytest.raises(ValueError, match=r"inner batch of 3 entries; \(inputs, labels\) was needed"):
        run(False, batches_of(support, query, True))
    with pytest.raises(ValueError, match="d of at least 2"):
        run(False, batches_of(support, query, False), nn.Linear(6, 1).to(D))
    with pytest.raises(ValueError, match=r"labels of shape \(11,\) for one task"):
        run(False, bl.Batches((support[0], support[1][:, :-1]), query))
