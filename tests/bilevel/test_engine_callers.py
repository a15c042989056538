"""Whatever asks for derivatives in the user's place takes an engine, and gets the same numbers with it."""

import functools

import pytest
import torch
from torch import nn

import bilevel as bl
from bilevel.engine.compiled import functions
from bilevel.space import tree

ENGINE = bl.Compiled(backend="graph")
TASKS, ROWS = 3, 6


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def traced(monkeypatch):
    """The names of what is traced."""
    said, trace = [], functions.trace

    def listening(flat, given):
        said.append(flat)
        return trace(flat, given)

    monkeypatch.setattr(functions, "trace", listening)
    return said


def same(found, expected):
    ours, theirs = tree.tensors(found), tree.tensors(expected)
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


def batches():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(TASKS, ROWS, 2, generator=generator)
    return bl.Batches(inner=(inputs, inputs.sin()), outer=(-inputs, inputs.cos()))


def learner(engine=None, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2))
    optimizer = functools.partial(torch.optim.SGD, lr=0.1)
    return bl.meta.Learner(net, nn.functional.mse_loss, engine=engine, optimizer=optimizer, **options)


KINDS = {
    "MAML": {},
    "FOMAML": {"estimator": bl.FirstOrder()},
    "ANIL": {"adapts": "2"},
    "Meta-SGD": {"rates": bl.meta.Rates(per="element")},
    "iMAML": {"start": bl.meta.Shared(pull=2.0), "estimator": bl.Implicit(bl.CG(5))},
    "all at once": {"chunk": 8},
    "Reptile": {"estimator": bl.meta.Reptile()},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_learner_trains_with_its_engine(options, traced):
    eager, compiled = learner(**options), learner(ENGINE, **options)
    x, z = eager.outer(), compiled.outer()
    same(compiled.hypergradient(z, batches()).grad, eager.hypergradient(x, batches()).grad)
    assert traced
    for one, other in zip(compiled.train(z, [batches()] * 2), eager.train(x, [batches()] * 2), strict=True):
        assert one.hypergradient.stats["engine"]["name"] == "compiled"
        assert "engine" not in other.hypergradient.stats
    same(z, x)


def test_a_learner_adapts_with_its_engine(traced):
    eager, compiled = learner(), learner(ENGINE)
    x = eager.outer()
    support = tuple(leaf[0] for leaf in batches().inner)
    same(list(compiled.adapt(x, support).values()), list(eager.adapt(x, support).values()))
    assert traced
    same(compiled.predict(x, support, support[0]), eager.predict(x, support, support[0]))

    def score(prediction, target):
        return -(prediction - target).square().mean()

    ours, theirs = (each.evaluate(x, [batches()], score=score) for each in (compiled, eager))
    assert ours.score == pytest.approx(theirs.score, rel=1e-10)


def test_training_shares_what_is_traced_and_an_engine_of_the_call_comes_first(traced):
    compiled = learner(ENGINE)
    x = compiled.outer()
    compiled.hypergradient(x, batches())
    count = len(traced)
    for _ in compiled.train(x, [batches()] * 3):
        pass
    compiled.adapt(x, tuple(leaf[0] for leaf in batches().inner))
    assert len(traced) <= count + 1  # (one task at the end of a chunk is of another shape than all)
    (step,) = compiled.train(x, [batches()], engine=bl.Eager())
    assert "engine" not in step.hypergradient.stats


def test_no_engine_is_refused():
    for give in (
        lambda: learner("compiled"),
        lambda: bl.adapt(*posed(), solver=bl.Descent(bl.SGD(lr=0.1), 1), engine=bl.Compiled),
    ):
        with pytest.raises(TypeError, match=r"engine.*bilevel\.(Eager\(\) or bilevel\.)?Compiled\(\) was needed"):
            give()


def loss(y, x, batch):
    return ((y - x.sin() * batch) ** 2).sum()


def posed():
    problem = bl.Problem(loss, loss, init=lambda x, batch: x)
    goals = torch.tensor([[0.5, 2.0], [1.0, -1.0]])
    return problem, torch.tensor([1.0, 2.0]), None, bl.Batches(goals, goals)


def test_adapt_takes_an_engine(traced):
    solver = bl.Descent(bl.SGD(lr=0.1), 3)
    found, expected = (bl.adapt(*posed(), solver=solver, tasks=True, engine=engine) for engine in (ENGINE, None))
    same((found.inner, found.inner_loss, found.outer_loss), (expected.inner, expected.inner_loss, expected.outer_loss))
    assert traced
    assert found.stats["calls"] == expected.stats["calls"]
    assert found.stats["engine"]["functions"][0]["calls"] == 3
    assert "engine" not in expected.stats


@pytest.mark.parametrize("form", ["paper", "released", "plain"])
def test_moml_is_the_same_with_an_engine(form, traced):
    problem, x, _, given = posed()
    given = bl.Batches(given.inner, given.outer, task_ids=["ada", "bob"])
    grads = []
    for engine in (ENGINE, None):
        state = None
        for _ in range(2):
            found = bl.hypergradient(
                problem,
                x,
                None,
                given,
                solver=bl.Descent(bl.SGD(lr=0.1), 1),
                estimator=bl.meta.MOML(0.5, form=form),
                state=state,
                engine=engine,
            )
            state = found.state
        grads.append(found.grad)
    same(*grads)
    assert traced


def test_local_moml_shares_one_trace_between_clients(traced):
    clients = [[bl.Batches(goal, goal)] * 2 for goal in (torch.tensor([0.5, 2.0]), torch.tensor([1.0, -1.0]))]
    problem, x, _, _ = posed()
    local = bl.meta.LocalMOML(rate=0.5, blend=0.5)
    solver = bl.Descent(bl.SGD(lr=0.1), 1)
    found, expected = (
        local.round(problem, x, clients, solver=solver, starts=[c[0].inner for c in clients], engine=engine)
        for engine in (ENGINE, None)
    )
    same((found.outer, found.outer_losses), (expected.outer, expected.outer_losses))
    assert 1 <= len(traced) <= 3
