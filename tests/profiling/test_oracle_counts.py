"""What each estimator asks of a problem: the formulas of bilevel.testing's entries, which are the tables in
bilevel/estimators, held to the number."""

import math

import pytest
import torch
from bilevel_profiling.meters.oracles import Oracles

import bilevel as bl
from bilevel.estimators.reverse.checkpoints import shrinking
from bilevel.problems import quadratic
from bilevel.testing.catalogue import ENTRIES, counts, once, unrolled

M = 3
"""Products of the iterative linear solvers: fewer than the P = 6 after which conjugate gradients would be done and stop
by themselves."""
P, Q = 6, quadratic.setup()[1].numel()
STEPS = (0, 1, 5, 12)
RATE = 0.3


FORMULAS = {
    entry.label: entry
    for entry in (
        *ENTRIES,
        unrolled("graph last 50", "graph", last=50),
        unrolled("segments of 1", "segments", segment=1),
        unrolled("segments of 2", "segments", segment=2),
        unrolled("segments of 5", "segments", segment=5),
        unrolled("segments of 99", "segments", segment=99),
    )
}


def formula(name, steps):
    """What the entry of that name promises of so many steps."""
    entry = FORMULAS[name]
    return entry.calls(steps, P if entry.quadratic_in_inner else Q if entry.few_outer else M)


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
    found, phases, _ = run(FORMULAS[name].at(M), descent(steps))
    assert found == formula(name, steps)
    inner = phases.get("inner", {"calls": {}})["calls"]
    assert inner.get("inner_gradient", 0) == FORMULAS[name].solves(steps)
    # The inner phase runs the inner solver and nothing else, but for those that perturb the inner loss by f.
    assert set(inner) <= {"inner_gradient"} or "corrected" in name or name == "f2sa"


@pytest.mark.parametrize("steps", [100, 200, 1000])
def test_segments_cost_about_what_the_table_says(steps):
    assert sum(shrinking(steps)) == steps
    total = formula("segments", steps)["inner_gradient"]
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


ONE_PROGRAM = [name for name, entry in FORMULAS.items() if entry.solves is once]
SIDES = [name for name in FORMULAS if "corrected" in name]


@pytest.mark.parametrize("name", [*ONE_PROGRAM, *SIDES, "bootstrapped"])
def test_of_a_solver_that_stops_by_itself(name):
    """It looks at K + 1 gradients to take K steps. Implicit estimators go on from there; those that go back through the
    program then run its K steps again."""
    entry = FORMULAS[name]
    found, _, hg = run(entry.at(M), bl.Converge(bl.SGD(1.0), tol=1e-2, max_steps=500))
    assert 2 < hg.stats["inner_steps"] < 500
    steps = hg.stats["inner_steps"]
    if "corrected" in name:
        # Each side stops by itself, after a number of steps of its own, and looks at its own end.
        sides = len(entry.estimator.stencil.nodes)
        assert found["inner_gradient"] == steps + 2 * sides
        if "forward" in name:  # f is on one side only
            assert 2 < found["outer_gradient"] - 2 < steps + 2
        else:
            assert found["outer_gradient"] == steps + 2 * sides
        return
    expected = formula(name, steps)
    twice = entry.sees == frozenset(bl.Path)  # it goes along the program's steps
    expected["inner_gradient"] += steps + 1 if twice else 1
    expected["inner_gradient"] += name == "bootstrapped"  # the way to its target stops by itself too
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
@pytest.mark.parametrize(
    "name", ["graph", "segments", "implicit cg", "implicit dense", "memory reduced", "corrected", "first order"]
)
def test_of_tasks_once_a_chunk(name, chunk):
    """One vmapped call is one call, however many tasks it holds."""
    found, _, _ = run(bl.TaskMean(FORMULAS[name].at(M), chunk), descent(5), problem=tasks())
    chunks = 1 if chunk is None else math.ceil(TASKS / chunk)
    assert found == {oracle: chunks * count for oracle, count in formula(name, 5).items()}


def test_features_and_a_start_add_no_calls():
    """They are not oracles of the inner or outer loss."""
    problem, outer, inner, batches = quadratic.setup()
    with_features = bl.Problem(problem.inner_loss, problem.outer_loss, features=lambda x, b: b)
    started = bl.Problem(
        problem.inner_loss, problem.outer_loss, init=lambda x, b: torch.zeros(P, dtype=x.dtype) + 0 * x.sum()
    )
    for name in ("graph", "iterates", "segments"):
        estimator, expected = FORMULAS[name].at(M), formula(name, 5)
        assert run(estimator, descent(5), problem=(with_features, outer, inner, batches))[0] == expected
        assert run(estimator, descent(5), problem=(started, outer, None, batches))[0] == expected


@pytest.mark.parametrize("name", ["iterates", "implicit cg", "corrected"])
def test_nested_meters_count_alike_and_a_later_one_starts_at_zero(name):
    estimator, one, five = FORMULAS[name].at(M), formula(name, 1), formula(name, 5)
    with Oracles() as outside:
        run(estimator, descent(5))
        with Oracles() as inside:
            run(estimator, descent(1))
    assert inside.figures()["calls"] == one
    assert outside.figures()["calls"] == {oracle: count + five[oracle] for oracle, count in one.items()}


def test_calls_before_an_error_are_counted():
    problem, outer, inner, batches = quadratic.setup()

    def outer_loss(y, x, b):
        if type(y) is torch.Tensor:
            raise KeyError("no")
        return problem.outer_loss(y, x, b)  # how x acts is looked at before anything is counted, without numbers

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
