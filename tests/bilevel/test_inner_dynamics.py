"""Dynamics that are no gradient step, with every estimator that makes sense: against the program as it ran, and the
solution; under tasks, engines, dtypes and stopping rules."""

import functools

import pytest
import torch
from inner_cases import BATCHES, CASES, GOAL, START, TASKS, X, slope
from right_or_refused import D

import bilevel as bl
from bilevel.inner import proximal, root

EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
ALONG = {"s": torch.tensor(0.7, dtype=D), "t": torch.tensor([-0.4, 0.9], dtype=D)}


def run(case, estimator, solver=None, **options):
    solver = solver or bl.Descent(case.dynamics, case.steps)
    return bl.hypergradient(case.problem, X, START, BATCHES, solver=solver, estimator=estimator, **options)


def along(grad):
    return sum((grad[name] * ALONG[name]).sum() for name in grad)


def differences(case, solver):
    return slope(lambda x: bl.adapt(case.problem, x, START, BATCHES, solver=solver).outer_loss, X, ALONG)


@functools.cache
def solution_slope(name):
    """Of the solution, by the fastest dynamics that has it."""
    case = CASES[name]
    dynamics = bl.inner.Newton(bl.Dense()) if case.symmetric else case.dynamics
    solver = bl.Converge(dynamics, tol=1e-10, max_steps=1000)
    return differences(case, solver)


@EVERY
def test_unrolling_equals_differences_of_the_program_however_it_is_kept(case):
    expected = differences(case, bl.Descent(case.dynamics, case.steps))
    grads = [run(case, bl.Unrolled(keep)).grad for keep in ("graph", "iterates", "segments")]
    torch.testing.assert_close(along(grads[0]), expected, rtol=1e-6, atol=1e-8)
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_the_solution_is_differentiated_where_the_dynamics_rests(name):
    case = CASES[name]
    twin = next(each for each in CASES if CASES[each].loss is case.loss and case.symmetric) if case.symmetric else name
    found = run(case, bl.Implicit(bl.Dense()), bl.Converge(case.dynamics, tol=1e-7, max_steps=1000))
    assert found.status is bl.Status.OK
    torch.testing.assert_close(along(found.grad), solution_slope(twin), rtol=2e-5, atol=1e-6)


@EVERY
def test_conjugate_gradients_are_right_or_refused(case):
    if case.symmetric:
        found, expected = (run(case, bl.Implicit(linear)).grad for linear in (bl.CG(50, 1e-12), bl.Dense()))
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
        return
    for estimator in (bl.Implicit(bl.CG(50, 1e-12)), bl.MemoryReduced()):
        with pytest.raises(ValueError, match="symmetric"):
            run(case, estimator)


@EVERY
def test_estimators_that_follow_the_gradient_of_g_refuse(case):
    for estimator in (bl.FirstOrderCorrected(), bl.FirstOrder()):
        with pytest.raises(ValueError, match=r"cannot see|perturbs the inner loss"):
            run(case, estimator)


FEW = ("LBFGS with Armijo", "Newton-CG, inexact", "Ridge", "accelerated L1", "FixedPoint, Anderson", "Root, Newton")


@pytest.mark.parametrize("case", [CASES[name] for name in FEW], ids=FEW)
def test_a_compiled_engine_gives_the_same_or_refuses_in_words(case):
    engine = bl.Compiled(backend="graph")
    if case.third:
        with pytest.raises(ValueError, match=r"third ones.*bilevel.Eager"):
            run(case, bl.Unrolled(), engine=engine)
    else:
        found = run(case, bl.Unrolled(), engine=engine).grad
        torch.testing.assert_close(found, run(case, bl.Unrolled()).grad, rtol=1e-9, atol=1e-11)
    found = run(case, bl.Implicit(bl.Dense()), engine=engine).grad
    torch.testing.assert_close(found, run(case, bl.Implicit(bl.Dense())).grad, rtol=1e-8, atol=1e-10)


def cast(value, dtype):
    return {name: leaf.to(dtype) for name, leaf in value.items()}


TASKED = (*FEW, "LBFGS with Wolfe", "GroupLasso", "Simplex", "FixedPoint, Broyden")


