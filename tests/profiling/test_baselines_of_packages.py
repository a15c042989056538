"""The baselines of higher and TorchOpt: the same hypergradients as ours on the same problems, and sentences where they
have no such thing."""

import functools
import importlib.metadata

import pytest
import torch
from bilevel_profiling import Baseline, Case, measure
from bilevel_profiling.baselines import higher, packages, torchopt
from bilevel_profiling.records.record import Target

import bilevel as bl
from bilevel.problems import quadratic
from bilevel.space import tree

PLAIN = {
    "gradient descent": bl.SGD(lr=0.1),
    "weight decay": bl.SGD(lr=0.1, weight_decay=0.05),
    "momentum": bl.SGD(lr=0.1, momentum=0.9),
    "dampening": bl.SGD(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01),
    "nesterov": bl.SGD(lr=0.1, momentum=0.9, nesterov=True),
    "adam": bl.Adam(lr=0.05),
    "adam, large eps": bl.Adam(lr=0.05, betas=(0.8, 0.9), eps=1e-2, weight_decay=0.1),
}
FUNCTIONS = {"higher": higher.unrolled, "torchopt": torchopt.unrolled}
TIGHT = functools.partial(torchopt.implicit, tol=1e-14)
CLASSES, FEATURES = 3, 5


@pytest.fixture(params=FUNCTIONS)
def name(request):
    pytest.importorskip(request.param, reason=f"{request.param} is not installed: pip install 'bilevel[peers]'")
    return request.param


@pytest.fixture
def function(name):
    return FUNCTIONS[name]


@pytest.fixture
def needs_torchopt():
    pytest.importorskip("torchopt", reason="torchopt is not installed: pip install 'bilevel[peers]'")


def data(rows, seed, dtype):
    made = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, FEATURES, generator=made, dtype=torch.float64).to(dtype)
    return inputs, torch.randint(0, CLASSES, (rows,), generator=made)


def net(dtype):
    torch.manual_seed(0)
    layers = torch.nn.Linear(FEATURES, 7), torch.nn.Tanh(), torch.nn.Linear(7, CLASSES)
    return bl.functional(torch.nn.Sequential(*layers).to(dtype))


def hypercleaning(dtype=torch.float64):
    """A weight for each example of a perceptron, one batch a step."""
    call, inner = net(dtype)
    loss = torch.nn.functional.cross_entropy

    def g(y, x, batch):
        return (x["weights"][batch[2]].sigmoid() * loss(call(y, batch[0]), batch[1], reduction="none")).mean()

    problem = bl.Problem(g, lambda y, x, batch: loss(call(y, batch[0]), batch[1]))
    batches = [(*data(10, step, dtype), torch.arange(10) + step) for step in range(5)]
    return problem, {"weights": torch.zeros(20, dtype=dtype)}, inner, bl.Batches(bl.PerStep(batches), data(8, 9, dtype))


def maml(dtype=torch.float64):
    """The start is x itself, which the losses see too."""
    call, outer = net(dtype)
    loss = torch.nn.functional.cross_entropy

    def g(y, x, batch):
        return loss(call(y, batch[0]), batch[1]) + 0.1 * sum((a * b).sum() for a, b in zip(y.values(), x.values()))  # noqa: B905

    batches = bl.Batches(data(10, 1, dtype), data(8, 2, dtype))
    return bl.Problem(g, lambda y, x, b: loss(call(y, b[0]), b[1]), init=lambda x, b: x), outer, None, batches


def imaml():
    problem, *rest = maml()
    return bl.proximal(problem, 2.0), *rest


