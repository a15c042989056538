"""Somebody else's hypergradient as an estimator: what it is given, what may come back, and what is counted."""

import dataclasses
import functools

import pytest
import torch
from bilevel_profiling import Baseline, Case, forecast, measure
from bilevel_profiling.baselines import baseline as baselines
from bilevel_profiling.baselines.counting import Counter, uncounted
from bilevel_profiling.cases.case_file import CaseError, Definition
from bilevel_profiling.cases.target import target_of
from bilevel_profiling.measurement.loop import outer_loop
from bilevel_profiling.records.record import Target

import bilevel as bl
from bilevel.problems import quadratic
from bilevel.space import tree

SOLVER = bl.Descent(bl.SGD(lr=0.3), steps=4)
UNROLLED_CALLS = {"inner_gradient": 4, "outer_gradient": 1, "hvp": 4, "mixed": 0}


def unrolled(problem, outer, inner, batches, solver):
    """By plain autograd, for a bare y."""
    y = inner.clone().requires_grad_() if problem.init is None else problem.init(outer, batches.inner_at(0)) * 1
    for step in range(solver.max_steps):
        (g,) = torch.autograd.grad(problem.inner(y, outer, batches.inner_at(step)), y, create_graph=True)
        y = y - solver.optimizer.lr * g
    loss = problem.outer(y, outer, batches.outer)
    grads = torch.autograd.grad(loss, tree.tensors(outer))
    last = problem.inner(y, outer, batches.inner_at(solver.max_steps - 1))
    return bl.Hypergradient(tree.like(outer, grads), y, loss, last)


def gradient_alone(*given):
    return unrolled(*given).grad


def neumann(problem, outer, inner, batches, solver, *, products=3):
    """Products and one mixed product at y_K, each by a backward pass of its own."""
    y = inner.clone()
    for step in range(solver.max_steps):
        y.requires_grad_()
        (g,) = torch.autograd.grad(problem.inner(y, outer.detach(), batches.inner_at(step)), y)
        y = (y - solver.optimizer.lr * g).detach()
    y.requires_grad_()
    v = total = torch.autograd.grad(problem.outer(y, outer, batches.outer), y)[0]
    (g,) = torch.autograd.grad(problem.inner(y, outer, batches.inner_at(0)), y, create_graph=True)
    for _ in range(products):
        v = v - solver.optimizer.lr * torch.autograd.grad(g, y, v, retain_graph=True)[0]
        total = total + v
    return -torch.autograd.grad(g, outer, solver.optimizer.lr * total)[0]


def difference(problem, outer, inner, batches, solver):
    """DARTS: two gradients of g in x."""
    y = inner.clone().requires_grad_()
    (v,) = torch.autograd.grad(problem.outer(y, outer, batches.outer), y)
    sides = [
        torch.autograd.grad(problem.inner(y.detach() + s * v, outer, batches.inner_at(0)), outer)[0] for s in (1, -1)
    ]
    return (sides[1] - sides[0]) / 2


def posed(**more):
    return dict(zip(("problem", "outer", "inner", "batches"), quadratic.setup(), strict=True)) | more


def hypergradient(function, solver=SOLVER, **more):
    given = posed(**more)
    return bl.hypergradient(*given.values(), solver=solver, estimator=Baseline(function))


def flat(value):
    return torch.cat([leaf.reshape(-1) for leaf in tree.tensors(value)])


def close(one, other, tolerance=1e-10):
    return float((flat(one) - flat(other)).norm()) <= tolerance * max(float(flat(other).norm()), 1e-30)


# --- what it is given and gives


def test_a_function_is_an_estimator_like_ours():
    ours = bl.hypergradient(*quadratic.setup(), solver=SOLVER, estimator=bl.Unrolled())
    found = hypergradient(unrolled)
    assert close(found.grad, ours.grad)
    assert close(found.inner, ours.inner)
    assert torch.allclose(found.outer_loss, ours.outer_loss)
    assert torch.allclose(found.inner_loss, ours.inner_loss)
    assert found.status is bl.Status.OK
    assert found.stats["calls"] == ours.stats["calls"] == UNROLLED_CALLS
    assert not any(leaf.requires_grad for leaf in (found.grad, found.inner, found.outer_loss, found.inner_loss))


