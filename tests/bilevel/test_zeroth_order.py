"""Estimators from values alone: known answers, smoothing, truncations, black boxes, tasks."""

import dataclasses
import math

import catalogue
import pytest
import torch
from scipy import optimize

import bilevel as bl
from bilevel.testing import check_estimator

D = torch.float64
ES, PES, PZOBO = bl.estimators.EvolutionStrategies, bl.estimators.PersistentES, bl.estimators.PZOBO


def tp1(lr=0.25):
    """TP1 of the methods' dossier: h = 2, K = 4; the program's gradient is .2197265625."""
    problem = bl.Problem(lambda y, x, b: (y**2 - x * y).sum(), lambda y, x, b: (y**2).sum() / 2)
    batches = bl.Batches(None, None)
    return {
        "problem": problem,
        "outer": torch.ones(1, dtype=D),
        "inner": torch.zeros(1, dtype=D),
        "batches": batches,
        "solver": bl.Descent(bl.SGD(lr), 4),
    }


def within(draws, expected, sigmas=4.5):
    error = abs(float(draws.mean()) - expected)
    assert error <= sigmas * float(draws.std()) / math.sqrt(len(draws)), (float(draws.mean()), expected)


@pytest.mark.parametrize("mu", [0.1, 1.0, 10.0])
def test_partial_zeroth_order_on_a_linear_map_is_exact_in_its_direction_for_any_width(mu):
    """One outer number: delta u = slope u^2, so the estimate over u^2 is the known number."""
    torch.manual_seed(0)
    hg = bl.hypergradient(**tp1(), estimator=PZOBO(mu=mu))
    torch.manual_seed(0)
    u = torch.randn(1, dtype=D)
    assert (hg.grad / u**2).item() == pytest.approx(0.2197265625, rel=1e-9)


def sums():
    """TP6: s_t = s_{t-1} + x, the loss is s at the end of each truncation."""
    problem = bl.Problem(lambda y, x, b: -(x * y).sum(), lambda y, x, b: y.sum())
    solver = bl.Descent(bl.SGD(1.0), 1)
    start, x = torch.zeros(1, dtype=D), torch.ones(1, dtype=D)
    return {"problem": problem, "outer": x, "inner": start, "batches": bl.Batches(None, None), "solver": solver}


@pytest.mark.parametrize("perturbations", ["fresh", "single"])
def test_truncations_lose_nothing(perturbations):
    torch.manual_seed(0)
    draws = []
    for _ in range(5):
        state, total = None, torch.zeros(1, dtype=D)
        estimator = PES(std=0.3, pairs=100, truncations=2, perturbations=perturbations)
        for _ in range(2):
            hg = bl.hypergradient(**sums(), estimator=estimator, state=state)
            state, total = hg.state, total + hg.grad
        assert state is None, "the inner problem has ended"
        draws.append(total)
    within(torch.cat(draws), 3.0)
    assert abs(float(torch.cat(draws).mean()) - 3.0) < 0.5


def test_truncated_evolution_strategies_do_lose_the_past():
    """The positive control: two truncations, each with a start that does not answer for x, see 2 of 3."""
    torch.manual_seed(0)
    first = bl.hypergradient(**sums(), estimator=ES(std=0.3, pairs=500))
    second = bl.hypergradient(**(sums() | {"inner": first.inner}), estimator=ES(std=0.3, pairs=500))
    assert float(first.grad + second.grad) == pytest.approx(2.0, abs=0.2)


def variances(perturbations):
    """The variance of each truncation's contribution, where y forgets nine tenths in each."""
    torch.manual_seed(1)
    rows = []
    arguments = tp1() | {"solver": bl.Descent(bl.SGD(0.45), 1), "inner": torch.full((1,), 0.5, dtype=D)}
    for _ in range(200):
        state, row = None, []
        for _ in range(6):
            estimator = PES(std=0.1, pairs=1, perturbations=perturbations)
            hg = bl.hypergradient(**arguments, estimator=estimator, state=state)
            state = hg.state
            row.append(hg.grad)
        rows.append(torch.cat(row))
    return torch.stack(rows).var(0)


def test_fresh_perturbations_grow_in_variance_and_a_single_one_does_not():
    """Var of xi e is t + 1 in truncation t; that of e^2 stays 2."""
    fresh, single = variances("fresh"), variances("single")
    assert 2.2 < fresh[-1] / fresh[0] < 5.5, fresh
    assert 0.6 < single[-1] / single[1] < 1.6, single


def test_smoothing_adds_half_the_third_derivative():
    """F(x) = x^3: E of the estimate is 3 x^2 + 3 std^2."""
    problem = bl.Problem(lambda y, x, b: ((y - x) ** 2).sum() / 2, lambda y, x, b: (y**3).sum())
    torch.manual_seed(0)
    x = torch.ones(1, dtype=D)
    rows = [
        bl.hypergradient(
            problem,
            x,
            0 * x,
            bl.Batches(None, None),
            solver=bl.Descent(bl.SGD(1.0), 1),
            estimator=ES(std=0.5, pairs=100),
        ).grad
        for _ in range(30)
    ]
    within(torch.cat(rows), 3 + 3 * 0.25)
    assert abs(float(torch.cat(rows).mean()) - 3.0) > 0.3


@dataclasses.dataclass(frozen=True)
class Scipy(bl.inner.Dynamics):
    """A black box: y = argmin_y (y - x)^4 / 4 + y^2 / 2, found by scipy from plain numbers."""

    def step(self, inner, state, outer, at):
        x = float(outer.detach())
        found = optimize.minimize_scalar(lambda y: (y - x) ** 4 / 4 + y**2 / 2, tol=1e-13).x
        return torch.full_like(inner, found), state