@pytest.mark.parametrize("case", [CASES[name] for name in TASKED], ids=TASKED)
def test_tasks_at_once_are_tasks_one_after_another(case):
    scales = 1 + 0.3 * torch.arange(3, dtype=D)
    start = {name: torch.stack([leaf * scale for scale in scales]) for name, leaf in START.items()}
    batches = bl.Batches(TASKS, torch.zeros(3, 1, dtype=D))
    # (Converge freezes tasks that rest while the others go on.)
    for estimator, solver in (
        (bl.Unrolled("iterates"), bl.Descent(case.dynamics, min(case.steps, 3))),
        (bl.Implicit(bl.Dense()), bl.Converge(case.dynamics, 1e-2, 100)),
    ):
        together, apart = (
            bl.hypergradient(case.problem, X, start, batches, solver=solver, estimator=bl.TaskMean(estimator, chunk))
            for chunk in (None, 1)
        )
        torch.testing.assert_close(together.grad, apart.grad, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(together.inner, apart.inner, rtol=1e-9, atol=1e-10)


@EVERY
def test_narrow_numbers_give_what_wide_ones_give(case):
    dtype = torch.float32
    steps = min(case.steps, 2)
    wide, narrow = (
        bl.hypergradient(
            case.problem,
            cast(X, each),
            cast(START, each),
            bl.Batches(GOAL.to(each), None),
            solver=bl.Descent(case.dynamics, steps),
            estimator=bl.Unrolled(),
        ).grad
        for each in (D, dtype)
    )
    assert all(leaf.dtype is dtype for leaf in narrow.values())
    for name, leaf in wide.items():
        off = (narrow[name].to(D) - leaf).norm() / max(each.norm() for each in wide.values())
        assert off < 1e-4, (name, off)


@EVERY
def test_without_steps_nothing_moves(case):
    solver = bl.Descent(case.dynamics, 0)
    torch.testing.assert_close(bl.adapt(case.problem, X, START, BATCHES, solver=solver).inner, START, rtol=0, atol=0)
    if case is CASES["LBFGS"]:
        with pytest.warns(UserWarning, match="influences neither loss"):
            grad = run(case, bl.Unrolled(), solver).grad
        torch.testing.assert_close(grad["t"], START["c"], rtol=0, atol=0)


@EVERY
def test_running_out_of_steps_is_no_ok(case):
    if case.steps == 1:
        return  # (a closed form lands)
    found = run(case, bl.Implicit(bl.Dense()), bl.Converge(case.dynamics, tol=1e-12, max_steps=1))
    assert found.status is not bl.Status.OK


@pytest.mark.parametrize(
    "dynamics",
    [
        bl.inner.FixedPoint(lambda y, x, b: x - y, root.Plain()),  # turns in a circle of two
        bl.inner.FixedPoint(lambda y, x, b: x - 1.1 * y, root.Plain()),  # runs away
        bl.inner.FixedPoint(lambda y, x, b: 3 * torch.tanh(-2 * y) + x, root.Plain()),  # two values, for ever
        bl.inner.Root(lambda y, x, b: y.square() + 1 + x.square(), root.Broyden(5)),  # there is none
        bl.inner.Root(lambda y, x, b: y.square() + 1 + x.square(), root.NewtonRoot(bl.Dense())),
        bl.inner.ProximalGradient(proximal.Box(-5.0, 5.0), rate=2.5),  # from bound to bound
        bl.inner.LBFGS(lr=5.0),
    ],
    ids=["circle", "away", "bounded circle", "no root, Broyden", "no root, Newton", "box", "LBFGS"],
)
@pytest.mark.parametrize("estimator", [bl.Implicit(bl.Dense()), bl.Unrolled()], ids=["Implicit", "Unrolled"])
def test_a_loop_that_does_not_come_to_rest_is_no_ok(dynamics, estimator):
    problem = bl.Problem(lambda y, x, b: ((y - x) ** 2).sum() / 2, lambda y, x, b: y.sum())
    found = bl.hypergradient(
        problem,
        torch.tensor([0.7], dtype=D),
        torch.tensor([2.0], dtype=D),
        bl.Batches(None, None),
        solver=bl.Descent(dynamics, 15),
        estimator=estimator,
    )
    assert found.status is not bl.Status.OK


def test_what_a_dynamics_reports_is_what_its_loop_is_judged_by():
    """A lasso whose g rises from the minimizer of g to that of g + h, which is no sign of a loop that goes wrong."""
    problem = bl.Problem(lambda y, x, b: ((y - b) ** 2).sum() / 2, lambda y, x, b: y.sum())
    b = torch.tensor([3.0, 0.5, -2.0], dtype=D)
    lasso = bl.inner.ProximalGradient(proximal.L1(1.0), rate=0.3)
    for solver in (bl.Descent(lasso, 30), bl.Converge(lasso, 1e-8)):
        found = bl.adapt(problem, torch.zeros(1, dtype=D), b + 1e-3, bl.Batches(b, None), solver=solver)
        assert found.status is bl.Status.OK
        assert found.inner_loss > 1


def test_minibatches_in_turn_are_unrolled_as_they_ran():
    goals = bl.PerStep([GOAL * scale for scale in (1.0, 0.8, 1.2, 1.1)])
    for name in ("LBFGS", "accelerated L1", "FixedPoint, Anderson", "Newton-CG"):
        case = CASES[name]
        batches, solver = bl.Batches(goals, None), bl.Descent(case.dynamics, 4)

        def value(x, case=case, batches=batches, solver=solver):
            return bl.adapt(case.problem, x, START, batches, solver=solver).outer_loss

        grad = bl.hypergradient(case.problem, X, START, batches, solver=solver, estimator=bl.Unrolled("iterates")).grad
        torch.testing.assert_close(along(grad), slope(value, X, ALONG), rtol=1e-5, atol=1e-8)


def test_a_tensor_that_the_loss_does_not_use_stays():
    problem = bl.Problem(lambda y, x, b: (y["a"] - x).square().sum(), lambda y, x, b: y["a"].sum() + y["b"].sum())
    start = {"a": torch.zeros(2, dtype=D), "b": torch.ones(3, dtype=D)}
    x = torch.ones(2, dtype=D)
    for dynamics in (
        bl.inner.LBFGS(memory=2, search=bl.inner.Wolfe()),
        bl.inner.Newton(bl.CG(5)),
        bl.inner.Newton(bl.Dense(), search=None),
        bl.inner.ProximalGradient(proximal.NonNegative(), 0.3),
    ):
        found = bl.hypergradient(
            problem,
            x,
            start,
            bl.Batches(None, None),
            solver=bl.Descent(dynamics, 40),
            estimator=bl.Unrolled(),
        )
        torch.testing.assert_close(found.inner["b"], start["b"], rtol=0, atol=0)
        torch.testing.assert_close(found.grad, torch.ones(2, dtype=D), rtol=1e-6, atol=0)