def nested():
    """Trees in trees, and a part of the start that does not depend on x."""
    x = {"a": [torch.tensor(0.3, dtype=torch.float64)], "b": (torch.ones(2, dtype=torch.float64),)}

    def start(outer, batch):
        return {"u": (outer["b"][0] * 2,), "v": torch.zeros(3, dtype=torch.float64)}

    def g(y, outer, batch):
        return (y["u"][0] - batch).pow(2).sum() * outer["a"][0].exp() + (y["v"] - y["u"][0].sum()).cos().sum()

    def f(y, outer, batch):
        return y["v"].sum().sin() + (y["u"][0] * batch).sum() + outer["a"][0] ** 2

    batch = torch.tensor([0.2, -0.4], dtype=torch.float64)
    return bl.Problem(g, f, init=start), x, None, bl.Batches(batch, batch)


PROBLEMS = {
    "quadratic": quadratic.setup,
    "hyper-cleaning": hypercleaning,
    "MAML": maml,
    "iMAML": imaml,
    "nested": nested,
}


def flat(value):
    return torch.cat([leaf.reshape(-1) for leaf in tree.tensors(value)])


def same(found, ours, tolerance=1e-10):
    for part in ("grad", "inner"):
        one, other = flat(getattr(found, part)), flat(getattr(ours, part))
        assert (one - other).norm() <= tolerance * other.norm(), part
    assert torch.allclose(found.outer_loss, ours.outer_loss, rtol=tolerance)
    assert torch.allclose(found.inner_loss, ours.inner_loss, rtol=tolerance)


