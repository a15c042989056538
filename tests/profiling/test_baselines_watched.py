"""Oracle calls of a baseline that calls the library too, or where x enters by features or a proximal term; and batches
whose containers it changes."""

import pytest
import torch
from bilevel_profiling import Baseline
from bilevel_profiling.baselines.baseline import UNCOUNTED

import bilevel as bl

SGD = bl.SGD(lr=0.05)


# --- counts


def problem_of(kind):
    """The same x in a loss, in the features, or in a proximal term."""
    draw = torch.Generator().manual_seed(0)

    def data(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    batches = bl.Batches((data(5, 3), data(5)), (data(5, 3), data(5)))

    def fit(y, x, b):
        return (b[0] @ y - b[1]).square().mean()

    if kind == "proximal":
        return bl.proximal(bl.Problem(fit, fit, init=lambda x, b: x * 1), 0.7), data(3), None, batches
    if kind == "features":
        return bl.Problem(fit, fit, features=lambda x, b: ((b[0] * x).tanh(), b[1])), data(3), data(3), batches

    def inside(y, x, b):
        return fit(y, x, ((b[0] * x).tanh(), b[1]))

    return bl.Problem(inside, inside), data(3), data(3), batches


def one_of_each(problem, outer, inner, batches, solver):
    """A gradient of f in y (and x, where it acts), one of g, and a product that arrives at x alone."""
    y = (outer.detach().clone() if inner is None else inner.clone()).requires_grad_()
    v, direct = torch.autograd.grad(problem.outer(y, outer, batches.outer), (y, outer), allow_unused=True)
    (g,) = torch.autograd.grad(problem.inner(y, outer, batches.inner), y, create_graph=True)
    return (0 if direct is None else direct) - torch.autograd.grad(g, outer, v)[0]


def hand(problem, outer, inner, batches, solver):
    y = problem.init(outer, batches.inner) if inner is None else inner.clone().requires_grad_()
    for step in range(solver.max_steps):
        (g,) = torch.autograd.grad(problem.inner(y, outer, batches.inner_at(step)), y, create_graph=True)
        y = y - solver.optimizer.lr * g
    loss = problem.outer(y, outer, batches.outer)
    last = problem.inner(y, outer, batches.inner_at(solver.max_steps - 1))
    return bl.Hypergradient(torch.autograd.grad(loss, outer)[0], y, loss, last)


def direct_alone(problem, outer, inner, batches, solver):
    return torch.autograd.grad(problem.outer(inner, outer, batches.outer), outer)[0]


def beside(problem, outer, inner, batches, solver):
    """One step by the library, and all by hand."""
    one = bl.Descent(solver.optimizer, 1)
    bl.hypergradient(problem, outer.detach(), inner, batches, solver=one, estimator=bl.Unrolled())
    return hand(problem, outer, inner, batches, solver)


@pytest.mark.parametrize("kind", ["loss", "features", "proximal"])
@pytest.mark.parametrize(
    ("function", "calls"),
    [(one_of_each, (1, 1, 0, 1)), (hand, (3, 1, 3, 0)), (beside, (4, 2, 4, 0)), (direct_alone, (0, 1, 0, 0))],
)
def test_x_is_counted_wherever_it_enters_and_beside_the_library(function, calls, kind):
    if (function, kind) == (direct_alone, "proximal"):
        pytest.skip("x is in no outer loss there")
    given = problem_of(kind)
    found = bl.hypergradient(*given, solver=bl.Descent(SGD, 3), estimator=Baseline(function))
    assert tuple(found.stats["calls"].values()) == calls
    assert UNCOUNTED not in found.stats
    if function in (hand, beside):
        ours = bl.hypergradient(*given, solver=bl.Descent(SGD, 3), estimator=bl.Unrolled())
        assert torch.allclose(found.grad, ours.grad, rtol=1e-12)
        assert torch.allclose(found.inner, ours.inner, rtol=1e-12)


def features_in_two_calls(problem, outer, inner, batches, solver):
    seen, y = problem.features(outer, batches.inner), inner.clone().requires_grad_()
    problem.inner_loss(y, outer, seen)
    return torch.autograd.grad(problem.outer_loss(y, outer, seen), outer)[0]


def features_alone(problem, outer, inner, batches, solver):
    return torch.autograd.grad(problem.features(outer, batches.inner)[0].sum(), outer)[0]


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (features_in_two_calls, "it uses the features of one call in several"),
        (features_alone, "it differentiates the features by themselves"),
    ],
)
def test_features_that_belong_to_no_call_are_not_counted(function, why):
    found = bl.hypergradient(*problem_of("features"), solver=bl.Descent(SGD, 3), estimator=Baseline(function))
    assert found.stats[UNCOUNTED] == why


