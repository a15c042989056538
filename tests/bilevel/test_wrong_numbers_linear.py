"""Linear solves that went wrong without a word (issue 7, A1): singular, indefinite, low precision, not a number."""

import itertools
import warnings

import pytest
import torch
from right_or_refused import NONE, D, close, right_or_refused

import bilevel as bl

IMPLICIT = {
    "CG": bl.Implicit(bl.CG(10)),
    "CG to rounding": bl.Implicit(bl.CG(60, 1e-14)),
    "Neumann": bl.Implicit(bl.Neumann(400, 0.3)),
    "Dense": bl.Implicit(bl.Dense()),
    "MemoryReduced": bl.MemoryReduced(),
    "MemoryReduced, long": bl.MemoryReduced(steps=60, tol=1e-14),
}
EVERY = pytest.mark.parametrize("estimator", IMPLICIT.values(), ids=[f"A1 {name}" for name in IMPLICIT])


def idle(dtype=D):
    """An inner tensor that g leaves alone and f uses; y* = x in the other, so dF/dx = x."""
    h = torch.tensor([1.0, 2.0, 3.0], dtype=dtype)
    problem = bl.Problem(
        lambda y, x, b: 0.5 * (h * (y["used"] - x).square()).sum(),
        lambda y, x, b: 0.5 * y["used"].square().sum() + (y["idle"] * y["idle"].new_tensor([1.0, 2.0])).sum(),
    )
    return problem, h.clone(), {"used": torch.zeros(3, dtype=dtype), "idle": torch.ones(2, dtype=dtype)}


def overparametrized(dtype=D):
    """Least squares with more unknowns than equations: the min-norm solution from 0, and its hypergradient."""
    g = torch.Generator().manual_seed(0)
    X, target, x = (torch.randn(*shape, generator=g, dtype=D) for shape in ((3, 6), (6,), (3,)))
    X = X / torch.linalg.matrix_norm(X, 2)
    inverse = torch.linalg.pinv(X)
    right = inverse.T @ (inverse @ x - target)
    X, target = X.to(dtype), target.to(dtype)
    problem = bl.Problem(
        lambda y, x, b: 0.5 * (X @ y - x).square().sum(), lambda y, x, b: 0.5 * (y - target).square().sum()
    )
    return problem, x.to(dtype), torch.zeros(6, dtype=dtype), right


def matrix(seed, size=6, shift=0.0, dtype=D):
    g = torch.Generator().manual_seed(seed)
    A, b = torch.randn(size, size, generator=g, dtype=D), torch.randn(size, generator=g, dtype=D)
    return ((A + A.T) / 2 + shift * torch.eye(size, dtype=D)).to(dtype), b.to(dtype)


def solve(solver, A, b, start=None):
    found = solver.solve(lambda v: (A @ v[0],), (b,), None if start is None else (start,))
    return found, ((b.to(D) - A.to(D) @ found.value[0].to(D)).norm() / b.to(D).norm()).item()


@EVERY
@pytest.mark.parametrize("dtype", [D, torch.float32], ids=["float64", "float32"])
def test_an_inner_tensor_that_g_leaves_alone_gives_the_right_number_or_a_failure(estimator, dtype):
    problem, x, y = idle(dtype)
    solver = bl.Descent(bl.SGD(0.3), 100)
    right_or_refused(
        lambda: bl.hypergradient(problem, x, y, NONE, solver=solver, estimator=estimator), x, 1e-4, atol=1e-4
    )


@EVERY
@pytest.mark.parametrize("dtype", [D, torch.float32], ids=["float64", "float32"])
def test_overparametrized_least_squares_gives_the_right_number_or_a_failure(estimator, dtype):
    problem, x, y, right = overparametrized(dtype)
    solver = bl.Descent(bl.SGD(1.0), 2000 if dtype is D else 300)
    right_or_refused(
        lambda: bl.hypergradient(problem, x, y, NONE, solver=solver, estimator=estimator), right, 1e-2, atol=1e-3
    )


@pytest.mark.parametrize("pose", [idle, overparametrized], ids=["A1 idle tensor", "A1 overparametrized"])
@EVERY
def test_iterate_moves_x_by_no_absurd_step_on_a_singular_hessian(pose, estimator):
    problem, start, y, *_ = pose()
    x = start.clone().requires_grad_()
    loop = bl.iterate(
        problem,
        x,
        y,
        itertools.repeat(NONE, 3),
        solver=bl.Descent(bl.SGD(0.3), 50),
        estimator=estimator,
        optimizer=torch.optim.SGD([x], lr=0.1),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for _ in loop:
                pass
        except bl.BilevelError:
            pass
    assert (x.detach() - start).norm() < 10 * (1 + start.norm())


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.0, 4.0], ids=lambda shift: f"A1 shift {shift}")
@pytest.mark.parametrize(
    "solver", [bl.CG(6), bl.CG(2), bl.CG(30, 1e-12), bl.Neumann(3, 0.4), bl.Neumann(40, 0.4)], ids=repr
)
def test_a_residual_above_that_of_zero_is_a_failed_status_and_what_iterate_tolerates_is_safe(solver, shift):
    for seed in range(25):
        A, b = matrix(seed, shift=shift)
        found, residual = solve(solver, A, b)
        if residual > 1 + 1e-9:
            assert found.status.failed, (seed, found.status.name, residual)
            assert found.status is not bl.Status.NEGATIVE_CURVATURE, (seed, residual)
        if found.status is bl.Status.OK:
            assert residual <= max(1.0 if isinstance(solver, bl.Neumann) else 0, 10 * solver.tol)