def test_it_is_given_what_was_given_to_hypergradient():
    seen = []

    def spy(*given):
        seen.append(given)
        return unrolled(*given)

    given = posed()
    hypergradient(spy, **given)
    ((problem, outer, inner, batches, solver),) = seen
    assert batches is given["batches"]
    assert solver is SOLVER
    assert outer.data_ptr() == given["outer"].data_ptr()
    assert inner.data_ptr() == given["inner"].data_ptr()
    assert (outer.requires_grad, inner.requires_grad) == (True, False)
    assert problem.outer(inner, outer, batches.outer) == given["problem"].outer(inner, outer, batches.outer)


def test_of_the_gradient_alone_the_rest_is_that_at_the_start():
    given = posed()
    found = hypergradient(gradient_alone, **given)
    problem, outer, inner, batches = given.values()
    assert close(found.grad, hypergradient(unrolled).grad)
    assert torch.equal(found.inner, inner)
    assert found.outer_loss == problem.outer(inner, outer, batches.outer)
    assert found.inner_loss == problem.inner(inner, outer, batches.inner)
    assert found.stats[baselines.WITHOUT_INNER]


def nested():
    """Dicts in dicts and a tuple, a batch of two tensors, one batch a step; float32."""
    torch.manual_seed(0)
    outer = {"b": (torch.randn(3), torch.randn(())), "a": {"c": torch.randn(2, 3)}}
    inner = {"z": [torch.randn(3)], "a": torch.randn(2)}

    def g(y, x, batch):
        rows, targets = batch
        fit = rows @ (y["z"][0] * x["b"][0].exp()) + x["a"]["c"].sum() * y["a"].prod() - targets
        return fit.square().mean() + x["b"][1].sigmoid() * sum(leaf.square().sum() for leaf in tree.tensors(y))

    def f(y, x, batch):
        return (batch[0] @ y["z"][0] - batch[1]).square().mean() + y["a"].square().sum()

    steps = bl.PerStep([(torch.randn(4, 3), torch.randn(4)) for _ in range(4)])
    return bl.Problem(g, f), outer, inner, bl.Batches(steps, (torch.randn(4, 3), torch.randn(4)))


def unrolled_tree(problem, outer, inner, batches, solver):
    y = tree.attach(inner)
    for step in range(solver.max_steps):
        loss = problem.inner(y, outer, batches.inner_at(step))
        grads = torch.autograd.grad(loss, tree.tensors(y), create_graph=True)
        y = tree.like(y, [a - solver.optimizer.lr * g for a, g in zip(tree.tensors(y), grads, strict=True)])
    loss = problem.outer(y, outer, batches.outer)
    grads = tree.like(outer, torch.autograd.grad(loss, tree.tensors(outer)))
    return bl.Hypergradient(grads, y, loss, problem.inner(y, outer, batches.inner_at(solver.max_steps - 1)))


def test_trees_batches_of_tuples_and_batches_by_step():
    solver = bl.Descent(bl.SGD(lr=0.05), steps=4)
    ours = bl.hypergradient(*nested(), solver=solver, estimator=bl.Unrolled())
    found = bl.hypergradient(*nested(), solver=solver, estimator=Baseline(unrolled_tree))
    assert found.grad["a"]["c"].dtype == torch.float32
    assert close(found.grad, ours.grad, 1e-5)
    assert close(found.inner, ours.inner, 1e-6)
    assert found.stats["calls"] == ours.stats["calls"]


def test_a_dict_in_another_order_is_put_in_order():
    def swapped(problem, outer, inner, batches, solver):
        return dict(reversed(unrolled_tree(problem, outer, inner, batches, solver).grad.items()))

    solver = bl.Descent(bl.SGD(lr=0.05), steps=4)
    one, other = (
        bl.hypergradient(*nested(), solver=solver, estimator=Baseline(function)).grad
        for function in (unrolled_tree, swapped)
    )
    assert list(one) == list(other) == ["b", "a"]
    assert close(one, other, 0.0)


def with_grad(make):
    """A baseline that returns something else in the place of a gradient, made of a good one."""
    return lambda *given: make(gradient_alone(*given))