# --- spoiled containers


def boxes(*, by_step=False):
    draw = torch.Generator().manual_seed(0)

    def box():
        return {"A": torch.randn(4, 3, generator=draw), "t": [torch.randn(4, generator=draw)]}

    def fit(y, x, b):
        return (b["A"] @ y - b["t"][0]).square().mean() + (x.exp() * y.square()).sum()

    inner = bl.PerStep([box() for _ in range(3)]) if by_step else box()
    return bl.Problem(fit, fit), torch.zeros(3), torch.ones(3), bl.Batches(inner, box())


def an_entry(batches):
    batches.outer["A"] = batches.outer["A"] * 0.5


def an_entry_of_a_list(batches):
    batches.inner_at(1)["t"][0] = batches.inner_at(1)["t"][0] + 1


def a_name(batches):
    batches.outer["more"] = 1


def a_name_less(batches):
    del batches.inner_at(0)["t"]


@pytest.mark.parametrize("by_step", [False, True], ids=["one batch", "by step"])
@pytest.mark.parametrize(
    ("spoil", "role"),
    [(an_entry, "outer batch"), (an_entry_of_a_list, "inner batch"), (a_name, "outer batch"), (a_name_less, "inner")],
)
def test_a_container_that_is_changed_is_refused(spoil, role, by_step):
    def spoiling(problem, outer, inner, batches, solver):
        found = hand(problem, outer, inner, batches, solver)
        spoil(batches)
        return found.grad

    with pytest.raises(ValueError, match=rf"spoiling changed the {role}.* in place.*dict\(batch\), list\(batch\)"):
        bl.hypergradient(*boxes(by_step=by_step), solver=bl.Descent(SGD, 2), estimator=Baseline(spoiling))


def test_a_container_is_watched_in_every_call():
    calls = []

    def late(problem, outer, inner, batches, solver):
        calls.append(None)
        found = hand(problem, outer, inner, batches, solver)
        if len(calls) == 3:
            an_entry(batches)
        return found

    given = boxes()
    for _ in range(2):
        bl.hypergradient(*given, solver=bl.Descent(SGD, 2), estimator=Baseline(late))
    with pytest.raises(ValueError, match="late changed the outer batch in place"):
        bl.hypergradient(*given, solver=bl.Descent(SGD, 2), estimator=Baseline(late))


@pytest.mark.parametrize("task", [0, 2])
@pytest.mark.parametrize("by_step", [False, True], ids=["one batch", "by step"])
def test_each_task_is_watched_by_its_numbers(task, by_step):
    calls = []

    def spoiling(problem, outer, inner, batches, solver):
        found = hand(problem, outer, inner, batches, solver)
        if len(calls) == task:
            batches.inner_at(1).data.mul_(2)
        calls.append(None)
        return found

    batch = torch.arange(1.0, 7.0).reshape(3, 2)
    problem = bl.Problem(lambda y, x, b: ((y - x) ** 2 * b).sum(), lambda y, x, b: (y * b).sum())
    tasks = bl.Batches(bl.PerStep([batch.clone() for _ in range(2)]) if by_step else batch, batch.clone())
    estimator = bl.TaskMean(Baseline(spoiling), chunk=1)
    with pytest.raises(ValueError, match="spoiling changed the inner batch in place"):
        bl.hypergradient(
            problem, torch.ones(2), torch.zeros(3, 2), tasks, solver=bl.Descent(SGD, 2), estimator=estimator
        )
