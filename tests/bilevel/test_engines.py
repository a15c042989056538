"""Every engine returns what the eager one returns: estimators x engines, what is traced and when, what is refused."""

import functools
import itertools

import catalogue
import pytest
import torch
from engine_pairs import GRAPH, call, equal, leaves, same, traced
from torch import nn

import bilevel as bl
from bilevel.engine.compiled import engine as compiled_engine
from bilevel.engine.compiled import inductor

D = torch.float64
ENGINES = {"eager": bl.Eager(), "graph": GRAPH}
ENGINE = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
ESTIMATOR = pytest.mark.parametrize("estimator", catalogue.ESTIMATORS)
FEW = {
    "graph": bl.Unrolled(),
    "iterates": bl.Unrolled("iterates"),
    "segments": bl.Unrolled("segments"),
    "implicit": bl.Implicit(bl.CG(8, 1e-12)),
    "corrected": bl.FirstOrderCorrected(),
}
SOME = pytest.mark.parametrize("estimator", FEW.values(), ids=FEW)


@functools.cache
def shared(name):
    """One problem for all tests of a name, so that it is traced once."""
    return catalogue.PROBLEMS[name]()


@functools.cache
def dropped():
    """A loss with dropout, of x in the start and in the loss."""
    problem, outer, inner, batches = catalogue.weighted_net()

    def loss(y, x, b):
        hidden = nn.functional.dropout(torch.tanh(b[0] @ y["a"]), 0.4)
        noise = 0.1 * torch.randn_like(hidden)
        losses = nn.functional.cross_entropy((hidden + noise) @ y["b"], b[1], reduction="none")
        return (losses * x["weights"][: len(losses)].sigmoid()).mean() + x["decay"].exp() * y["a"].square().sum()

    return bl.Problem(loss, problem.outer_loss), outer, inner, batches


# --- estimators x engines


@ENGINE
@ESTIMATOR
@pytest.mark.parametrize("problem", catalogue.PROBLEMS)
def test_every_estimator_returns_what_it_returns_eagerly(problem, estimator, engine):
    p, outer, inner, batches = shared(problem)
    if problem == "weighted net" and estimator == "first order":
        p = bl.Problem(lambda y, x, b: p_free(y, x, b), p.outer_loss)
    solver = bl.Descent(bl.SGD(0.3), 5)
    found = same(p, outer, inner, batches, engine=engine, solver=solver, estimator=catalogue.ESTIMATORS[estimator])
    assert ("engine" in found.stats) == (engine is GRAPH)


def p_free(y, x, b):
    """An inner loss that x does not enter."""
    return nn.functional.cross_entropy(torch.tanh(b[0] @ y["a"]) @ y["b"], b[1])


@SOME
@pytest.mark.parametrize("optimizer", catalogue.OPTIMIZERS)
def test_every_optimizer(optimizer, estimator):
    p, outer, inner, batches = shared("weighted net")
    if optimizer in ("learned lr", "adamw") and not isinstance(estimator, bl.Unrolled):
        pytest.skip("x, or the decay, enters through the optimizer")
    same(p, outer, inner, batches, solver=bl.Descent(catalogue.OPTIMIZERS[optimizer], 4), estimator=estimator)


@ESTIMATOR
def test_dropout_draws_the_same_numbers(estimator):
    if estimator == "first order" or estimator in catalogue.BY_ROUNDS - {"amigo"}:
        pytest.skip("x enters through the inner loss")
    p, outer, inner, batches = dropped()
    found = same(p, outer, inner, batches, estimator=catalogue.ESTIMATORS[estimator], seed=3)
    another, _ = call(GRAPH, p, outer, inner, batches, estimator=catalogue.ESTIMATORS[estimator], seed=4)
    assert not torch.allclose(another.grad["weights"], found.grad["weights"]), "another seed, other numbers"


@SOME
def test_per_step_batches(estimator):
    p, outer, inner, batches = shared("weighted net")
    X, Y = batches.inner
    steps = bl.PerStep([(X[i : i + 8], Y[i : i + 8]) for i in range(5)])
    same(p, outer, inner, bl.Batches(steps, batches.outer), solver=bl.Descent(bl.SGD(0.3), 5), estimator=estimator)