@pytest.fixture
def double():
    """TorchOpt computes Adam's bias correction in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_the_bias_correction_of_torchopt_has_the_digits_of_the_default_dtype(needs_torchopt):
    given = quadratic.setup()
    solver = bl.Descent(bl.Adam(lr=0.05), steps=4)
    ours, found = (
        bl.hypergradient(*given, solver=solver, estimator=each) for each in (bl.Unrolled(), Baseline(torchopt.unrolled))
    )
    assert 1e-8 < (found.inner - ours.inner).norm() / ours.inner.norm() < 1e-4
    (note,) = torchopt.baselines()["torchopt unrolled"].notes
    assert "default dtype" in note


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("optimizer", PLAIN)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_unrolling_is_ours(function, problem, optimizer):
    solver = bl.Descent(PLAIN[optimizer], steps=4)
    ours, found = (
        bl.hypergradient(*PROBLEMS[problem](), solver=solver, estimator=each)
        for each in (bl.Unrolled(), Baseline(function))
    )
    same(found, ours)
    assert found.stats["calls"] == ours.stats["calls"]


@pytest.mark.usefixtures("double", "needs_torchopt")
def test_adamw_of_torchopt_is_ours():
    solver = bl.Descent(bl.AdamW(lr=0.05, weight_decay=0.2), steps=4)
    for problem in (hypercleaning, maml):
        ours, found = (
            bl.hypergradient(*problem(), solver=solver, estimator=each)
            for each in (bl.Unrolled(), Baseline(torchopt.unrolled))
        )
        same(found, ours)


def test_in_float32_too(function):
    solver = bl.Descent(bl.SGD(lr=0.1, momentum=0.5), steps=3)
    for problem in (hypercleaning, maml):
        ours, found = (
            bl.hypergradient(*problem(torch.float32), solver=solver, estimator=each)
            for each in (bl.Unrolled(), Baseline(function))
        )
        assert tree.tensors(found.grad)[0].dtype == torch.float32
        same(found, ours, 1e-5)


def test_without_a_step_the_start_is_the_solution(function):
    solver = bl.Descent(bl.SGD(lr=0.1), steps=0)
    for problem in (maml, nested):
        ours, found = (
            bl.hypergradient(*problem(), solver=solver, estimator=each) for each in (bl.Unrolled(), Baseline(function))
        )
        same(found, ours)


def test_random_numbers_are_those_of_ours(function):
    problem, x, inner, batches = hypercleaning()
    noisy = bl.Problem(
        lambda y, x, b: problem.inner(y, x, (torch.nn.functional.dropout(b[0], 0.3), *b[1:])),
        lambda y, x, b: problem.outer(y, x, (torch.nn.functional.dropout(b[0], 0.3), *b[1:])),
    )
    found = []
    for estimator in (bl.Unrolled(), Baseline(function)):
        torch.manual_seed(4)
        solver = bl.Descent(bl.SGD(lr=0.1), steps=5)
        found.append(bl.hypergradient(noisy, x, inner, batches, solver=solver, estimator=estimator))
    same(found[1], found[0])


def test_an_inner_tensor_that_a_step_does_not_use_is_left_alone(function):
    one = {"used": torch.ones(2, dtype=torch.float64), "idle": torch.ones(2, dtype=torch.float64)}
    problem = bl.Problem(
        lambda y, x, b: ((y["used"] - x) ** 2).sum(), lambda y, x, b: (y["used"] * y["idle"]).sum() + x.sum()
    )
    given = problem, torch.zeros(2, dtype=torch.float64), one, bl.Batches(None, None)
    solver = bl.Descent(bl.SGD(lr=0.1, momentum=0.5, weight_decay=0.3), steps=3)
    ours, found = (
        bl.hypergradient(*given, solver=solver, estimator=each) for each in (bl.Unrolled(), Baseline(function))
    )
    same(found, ours)


def test_higher_learns_step_sizes():
    pytest.importorskip("higher", reason="higher is not installed: pip install 'bilevel[peers]'")

    def made():
        problem, x, inner, batches = hypercleaning()
        x["rate"] = torch.tensor(-2.0, dtype=torch.float64)
        x["momentum"] = torch.tensor(0.3, dtype=torch.float64)
        return problem, x, inner, batches

    for optimizer in (
        bl.SGD(lr=lambda x: x["rate"].exp(), momentum=lambda x: x["momentum"]),
        bl.Adam(lr=lambda x: x["rate"].exp(), betas=(lambda x: x["momentum"], 0.9)),
    ):
        ours, found = (
            bl.hypergradient(*made(), solver=bl.Descent(optimizer, steps=4), estimator=each)
            for each in (bl.Unrolled(), Baseline(higher.unrolled))
        )
        assert ours.grad["rate"] != 0
        same(found, ours)


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        (bl.Converge(bl.SGD(lr=0.1), tol=1e-3), "has no Converge"),
        (
            bl.Descent(bl.Scheduled((bl.SGD(lr=0.1),)), 1),
            "has no Descent.*Scheduled.*it takes bl.Descent with bl.SGD or",
        ),
        (bl.Descent(bl.SGD(lr=torch.full((6,), 0.1)), 2), "one lr for all tensors|a plain number as lr"),
    ],
)
def test_another_inner_solver_is_refused_in_a_sentence(function, name, solver, message):
    with pytest.raises(ValueError, match=f"^{name}.*({message})"):
        bl.hypergradient(*quadratic.setup(), solver=solver, estimator=Baseline(function))


def test_what_one_of_them_lacks_is_refused_in_a_sentence(function, name):
    if name == "higher":
        solver = bl.Descent(bl.AdamW(lr=0.1), 2)
        message = "higher has no .*AdamW.*; it takes bl.Descent with bl.SGD or bl.Adam"
    else:
        solver = bl.Descent(bl.SGD(lr=lambda x: x.sum().exp()), 2)
        message = "torchopt takes a plain number as lr, and SGD was given a function of outer"
    with pytest.raises(ValueError, match=message):
        bl.hypergradient(*quadratic.setup(), solver=solver, estimator=Baseline(function))


# --- implicit differentiation


@pytest.mark.usefixtures("double", "needs_torchopt")
@pytest.mark.parametrize("optimizer", [bl.SGD(lr=0.1), bl.SGD(lr=0.1, weight_decay=0.3), bl.Adam(lr=0.05)])
@pytest.mark.parametrize("problem", ["quadratic", "iMAML"])
def test_implicit_differentiation_of_torchopt_is_ours(problem, optimizer):
    solver = bl.Descent(optimizer, steps=5)
    ours = bl.hypergradient(*PROBLEMS[problem](), solver=solver, estimator=bl.Implicit(bl.CG(max_steps=10, tol=0.0)))
    found = bl.hypergradient(*PROBLEMS[problem](), solver=solver, estimator=Baseline(TIGHT))
    same(found, ours)


def test_its_linear_solve_can_be_told_otherwise(needs_torchopt):
    solver = bl.Descent(bl.SGD(lr=1.0), steps=5)
    other = functools.partial(torchopt.implicit, steps=3, tol=0.0, damping=0.5)
    linear = bl.CG(max_steps=3, tol=0.0, damping=0.5)
    ours = bl.hypergradient(*quadratic.setup(), solver=solver, estimator=bl.Implicit(linear))
    found = bl.hypergradient(*quadratic.setup(), solver=solver, estimator=Baseline(other))
    same(found, ours)
    assert repr(Baseline(other)) == "Baseline(torchopt.implicit(steps=3, tol=0.0, damping=0.5))"


def test_the_last_batch_is_where_it_takes_the_curvature(needs_torchopt):
    solver = bl.Descent(bl.SGD(lr=0.1, weight_decay=1.0), steps=5)
    ours = bl.hypergradient(*hypercleaning(), solver=solver, estimator=bl.Implicit(bl.CG(max_steps=10, tol=0.0)))
    found = bl.hypergradient(*hypercleaning(), solver=solver, estimator=Baseline(TIGHT))
    assert ours.status is bl.Status.MAX_STEPS
    same(found, ours, 1e-8)


def test_where_no_solution_is_known_there_is_no_implicit_estimate(needs_torchopt):
    solver = bl.Descent(bl.AdamW(lr=0.1, weight_decay=0.1), steps=2)
    with pytest.raises(ValueError, match=r"where bl\.AdamW with weight decay rests is not known"):
        bl.hypergradient(*quadratic.setup(), solver=solver, estimator=Baseline(torchopt.implicit))


def test_a_start_alone_cannot_be_seen_by_it(needs_torchopt):
    problem = bl.Problem(lambda y, x, b: (y**2).sum(), lambda y, x, b: (y**2).sum(), init=lambda x, b: x)
    row = torchopt.baselines()["torchopt implicit CG"]
    with pytest.raises(ValueError, match="cannot see how the outer variable acts here"):
        bl.hypergradient(
            problem, torch.ones(2), None, bl.Batches(None, None), solver=bl.Descent(bl.SGD(lr=0.1), 2), estimator=row
        )


# --- rows


def test_the_rows_say_whose_they_are(name):
    found = packages.named([name])
    labels = {"higher": ["higher unrolled"], "torchopt": ["torchopt unrolled", "torchopt implicit CG"]}
    assert list(found) == labels[name]
    first = found[f"{name} unrolled"]
    assert first.said[0] == f"By {name} {importlib.metadata.version(name)}."
    assert first.target is Target.PROGRAM
    record = measure(Case(quadratic.setup, solver=bl.Descent(bl.SGD(lr=1.0), 3), estimator=first), repeats=1)
    assert record.program_relative_error < 1e-14
    assert record.calls == {"inner_gradient": 3, "outer_gradient": 1, "hvp": 3, "mixed": 0}
    assert record.kept_tensor_bytes == 0


def test_memory_of_theirs_is_a_graph_a_step(function):
    peaks = [
        measure(
            Case(
                lambda device: hypercleaning(), solver=bl.Descent(bl.SGD(lr=0.1), steps), estimator=Baseline(function)
            ),
            repeats=1,
            errors=False,
        ).peak_tensor_bytes
        for steps in (3, 4, 5)
    ]
    assert peaks[1] - peaks[0] == pytest.approx(peaks[2] - peaks[1], rel=0.01)
    assert peaks[1] - peaks[0] > 1000
