"""Betty's methods as baselines: each against an independent computation of the same number, its known defects
included."""

import gc
import logging
import math

import pytest
import torch
from bilevel_profiling.baselines import betty
from bilevel_profiling.cli import main
from bilevel_profiling.meters.tensors import Tensors
from bilevel_profiling.records import records_file

import bilevel as bl
from bilevel.problems import quadratic

pytest.importorskip("betty.engine", reason='betty-ml is not installed: pip install "bilevel[betty]"')
METHODS = betty.methods()
SAMA = pytest.mark.skipif("sama" not in METHODS, reason="this release of betty-ml has no sama")

SGD, MOMENTUM, ADAM = bl.SGD(lr=0.3), bl.SGD(lr=0.2, momentum=0.7, nesterov=True), bl.Adam(lr=0.05)
DECAY = bl.SGD(lr=0.2, weight_decay=0.1)


def net():
    """A small net on minibatches: x weighs the examples and shifts the outputs; both variables are trees."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    data, targets = normal(12, 3), normal(12)

    def predicted(y, inputs):
        return (inputs @ y["hidden"]["weight"]).tanh() @ y["out"] + y["bias"]

    def inner_loss(y, x, rows):
        return (x["weights"][rows].sigmoid() * (predicted(y, data[rows]) - x["shift"] - targets[rows]) ** 2).mean()

    def outer_loss(y, x, batch):
        inputs, wanted = batch
        return ((predicted(y, inputs) - wanted) ** 2).mean() + 0.1 * (x["shift"] ** 2).sum()

    inner = {"hidden": {"weight": normal(3, 4)}, "out": normal(4), "bias": normal(1)}
    outer = {"weights": normal(12), "shift": normal(1)}
    rows = [torch.arange(12)[start::3] for start in (0, 1, 2, 1, 0, 2)]
    return (
        bl.Problem(inner_loss, outer_loss),
        outer,
        inner,
        bl.Batches(inner=bl.PerStep(rows), outer=(normal(5, 3), normal(5))),
    )


def flat(value):
    return torch.cat([leaf.reshape(-1) for leaf in torch.utils._pytree.tree_leaves(value)])


def difference(a, b):
    return float((flat(a) - flat(b)).norm() / flat(b).norm())


@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM, ADAM, DECAY], ids=["SGD", "momentum", "Adam", "decay"])
def test_unrolled_is_backpropagation_through_the_same_steps(optimizer):
    problem, outer, inner, batches = net()
    solver = bl.Descent(optimizer, steps=6)
    ours = bl.hypergradient(problem, outer, inner, batches, solver=solver, estimator=bl.Unrolled())
    theirs = betty.hypergradient_with_betty(problem, outer, inner, batches, solver, betty.unrolled())
    assert difference(theirs.grad, ours.grad) < 1e-10
    assert difference(theirs.inner, ours.inner) < 1e-10
    assert list(theirs.grad) == list(outer)
    assert theirs.inner["hidden"]["weight"].shape == (3, 4)
    assert theirs.status is bl.Status.OK
    assert math.isclose(theirs.outer_loss, ours.outer_loss, rel_tol=1e-10)
    assert math.isclose(theirs.inner_loss, ours.inner_loss, rel_tol=1e-10)


def test_unrolled_goes_on_through_the_start():
    problem, outer, _, batches = net()

    def init(x, rows):
        return {
            "hidden": {"weight": x["weights"].reshape(3, 4)},
            "out": x["weights"][:4] * 2,
            "bias": torch.ones(1).double(),
        }

    learned = bl.Problem(problem.inner_loss, problem.outer_loss, init=init)
    for optimizer in (SGD, ADAM):
        solver = bl.Descent(optimizer, steps=4)
        ours = bl.hypergradient(learned, outer, None, batches, solver=solver, estimator=bl.Unrolled())
        theirs = betty.hypergradient_with_betty(learned, outer, None, batches, solver, betty.unrolled())
        assert difference(theirs.grad, ours.grad) < 1e-10


@pytest.mark.parametrize("method", [betty.unrolled(), betty.neumann(3)], ids=["unrolled", "neumann"])
def test_maml_starts_at_x_itself(method):
    _, x, inner, _ = net()
    tasks = [{"out": leaf} for leaf in (inner["out"], x["weights"][:4])]

    def loss(y, x, task):
        return (y["out"] - task["out"]).cosh().log().sum()

    maml = bl.proximal(bl.Problem(loss, loss, init=lambda x, _: x), 2.0)
    args = maml, {"out": torch.ones(4).double()}, None, bl.Batches(*tasks)
    solver = bl.Descent(SGD, steps=3)
    estimator = bl.Unrolled() if method.name == "unrolled" else bl.Implicit(bl.Neumann(3, SGD.lr))
    ours = bl.hypergradient(*args, solver=solver, estimator=estimator)
    theirs = betty.hypergradient_with_betty(*args, solver, method)
    assert difference(theirs.grad, ours.grad) < 1e-10
    assert args[1]["out"].grad is None
    assert torch.equal(args[1]["out"], torch.ones(4).double())


@pytest.mark.parametrize("optimizer", [SGD, MOMENTUM, ADAM], ids=["SGD", "momentum", "Adam"])
@pytest.mark.parametrize("products", [1, 4])
def test_neumann_counts_products_as_ours_does(optimizer, products):
    problem, outer, inner, batches = net()
    solver = bl.Descent(optimizer, steps=6)
    estimator = bl.Implicit(bl.Neumann(steps=products, step_size=optimizer.lr))
    ours = bl.hypergradient(problem, outer, inner, batches, solver=solver, estimator=estimator)
    theirs = betty.hypergradient_with_betty(problem, outer, inner, batches, solver, betty.neumann(products))
    assert difference(theirs.grad, ours.grad) < 1e-10
    given = betty.hypergradient_with_betty(
        problem, outer, inner, batches, solver, betty.neumann(products, alpha=optimizer.lr)
    )
    assert torch.equal(flat(given.grad), flat(theirs.grad))
    fewer = betty.hypergradient_with_betty(problem, outer, inner, batches, solver, betty.neumann(products - 1))
    assert difference(fewer.grad, ours.grad) > 1e-3


def parts(problem, outer, inner, batches, solver):
    """y_K, df/dx and df/dy there, and the functions y -> dg/dx and v -> (H v, C'v) there, by hand."""
    found = bl.adapt(problem, outer, inner, batches, solver=solver).inner
    spec = torch.utils._pytree.tree_structure
    y = [leaf.clone().requires_grad_() for leaf in torch.utils._pytree.tree_leaves(found)]
    x = [leaf.clone().requires_grad_() for leaf in torch.utils._pytree.tree_leaves(outer)]

    def build(value, leaves):
        return torch.utils._pytree.tree_unflatten(leaves, spec(value))

    loss = problem.outer_loss(build(found, y), build(outer, x), batches.outer)
    direct = torch.autograd.grad(loss, x, allow_unused=True, retain_graph=True)
    direct = [torch.zeros_like(leaf) if part is None else part for leaf, part in zip(x, direct, strict=True)]
    vector = torch.autograd.grad(loss, y)
    rows = batches.inner_at(solver.max_steps - 1)

    def outer_gradient(at):
        return torch.autograd.grad(problem.inner_loss(build(found, at), build(outer, x), rows), x)

    slope = torch.autograd.grad(problem.inner_loss(build(found, y), build(outer, x), rows), y, create_graph=True)

    def hvp(v):
        return torch.autograd.grad(slope, y, v, retain_graph=True)

    def mixed(v):
        return torch.autograd.grad(slope, x, v, retain_graph=True)

    return y, direct, vector, outer_gradient, hvp, mixed


def dot(a, b):
    return sum((p * q).sum() for p, q in zip(a, b, strict=True))


def plus(a, scale, b):
    return [p + scale * q for p, q in zip(a, b, strict=True)]


def test_cg_is_its_own_recursion_with_the_old_residual():
    quad = quadratic.random()
    problem, outer, inner, batches = quad.pose()
    solver = bl.Descent(bl.SGD(lr=1.0), steps=400)
    *_, direct, b, _, hvp, mixed = parts(problem, outer.detach(), inner, batches, solver)
    old, right = cg_by_hand(b, hvp, 6, new_residual=False), cg_by_hand(b, hvp, 6, new_residual=True)
    theirs = betty.hypergradient_with_betty(problem, outer, inner, batches, solver, betty.cg(6)).grad
    assert difference(theirs, plus(direct, -1.0, mixed(old))) < 1e-10
    exact = quad.hypergradient(outer.detach())
    assert difference(plus(direct, -1.0, mixed(right)), exact) < 1e-8, "six products solve a system of six unknowns"
    assert difference(theirs, exact) > 0.01, "the defect shows"


def cg_by_hand(b, hvp, steps, *, new_residual):
    x, r, p = [torch.zeros_like(leaf) for leaf in b], list(b), list(b)
    for _ in range(steps):
        Ap = hvp(p)
        alpha = dot(r, r) / dot(p, Ap)
        x, later = plus(x, alpha, p), plus(r, -alpha, Ap)
        p, r = plus(later if new_residual else r, dot(later, later) / dot(r, r), p), later
    return x


@pytest.mark.parametrize(
    ("method", "length"),
    [(betty.darts(), 0.01), (betty.darts(0.3), 0.3), pytest.param(betty.sama(), 1.0, marks=SAMA)],
    ids=["darts", "darts 0.3", "sama"],
)
def test_darts_is_a_central_difference_along_the_outer_gradient(method, length):
    problem, outer, inner, batches = net()
    solver = bl.Descent(SGD, steps=5)
    y, direct, vector, outer_gradient, *_ = parts(problem, outer, inner, batches, solver)
    eps = length / dot(vector, vector).sqrt().item()
    ahead, behind = outer_gradient(plus(y, eps, vector)), outer_gradient(plus(y, -eps, vector))
    by_hand = plus(direct, -1 / (2 * eps), plus(ahead, -1.0, behind))
    theirs = betty.hypergradient_with_betty(problem, outer, inner, batches, solver, method)
    assert difference(theirs.grad, by_hand) < 1e-9


@SAMA
def test_sama_differs_from_darts_by_the_last_step_of_adam():
    problem, outer, inner, batches = net()
    solver = bl.Descent(ADAM, steps=5)
    y, direct, vector, outer_gradient, *_ = parts(problem, outer, inner, batches, solver)
    # d(last update)/d(last gradient), from the moments of the last step, as Betty writes it.
    parameters = [leaf.detach().clone().requires_grad_() for leaf in torch.utils._pytree.tree_leaves(inner)]
    optimizer = torch.optim.Adam(parameters, lr=ADAM.lr)
    names = torch.utils._pytree.tree_structure(inner)
    for step in range(5):
        optimizer.zero_grad()
        loss = problem.inner_loss(torch.utils._pytree.tree_unflatten(parameters, names), outer, batches.inner_at(step))
        loss.backward()
        optimizer.step()
    scaled = []
    for leaf, v in zip(parameters, vector, strict=True):
        m, s, g = optimizer.state[leaf]["exp_avg"], optimizer.state[leaf]["exp_avg_sq"], leaf.grad
        m_before, s_before = (m - 0.1 * g) / 0.9, (s - 0.001 * g * g) / 0.999
        scaled.append(ADAM.lr * v * (0.1 * 0.999 * s_before - 0.9 * 0.001 * g * m_before) / (s.sqrt() + 1e-8) ** 3)
    eps = 1.0 / dot(scaled, scaled).sqrt().item()
    ahead, behind = outer_gradient(plus(y, eps, scaled)), outer_gradient(plus(y, -eps, scaled))
    theirs = betty.hypergradient_with_betty(problem, outer, inner, batches, solver, betty.sama())
    assert difference(theirs.grad, plus(direct, -1 / (2 * eps), plus(ahead, -1.0, behind))) < 1e-6


def test_derivatives_are_taken_at_the_batch_of_curvature():
    problem, outer, inner, batches = net()
    both = bl.Batches(inner=batches.inner, outer=batches.outer, curvature=torch.arange(12))
    solver = bl.Descent(SGD, steps=6)
    estimator = bl.Implicit(bl.Neumann(steps=3, step_size=SGD.lr))
    ours = bl.hypergradient(problem, outer, inner, both, solver=solver, estimator=estimator)
    theirs = betty.hypergradient_with_betty(problem, outer, inner, both, solver, betty.neumann(3))
    assert difference(theirs.grad, ours.grad) < 1e-10
    assert math.isclose(theirs.inner_loss, ours.inner_loss, rel_tol=1e-10)


@pytest.mark.parametrize("method", [betty.unrolled(), betty.neumann(2)], ids=["unrolled", "neumann"])
def test_random_numbers_are_those_of_a_plain_program(method):
    def inner_loss(y, x, _):
        return ((y - x) ** 2 * torch.nn.functional.dropout(torch.ones(8).double(), 0.5)).sum()

    problem = bl.Problem(inner_loss, lambda y, x, _: (y**2).sum() / 2)
    x, y = torch.linspace(1, 2, 8).double(), torch.zeros(8).double()
    torch.manual_seed(3)
    found = betty.hypergradient_with_betty(problem, x, y, bl.Batches(None, None), bl.Descent(SGD, 3), method)
    torch.manual_seed(3)
    for _ in range(3):
        mask = torch.nn.functional.dropout(torch.ones(8).double(), 0.5)
        y = y - SGD.lr * 2 * (y - x) * mask
    assert torch.allclose(found.inner, y, atol=1e-12)


def test_nothing_is_said_and_nothing_is_changed(capsys, recwarn):
    problem, outer, inner, batches = net()
    logger = logging.getLogger("betty")
    logger.setLevel(logging.WARNING)
    set_so = logger.level, logger.disabled, logger.propagate
    before = flat(outer).clone(), flat(inner).clone(), list(logger.handlers)
    for method in (betty.unrolled(), betty.cg(2)):
        betty.hypergradient_with_betty(problem, outer, inner, batches, bl.Descent(MOMENTUM, 6), method)
    assert capsys.readouterr().out == ""
    assert not recwarn.list
    assert torch.equal(flat(outer), before[0])
    assert torch.equal(flat(inner), before[1])
    assert all(leaf.grad is None for leaf in [*outer.values(), inner["out"]])
    assert logger.handlers == before[2]
    assert (logger.level, logger.disabled, logger.propagate) == set_so


@pytest.mark.parametrize("name", ["unrolled", "neumann", "cg", "darts"])
def test_a_call_leaves_no_tensor_behind(name):
    """Betty's problems refer to each other, and its IterativeProblem keeps the graph of every step for ever."""
    problem, outer, inner, batches = net()
    method = {"unrolled": betty.unrolled(), "neumann": betty.neumann(), "cg": betty.cg(), "darts": betty.darts()}[name]
    gc.collect()
    gc.disable()
    try:
        with Tensors() as meter:
            found = betty.hypergradient_with_betty(problem, outer, inner, batches, bl.Descent(MOMENTUM, 6), method)
            held = meter.live_bytes
            assert held >= 8 * (len(flat(outer)) + len(flat(inner)))
            size = 8 * (len(flat(found.grad)) + len(flat(found.inner)) + 2)
            del found
            assert meter.live_bytes <= held - size
            assert meter.live_bytes < 64, "a few numbers at most"
    finally:
        gc.enable()


def test_what_is_not_finite_says_so():
    problem = bl.Problem(lambda y, x, _: ((y - x) ** 2).sum(), lambda y, x, _: (y - 0.25).abs().sqrt().sum())
    x, y = torch.full((2,), 0.5).double(), torch.zeros(2).double()
    solver = bl.Descent(bl.SGD(lr=0.25), 1)  # ends at 0.25, where f has no derivative
    found = betty.hypergradient_with_betty(problem, x, y, bl.Batches(None, None), solver, betty.unrolled())
    assert found.status is bl.Status.NONFINITE
    wild = bl.Descent(bl.SGD(lr=1e200), 3)
    found = betty.hypergradient_with_betty(problem, x, y, bl.Batches(None, None), wild, betty.neumann(1))
    assert found.status is bl.Status.DIVERGED


@pytest.mark.parametrize(
    ("solver", "method", "words"),
    [
        (bl.Converge(SGD, tol=1e-3), betty.cg(), "fixed number of steps"),
        (bl.Descent(SGD, steps=0), betty.cg(), "at least one inner step"),
        (bl.Descent(bl.SGD(lr=lambda x: x["shift"].exp()), steps=2), betty.cg(), "are numbers"),
        (bl.Descent(bl.AdamW(lr=0.1), steps=2), betty.unrolled(), "AdamW"),
        (bl.Descent(SGD, steps=2), betty.Method("hessian-free"), "no hessian-free"),
    ],
)
def test_what_betty_cannot_do_is_refused_in_a_sentence(solver, method, words):
    problem, outer, inner, batches = net()
    with pytest.raises(ValueError, match=words):
        betty.hypergradient_with_betty(problem, outer, inner, batches, solver, method)


def test_an_inner_tensor_that_is_not_used_is_refused_where_betty_would_drop_it():
    problem = bl.Problem(lambda y, x, _: ((y[0] - x) ** 2).sum(), lambda y, x, _: (y[0] ** 2).sum() + y[1].sum())
    args = problem, torch.ones(2), [torch.zeros(2), torch.zeros(3)], bl.Batches(None, None), bl.Descent(SGD, 2)
    with pytest.raises(ValueError, match="drop inner tensors"):
        betty.hypergradient_with_betty(*args, betty.unrolled())
    found = betty.hypergradient_with_betty(*args, betty.darts())
    assert torch.isfinite(found.grad).all()


def test_adamw_runs_where_the_solution_is_differentiated():
    problem, outer, inner, batches = net()
    solver = bl.Descent(bl.AdamW(lr=0.05, weight_decay=0.1), steps=4)
    ours = bl.adapt(problem, outer, inner, batches, solver=solver)
    found = betty.hypergradient_with_betty(problem, outer, inner, batches, solver, betty.neumann(1))
    assert difference(found.inner, ours.inner) < 1e-12


def test_each_method_is_a_row_that_says_whose_it_is():
    rows = betty.baselines()
    assert list(rows) == [f"betty {name}" for name in ("cg", "neumann", "darts", "sama", "unrolled") if name in METHODS]
    assert all(row.package == "betty-ml" and row.version for row in rows.values())
    assert rows["betty unrolled"].target == "program"
    assert rows["betty neumann"].target == "solution"
    assert rows["betty darts"].target is None
    assert any("mended" in note for note in rows["betty unrolled"].notes)
    assert any("old residual" in note for note in rows["betty cg"].notes)
    assert rows["betty cg"].target is None, "it does not converge to the solution's"
    assert "neumann_iterations=10" in repr(rows["betty neumann"])
    problem, outer, _, batches = quadratic.setup()
    learned = bl.Problem(problem.inner_loss, problem.outer_loss, init=lambda x, _: torch.cat([x, x[:2]]))
    only_start = bl.Problem(lambda y, x, _: (y**2).sum() / 4, lambda y, x, _: (y**2).sum(), init=learned.init)
    solver = bl.Descent(bl.SGD(lr=0.5), steps=2)
    with pytest.raises(ValueError, match="start of the inner loop"):
        bl.hypergradient(only_start, outer, None, batches, solver=solver, estimator=rows["betty neumann"])
    ours = bl.hypergradient(only_start, outer, None, batches, solver=solver, estimator=bl.Unrolled())
    theirs = bl.hypergradient(only_start, outer, None, batches, solver=solver, estimator=rows["betty unrolled"])
    assert difference(theirs.grad, ours.grad) < 1e-10


def test_a_command_puts_betty_beside_ours(tmp_path, capsys):
    out = tmp_path / "report"
    words = "compare quadratic --baselines betty --estimators unrolled --inner-steps 4 --outer-steps 2 --repeats 1"
    assert main([*words.split(), "--out", str(out), "--device", "cpu"]) == 0
    rows = {row.estimator: row for row in records_file.read(out / "records.jsonl")}
    assert {"unrolled", "betty unrolled", "betty cg", "betty neumann", "betty darts"} <= set(rows)
    assert all(row.status == "OK" for row in rows.values()), {row.estimator: row.reason for row in rows.values()}
    assert rows["betty unrolled"].program_relative_error < 1e-12
    assert rows["betty unrolled"].calls == rows["unrolled"].calls
    assert rows["betty cg"].calls["hvp"] == 10
    assert rows["betty cg"].calls["mixed"] == 1
    assert "cg_iterations=10" in rows["betty cg"].settings
    assert any("mended" in note for note in rows["betty unrolled"].notes)
    first, *_, last = ((row.iterations[-1].outer_loss, row.estimator) for row in rows.values() if row.iterations)
    assert first[0] == pytest.approx(last[0], rel=1e-9)
    assert (first[1], last[1]) == ("unrolled", "betty unrolled")
    assert "betty-ml" in capsys.readouterr().out


def test_tasks_go_through_betty_one_after_another():
    draw = torch.Generator().manual_seed(1)
    targets = torch.randn(3, 4, generator=draw, dtype=torch.float64)

    def loss(y, x, target):
        return (y["out"] - target).cosh().log().sum()

    maml = bl.Problem(loss, loss, init=lambda x, _: x)
    args = maml, {"out": torch.ones(4).double()}, None, bl.Batches(targets, targets.flip(0))
    for name, own in (("unrolled", bl.Unrolled()), ("neumann", bl.Implicit(bl.Neumann(10, SGD.lr)))):
        posed = args if name == "unrolled" else (bl.proximal(maml, 2.0), *args[1:])
        ours, theirs = (
            bl.hypergradient(*posed, solver=bl.Descent(SGD, 3), estimator=bl.TaskMean(each, chunk=1))
            for each in (own, betty.baselines()[f"betty {name}"])
        )
        assert difference(theirs.grad, ours.grad) < 1e-10
        assert difference(theirs.inner, ours.inner) < 1e-10