@pytest.mark.parametrize("estimator", [FEW["graph"], FEW["iterates"], FEW["implicit"]], ids=["graph", "iter", "cg"])
def test_a_smaller_last_batch(estimator):
    p, outer, inner, batches = shared("weighted net")
    X, Y = batches.inner
    steps = bl.PerStep([(X[:8], Y[:8]), (X[8:], Y[8:]), (X[:5], Y[:5])], ragged=True)
    same(p, outer, inner, bl.Batches(steps, batches.outer), solver=bl.Descent(bl.SGD(0.3), 3), estimator=estimator)


def test_resampled_and_weighted_steps():
    p, outer, inner, batches = shared("weighted net")
    X, Y = batches.inner
    halves = [(X[:8], Y[:8]), (X[8:], Y[8:])]
    data = bl.Batches(bl.PerStep(halves * 2), batches.outer, curvature=bl.PerStep(halves[::-1] * 2))
    same(p, outer, inner, data, estimator=bl.Unrolled("iterates", resampled=True))
    weights = (0.1, 0.2, 0.3, 0.4)
    same(p, outer, inner, batches, estimator=bl.Unrolled("iterates", step_weights=weights))
    same(p, outer, inner, batches, estimator=bl.Unrolled("graph", step_weights=weights))


@SOME
def test_converge(estimator):
    def g(y, x, b):
        return 0.5 * ((y - x) ** 2 * torch.arange(1.0, 4, dtype=D)).sum()

    p, x = bl.Problem(g, lambda y, x, b: (y**2).sum()), torch.ones(3, dtype=D)
    solver = bl.Converge(bl.SGD(0.3), max_steps=60, tol=1e-5)
    found = same(p, x, torch.zeros(3, dtype=D), bl.Batches(None, None), solver=solver, estimator=estimator)
    assert found.stats["inner_steps"] < (180 if isinstance(estimator, bl.FirstOrderCorrected) else 60)


@SOME
@pytest.mark.parametrize("pull", [False, True], ids=["init", "proximal"])
def test_a_start_that_draws_and_a_pull_to_it(pull, estimator):
    _, _, inner, batches = shared("weighted net")

    def init(x, b):
        return {name: leaf + 0.1 * torch.randn_like(leaf) for name, leaf in x.items()}

    p = bl.Problem(p_free, p_free, init=init)
    if not pull and not isinstance(estimator, bl.Unrolled):
        pytest.skip("x enters through the start alone")
    same(bl.proximal(p, 0.7) if pull else p, inner, None, batches, estimator=estimator)


@SOME
def test_features(estimator):
    g = torch.Generator().manual_seed(0)
    X, Y = torch.randn(12, 5, generator=g, dtype=D), torch.randn(12, 2, generator=g, dtype=D)
    body, head = 0.3 * torch.randn(5, 4, generator=g, dtype=D), 0.3 * torch.randn(4, 2, generator=g, dtype=D)

    def loss(y, x, b):
        return (b[0] @ y - b[1]).square().mean() + 0.05 * y.square().sum()

    p = bl.Problem(loss, loss, features=lambda x, b: (nn.functional.dropout(torch.tanh(b[0] @ x), 0.2), b[1]))
    same(p, body, head, bl.Batches((X[:6], Y[:6]), (X[6:], Y[6:])), estimator=estimator)
    steps = bl.PerStep([(X[:3], Y[:3]), (X[3:6], Y[3:6])] * 2)
    same(p, body, head, bl.Batches(steps, (X[6:], Y[6:])), estimator=estimator)


@functools.cache
def tasks():
    g = torch.Generator().manual_seed(0)
    X, Y = torch.randn(3, 6, 4, generator=g, dtype=D), torch.randn(3, 6, 1, generator=g, dtype=D)
    start = {"w": torch.randn(4, 1, generator=g, dtype=D), "b": torch.zeros(1, dtype=D)}

    def loss(y, x, b):
        return (nn.functional.dropout(b[0] @ y["w"], 0.3) + y["b"] - b[1]).square().mean()

    p = bl.proximal(bl.Problem(loss, loss, init=lambda x, b: x), 0.5)
    return p, start, None, bl.Batches((X[:, :3], Y[:, :3]), (X[:, 3:], Y[:, 3:]))


@SOME
@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_tasks(chunk, estimator):
    same(*tasks(), estimator=bl.TaskMean(estimator, chunk=chunk))