def with_result(**fields):
    return lambda *given: dataclasses.replace(unrolled(*given), **fields)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (with_grad(lambda grad: None), "returned None, where a tree like outer was needed; does it end in a return"),
        (with_grad(lambda grad: (grad,)), r"returned a tuple as the hypergradient, where a tree like outer was needed"),
        (with_grad(lambda grad: {"x": grad}), "returned a dict as the hypergradient"),
        (with_grad(lambda grad: grad[:3]), r"returned a tensor of shape \(3,\), torch.float64 on cpu .* shape \(4,\)"),
        (with_grad(lambda grad: grad.float()), "torch.float32 on cpu as the hypergradient"),
        (with_grad(lambda grad: 1.0), "returned a float as the hypergradient of outer"),
        (with_result(inner=torch.zeros(5)), r"whose inner is a tensor of shape \(5,\).*return the gradient alone"),
        (with_result(inner={"y": torch.zeros(6)}), "whose inner is a dict"),
        (with_result(outer_loss=0.5), "whose outer_loss is a float; a 0-dim floating tensor was needed"),
        (with_result(inner_loss=torch.zeros(2)), r"whose inner_loss is a tensor of shape \(2,\)"),
    ],
)
def test_what_is_no_hypergradient_is_refused(function, message):
    with pytest.raises(ValueError, match=message):
        hypergradient(function)


def test_a_tuple_for_a_dict_gets_the_line_to_write():
    def loose(problem, outer, inner, batches, solver):
        return torch.autograd.grad(problem.outer(inner, outer, batches.outer), list(outer.values()))

    problem = bl.Problem(lambda y, x, b: (y**2).sum(), lambda y, x, b: x["a"] ** 2 + x["b"])
    outer = {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}
    with pytest.raises(ValueError, match=r"write dict\(zip\(outer, gradients\)\)"):
        bl.hypergradient(
            problem, outer, torch.zeros(2), bl.Batches(None, None), solver=SOLVER, estimator=Baseline(loose)
        )


def test_nothing_for_a_tensor_that_acts_is_refused_and_for_one_that_does_not_is_zero():
    def half(problem, outer, inner, batches, solver):
        return {"a": torch.ones(()), "b": None}

    acting = bl.Problem(lambda y, x, b: ((y - x["b"]) ** 2).sum(), lambda y, x, b: x["a"] + (y**2).sum())
    idle = bl.Problem(lambda y, x, b: (y**2).sum(), lambda y, x, b: x["a"] + (y**2).sum())
    given = {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, torch.zeros(2), bl.Batches(None, None)
    with pytest.raises(ValueError, match=r"x enters as \['b'\] through the inner loss"):
        bl.hypergradient(acting, *given, solver=SOLVER, estimator=Baseline(half))
    with pytest.warns(UserWarning, match=r"\['b'\] influences neither loss"):
        found = bl.hypergradient(idle, *given, solver=SOLVER, estimator=Baseline(half))
    assert found.grad == {"a": torch.tensor(1.0), "b": torch.tensor(0.0)}


def test_a_problem_that_it_says_it_cannot_see_is_refused():
    problem = bl.Problem(lambda y, x, b: (y**2).sum(), lambda y, x, b: (y**2).sum(), init=lambda x, b: x)
    blind = Baseline(gradient_alone, sees=frozenset({bl.Path.INNER_LOSS, bl.Path.OUTER_LOSS}))
    with pytest.raises(ValueError, match="cannot see how the outer variable acts here"):
        bl.hypergradient(problem, torch.ones(2), None, bl.Batches(None, None), solver=SOLVER, estimator=blind)


@pytest.mark.parametrize(
    ("function", "status"),
    [
        (with_grad(lambda grad: grad * float("nan")), "NONFINITE"),
        (with_result(outer_loss=torch.tensor(float("inf"))), "NONFINITE"),
        (with_result(inner=torch.full((6,), float("nan"), dtype=torch.float64)), "DIVERGED"),
        (with_result(code=bl.Status.MAX_STEPS.code), "MAX_STEPS"),
        (with_result(code=torch.tensor(bl.Status.UNSOLVED.code)), "UNSOLVED"),
    ],
)
def test_the_status_is_honest(function, status):
    found = hypergradient(function)
    assert found.status.name == status
    assert found.status.failed == (status != "MAX_STEPS")


def spoils(part, *, by_data=False):
    def spoiling(problem, outer, inner, batches, solver):
        found = gradient_alone(problem, outer, inner, batches, solver)
        given = {"outer": outer, "inner": inner, "batch": batches.inner_at(1), "other": batches.outer}[part]
        with torch.no_grad():
            (given.data if by_data else given).add_(1)
        return found

    return spoiling


@pytest.mark.parametrize("by_data", [False, True], ids=["in place", "by .data"])
@pytest.mark.parametrize(
    ("part", "role"),
    [("outer", "outer variable"), ("inner", "inner variable"), ("batch", "inner batch"), ("other", "outer batch")],
)
@pytest.mark.parametrize("by_step", [False, True], ids=["one batch", "by step"])
def test_an_argument_changed_in_place_is_refused(part, role, by_data, by_step):
    problem = bl.Problem(lambda y, x, b: ((y - x) ** 2 * b).sum(), lambda y, x, b: (y * b).sum())
    batch = bl.PerStep([torch.ones(2) for _ in range(4)]) if by_step else torch.ones(2)
    given = {"outer": torch.ones(2), "inner": torch.zeros(2), "batches": bl.Batches(batch, torch.ones(2))}
    with pytest.raises(ValueError, match=f"spoiling changed the {role} in place"):
        hypergradient(spoils(part, by_data=by_data), problem=problem, **given)


def test_another_kind_than_a_function_is_refused():
    with pytest.raises(TypeError, match="was given a Unrolled; a function"):
        Baseline(bl.Unrolled())
    with pytest.raises(ValueError, match="neither"):
        Baseline(unrolled, target="neither")


def test_a_forecast_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="a baseline needs real numbers, and forecasts have none"):
        forecast(Case(quadratic.setup, solver=SOLVER, estimator=Baseline(unrolled)))


