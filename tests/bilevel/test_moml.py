"""Memory-based MAML, its pool of personal models, and LocalMOML: methods.md, A4."""

import io
import itertools

import pytest
import torch

import bilevel as bl

D = torch.float64
FORMS = ("paper", "released", "plain")
LR = 0.1
SOLVER = bl.Descent(bl.SGD(LR), 1)


def scalar(y, x, b):
    return (y - b) ** 2 / 2


SCALAR = bl.Problem(scalar, scalar, init=lambda x, b: x)


def goals(*values):
    return torch.tensor(values, dtype=D)


def called(x, ids, estimator, state=None, *, at=None, problem=SCALAR, solver=SOLVER):
    at = goals(*[0.0] * len(ids)) if at is None else at
    x = torch.tensor(x, dtype=D) if isinstance(x, float) else x
    batches = bl.Batches(at, at, task_ids=ids)
    return bl.hypergradient(problem, x, None, batches, solver=solver, estimator=estimator, state=state)


# --- the known answers: L = (w - a_i)^2 / 2, a_i = 0, w = 1, a = 0.1, b = 0.5


@pytest.mark.parametrize(("form", "expected"), [("paper", 0.81), ("released", 0.45), ("plain", 0.9)])
@pytest.mark.parametrize("chunk", [None, 1])
def test_the_scalar_check(form, expected, chunk):
    """A4: u0 = 0.9, u1 = 0.9; the paper's D = 0.81 is the exact MAML gradient, the released code's is 0.45."""
    estimator = bl.meta.MOML(0.5, form, chunk=chunk)
    first = called(1.0, ["i"], estimator)
    second = called(1.0, ["i"], estimator, first.state)
    for hg in (first, second):
        assert hg.state.of["i"].item() == pytest.approx(0.9, abs=1e-15)
        assert hg.grad.item() == pytest.approx(expected, abs=1e-15)
        assert hg.status is bl.Status.OK
    if form == "paper":
        maml = bl.hypergradient(
            SCALAR, torch.tensor(1.0, dtype=D), None, bl.Batches(goals(0.0), goals(0.0)), solver=SOLVER,
            estimator=bl.TaskMean(bl.Unrolled()),
        )  # fmt: skip
        torch.testing.assert_close(first.grad, maml.grad, rtol=1e-15, atol=0)


def test_unsampled_tasks_keep_their_models():
    """A4: "unsampled tasks keep u_i (v1)"; a first visit begins at u_i = w - a grad L_i(w)."""
    estimator = bl.meta.MOML(0.5)
    one = called(1.0, ["a", "b"], estimator, at=goals(0.0, 2.0))
    two = called(3.0, ["c", "a"], estimator, one.state, at=goals(1.0, 0.0))
    models = {task: u.item() for task, u in two.state.of.items()}
    # b: 1 - 0.1 (1 - 2) as it was; a: (0.9 + 2.7) / 2; c, new: 3 - 0.1 (3 - 1).
    assert models == pytest.approx({"a": 1.8, "b": 1.1, "c": 2.8}, abs=1e-14)
    torch.testing.assert_close(two.inner, goals(2.8, 1.8))
    # D = mean of (1 - 0.1)(u - goal).
    assert two.grad.item() == pytest.approx(0.9 * ((2.8 - 1) + (1.8 - 0)) / 2, abs=1e-14)
    assert two.outer_loss.item() == pytest.approx(((2.8 - 1) ** 2 + 1.8**2) / 4, abs=1e-14)