@pytest.mark.parametrize("steps", [1, 2, 3], ids=lambda steps: f"A1 {steps} steps")
def test_conjugate_gradients_cut_short_return_nothing_worse_than_zero_unless_they_say_so(steps):
    A, b = torch.diag(torch.tensor([1.0, 30.0, 1000.0, 1e5], dtype=D)), torch.tensor([1.0, 0.1, 0.03, 0.01], dtype=D)
    found, residual = solve(bl.CG(steps), A, b)
    assert residual <= 1 + 1e-9 or found.status.failed


@pytest.mark.parametrize("rate", [2.05, 2.2, 2.4], ids=lambda rate: f"A1 rate {rate}")
def test_a_neumann_series_that_grew_a_little_has_failed(rate):
    found, residual = solve(bl.Neumann(1, rate), torch.eye(2, dtype=D), torch.ones(2, dtype=D))
    assert residual <= 1 or found.status.failed


@pytest.mark.parametrize("steps", [3, 6, 20, 100], ids=lambda steps: f"A1 bfloat16 {steps} steps")
def test_bfloat16_is_not_ok_at_a_residual_that_solved_nothing(steps):
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        size = (4, 10, 40)[seed % 3]
        X = torch.randn(size // 2 if seed % 2 else size, size, generator=g)
        A, b = (X.T @ X / size).bfloat16(), torch.randn(size, generator=g).bfloat16()
        found, residual = solve(bl.CG(steps, 1e-3), A, b)
        assert found.status is not bl.Status.OK or residual < 0.3, (seed, residual)
        assert residual <= 1.05 or found.status.failed, (seed, found.status.name, residual)


@pytest.mark.parametrize("solver", [bl.CG(5), bl.Neumann(5, 0.1), bl.Dense()], ids=["A1 CG", "A1 Neumann", "A1 Dense"])
def test_a_hessian_that_is_not_a_number_is_nonfinite(solver):
    found = solver.solve(lambda v: (v[0] * float("nan"),), (torch.ones(3, dtype=D),))
    assert found.status is bl.Status.NONFINITE


@EVERY
def test_a_second_derivative_that_is_not_a_number_is_nonfinite(estimator):
    # |y|^1.5 has derivative 0 and an infinite second derivative at 0.
    problem = bl.Problem(lambda y, x, b: y.abs().pow(1.5).sum() + 0.5 * (y - x).square().sum(), lambda y, x, b: y.sum())
    zero, solver = torch.zeros(2, dtype=D), bl.Descent(bl.SGD(0.1), 0)
    hg = bl.hypergradient(problem, zero, zero, NONE, solver=solver, estimator=estimator)
    assert hg.status is bl.Status.NONFINITE


def test_dense_breaks_down_only_where_the_residual_says_so():
    A = torch.diag(torch.tensor([1e-20, 1.0], dtype=D))
    found, residual = solve(bl.Dense(), A, torch.tensor([0.0, 1.0], dtype=D))
    assert residual == 0
    assert found.status is bl.Status.OK
    singular, _ = solve(bl.Dense(), torch.diag(torch.tensor([0.0, 1.0], dtype=D)), torch.ones(2, dtype=D))
    assert singular.status.failed


@pytest.mark.parametrize("start", [None, torch.ones(2, dtype=D)], ids=["A1 from zero", "A12 warm"])
@pytest.mark.parametrize(
    "A", [torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([0.0, 1.0]))], ids=["", "singular"]
)
@pytest.mark.parametrize("solver", [bl.CG(5), bl.Dense()], ids=["CG", "Dense"])
def test_a_right_hand_side_of_zero_gives_zero(solver, A, start):
    found, _ = solve(solver, A.to(D), torch.zeros(2, dtype=D), start)
    assert found.status is bl.Status.OK
    assert found.residual.isfinite().all()
    close(found.value[0], torch.zeros(2), atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 5, 20], ids=lambda steps: f"A12 {steps} steps")
def test_a_warm_started_solve_is_right_where_the_outer_gradient_vanishes(steps):
    h = torch.tensor([1.0, 3.0], dtype=D)
    problem = bl.Problem(
        lambda y, x, b: 0.5 * (h * (y - x).square()).sum(), lambda y, x, b: 0.5 * (y - b).square().sum()
    )
    x = torch.tensor([1.0, 2.0], dtype=D)
    estimator = bl.MemoryReduced(steps=steps, warm_inner=True, warm_adjoint=True)
    solver = bl.Descent(bl.SGD(0.2), 3)
    first = bl.hypergradient(problem, x, x, bl.Batches(None, x + 1), solver=solver, estimator=estimator)
    hg = bl.hypergradient(problem, x, x, bl.Batches(None, x), solver=solver, estimator=estimator, state=first.state)
    assert not hg.status.failed
    close(hg.grad, torch.zeros(2), atol=1e-9)


def test_one_singular_task_does_not_spoil_or_hide_among_good_ones():
    h = torch.tensor([[1.0, 2.0], [1.0, 0.0], [2.0, 3.0]], dtype=D)
    problem = bl.Problem(
        lambda y, x, b: 0.5 * (b * (y - x).square()).sum(), lambda y, x, b: 0.5 * (y + 1).square().sum()
    )
    x, y = torch.tensor([1.0, 2.0], dtype=D), torch.zeros(3, 2, dtype=D)
    for chunk, inner in itertools.product((None, 1, 2), (bl.Implicit(bl.CG(10)), bl.MemoryReduced())):
        # The singular task moves along its first coordinate only.
        right = torch.tensor([3 * 2.0, 2 * 3.0]) / 3
        right_or_refused(
            lambda chunk=chunk, inner=inner, right=right: bl.hypergradient(
                problem,
                x,
                y,
                bl.Batches(h, None),
                solver=bl.Descent(bl.SGD(0.3), 200),
                estimator=bl.TaskMean(inner, chunk),
            ),
            right,
            1e-6,
        )
