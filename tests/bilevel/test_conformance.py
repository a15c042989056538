"""One matrix: estimators x problems x inner optimizers x dtypes x devices, against an independent way to the same
number."""

import dataclasses
import functools

import catalogue
import pytest
import torch
from torch.utils import _pytree as pytree

import bilevel as bl
from bilevel.estimators.penalty.first_order_corrected import default_nu

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    ),
]


def flat(tree):
    return torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(tree)])


def reference(problem, outer, inner, batches, optimizer, steps):
    """The K-step program written out as a function of x and differentiated once by torch.func.grad."""

    def program(x):
        y = inner if problem.init is None else problem.init(x, batches.inner_at(0))
        state = optimizer.init(y)
        for step in range(steps):
            gradient = torch.func.grad(problem.inner_loss)(y, x, batches.inner_at(step))
            y, state = optimizer.step(gradient, state, y, x)
        return problem.outer_loss(y, x, batches.outer)

    return torch.func.grad(program)(outer)


def cells():
    for problem in catalogue.PROBLEMS:
        for optimizer in catalogue.OPTIMIZERS:
            if not (problem == "meta start" and optimizer == "learned lr"):
                yield pytest.param(problem, optimizer, id=f"{problem}-{optimizer}")


def quietly(call):
    """log_lr is part of x for all optimizers, and influences nothing for most of them: that warning is tested
    elsewhere."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="outer variable .*log_lr")
        return call()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("estimator", catalogue.EXACT)
@pytest.mark.parametrize(("problem", "optimizer"), list(cells()))
def test_exact_estimators_equal_the_written_out_program(problem, optimizer, estimator, device):
    p, outer, inner, batches = catalogue.PROBLEMS[problem](device=device)
    optimizer = catalogue.OPTIMIZERS[optimizer]
    expected = reference(p, outer, inner, batches, optimizer, 7)
    found = quietly(
        lambda: bl.hypergradient(
            p, outer, inner, batches, solver=bl.Descent(optimizer, 7), estimator=catalogue.EXACT[estimator]
        )
    )
    assert found.status is bl.Status.OK
    torch.testing.assert_close(flat(found.grad), flat(expected), rtol=1e-11, atol=1e-13)
    assert pytree.tree_structure(found.grad) == pytree.tree_structure(outer)


@pytest.mark.parametrize("estimator", catalogue.EXACT)
@pytest.mark.parametrize("problem", catalogue.PROBLEMS)
def test_float32_loses_rounding_only(problem, estimator):
    answers = []
    for dtype in (torch.float64, torch.float32):
        p, outer, inner, batches = catalogue.PROBLEMS[problem](dtype=dtype)
        answers.append(
            flat(
                quietly(
                    lambda p=p, o=outer, i=inner, b=batches: bl.hypergradient(
                        p, o, i, b, solver=bl.Descent(bl.SGD(0.3), 10), estimator=catalogue.EXACT[estimator]
                    )
                ).grad
            )
        )
    assert answers[1].dtype == torch.float32
    assert (answers[1].double() - answers[0]).norm() / answers[0].norm() < 1e-5


@pytest.mark.parametrize("last", [1, 3, 7, 20])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_truncation_is_the_same_for_every_way_of_keeping_the_trajectory(last, optimizer):
    p, outer, inner, batches = catalogue.weighted_net()
    answers = []
    for keep in ("graph", "iterates", "segments"):
        estimator = bl.Unrolled(keep=keep, last=last)
        solver = bl.Descent(catalogue.OPTIMIZERS[optimizer], 7)
        answers.append(
            flat(
                quietly(
                    lambda e=estimator, s=solver: bl.hypergradient(p, outer, inner, batches, solver=s, estimator=e)
                ).grad
            )
        )
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(answers[2], answers[0], rtol=1e-11, atol=1e-14)
    full = flat(reference(p, outer, inner, batches, catalogue.OPTIMIZERS[optimizer], 7))
    assert torch.allclose(answers[0], full, rtol=1e-10) == (last >= 7)


@functools.cache
def long_unroll(problem):
    p, outer, inner, batches = catalogue.PROBLEMS[problem]()
    solver = bl.Descent(bl.SGD(1.0), 2000)
    return flat(
        quietly(
            lambda: bl.hypergradient(p, outer, inner, batches, solver=solver, estimator=bl.Unrolled("segments"))
        ).grad
    )


@functools.cache
def nearly_solved(problem):
    """The problem, with a start that half of the steps to its solution were taken from already."""
    p, outer, inner, batches = catalogue.PROBLEMS[problem]()
    if inner is None:
        return p, outer, inner, batches
    solver = bl.Converge(bl.SGD(1.0), tol=1e-6, max_steps=5000)
    found = quietly(
        lambda: bl.hypergradient(
            p, outer, inner, batches, solver=solver, estimator=catalogue.AT_SOLUTION["implicit cg"]
        )
    )
    return p, outer, found.inner, batches


@pytest.mark.parametrize("estimator", catalogue.AT_SOLUTION)
@pytest.mark.parametrize("problem", catalogue.PROBLEMS)
def test_estimators_at_the_solution_agree_with_a_long_unroll(problem, estimator):
    p, outer, inner, batches = nearly_solved(problem)
    long = long_unroll(problem)
    solver = bl.Converge(bl.SGD(1.0), tol=1e-12, max_steps=5000)
    found = quietly(
        lambda: bl.hypergradient(p, outer, inner, batches, solver=solver, estimator=catalogue.AT_SOLUTION[estimator])
    )
    assert found.status is bl.Status.OK
    # a finite difference keeps its own nu or nu^2 and rounding; the others are exact here
    bound = {None: 1e-9, "nu^4": 1e-9, "nu^2": 1e-8, "nu": 1e-6}[catalogue.ENTRIES[estimator].bias]
    assert (flat(found.grad) - long).norm() / long.norm() < bound


@pytest.mark.parametrize("keep", ["graph", "iterates", "segments"])
def test_unrolling_a_solver_that_stops_by_itself_is_the_program_of_as_many_steps(keep):
    p, outer, inner, batches = catalogue.meta_start()
    found = bl.hypergradient(
        p,
        outer,
        inner,
        batches,
        solver=bl.Converge(bl.SGD(0.5), tol=1e-3, max_steps=500),
        estimator=bl.Unrolled(keep=keep),
    )
    steps = found.stats["inner_steps"]
    assert 5 < steps < 500
    torch.testing.assert_close(
        flat(found.grad), flat(reference(p, outer, inner, batches, bl.SGD(0.5), steps)), rtol=1e-10, atol=1e-13
    )


@pytest.mark.parametrize("estimator", catalogue.EXACT)
def test_every_step_sees_its_own_batch(estimator):
    p, outer, inner, batches = catalogue.weighted_net()
    g = torch.Generator().manual_seed(9)
    steps = [
        [torch.randn(4, 5, generator=g, dtype=catalogue.D), torch.randint(0, 3, (4,), generator=g)] for _ in range(6)
    ]
    batches = dataclasses.replace(batches, inner=bl.PerStep(steps))
    found = quietly(
        lambda: bl.hypergradient(
            p, outer, inner, batches, solver=bl.Descent(bl.SGD(0.3), 6), estimator=catalogue.EXACT[estimator]
        )
    )
    torch.testing.assert_close(
        flat(found.grad), flat(reference(p, outer, inner, batches, bl.SGD(0.3), 6)), rtol=1e-11, atol=1e-14
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("estimator", catalogue.EXACT)
def test_random_numbers_are_replayed(estimator, optimizer):
    """The same seed gives the same hypergradient whether a step's graph was kept or rebuilt, and leaves the same random
    state behind."""
    p, outer, inner, batches = catalogue.weighted_net()
    noisy = bl.Problem(
        lambda y, x, b: p.inner_loss(y, x, (torch.nn.functional.dropout(b[0], 0.4), b[1])),
        lambda y, x, b: p.outer_loss(y, x, (torch.nn.functional.dropout(b[0], 0.2), b[1])),
    )

    def run(estimator):
        torch.manual_seed(5)
        solver = bl.Descent(catalogue.OPTIMIZERS[optimizer], 8)
        found = quietly(lambda: bl.hypergradient(noisy, outer, inner, batches, solver=solver, estimator=estimator))
        return flat(found.grad), found.inner_loss, torch.rand(1)

    grad, inner_loss, after = run(catalogue.EXACT[estimator])
    expected, expected_loss, expected_after = run(bl.Unrolled())
    torch.testing.assert_close(grad, expected, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(inner_loss, expected_loss)
    assert after == expected_after
    torch.manual_seed(6)
    other = quietly(
        lambda: bl.hypergradient(
            noisy, outer, inner, batches, solver=bl.Descent(bl.SGD(0.3), 8), estimator=bl.Unrolled()
        )
    )
    assert not torch.allclose(flat(other.grad), expected)


def test_both_sides_of_the_correction_draw_the_same_random_numbers():
    """Without common random numbers the difference of two noisy solutions is divided by nu."""
    p, outer, inner, batches = catalogue.weighted_net()
    noisy = bl.Problem(lambda y, x, b: p.inner_loss(y, x, (torch.nn.functional.dropout(b[0], 0.4), b[1])), p.outer_loss)

    def run(nu):
        torch.manual_seed(5)
        return flat(
            quietly(
                lambda: bl.hypergradient(
                    noisy,
                    outer,
                    inner,
                    batches,
                    solver=bl.Descent(bl.SGD(0.3), 30),
                    estimator=bl.FirstOrderCorrected(nu),
                )
            ).grad
        )

    assert (run(1e-4) - run(1e-5)).norm() / run(1e-4).norm() < 1e-6


@pytest.mark.parametrize("estimator", catalogue.ESTIMATORS)
def test_same_seed_same_answer(estimator):
    p, outer, inner, batches = catalogue.meta_start()

    def answer():
        torch.manual_seed(1)
        solver = bl.Descent(bl.SGD(0.3), 5)
        return bl.hypergradient(p, outer, inner, batches, solver=solver, estimator=catalogue.ESTIMATORS[estimator])

    assert torch.equal(flat(answer().grad), flat(answer().grad))


@pytest.mark.parametrize(
    ("dtype", "scheme", "bound"),
    [
        (torch.float64, "symmetric", 2e-9),
        (torch.float64, "forward", 5e-7),
        (torch.float32, "symmetric", 1e-3),
        (torch.float32, "forward", 5e-3),
    ],
)
def test_the_default_perturbation_balances_truncation_and_rounding(dtype, scheme, bound):
    """A tenth and ten times the default are no better than a factor of ten or so; the bound is what the default reaches
    here."""
    p, outer, _, batches = catalogue.meta_start()
    exact = flat(
        bl.hypergradient(
            p, outer, None, batches, solver=bl.Descent(bl.SGD(0.5), 150), estimator=bl.Unrolled("segments")
        ).grad
    )
    p, outer, _, batches = catalogue.meta_start(dtype)

    def error(nu):
        estimator = bl.FirstOrderCorrected(nu, scheme)
        found = bl.hypergradient(p, outer, None, batches, solver=bl.Descent(bl.SGD(0.5), 150), estimator=estimator)
        assert found.stats["nu"] == (nu or default_nu(dtype, scheme))
        return ((flat(found.grad).double() - exact).norm() / exact.norm()).item()

    assert error(None) < bound
    assert error(None) < 15 * min(error(default_nu(dtype, scheme) * factor) for factor in (0.1, 10.0))