@SOME
def test_states_go_from_engine_to_engine(estimator):
    """Warm starts are carried, and made by one engine they serve another."""
    p, outer, inner, batches = shared("weighted net")
    if isinstance(estimator, bl.FirstOrderCorrected):
        estimator = bl.FirstOrderCorrected(warm_sides=True)
    runs = []
    for engines in ([None] * 3, [GRAPH] * 3, [GRAPH, None, GRAPH]):
        y, state, x = inner, None, outer
        for engine in engines:
            found, _ = call(engine, p, x, y, batches, estimator=estimator, state=state)
            y, state = found.inner, found.state
            x = {name: leaf - 0.1 * found.grad[name] for name, leaf in x.items()}
        runs.append(found)
    equal(runs[1], runs[0], 1e-9)
    equal(runs[2], runs[0], 1e-9)


def test_iterate_with_an_engine():
    p, outer, inner, batches = shared("weighted net")
    ends = []
    for engine in (None, GRAPH):
        x = {name: leaf.clone().requires_grad_() for name, leaf in outer.items()}
        loop = bl.iterate(
            p,
            x,
            inner,
            [batches] * 6,
            solver=bl.Descent(bl.SGD(lr=lambda x: x["log_lr"].exp()), 4),
            estimator=bl.Unrolled("iterates"),
            optimizer=torch.optim.Adam(x.values(), 0.05),
            engine=engine,
        )
        steps = list(loop)
        ends.append(torch.cat([leaf.detach().reshape(-1) for leaf in x.values()]))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=0)
    assert all(traced(step.hypergradient) == [] for step in steps[1:])


def test_reduced_precision_to_its_rounding():
    p, outer, inner, batches = catalogue.weighted_net(dtype=torch.float32)
    for estimator in FEW.values():
        same(p, outer, inner, batches, estimator=estimator, rtol=2e-3)


# --- what is traced, and when


def fresh():
    """A problem that nobody has traced yet, with what its loss reads from elsewhere."""
    box = {"scale": 1.0, "tensor": torch.ones(3, dtype=D)}
    layer = nn.Dropout(0.0)

    def loss(y, x, b):
        return (box["scale"] * box["tensor"] * layer(b @ y - x).square()).mean() + 0.1 * y.square().sum()

    p = bl.Problem(loss, lambda y, x, b: (b @ y).square().mean())
    g = torch.Generator().manual_seed(0)
    y, x = torch.randn(4, 3, generator=g, dtype=D), torch.randn(3, dtype=D, generator=g)
    X = torch.randn(7, 4, generator=g, dtype=D)
    return p, x, y, X, box, layer


def test_a_second_call_and_another_estimator_trace_nothing():
    p, x, y, X, _, _ = fresh()
    first = same(p, x, y, bl.Batches(X, X))
    rows = {row["name"]: row for row in first.stats["engine"]["functions"]}
    assert set(rows) == {"gradient of inner_loss", "products of inner_loss", "gradients of outer_loss"}
    assert all(row["new"] and row["trace_seconds"] > 0 and row["nodes"] > 5 for row in rows.values())
    assert rows["gradient of inner_loss"]["calls"] == rows["products of inner_loss"]["calls"] == 4
    assert rows["gradient of inner_loss"]["flops"] >= 2 * (2 * 7 * 4 * 3)
    # Numbers of tensors, K and the step index are no reason.
    for estimator in (bl.Unrolled(), bl.Unrolled("segments"), bl.Unrolled("iterates")):
        again = same(p, x + 1, y - 1, bl.Batches(2 * X, X + 1), estimator=estimator, solver=bl.Descent(bl.SGD(0.05), 9))
        assert traced(again) == []
        assert {row["name"]: row["calls"] for row in again.stats["engine"]["functions"]} == {
            "gradient of inner_loss": {"iterates": 9, "segments": 14, "graph": 9}[estimator.keep],
            "products of inner_loss": 9,
            "gradients of outer_loss": 1,
        }
    assert traced(same(p, x, y, bl.Batches(bl.PerStep([X, X + 1, X - 1, -X]), X))) == []