@pytest.mark.parametrize("estimator", [ES(1e-3, 2), PZOBO(1e-4, 2), PES(1e-3, 2)], ids=lambda e: type(e).__name__)
def test_an_inner_solver_may_be_a_black_box(estimator):
    problem = bl.Problem(lambda y, x, b: ((y - x) ** 4).sum() / 4 + (y**2).sum() / 2, lambda y, x, b: (y**2).sum())
    x = torch.tensor([1.5], dtype=D)
    torch.manual_seed(0)
    hg = bl.hypergradient(problem, x, 0 * x, bl.Batches(None, None), solver=bl.Descent(Scipy(), 1), estimator=estimator)
    y = float(hg.inner)
    bend = 3 * (y - 1.5) ** 2
    exact = 2 * y * bend / (bend + 1)
    torch.manual_seed(0)
    squares = torch.cat([torch.randn(1, dtype=D) for _ in range(2)]).square().mean()
    assert float(hg.grad / squares) == pytest.approx(exact, rel=2e-3)


@pytest.mark.parametrize(
    "label", [label for label, e in catalogue.ENTRIES.items() if "evolution" in label or "partial" in label]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_they_keep_the_contract_of_an_estimator(label, dtype):
    check_estimator(catalogue.ENTRIES[label].estimator, target=None, dtype=dtype)


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("kind", [ES, PES, PZOBO])
def test_tasks(kind, chunk):
    """Unbiased for the mean over tasks, in one chunk or one by one, warm states included."""
    shifts = torch.tensor([0.5, -1.0, 2.0], dtype=D)
    problem = bl.Problem(lambda y, x, b: ((y - x * b) ** 2).sum() / 2, lambda y, x, b: ((y - b) ** 2).sum() / 2)
    solver, x = bl.Descent(bl.SGD(0.5), 3), torch.tensor([0.7], dtype=D)
    arguments = (problem, x, torch.zeros(3, 1, dtype=D), bl.Batches(shifts, shifts))
    exact = bl.hypergradient(*arguments, solver=solver, estimator=bl.TaskMean(bl.Unrolled())).grad
    estimator = bl.TaskMean(kind(0.01) if kind is not PZOBO else PZOBO(), chunk)
    torch.manual_seed(0)
    draws = torch.cat([bl.hypergradient(*arguments, solver=solver, estimator=estimator).grad for _ in range(120)])
    within(draws, float(exact))


def test_the_state_of_tasks_may_be_cut_into_other_chunks():
    torch.manual_seed(0)
    problem = bl.Problem(lambda y, x, b: -(x * b * y).sum(), lambda y, x, b: y.sum())
    x, b = torch.ones(1, dtype=D), torch.tensor([1.0, 3.0], dtype=D)
    arguments = (problem, x, torch.zeros(2, 1, dtype=D), bl.Batches(b, b))
    totals = []
    for _ in range(80):
        state, total = None, 0.0
        for chunk in (1, None):
            hg = bl.hypergradient(
                *arguments,
                solver=bl.Descent(bl.SGD(1.0), 1),
                estimator=bl.TaskMean(PES(0.3, 4), chunk),
                state=state,
            )
            state, total = hg.state, total + hg.grad
        totals.append(total)
    within(torch.cat(totals), 3 * 2.0)
    single = bl.TaskMean(PES(0.3, 1, perturbations="single"), 1)
    state = bl.hypergradient(*arguments, solver=bl.Descent(bl.SGD(1.0), 1), estimator=single).state
    with pytest.raises(ValueError, match="different chunks"):
        bl.hypergradient(
            *arguments,
            solver=bl.Descent(bl.SGD(1.0), 1),
            estimator=dataclasses.replace(single, chunk=None),
            state=state,
        )


@pytest.mark.parametrize("kind", [ES, PES, PZOBO])
def test_every_program_sees_the_same_random_numbers(kind):
    """Dropout in the inner loss: without common numbers its noise over the width would be a thousand times the
    slope."""

    def inner_loss(y, x, b):
        return ((y - x) * torch.nn.functional.dropout(torch.ones_like(y), 0.5)).square().sum() / 4

    problem = bl.Problem(inner_loss, lambda y, x, b: y.sum())
    x = torch.ones(4, dtype=D)
    torch.manual_seed(0)
    hg = bl.hypergradient(
        problem, x, 0 * x, bl.Batches(None, None), solver=bl.Descent(bl.SGD(0.5), 5), estimator=kind(1e-5)
    )
    assert hg.grad.abs().max() < 20
    after = torch.rand(1)
    torch.manual_seed(0)
    bl.hypergradient(problem, x, 0 * x, bl.Batches(None, None), solver=bl.Descent(bl.SGD(0.5), 5), estimator=kind(1e-5))
    assert after == torch.rand(1)


@pytest.mark.parametrize("kind", [ES, PES, PZOBO])
def test_a_program_that_leaves_the_numbers_is_not_ok(kind):
    problem = bl.Problem(lambda y, x, b: ((y - x) ** 2).sum(), lambda y, x, b: (y**2).sum())
    x = torch.ones(1)
    hg = bl.hypergradient(
        problem, x, 0 * x, bl.Batches(None, None), solver=bl.Descent(bl.SGD(1e3), 30), estimator=kind(0.01)
    )
    assert hg.status.failed


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ES(std=0.0), "std=0.0"),
        (lambda: ES(pairs=0), "pairs=0"),
        (lambda: PES(truncations=0), "truncations=0"),
        (lambda: PES(perturbations="both"), "'fresh' or 'single'"),
        (lambda: PZOBO(mu=-1.0), "mu=-1.0"),
        (lambda: PZOBO(directions=True), "directions=True"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