def test_all_tasks_move_in_the_second_variant():
    """A4, V2: sampled u <- (1-b) u + b w + b (n/B)(-a grad L(w)); unsampled u <- (1-b) u + b w."""
    b, n = 0.3, 4
    estimator = bl.meta.MOML(b, "released", population=n)
    one = called(1.0, [0, 1], estimator, at=goals(0.0, 2.0))
    begun = {0: 0.9, 1: 1.1}
    moved = {0: (1 - b) * 0.9 + b * (1 + n / 2 * -0.1), 1: (1 - b) * 1.1 + b * (1 + n / 2 * 0.1)}
    assert begun != moved
    assert {task: u.item() for task, u in one.state.of.items()} == pytest.approx(moved, abs=1e-14)
    two = called(3.0, [1], estimator, one.state, at=goals(2.0))
    after = {0: (1 - b) * moved[0] + b * 3.0, 1: (1 - b) * moved[1] + b * (3.0 + n * -0.1)}
    assert {task: u.item() for task, u in two.state.of.items()} == pytest.approx(after, abs=1e-14)
    assert two.grad.item() == pytest.approx(b * (after[1] - 2.0), abs=1e-14)


# --- against the formulas written out on a net


def nets(count, seed=0, dtype=D):
    """Tasks of a small regression: three independent batches each; x starts y and holds a learned target of f."""
    g = torch.Generator().manual_seed(seed)

    def data():
        return [
            torch.randn(count, 5, 3, generator=g, dtype=D).to(dtype),
            torch.randn(count, 5, generator=g, dtype=D).to(dtype),
        ]

    def residual(y, b):
        return torch.tanh(b[0] @ y["a"]) @ y["b"] - b[1]

    problem = bl.Problem(
        lambda y, x, b: residual(y, b).square().mean() / 2 + 0.1 * x["pull"] * y["a"].square().sum(),
        lambda y, x, b: (residual(y, b) - x["goal"]).square().mean() / 2,
        init=lambda x, b: {"a": x["a"], "b": x["b"]},
    )
    x = {
        "a": torch.randn(3, 2, generator=g, dtype=D).to(dtype), "b": torch.randn(2, generator=g, dtype=D).to(dtype),
        "goal": torch.tensor(0.2, dtype=dtype), "pull": torch.tensor(0.7, dtype=dtype),
    }  # fmt: skip
    return problem, x, data(), data(), data()


def row(batch, task):
    return [leaf[task] for leaf in batch]


def paper_form(problem, x, u, s1, s2, s3, b):
    """u and D of one task: D_x = df/dx(u) + (dw/dx - a d/dx grad L(w; S2))' grad f(u; S3)."""
    w = problem.init(x, s1)
    step = torch.func.grad(problem.inner_loss)(w, x, s1)
    adapted = {name: w[name] - LR * step[name] for name in w}
    u = {name: (1 - b) * (adapted if u is None else u)[name] + b * adapted[name] for name in w}
    slope, direct = torch.func.grad(problem.outer_loss, argnums=(0, 1))(u, x, s3)

    def moved(x):
        w = problem.init(x, s2)
        g = torch.func.grad(problem.inner_loss)(w, x, s2)
        return sum(((w[name] - LR * g[name]) * slope[name]).sum() for name in w)

    indirect = torch.func.grad(moved)(x)
    return u, {name: direct[name] + indirect[name] for name in x}, slope


def first_order_x(problem, x):
    """FOMAML sees the start and f: an x that acts through g alone is not its problem."""
    fixed = x["pull"].clone()
    return (
        bl.Problem(
            lambda y, z, b: problem.inner_loss(y, {**z, "pull": fixed}, b), problem.outer_loss, init=problem.init
        ),
        {name: leaf for name, leaf in x.items() if name != "pull"},
    )


def close(found, expected, rtol=1e-12):
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=rtol * 0.1)


