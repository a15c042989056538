"""What each estimator asks of a problem, with the formula written out: the tables in bilevel/estimators, held to the
number."""

import math

import pytest
import torch
from bilevel_profiling.meters.oracles import Oracles

import bilevel as bl
from bilevel.estimators.reverse.unrolled import shrinking
from bilevel.problems import quadratic

M = 3
"""Products of the iterative linear solvers: fewer than the P = 6 after which conjugate gradients would be done and stop
by themselves."""
P = 6
STEPS = (0, 1, 5, 12)
RATE = 0.3


def counts(inner_gradient, outer_gradient, hvp, mixed):
    return {"inner_gradient": inner_gradient, "outer_gradient": outer_gradient, "hvp": hvp, "mixed": mixed}


def recomputed(lengths):
    """Every segment but the last is run again from its first iterate, up to its last."""
    return sum(length - 1 for length in lengths[:-1])


def uniform(steps, segment):
    return [min(segment, steps - begin) for begin in range(0, steps, segment)]


FORMULAS = {
    "graph": (bl.Unrolled(), lambda k: counts(k, 1, k, 0)),
    "graph last 2": (bl.Unrolled(last=2), lambda k: counts(k, 1, min(2, k), 0)),
    "graph last 50": (bl.Unrolled(last=50), lambda k: counts(k, 1, k, 0)),
    "iterates": (bl.Unrolled("iterates"), lambda k: counts(2 * k, 1, k, 0)),
    "iterates last 2": (bl.Unrolled("iterates", last=2), lambda k: counts(k + min(2, k), 1, min(2, k), 0)),
    "segments": (bl.Unrolled("segments"), lambda k: counts(2 * k + recomputed(shrinking(k)), 1, k, 0)),
    "segments of 1": (bl.Unrolled("segments", segment=1), lambda k: counts(2 * k, 1, k, 0)),
    "segments of 2": (bl.Unrolled("segments", segment=2), lambda k: counts(2 * k + recomputed(uniform(k, 2)), 1, k, 0)),
    "segments of 5": (bl.Unrolled("segments", segment=5), lambda k: counts(2 * k + recomputed(uniform(k, 5)), 1, k, 0)),
    "segments of 99": (bl.Unrolled("segments", segment=99), lambda k: counts(2 * k, 1, k, 0)),
    "segments last 4": (
        bl.Unrolled("segments", last=4),
        lambda k: counts(k + min(4, k) + recomputed(shrinking(min(4, k))), 1, min(4, k), 0),
    ),
    "CG": (bl.Implicit(bl.CG(M, tol=0.0)), lambda k: counts(k + 1, 1, M, 1)),
    "Neumann": (bl.Implicit(bl.Neumann(M, RATE)), lambda k: counts(k + 1, 1, M, 1)),
    "Dense": (bl.Implicit(bl.Dense()), lambda k: counts(k + 1, 1, P, 1)),
    "memory-reduced": (bl.MemoryReduced(steps=M), lambda k: counts(k + 1, 1, M, 1)),
    "corrected": (bl.FirstOrderCorrected(), lambda k: counts(2 * k + 2, 2 * k + 2, 0, 0)),
    "corrected forward": (bl.FirstOrderCorrected(scheme="forward"), lambda k: counts(2 * k + 2, k + 2, 0, 0)),
    "first-order": (bl.FirstOrder(), lambda k: counts(k, 1, 0, 0)),
}


def run(estimator, solver, state=None, problem=None):
    """The counts of the estimator's own statistics, after a check against the meter and against its phases."""
    made = quadratic.setup() if problem is None else problem
    with Oracles() as meter:
        hg = bl.hypergradient(*made, solver=solver, estimator=estimator, state=state)
    assert meter.figures()["calls"] == hg.stats["calls"]
    phases = [phase["calls"] for phase in meter.phases().values()]
    assert {name: sum(calls.get(name, 0) for calls in phases) for name in hg.stats["calls"]} == hg.stats["calls"]
    return hg.stats["calls"], meter.phases(), hg


def descent(steps):
    return bl.Descent(bl.SGD(RATE), steps)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", FORMULAS)
def test_of_a_fixed_number_of_steps(name, steps):
    estimator, formula = FORMULAS[name]
    found, phases, _ = run(estimator, descent(steps))
    assert found == formula(steps)
    if "corrected" not in name:
        # The inner phase runs the inner solver and nothing else.
        assert phases.get("inner", {"calls": {}})["calls"] == ({"inner_gradient": steps} if steps else {})