# --- random numbers and proximal terms


def noisy():
    torch.manual_seed(1)
    rows, targets = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, dtype=torch.float64)

    def loss(y, x, batch):
        kept = torch.nn.functional.dropout(batch[0], 0.4)
        return (kept @ (y * x.exp()) - batch[1]).square().mean()

    x, y = (torch.randn(3, dtype=torch.float64) for _ in range(2))
    return bl.Problem(loss, loss), x, y, bl.Batches((rows, targets), (rows[:4], targets[:4]))


def test_it_draws_the_numbers_that_ours_draw():
    found = []
    for estimator in (bl.Unrolled(), Baseline(unrolled)):
        given = noisy()
        torch.manual_seed(5)
        solver = bl.Descent(bl.SGD(lr=0.02), steps=4)
        found.append(bl.hypergradient(*given, solver=solver, estimator=estimator))
    assert close(found[1].grad, found[0].grad)
    assert torch.allclose(found[1].inner_loss, found[0].inner_loss, rtol=1e-12)


@pytest.mark.parametrize("draws", [False, True], ids=["of the batch", "with noise"])
def test_a_proximal_term_pulls_to_the_one_start(draws):
    def start(x, batch):
        return x * batch + (torch.randn(2, dtype=torch.float64) if draws else 0)

    plain = bl.Problem(lambda y, x, b: ((y - b) ** 2).sum(), lambda y, x, b: ((y - b) ** 2).sum(), init=start)
    steps = bl.PerStep([torch.tensor([float(k), 1.0], dtype=torch.float64) for k in range(1, 5)])
    x, last = torch.tensor([0.5, -2.0], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    found = []
    for estimator in (bl.Unrolled(), Baseline(unrolled)):
        torch.manual_seed(3)
        batches = bl.Batches(steps, last)
        found.append(bl.hypergradient(bl.proximal(plain, 0.7), x, None, batches, solver=SOLVER, estimator=estimator))
    assert close(found[1].grad, found[0].grad)
    assert close(found[1].inner, found[0].inner)


# --- tasks


def tasks():
    torch.manual_seed(2)
    problem = bl.Problem(
        lambda y, x, b: ((y - b) ** 2).sum() + (y * x).pow(2).sum(), lambda y, x, b: ((y - b) ** 2).sum()
    )
    batch = torch.randn(3, 2, dtype=torch.float64)
    return (
        problem,
        torch.ones(2, dtype=torch.float64),
        torch.zeros(3, 2, dtype=torch.float64),
        bl.Batches(batch, -batch),
    )


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("function", [unrolled, gradient_alone])
def test_tasks_are_seen_one_by_one_as_plain_problems(chunk, function):
    seen = []

    def spy(problem, outer, inner, batches, solver):
        seen.append((inner.shape, batches.inner.shape, batches.outer.shape))
        return function(problem, outer, inner, batches, solver)

    ours = bl.hypergradient(*tasks(), solver=SOLVER, estimator=bl.TaskMean(bl.Unrolled()))
    found = bl.hypergradient(*tasks(), solver=SOLVER, estimator=bl.TaskMean(Baseline(spy), chunk))
    assert seen == [((2,), (2,), (2,))] * 3
    assert close(found.grad, ours.grad)
    assert found.stats["tasks"] == 3
    if function is unrolled:
        assert close(found.inner, ours.inner)
        assert torch.allclose(found.outer_loss, ours.outer_loss)
        assert torch.allclose(found.inner_loss, ours.inner_loss)
        assert found.stats["calls"]["hvp"] == 3 * ours.stats["calls"]["hvp"]
    else:
        assert found.stats[baselines.WITHOUT_INNER]


def test_a_case_over_tasks_puts_its_baselines_over_the_same_tasks():
    mean = bl.TaskMean(bl.Unrolled(), chunk=2, weights=None)
    case = Definition("tasks", tasks, {"ours": mean}, baselines={"theirs": unrolled})
    assert case.compared == {"ours": mean, "theirs": bl.TaskMean(Baseline(unrolled), chunk=1)}
    weighted = bl.TaskMean(bl.Unrolled(), weights=bl.GivenWeights([0.5, 0.25, 0.25]))
    case = Definition("tasks", tasks, {"ours": weighted}, baselines={"theirs": unrolled})
    ours, theirs = (bl.hypergradient(*tasks(), solver=SOLVER, estimator=each).grad for each in case.compared.values())
    assert close(theirs, ours)


# --- counts


@pytest.mark.parametrize(
    ("function", "calls"),
    [
        (unrolled, (4, 1, 4, 0)),
        (neumann, (5, 1, 3, 1)),
        (functools.partial(neumann, products=0), (5, 1, 0, 1)),
        (difference, (2, 1, 0, 0)),
        (lambda problem, outer, *_: torch.zeros_like(outer), (0, 0, 0, 0)),
    ],
    ids=["unrolled", "neumann", "no products", "difference", "nothing"],
)
def test_oracle_calls_are_the_passes_of_autograd(function, calls):
    found = hypergradient(function).stats
    assert tuple(found["calls"].values()) == calls
    assert baselines.UNCOUNTED not in found


def test_the_counts_of_our_own_estimators_are_what_they_say_of_themselves():
    implicit, corrected = bl.Implicit(bl.CG(6)), bl.FirstOrderCorrected()
    for estimator in (bl.Unrolled(), bl.Unrolled("iterates"), bl.Unrolled("segments"), implicit, corrected):
        counter, (problem, *rest) = Counter(of_library=True), quadratic.setup()
        found = bl.hypergradient(counter.watched(problem), *rest, solver=SOLVER, estimator=estimator)
        said = found.stats["calls"]
        for name in ("inner_gradient", "outer_gradient"):
            assert counter.calls[name] == said[name], (estimator, name)
        # A sweep through the first step need not reach y_0, and a mixed product of ours may.
        assert counter.calls["hvp"] + counter.calls["mixed"] == said["hvp"] + said["mixed"], estimator


def test_where_the_library_is_called_inside_its_own_counts_stand():
    def inside(problem, outer, inner, batches, solver):
        return bl.hypergradient(problem, outer, inner, batches, solver=solver, estimator=bl.Implicit(bl.CG(6)))

    ours = bl.hypergradient(*quadratic.setup(), solver=SOLVER, estimator=bl.Implicit(bl.CG(6)))
    found = hypergradient(inside)
    assert found.stats["calls"] == ours.stats["calls"]
    assert close(found.grad, ours.grad, 0.0)


def transforms(problem, outer, inner, batches, solver):
    return torch.func.grad(lambda x: problem.outer(inner, x, batches.outer))(outer.detach())


def forward_mode(problem, outer, inner, batches, solver):
    x, ad = outer.detach(), torch.autograd.forward_ad
    with ad.dual_level():
        each = [problem.outer(inner, ad.make_dual(x, along), batches.outer) for along in torch.eye(4).to(x)]
        return torch.stack([ad.unpack_dual(value).tangent for value in each])


def compiled(problem, outer, inner, batches, solver):
    loss = torch.compile(lambda x: problem.outer(inner, x, batches.outer), backend="eager", fullgraph=True)
    return torch.autograd.grad(loss(outer), outer)[0]


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # of torch's own forward mode
@pytest.mark.parametrize(
    ("function", "why"),
    [
        (transforms, "it differentiates with torch.func"),
        (forward_mode, "it differentiates in forward mode"),
        (compiled, "it compiles"),
    ],
)
def test_what_is_not_seen_does_not_count(function, why):
    given = posed()
    found = hypergradient(function, **given)
    assert found.stats[baselines.UNCOUNTED] == why
    problem, outer, inner, batches = given.values()
    outer = outer.detach().requires_grad_()
    assert close(found.grad, torch.autograd.grad(problem.outer(inner, outer, batches.outer), outer)[0])


def test_what_cannot_be_counted_is_said_and_leaves_no_counts():
    record = measure(Case(quadratic.setup, solver=SOLVER, estimator=Baseline(transforms)), repeats=1, errors=False)
    assert record.calls == {}
    assert not any(phase.calls for phase in record.phases.values())
    assert "Oracle calls were not counted, because it differentiates with torch.func." in map(str, record.notes)


def perceptron(device="cpu"):
    torch.manual_seed(0)
    rows, labels = torch.randn(64, 10), torch.randint(0, 3, (64,))
    inner = {"w": torch.randn(10, 32) / 3, "v": torch.randn(32, 3) / 5}

    def loss(y, x, batch):
        each = torch.nn.functional.cross_entropy((batch[0] @ y["w"]).tanh() @ y["v"], batch[1], reduction="none")
        return (x.sigmoid() * each).mean()

    def plain(y, x, batch):
        return loss(y, torch.zeros_like(x), batch)

    return bl.Problem(loss, plain), torch.zeros(64), inner, bl.Batches((rows, labels), (rows, labels))


def test_counting_changes_neither_bytes_nor_numbers(monkeypatch):
    case = Case(perceptron, solver=SOLVER, estimator=Baseline(unrolled_tree))
    plain = measure(case, repeats=1)
    assert plain.calls == UNROLLED_CALLS
    with uncounted():
        bare = bl.hypergradient(*perceptron(), solver=SOLVER, estimator=Baseline(unrolled_tree))
    assert bare.stats[baselines.UNCOUNTED] == "it was not asked for"
    counted = bl.hypergradient(*perceptron(), solver=SOLVER, estimator=Baseline(unrolled_tree))
    assert close(counted.grad, bare.grad, 1e-6)
    # measure() counts in its first pass alone; the same with counting in every pass:
    monkeypatch.setattr(baselines, "counting", lambda: True)
    everywhere = measure(case, repeats=1)
    for figure in ("peak_tensor_bytes", "kept_tensor_bytes", "matmul_flops", "moved_bytes", "program_relative_error"):
        assert getattr(everywhere, figure) == getattr(plain, figure), figure


# --- records


def test_a_row_says_whose_it_is_and_what_it_aims_at():
    theirs = Baseline(gradient_alone, "theirs", "1.2", target="program", notes=("It is slow.",))
    record = measure(Case(quadratic.setup, solver=SOLVER, estimator=theirs), repeats=1)
    assert [str(note) for note in record.notes][:2] == ["By theirs 1.2.", "It is slow."]
    assert record.settings == "Baseline(test_baselines.gradient_alone, theirs 1.2)"
    assert record.target is target_of(bl.TaskMean(theirs)) is Target.PROGRAM
    assert record.program_relative_error < 1e-14
    assert record.status == "OK"
    assert set(record.phases) == {"hypergradient", "outer"}


def test_an_outer_loop_goes_on_from_the_inner_variable_that_came_back():
    case = Case(quadratic.setup, solver=SOLVER, estimator=Baseline(unrolled))
    ours = outer_loop(dataclasses.replace(case, estimator=bl.Unrolled()), Definition("q", quadratic.setup), 3)
    theirs = outer_loop(case, Definition("q", quadratic.setup), 3)
    for one, other in zip(theirs.iterations, ours.iterations, strict=True):
        assert one.outer_loss == pytest.approx(other.outer_loss, rel=1e-10)
        assert one.calls == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"": unrolled}, "BASELINES .* is"),
        ({"mine": 3}, "a dict of functions was needed"),
        ([unrolled], "a dict of functions was needed"),
        ({"ours": unrolled}, "'ours' is an estimator and a baseline"),
    ],
)
def test_a_case_with_baselines_that_are_none_is_refused(given, message):
    with pytest.raises(CaseError, match=message):
        Definition("case", quadratic.setup, {"ours": bl.Unrolled()}, baselines=given)