CHANGES = {
    "shape": lambda p, x, y, X, box, layer: (x, y, X[:5]),
    "dtype": lambda p, x, y, X, box, layer: (x.float(), y.float(), X.float(), box.update(tensor=box["tensor"].float())),
    "training mode": lambda p, x, y, X, box, layer: (x, y, X, layer.eval()),
    "an attribute of a module": lambda p, x, y, X, box, layer: (x, y, X, setattr(layer, "p", 0.5)),
    "a Python value in the closure": lambda p, x, y, X, box, layer: (x, y, X, box.update(scale=3.0)),
    "another tensor in the closure": lambda p, x, y, X, box, layer: (x, y, X, box.update(tensor=torch.arange(3.0))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_traced_again(change):
    p, x, y, X, box, layer = fresh()
    same(p, x, y, bl.Batches(X, X))
    x, y, X = CHANGES[change](p, x, y, X, box, layer)[:3]
    found = same(p, x, y, bl.Batches(X, X), rtol=1e-3 if change == "dtype" else 1e-10)
    assert "gradient of inner_loss" in traced(found)
    assert traced(same(p, x, y, bl.Batches(X, X), rtol=1e-3 if change == "dtype" else 1e-10)) == []


def test_a_tensor_in_the_closure_is_read_anew():
    p, x, y, X, box, _ = fresh()
    before = same(p, x, y, bl.Batches(X, X))
    box["tensor"].mul_(3)
    after = same(p, x, y, bl.Batches(X, X))
    assert traced(after) == []
    assert not torch.allclose(after.grad, before.grad)


def test_surroundings_that_change_without_end_are_refused(monkeypatch):
    monkeypatch.setattr(compiled_engine, "_VARIANTS", 2)
    p, x, y, X, box, _ = fresh()
    one = bl.Descent(bl.SGD(0.01), 1)
    for scale in range(2):
        box["scale"] = scale + 0.5
        same(p, x, y, bl.Batches(X, X), solver=one)
    box["scale"] = 9.0
    with pytest.raises(ValueError, match=r"has changed 2 times.*Pass what changes as a tensor"):
        call(GRAPH, p, x, y, bl.Batches(X, X), solver=one)


# --- what is refused


def item(y):
    return y.sum() * y.abs().max().item()  # the user's line: item


def branch(y):
    if y.sum() > 0:  # the user's line: branch
        return y.sum()
    return -y.sum()


def shown(y):
    print(y)  # the user's line: shown
    return y.sum()


def chosen(y):
    return y[y > 0].mean()  # the user's line: chosen


def listed(y):
    return sum(y.flatten().tolist()) * y.sum()  # the user's line: listed


@pytest.mark.parametrize("does", [item, branch, shown, chosen, listed], ids=lambda f: f.__name__)
@pytest.mark.parametrize("check", [True, False])
def test_what_looks_at_numbers_is_refused_with_its_line(does, check, capsys):
    y = torch.tensor([0.3, 0.4], dtype=D)
    p = bl.Problem(lambda y, x, b: (y - x).square().sum() + does(y), lambda y, x, b: y.square().sum())
    with pytest.raises(bl.NotTraceableError, match=f"# the user's line: {does.__name__}") as error:
        call(bl.Compiled(backend="graph", check=check), p, y, y, bl.Batches(None, None))
    assert "engine=bilevel.Eager()" in str(error.value)
    assert __file__ in str(error.value)
    call(bl.Eager(), p, y, y, bl.Batches(None, None))


@SOME
def test_a_counter_in_the_loss_is_never_a_quiet_wrong_number(estimator):
    count = [0]

    def loss(y, x, b):
        count[0] += 1
        return count[0] * (y - x).square().sum()

    p, x = bl.Problem(loss, lambda y, x, b: y.square().sum()), torch.ones(2, dtype=D)
    with pytest.raises((bl.EngineMismatchError, bl.NotTraceableError)):
        call(GRAPH, p, x, 0 * x, bl.Batches(None, None), estimator=estimator)


def test_numbers_of_python_and_numpy_are_found():
    import random

    import numpy as np

    x = torch.ones(2, dtype=D)
    for draw in (random.random, np.random.rand):
        p = bl.Problem(lambda y, x, b, draw=draw: (y - draw() * x).square().sum(), lambda y, x, b: y.square().sum())
        with pytest.raises((bl.EngineMismatchError, bl.NotTraceableError)):
            call(GRAPH, p, x, 0 * x, bl.Batches(None, None))


@pytest.mark.parametrize("arguments", [{"backend": "eager"}, {"backend": 3}, {"check": 1}, {"check": None}])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="was needed"):
        bl.Compiled(**arguments)


@pytest.mark.parametrize("engine", ["compiled", bl.Compiled, 3])
def test_what_is_no_engine(engine):
    p, x, y, X, _, _ = fresh()
    with pytest.raises(TypeError, match="engine"):
        call(engine, p, x, y, bl.Batches(X, X))


def test_without_checks_the_loss_is_not_called_again():
    calls = itertools.count()  # (which changes without being seen to)

    def loss(y, x, b):
        next(calls)
        return (y - x).square().sum()

    x, counts = torch.ones(2, dtype=D), {}
    for check in (True, False):
        p = bl.Problem(loss, lambda y, x, b: y.square().sum())
        engine = bl.Compiled(backend="graph", check=check)
        for _ in range(2):
            call(engine, p, x, 0 * x, bl.Batches(None, None))
        before = next(calls)
        call(engine, p, x, 0 * x, bl.Batches(None, None))
        counts[check] = next(calls) - before - 1
    assert counts == {True: 2, False: 1}  # of False, g at the solution, as of the eager engine


# --- a compiler that is wrong


def zeroing(which):
    """A compiler that returns zeros in the place of one output of every function."""

    def wrong(graph, inputs):
        def run(*given):
            found = list(graph(*given))
            if which < len(found):
                found[which] = torch.zeros_like(found[which])
            return tuple(found)

        return run

    return wrong


@SOME
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("offset", [0.0, 1e6], ids=["", "beside a large loss"])
def test_a_compiler_that_is_wrong_is_caught(which, offset, estimator, monkeypatch):
    monkeypatch.setattr(inductor, "inductor", zeroing(which))

    def g(y, x, b):
        return 1e-3 * ((y["a"] - x).square().sum() + (y["b"] * y["a"] + x).square().sum()) + offset

    p = bl.Problem(g, lambda y, x, b: 1e-3 * (y["a"] * y["b"]).sum() + 1e-3 * x.square().sum() + offset)
    x = torch.tensor([0.7, -0.2], dtype=D)
    y = {"a": x + 1, "b": x - 1}
    with pytest.raises(bl.EngineMismatchError, match="differs from the eager one"):
        call(bl.Compiled(), p, x, y, bl.Batches(None, None), estimator=estimator)


# --- compiled by TorchInductor


def test_inductor_on_a_net_with_dropout():
    g = torch.Generator().manual_seed(0)
    X = torch.randn(6, 4, generator=g, dtype=D)
    y = {"a": torch.randn(4, 3, generator=g, dtype=D), "b": torch.randn(3, 1, generator=g, dtype=D)}

    def g_loss(y, x, b):
        return (nn.functional.dropout(torch.tanh(b @ y["a"]), 0.3) @ y["b"] - x).square().mean()

    p = bl.Problem(g_loss, lambda y, x, b: (torch.tanh(b @ y["a"]) @ y["b"]).square().mean())
    found = same(p, torch.ones(1, dtype=D), y, bl.Batches(X, X), engine=bl.Compiled())
    assert all(row["compile_seconds"] > 0 for row in found.stats["engine"]["functions"])
    assert traced(same(p, torch.zeros(1, dtype=D), y, bl.Batches(X, X), engine=bl.Compiled())) == []


def test_inductor_in_a_linear_system():
    p, x, y, X, _, _ = fresh()
    same(p, x, y, bl.Batches(X, X), engine=bl.Compiled(), estimator=bl.Implicit(bl.CG(5, 1e-12)))


def test_no_result_shares_memory_with_another():
    p, x, y, X, _, _ = fresh()
    found = same(p, x, y, bl.Batches(X, X))
    places = [leaf.data_ptr() for leaf in leaves([found.grad, found.inner, x, y, X])]
    assert len(set(places)) == len(places)


def test_python_numbers_that_change_from_step_to_step_are_refused_and_tensors_are_not():
    problem = bl.Problem(lambda y, x, step: ((y - step * x) ** 2).sum(), lambda y, x, b: (y**2).sum())
    x, y, solver = torch.ones(2), torch.zeros(2), bl.Descent(bl.SGD(0.1), 8)

    def call(steps):
        return bl.hypergradient(
            problem,
            x,
            y,
            bl.Batches(bl.PerStep(steps), None),
            solver=solver,
            estimator=bl.Unrolled("iterates"),
            engine=bl.Compiled(backend="graph"),
        )

    with pytest.raises(ValueError, match=r"more than 4 different Python values .*torch\.tensor\(step\)"):
        call(range(8))
    found = call([torch.tensor(float(step)) for step in range(8)])
    assert len([row for row in found.stats["engine"]["functions"] if row["new"]]) == 3