@pytest.mark.parametrize("steps", [100, 200, 1000])
def test_segments_cost_about_what_the_table_says(steps):
    lengths = shrinking(steps)
    assert sum(lengths) == steps
    total = 2 * steps + recomputed(lengths)
    assert total == pytest.approx(3 * steps - math.sqrt(2 * steps), rel=0.01)


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_memory_reduced_asks_one_product_more_when_the_adjoint_is_warm(steps):
    for warm, extra in (
        ({"warm_inner": True}, 0),
        ({"warm_adjoint": True}, 1),
        ({"warm_inner": True, "warm_adjoint": True}, 1),
    ):
        estimator = bl.MemoryReduced(steps=M, **warm)
        cold, _, first = run(estimator, descent(steps))
        again, _, _ = run(estimator, descent(steps), first.state)
        assert cold == counts(steps + 1, 1, M, 1)
        assert again == counts(steps + 1, 1, M + extra, 1)


def test_conjugate_gradients_stop_when_they_are_done():
    found, _, hg = run(bl.Implicit(bl.CG(50, tol=1e-9)), descent(5))
    assert M < found["hvp"] <= P + 1
    assert found["hvp"] == hg.stats["linear_steps"]


@pytest.mark.parametrize("name", FORMULAS)
def test_of_a_solver_that_stops_by_itself(name):
    """To learn K costs K + 1 gradients. Implicit estimators go on from there; unrolling runs the K-step program again."""
    estimator, formula = FORMULAS[name]
    found, _, hg = run(estimator, bl.Converge(bl.SGD(1.0), tol=1e-2, max_steps=500))
    steps = hg.stats["inner_steps"]
    assert 2 < steps < 1000
    if "corrected" in name:
        # Each side stops by itself, having looked once more, and has its derivatives in x taken.
        assert found["inner_gradient"] == steps + 4
        return
    at_solution = name in ("CG", "Neumann", "Dense", "memory-reduced", "first-order")
    expected = formula(steps)
    expected["inner_gradient"] += 1 if at_solution else steps + 1
    assert found == expected


TASKS = 5


def tasks():
    """The quadratic problem, once a task; its losses divide by nothing, so tasks differ by their targets only."""
    problem, outer, inner, batches = quadratic.setup()
    hessian, coupling = batches.inner
    target, penalty = batches.outer
    many = [leaf.expand(TASKS, *leaf.shape) for leaf in (hessian, coupling)]
    targets = torch.stack([target + shift for shift in range(TASKS)])
    split = bl.Problem(
        lambda y, x, b: problem.inner_loss(y, x, b), lambda y, x, b: problem.outer_loss(y, x, (b[0], penalty))
    )
    return split, outer, inner.expand(TASKS, -1), bl.Batches(many, [targets])


@pytest.mark.parametrize("chunk", [None, 1, 2, 5, 9])
@pytest.mark.parametrize("name", ["graph", "segments", "CG", "Dense", "memory-reduced", "corrected", "first-order"])
def test_of_tasks_once_a_chunk(name, chunk):
    """One vmapped call is one call, however many tasks it holds."""
    estimator, formula = FORMULAS[name]
    found, _, _ = run(bl.TaskMean(estimator, chunk), descent(5), problem=tasks())
    chunks = 1 if chunk is None else math.ceil(TASKS / chunk)
    assert found == {oracle: chunks * count for oracle, count in formula(5).items()}


def test_features_and_a_start_add_no_calls():
    """They are not oracles of the inner or outer loss."""
    problem, outer, inner, batches = quadratic.setup()
    with_features = bl.Problem(problem.inner_loss, problem.outer_loss, features=lambda x, b: b)
    started = bl.Problem(
        problem.inner_loss, problem.outer_loss, init=lambda x, b: torch.zeros(P, dtype=x.dtype) + 0 * x.sum()
    )
    for name in ("graph", "iterates", "segments"):
        estimator, formula = FORMULAS[name]
        assert run(estimator, descent(5), problem=(with_features, outer, inner, batches))[0] == formula(5)
        assert run(estimator, descent(5), problem=(started, outer, None, batches))[0] == formula(5)


@pytest.mark.parametrize("name", ["iterates", "CG", "corrected"])
def test_nested_meters_count_alike_and_a_later_one_starts_at_zero(name):
    estimator, formula = FORMULAS[name]
    with Oracles() as outside:
        run(estimator, descent(5))
        with Oracles() as inside:
            run(estimator, descent(1))
    assert inside.figures()["calls"] == formula(1)
    assert outside.figures()["calls"] == {oracle: count + formula(5)[oracle] for oracle, count in formula(1).items()}


def test_calls_before_an_error_are_counted():
    def outer_loss(y, x, b):
        raise KeyError("no")

    problem, outer, inner, batches = quadratic.setup()
    with pytest.raises(KeyError), Oracles() as meter:
        bl.hypergradient(
            bl.Problem(problem.inner_loss, outer_loss),
            outer,
            inner,
            batches,
            solver=descent(4),
            estimator=bl.Implicit(bl.CG(2)),
        )
    assert meter.figures()["calls"] == counts(4, 1, 0, 0)