@pytest.mark.parametrize("chunk", [None, 2, 1])
@pytest.mark.parametrize("fresh", [False, True], ids=["S2 = S1", "S2 fresh"])
def test_the_paper_form_on_a_net(fresh, chunk):
    """A4: D = (1/B) sum (I - a H(w; S2)) grad L(u_i; S3), over two calls whose tasks overlap."""
    problem, x, s1, s2, s3 = nets(4)
    estimator, state, models = bl.meta.MOML(0.4, chunk=chunk), None, {}
    for ids in ([0, 1, 2], [3, 1, 0]):
        taken = [[leaf[ids] for leaf in batch] for batch in (s1, s2, s3)]
        batches = bl.Batches(taken[0], taken[2], curvature=taken[1] if fresh else None, task_ids=ids)
        hg = bl.hypergradient(problem, x, None, batches, solver=SOLVER, estimator=estimator, state=state)
        total = {name: torch.zeros_like(leaf) for name, leaf in x.items()}
        for task in ids:
            own = [row(batch, task) for batch in (s1, s2 if fresh else s1, s3)]
            models[task], grad, _ = paper_form(problem, x, models.get(task), *own, 0.4)
            total = {name: total[name] + grad[name] / len(ids) for name in total}
        close(hg.grad, total)
        assert set(hg.state.of) == set(models)
        for task, model in models.items():
            close(hg.state.of[task], model)
        x, state = {name: leaf - 0.3 * total[name] for name, leaf in x.items()}, hg.state


@pytest.mark.parametrize("form", ["released", "plain"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_the_first_order_forms_on_a_net(form, chunk):
    """A4: b * mean grad L_i(u_i) through the start; what acts in f directly is not scaled."""
    problem, x, s1, _, s3 = nets(3)
    problem, x = first_order_x(problem, x)
    estimator, state, models = bl.meta.MOML(0.4, form, chunk=chunk), None, {}
    for move in (0.0, 0.2):
        x = {name: leaf + move for name, leaf in x.items()}
        hg = bl.hypergradient(
            problem,
            x,
            None,
            bl.Batches(s1, s3, task_ids=range_list(3)),
            solver=SOLVER,
            estimator=estimator,
            state=state,
        )
        total = {name: torch.zeros_like(leaf) for name, leaf in x.items()}
        for task in range(3):
            models[task], _, slope = paper_form(problem, x, models.get(task), *[row(s1, task)] * 2, row(s3, task), 0.4)
            direct = torch.func.grad(problem.outer_loss, argnums=1)(models[task], x, row(s3, task))
            scale = 0.4 if form == "released" else 1.0
            total = {n: total[n] + (direct[n] + (scale * slope[n] if n in slope else 0)) / 3 for n in total}
        close(hg.grad, total)
        state = hg.state
    assert hg.stats["calls"] == {
        "inner_gradient": 3 * 1 if chunk == 1 else calls_of(chunk, 3),
        "outer_gradient": calls_of(chunk, 3),
        "hvp": 0,
        "mixed": 0,
    }


def range_list(count):
    return list(range(count))


def calls_of(chunk, tasks):
    return -(-tasks // (chunk or tasks))


@pytest.mark.parametrize(
    ("form", "curvature", "calls"),
    [
        ("paper", False, {"inner_gradient": 3, "outer_gradient": 1, "hvp": 3, "mixed": 0}),
        ("paper", True, {"inner_gradient": 6, "outer_gradient": 1, "hvp": 3, "mixed": 0}),
        ("released", False, {"inner_gradient": 3, "outer_gradient": 1, "hvp": 0, "mixed": 0}),
    ],
)
def test_costs_are_those_of_the_table(form, curvature, calls):
    problem, x, s1, s2, s3 = nets(2)
    problem, x = first_order_x(problem, x)
    batches = bl.Batches(s1, s3, curvature=s2 if curvature else None, task_ids=[0, 1])
    hg = bl.hypergradient(
        problem, x, None, batches, solver=bl.Descent(bl.SGD(LR), 3), estimator=bl.meta.MOML(0.5, form)
    )
    assert hg.stats["calls"] == calls


@pytest.mark.parametrize(
    "optimizer", [bl.SGD(LR), bl.SGD(LR, momentum=0.7), bl.Adam(0.05)], ids=["sgd", "momentum", "adam"]
)
@pytest.mark.parametrize("form", FORMS)
def test_a_blend_of_one_is_maml_over_any_steps(optimizer, form):
    """b = 1 forgets: u = y_K, so that the paper form is Unrolled, and the first-order forms are FOMAML."""
    problem, x, s1, s2, s3 = nets(3)
    problem, x = first_order_x(problem, x)
    solver, state = bl.Descent(optimizer, 4), None
    other = bl.Unrolled() if form == "paper" else bl.FirstOrder()
    batches = bl.Batches(s1, s3, task_ids=["x", "y", "z"])
    for _ in range(2):
        found = bl.hypergradient(
            problem, x, None, batches, solver=solver, estimator=bl.meta.MOML(1.0, form), state=state
        )
        expected = bl.hypergradient(problem, x, None, batches, solver=solver, estimator=bl.TaskMean(other))
        close(found.grad, expected.grad)
        close(found.inner, expected.inner)
        state = found.state
    if form == "paper":
        fresh = bl.Batches(s1, s3, curvature=s2, task_ids=["x", "y", "z"])
        found = bl.hypergradient(problem, x, None, fresh, solver=solver, estimator=bl.meta.MOML(1.0))
        expected = bl.hypergradient(
            problem, x, None, fresh, solver=solver, estimator=bl.TaskMean(bl.Unrolled("iterates", resampled=True))
        )
        close(found.grad, expected.grad)


# --- the pool


def test_the_order_of_tasks_and_of_calls_does_not_matter():
    problem, x, s1, _, s3 = nets(4)

    def run(orders):
        state = None
        for ids in orders:
            batches = bl.Batches([leaf[ids] for leaf in s1], [leaf[ids] for leaf in s3], task_ids=ids)
            hg = bl.hypergradient(problem, x, None, batches, solver=SOLVER, estimator=bl.meta.MOML(0.3), state=state)
            state = hg.state
        return hg

    one, other = run([[0, 1], [2, 3], [1, 2, 0]]), run([[3, 2], [1, 0], [0, 2, 1]])
    close(one.grad, other.grad)
    for task in range(4):
        close(one.state.of[task], other.state.of[task])


@pytest.mark.parametrize("ids", [[7, 3], ["a", "b"], [("train", 1), ("train", 2)], torch.tensor([7, 3])], ids=str)
def test_memories_are_saved_and_read(ids):
    estimator = bl.meta.MOML(0.5)
    first = called(1.0, ids, estimator, at=goals(0.0, 2.0))
    file = io.BytesIO()
    torch.save(first.state.to_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert set(saved) == {"owner", "of"}
    expected = called(2.0, ids, estimator, first.state, at=goals(0.0, 2.0))
    for state in (saved, bl.meta.Memories.from_dict(saved)):
        found = called(2.0, ids, estimator, state, at=goals(0.0, 2.0))
        assert torch.equal(found.grad, expected.grad)
        assert found.state.of.keys() == expected.state.of.keys()


def test_numbers_of_a_tensor_and_of_a_list_are_the_same_tasks():
    estimator = bl.meta.MOML(0.5)
    one = called(1.0, torch.tensor([4, 5]), estimator)
    two = called(2.0, [5, torch.tensor(4)], estimator, one.state)
    assert set(two.state.of) == {4, 5}
    assert two.state.of[4].item() == pytest.approx((0.9 + 1.8) / 2)


def test_results_and_memories_are_their_own():
    """A state is not changed by a later call, and changing a result in place changes no memory."""
    estimator = bl.meta.MOML(0.5)
    one = called(1.0, ["a", "b"], estimator, at=goals(0.0, 2.0))
    before = {task: u.clone() for task, u in one.state.of.items()}
    two = called(2.0, ["a"], estimator, one.state, at=goals(0.0))
    assert all(torch.equal(one.state.of[task], u) for task, u in before.items())
    kept = two.state.of["a"].clone()
    two.inner.zero_()
    two.grad.zero_()
    assert torch.equal(two.state.of["a"], kept)
    assert not any(u.requires_grad for u in two.state.of.values())
    # A row of a stack would keep the models of all tasks of a call alive.
    assert all(u.untyped_storage().nbytes() == 8 for u in two.state.of.values())


def test_memories_on_the_host():
    """(On a machine without a GPU: the same numbers.)"""
    one, other = (
        called(1.0, ["a", "b"], bl.meta.MOML(0.5, on_host=host), at=goals(0.0, 2.0)) for host in (True, False)
    )
    assert torch.equal(one.grad, other.grad)
    assert all(u.device.type == "cpu" for u in one.state.of.values())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memories_on_the_host_of_a_gpu():
    problem, x, s1, _, s3 = nets(3)
    x = {name: leaf.cuda() for name, leaf in x.items()}
    batches = bl.Batches([leaf.cuda() for leaf in s1], [leaf.cuda() for leaf in s3], task_ids=[0, 1, 2])
    found = []
    for host in (True, False):
        state = None
        for _ in range(2):
            hg = bl.hypergradient(
                problem, x, None, batches, solver=SOLVER, estimator=bl.meta.MOML(0.5, on_host=host), state=state
            )
            state = hg.state
        assert {leaf.device.type for u in state.of.values() for leaf in u.values()} == {"cpu" if host else "cuda"}
        found.append(hg)
    close(found[0].grad, found[1].grad)


def test_the_outer_loop_learns_from_few_tasks_at_a_time():
    """Eight tasks with goals a_i, two a step: w goes to their mean, where MAML's gradient is zero."""
    g = torch.Generator().manual_seed(0)
    at = torch.randn(8, generator=g, dtype=D)
    x = torch.tensor(3.0, dtype=D, requires_grad=True)

    def loader():
        for step in range(120):
            ids = [(2 * step) % 8, (2 * step + 1) % 8]
            yield bl.Batches(at[ids], at[ids], task_ids=ids)

    loop = bl.iterate(
        SCALAR, x, None, loader(), solver=SOLVER, estimator=bl.meta.MOML(0.5), optimizer=torch.optim.SGD([x], lr=0.06)
    )
    *_, last = loop
    assert len(last.hypergradient.state.of) == 8
    assert abs(x.item() - at.mean()) < 0.1


# --- attacks


@pytest.mark.parametrize("form", FORMS)
def test_other_dtypes_trees_and_step_counts(form):
    problem, x, s1, _, s3 = nets(2, dtype=torch.float32)
    problem, x = first_order_x(problem, x)
    batches = bl.Batches(s1, s3, task_ids=["a", "b"])
    for steps in (0, 1, 3):
        hg = bl.hypergradient(
            problem, x, None, batches, solver=bl.Descent(bl.SGD(LR), steps), estimator=bl.meta.MOML(0.5, form)
        )
        assert all(leaf.dtype == torch.float32 for leaf in hg.grad.values())
        if steps == 0:  # u = w: the gradient of f at w
            w = {"a": x["a"], "b": x["b"]}
            each = [torch.func.grad(problem.outer_loss, argnums=(0, 1))(w, x, row(s3, task)) for task in (0, 1)]
            scale = 0.5 if form == "released" else 1.0
            mean = {n: sum(scale * y.get(n, 0) + z[n] for y, z in each) / 2 for n in x}
            close(hg.grad, mean, 1e-5)


def test_one_batch_per_step():
    """PerStep batches for the steps and for the Hessians."""
    problem, x, s1, s2, s3 = nets(2)
    steps = bl.PerStep([s1, s2, s1])
    solver, ids = bl.Descent(bl.SGD(LR), 3), [0, 1]
    for curvature in (None, steps):
        batches = bl.Batches(steps, s3, curvature=curvature, task_ids=ids)
        found = bl.hypergradient(problem, x, None, batches, solver=solver, estimator=bl.meta.MOML(1.0))
        expected = bl.hypergradient(problem, x, None, batches, solver=solver, estimator=bl.TaskMean(bl.Unrolled()))
        close(found.grad, expected.grad)


def test_random_inner_losses_are_drawn_once():
    """Dropout in g: with one seed, the graph and b = 1 agree with Unrolled."""

    def noisy(y, x, b):
        return (torch.nn.functional.dropout(y, 0.5) - b).square().sum()

    problem = bl.Problem(noisy, lambda y, x, b: (y - b).square().sum(), init=lambda x, b: x)
    x, at, found = torch.ones(4, dtype=D), torch.zeros(3, 4, dtype=D), []
    for estimator in (bl.meta.MOML(1.0), bl.TaskMean(bl.Unrolled())):
        torch.manual_seed(0)
        batches = bl.Batches(at, at, task_ids=[0, 1, 2])
        found.append(bl.hypergradient(problem, x, None, batches, solver=SOLVER, estimator=estimator).grad)
    assert torch.equal(*found)


def test_a_diverging_adaptation_is_reported():
    hg = called(1.0, ["a"], bl.meta.MOML(0.5), solver=bl.Descent(bl.SGD(1e200), 3))
    assert hg.status.failed
    rose = called(1.0, ["a"], bl.meta.MOML(0.5), solver=bl.Descent(bl.SGD(3.0), 2))
    assert rose.status is not bl.Status.OK
    # A model that lags is no failure of the adaptation.
    state = bl.meta.Memories({"a": torch.tensor(50.0, dtype=D)})
    assert called(1.0, ["a"], bl.meta.MOML(0.5), state).status is bl.Status.OK


def test_it_learns_the_problem_of_a_learner():
    net = torch.nn.Linear(3, 1)
    learner = bl.meta.Learner(net, torch.nn.functional.mse_loss, solver=bl.Descent(bl.SGD(0.05), 1))
    x = learner.outer()
    batch = torch.randn(2, 5, 3), torch.randn(2, 5, 1)
    batches = bl.Batches(batch, batch, task_ids=["a", "b"])
    found = bl.hypergradient(
        learner.problem, x, None, batches, solver=learner.inner_solver, estimator=bl.meta.MOML(1.0)
    )
    expected = learner.hypergradient(x, batches)
    close(found.grad["parameters"], expected.grad["parameters"], 1e-5)
    assert set(found.state.of) == {"a", "b"}


# --- LocalMOML


def local_by_hand(w, clients, a, eta, b, form, start=None):
    """Rounds of the scalar problem, client by client."""
    ends, models = [], []
    for place, steps in enumerate(clients):
        v = w
        u = None if start is None else v - a * (v - start[place])
        for goal in steps:
            adapted = v - a * (v - goal)
            u = adapted if u is None else u
            u = (1 - b) * u + b * adapted
            scale = {"plain": 1.0, "released": b, "paper": 1 - a}[form]
            v = v - eta * scale * (u - goal)
        ends.append(v)
        models.append(u)
    return ends, models


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("starts", [None, [0.5, -0.5, 0.0]])
def test_a_round_of_local_steps(form, starts):
    """A4: u_0 = w - a grad L(w; S0); H times u, w_i; then the average of the clients."""
    clients = [[0.0, 0.2, 0.1], [1.0], [-1.0, -0.5]]
    batches = [[bl.Batches(torch.tensor(v, dtype=D), torch.tensor(v, dtype=D)) for v in steps] for steps in clients]
    local = bl.meta.LocalMOML(rate=0.4, blend=0.3, form=form)
    x = torch.tensor(2.0, dtype=D, requires_grad=True)
    given = None if starts is None else [torch.tensor(v, dtype=D) for v in starts]
    found = local.round(SCALAR, x, batches, solver=SOLVER, starts=given)
    ends, models = local_by_hand(2.0, clients, LR, 0.4, 0.3, form, starts)
    assert found.outer.item() == pytest.approx(sum(ends) / 3, abs=1e-14)
    assert [w.item() for w in found.clients] == pytest.approx(ends, abs=1e-14)
    assert [u.item() for u in found.models] == pytest.approx(models, abs=1e-14)
    assert [tuple(losses.shape) for losses in found.outer_losses] == [(3,), (1,), (2,)]
    assert x.item() == 2.0
    assert not found.outer.requires_grad
    weighted = local.round(SCALAR, x, batches, solver=SOLVER, starts=given, weights=[2, 0, 6])
    assert weighted.outer.item() == pytest.approx(0.25 * ends[0] + 0.75 * ends[2], abs=1e-14)


def test_rounds_lead_to_the_mean_of_the_goals():
    """Clients of one curvature contract alike, so that the mean of their ends contracts to the mean of the goals."""
    at = [0.0, 0.2, 1.0]
    clients = [[bl.Batches(torch.tensor(v, dtype=D), torch.tensor(v, dtype=D))] * 3 for v in at]
    local, x = bl.meta.LocalMOML(rate=0.2), torch.tensor(3.0, dtype=D)
    away = []
    for _ in range(12):
        x = local.round(SCALAR, x, clients, solver=SOLVER).outer
        away.append(x.item() - 0.4)
    ratios = [after / before for before, after in itertools.pairwise(away[:5])]
    assert ratios == pytest.approx([ratios[0]] * 4, rel=1e-9)
    assert 0 < ratios[0] < 0.7
    assert abs(away[-1]) < 0.01


def test_a_round_of_a_net_is_its_steps_by_hand():
    problem, x, s1, _, s3 = nets(2)
    problem, x = first_order_x(problem, x)
    clients = [[bl.Batches(row(s1, task), row(s3, task))] * 2 for task in range(2)]
    found = bl.meta.LocalMOML(rate=0.2, blend=0.4).round(problem, x, clients, solver=SOLVER)
    ends = []
    for task in range(2):
        w, u = x, None
        for _ in range(2):
            u, _, slope = paper_form(problem, w, u, *[row(s1, task)] * 2, row(s3, task), 0.4)
            direct = torch.func.grad(problem.outer_loss, argnums=1)(u, w, row(s3, task))
            w = {name: w[name] - 0.2 * (direct[name] + slope.get(name, 0)) for name in w}
        close(found.clients[task], w)
        close(found.models[task], u)
        ends.append(w)
    close(found.outer, {name: (ends[0][name] + ends[1][name]) / 2 for name in x})


# --- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bl.meta.MOML(0.0), "blend=0.0"),
        (lambda: bl.meta.MOML(1.5), "blend=1.5"),
        (lambda: bl.meta.MOML(True), "blend=True"),
        (lambda: bl.meta.MOML(0.5, "v2"), "'paper', 'released', 'plain'"),
        (lambda: bl.meta.MOML(population=0), "population=0"),
        (lambda: bl.meta.MOML(population=2.5), "population=2.5"),
        (lambda: bl.meta.MOML(chunk=0), "chunk=0"),
        (lambda: bl.meta.MOML(on_host="cpu"), "on_host='cpu'"),
        (lambda: bl.meta.LocalMOML(rate=0.0), "rate=0.0"),
        (lambda: bl.meta.LocalMOML(rate=0.1, blend=-1), "blend=-1"),
        (lambda: bl.meta.LocalMOML(rate=0.1, form="x"), "form='x'"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (None, "needs their names"),
        (5, "needs their names"),
        (torch.tensor([[1, 2]]), "needs their names"),
        (["a", "a"], "the task 'a' more than once"),
        (torch.tensor([3, 3]), "the task 3 more than once"),
        ([1.5, 2], "holds 1.5"),
        ([None, 2], "holds None"),
        (torch.tensor([1.0, 2.0]), "holds 1.0"),
        (["a"], "leading"),
        (["a", "b", "c"], "leading"),
    ],
    ids=str,
)
def test_tasks_without_a_name_of_their_own_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        called(1.0, ids, bl.meta.MOML(), at=goals(0.0, 1.0))


def test_other_bad_input_is_refused():
    estimator = bl.meta.MOML()
    state = called(1.0, ["a", "b"], bl.meta.MOML(population=2)).state
    with pytest.raises(ValueError, match=r"has met 3 tasks.*'c'.* are new"):
        called(1.0, ["c"], bl.meta.MOML(population=2), state)
    with pytest.raises(ValueError, match="no TaskMean around it"):
        called(1.0, ["a", "b"], bl.TaskMean(estimator), at=goals(0.0, 1.0))
    with pytest.raises(ValueError, match="no TaskMean around it"):
        called(1.0, ["a", "b"], bl.TaskMean(estimator, chunk=1), at=goals(0.0, 1.0))
    problem, x, s1, _, s3 = nets(2)
    with pytest.raises(ValueError, match=r"cannot see how the outer variable acts here.*'pull'"):
        bl.hypergradient(
            problem, x, None, bl.Batches(s1, s3, task_ids=[0, 1]), solver=SOLVER, estimator=bl.meta.MOML(0.5, "plain")
        )
    at, problem = goals(0.0, 1.0), bl.Problem(lambda y, x, b: (y - x - b) ** 2, scalar)
    with pytest.raises(ValueError, match="a problem without init"):
        bl.hypergradient(problem, at[0], at, bl.Batches(at, at, task_ids=[0, 1]), solver=SOLVER, estimator=estimator)
    with pytest.raises(ValueError, match="fixed number of steps"):
        called(1.0, ["a"], estimator, solver=bl.Converge(bl.SGD(0.1)))
    for wrong in (
        called(1.0, ["a"], bl.TaskMean(bl.MemoryReduced(warm_inner=True)), problem=bl.proximal(SCALAR, 1.0)).state,
        3,
    ):
        with pytest.raises(ValueError, match="Memories of its own last call"):
            called(1.0, ["a"], estimator, wrong)
    with pytest.raises(ValueError, match="Pass state=None"):
        called(1.0, ["a"], estimator, {"owner": "Another", "of": {}})


@pytest.mark.parametrize(
    "model",
    [torch.zeros(2, dtype=D), torch.zeros((), dtype=torch.float32), {"w": torch.zeros((), dtype=D)}],
    ids=["shape", "dtype", "structure"],
)
def test_memories_of_another_problem_are_refused(model):
    with pytest.raises(ValueError, match="Pass state=None"):
        called(1.0, ["a"], bl.meta.MOML(), bl.meta.Memories({"a": model}))
    mixed = bl.meta.Memories({"a": model, "b": torch.zeros((), dtype=D)})
    with pytest.raises(ValueError, match="Pass state=None"):
        called(1.0, ["a", "b"], bl.meta.MOML(), mixed, at=goals(0.0, 1.0))


def test_bad_rounds_are_refused():
    local, x = bl.meta.LocalMOML(rate=0.1), torch.tensor(1.0, dtype=D)
    step = bl.Batches(torch.tensor(0.0, dtype=D), torch.tensor(0.0, dtype=D))
    for clients, more, message in (
        ([], {}, "at least one client"),
        ([[step], []], {}, r"\[1, 0\] local batches"),
        ([[step]], {"starts": []}, "0 starts for 1 clients"),
        ([[step]], {"weights": [1, 2]}, "2 weights for 1 clients"),
        ([[step]], {"weights": [-1]}, r"weights=\[-1\]"),
        ([[step]], {"weights": [0]}, r"weights=\[0\]"),
        ([[step]], {"weights": [float("nan")]}, "weights"),
    ):
        with pytest.raises(ValueError, match=message):
            local.round(SCALAR, x, clients, solver=SOLVER, **more)
    with pytest.raises(ValueError, match="without init"):
        local.round(bl.Problem(scalar, scalar), x, [[step]], solver=SOLVER)
    with pytest.raises(bl.BilevelError, match="DIVERGED"):
        local.round(SCALAR, x, [[step]], solver=bl.Descent(bl.SGD(1e200), 3))
