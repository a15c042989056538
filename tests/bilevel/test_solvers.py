"""The Krylov solvers, Chebyshev and Nystrom: known answers, scipy's, and every system that may not be answered wrongly.

Those of the first three solvers (CG, Neumann, Dense) are in test_linear.py and test_linear_safety.py.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse.linalg as scipy_solvers
import torch
from torch import Tensor

import bilevel as bl
from bilevel.linear import (
    GMRES,
    LSMR,
    MINRES,
    BiCGSTAB,
    Chebyshev,
    Jacobi,
    LevenbergMarquardt,
    Masked,
    NormalCG,
    Nystrom,
    NystromPreconditioner,
    Product,
    Rectangular,
)
from bilevel.linear.operator import LinearOperator

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=F64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def by(matrix: Tensor) -> Callable:
    return lambda v: ((matrix @ v[0].unsqueeze(-1)).squeeze(-1),)


def operator(matrix: Tensor, *, symmetric: bool = True) -> Product:
    return Product(by(matrix), symmetric, by(matrix.mT))


def with_values(values: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues."""
    basis = torch.linalg.qr(normal(len(values), len(values), seed=seed)).Q
    return basis * values @ basis.T


SYMMETRIC = {"minres": MINRES(40, 1e-10)}
ANY = {
    "gmres": GMRES(40, 40, 1e-10),
    "gmres, restarted": GMRES(300, 12, 1e-10),
    "bicgstab": BiCGSTAB(100, 1e-10),
    "lsmr": LSMR(100, 1e-10),
    "normal cg": NormalCG(100, 1e-10),
}
DEFINITE = {
    "chebyshev": Chebyshev(0.5, 3.0, 100, 1e-10),
    "cg, jacobi": bl.CG(60, 1e-10, preconditioner=Jacobi(probes=4)),
    "cg, nystrom": bl.CG(60, 1e-10, preconditioner=NystromPreconditioner(4)),
    "cg, a function": bl.CG(60, 1e-10, preconditioner=lambda r: tuple(leaf / 2 for leaf in r)),
    "minres, jacobi": MINRES(60, 1e-11, preconditioner=Jacobi(probes=4)),
    "chosen damping": LevenbergMarquardt(bl.CG(60, 1e-10)),
    "masked": Masked(bl.CG(60, 1e-10)),
}
EVERY = {**SYMMETRIC, **ANY, **DEFINITE}
SADDLE = {**SYMMETRIC, **ANY}


# Known answers (TP2, TP8)


@pytest.mark.parametrize("diagonal", [(1.0, -1.0), (2.0, -1.0)], ids=str)
@pytest.mark.parametrize("name", SADDLE)
def test_indefinite_systems_where_conjugate_gradients_stop(name, diagonal):
    found = SADDLE[name].solve(operator(torch.diag(vector(*diagonal))), (vector(1.0, 1.0),))
    torch.testing.assert_close(found.value[0], 1 / vector(*diagonal), rtol=1e-12, atol=1e-12)
    assert found.status is bl.Status.OK


def test_scipys_bicgstab_breaks_down_where_ours_does_not():
    """TP2: its shadow vector is the residual, and b'A b = 0."""
    _, info = scipy_solvers.bicgstab(np.diag([1.0, -1.0]), np.ones(2), maxiter=20)
    assert info < 0
    assert bl.CG().solve(by(torch.diag(vector(1.0, -1.0))), (vector(1.0, 1.0),)).status is bl.Status.NEGATIVE_CURVATURE


def test_nystrom_with_all_columns_is_the_inverse_and_with_some_is_refused():
    """TP8: a column that is not sampled gets 1 / rho, which is worse than v = 0."""
    h, b = vector(4.0, 1.0, 0.25), (vector(1.0, 1.0, 1.0),)

    def product(v):
        return (h * v[0],)

    for solver in (Nystrom(3, 0.1, columns=(0, 1, 2)), Nystrom(3, 0.1)):
        found = solver.solve(product, b)
        torch.testing.assert_close(found.value[0], vector(0.2439024390, 0.9090909091, 2.8571428571), rtol=1e-9, atol=0)
        assert found.status is bl.Status.OK
        assert found.residual < 1e-10
    some = Nystrom(2, 0.1, columns=(0, 2))
    inverse = some.prepare(product).inverse(b)[0]
    torch.testing.assert_close(inverse, vector(0.2439024390, 10.0, 2.8571428571), rtol=1e-9, atol=0)
    found = some.solve(product, b)
    assert found.status is bl.Status.UNSOLVED
    assert torch.equal(found.value[0], torch.zeros(3, dtype=F64))


def test_nystrom_of_an_indefinite_matrix_is_semidefinite_and_says_what_it_missed():
    """Hataya and Yamada's formula divides by an eigenvalue near -rho."""
    A = torch.diag(vector(4.0, -0.1, 1.0))
    found = Nystrom(3, 0.1).solve(by(A), (vector(1.0, 1.0, 1.0),))
    assert torch.isfinite(found.value[0]).all()
    assert found.value[0].norm() < 20
    assert found.residual > 0.5


@pytest.mark.parametrize("steps", [2, 5, 10])
def test_chebyshev_keeps_its_bound_and_needs_the_interval(steps):
    A, b = with_values(torch.linspace(1.0, 2.0, 30, dtype=F64)), normal(30, seed=1)
    bound = 1 / np.cosh(steps * np.arccosh(3.0))
    found = Chebyshev(1.0, 2.0, steps, 0.0).solve(by(A), (b,))
    assert found.residual <= bound
    assert found.residual > 1e-3 * bound
    outside = Chebyshev(0.2, 0.8, 30, 0.0).solve(by(A), (b,))
    assert outside.status is bl.Status.NOT_CONTRACTIVE
    assert outside.residual <= 1


# Against scipy


SCIPY = {
    "minres": (MINRES(7, 0.0), lambda A, b: scipy_solvers.minres(A, b, rtol=0.0, maxiter=7)[0]),
    "gmres": (GMRES(7, 7, 0.0), lambda A, b: scipy_solvers.gmres(A, b, rtol=0.0, restart=7, maxiter=1)[0]),
    "gmres, restarted": (GMRES(12, 4, 0.0), lambda A, b: scipy_solvers.gmres(A, b, rtol=0.0, restart=4, maxiter=3)[0]),
    "lsmr": (LSMR(7, 0.0), lambda A, b: scipy_solvers.lsmr(A, b, atol=0, btol=0, conlim=0, maxiter=7)[0]),
    "normal cg": (NormalCG(7, 0.0), lambda A, b: scipy_solvers.cg(A.T @ A, A.T @ b, rtol=0.0, maxiter=7)[0]),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SCIPY)
def test_unfinished_solves_equal_those_of_scipy(name, seed):
    ours, theirs = SCIPY[name]
    A = normal(25, 25, seed=seed) / 5 + torch.eye(25, dtype=F64)
    A = (A + A.T) / 2 if name == "minres" else A
    b = normal(25, seed=seed + 10)
    found = ours.solve(operator(A, symmetric=name == "minres"), (b,))
    expected = torch.from_numpy(theirs(A.numpy(), b.numpy()))
    torch.testing.assert_close(found.value[0], expected, rtol=1e-8, atol=1e-10)
    assert found.status in (bl.Status.MAX_STEPS, bl.Status.OK)
    torch.testing.assert_close(found.residual, (b - A @ expected).norm() / b.norm(), rtol=1e-8, atol=0)


# What each is for


SYSTEMS = {
    "definite": lambda: (with_values(torch.linspace(0.5, 3.0, 20, dtype=F64)), True),
    "indefinite": lambda: (with_values(torch.linspace(-2.0, 3.07, 20, dtype=F64)), True),
    "not symmetric": lambda: (normal(20, 20, seed=3) * 0.15 + torch.eye(20, dtype=F64), False),
    "singular": lambda: (with_values(torch.linspace(0.0, 3.0, 20, dtype=F64).clamp_min(0.6) - 0.6), True),
}


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("name", EVERY)
def test_systems_of_its_kind_are_solved_and_others_refused_or_told(name, system):
    A, symmetric = SYSTEMS[system]()
    b = A @ normal(20, seed=1)
    able = {"definite": EVERY, "indefinite": SADDLE, "not symmetric": ANY, "singular": SADDLE}[system]
    solver, given = EVERY[name], operator(A, symmetric=symmetric)
    if name not in able:
        if not symmetric:
            with pytest.raises(ValueError, match="symmetric=False") if name != "masked" else pytest.raises(ValueError):
                solver.solve(given, (b,))
            return
        found = solver.solve(given, (b,))
        true = (b - A @ found.value[0] - (0 if found.damping is None else found.damping * found.value[0])).norm()
        assert found.status is not bl.Status.OK or true / b.norm() < 1e-6
        return
    found = solver.solve(given, (b,))
    if system == "indefinite" and name == "gmres, restarted":
        assert found.status in (bl.Status.MAX_STEPS, bl.Status.BREAKDOWN)  # it stands still, and says so
        return
    assert found.status is bl.Status.OK
    least = torch.linalg.pinv(A, rtol=1e-9) @ b
    torch.testing.assert_close(found.value[0], least, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("name", SADDLE)
def test_a_right_hand_side_outside_the_range_is_never_ok_and_its_answer_is_no_longer_than_it_must_be(name, dtype):
    A = with_values(torch.linspace(-1.0, 3.0, 20, dtype=F64) * (torch.arange(20) > 4))
    b = normal(20, seed=1)
    found = SADDLE[name].solve(operator(A.to(dtype)), (b.to(dtype),))
    least = torch.linalg.pinv(A, rtol=1e-9) @ b
    smallest = (b - A @ least).norm() / b.norm()
    assert found.status is not bl.Status.OK
    assert found.residual >= 0.999 * smallest
    if name not in ("bicgstab", "gmres, restarted"):
        assert found.status is bl.Status.BREAKDOWN
        assert found.residual < 1.01 * smallest
        assert found.value[0].double().norm() < 10 * least.norm()
    elif not found.status.failed:
        assert found.value[0].double().norm() < 1e4 * least.norm()


@pytest.mark.parametrize("solver", [LSMR(60, 1e-9, least_squares=True), NormalCG(60, 1e-9, least_squares=True)])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)], ids=str)
@pytest.mark.parametrize("start", [False, True], ids=["cold", "warm"])
def test_least_squares_between_two_spaces_are_those_of_the_pseudo_inverse(solver, shape, start):
    A, b = normal(*shape, seed=2), normal(shape[0], seed=3)
    A[:, 1] = A[:, 0]  # (rank deficient as well)
    given = Rectangular(by(A), by(A.T))
    guess = (0.01 * A.T @ normal(shape[0], seed=5),) if start else None
    found = solver.solve(given, (b,), guess)
    assert found.status is bl.Status.OK
    torch.testing.assert_close(found.value[0], torch.linalg.pinv(A, rtol=1e-10) @ b, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.residual, (b - A @ found.value[0]).norm() / b.norm(), rtol=1e-9, atol=1e-12)
    # Cut short, it says so, although the residual says nothing.
    short = type(solver)(2, 1e-9, least_squares=True).solve(given, (b,), guess)
    assert short.status is bl.Status.MAX_STEPS


def test_the_normal_equations_are_right_where_conjugate_gradients_fail():
    """A singular system in float32 whose right-hand side is outside of the range by rounding only."""
    A = with_values(vector(1.0, -1.0, 0.5, 0.0, 0.0)).float()
    b = A @ torch.linalg.qr(normal(5, 5)).Q.float() @ torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0])
    found = NormalCG(60, 1e-6).solve(by(A), (b,))
    assert found.status is bl.Status.OK
    assert (b - A @ found.value[0]).norm() < 3e-6 * b.norm()
    assert bl.CG(60, 1e-6).solve(by(A), (b,)).status.failed


def test_preconditioners_save_products():
    scale = torch.logspace(0, 3, 40, dtype=F64)
    mixed = torch.eye(40, dtype=F64) + 0.02 * (normal(40, 40) + normal(40, 40).T)
    scaled, b = scale[:, None] * mixed * scale, normal(40, seed=1)
    plain = bl.CG(200, 1e-6).solve(by(scaled), (b,))
    for solver in (
        bl.CG(60, 1e-6, preconditioner=Jacobi(probes=1, floor=1e-9)),
        bl.CG(60, 1e-6, preconditioner=Jacobi(floor=1e-9)),
        MINRES(60, 1e-13, preconditioner=Jacobi(floor=1e-9)),
    ):
        given = Product(by(scaled), known_diagonal=(scaled.diagonal(),))
        found = solver.solve(given, (b,))
        assert found.residual < 1e-6
        assert found.steps < plain.steps / 2
    peaks = with_values(torch.cat([torch.logspace(4, 2, 8, dtype=F64), 1 + torch.rand(52, dtype=F64)]))
    b = normal(60, seed=1)
    plain = bl.CG(200, 1e-6).solve(by(peaks), (b,))
    found = bl.CG(200, 1e-6, preconditioner=NystromPreconditioner(12)).solve(by(peaks), (b,))
    assert found.status is bl.Status.OK
    assert found.steps < plain.steps


def test_a_preconditioner_that_is_not_positive_definite_is_told():
    A, b = with_values(torch.linspace(1.0, 3.0, 8, dtype=F64)), normal(8, seed=1)
    for solver in (bl.CG(20, preconditioner=lambda r: (-r[0],)), MINRES(20, preconditioner=lambda r: (-r[0],))):
        found = solver.solve(by(A), (b,))
        assert found.status is bl.Status.BREAKDOWN
        assert found.residual <= 1


def test_damping_is_chosen_for_the_tasks_that_need_it():
    diagonals = torch.stack([vector(1.0, 2.0, 3.0), vector(1.0, -0.2, 0.5), vector(-1.0, 2.0, -2.0)])
    found = LevenbergMarquardt(bl.CG(10, 1e-10), first=1e-2, factor=3.0, attempts=8).solve(
        lambda v: (diagonals * v[0],), (torch.ones(3, 3, dtype=F64),), tasks=3
    )
    assert found.status is bl.Status.OK
    assert found.damping[0] == 0
    assert 0.2 < found.damping[1] < 1
    assert 1 < found.damping[2] < 9
    torch.testing.assert_close(found.value[0], 1 / (diagonals + found.damping[:, None]), rtol=1e-8, atol=0)


def test_damping_that_is_not_enough_leaves_the_failure():
    found = LevenbergMarquardt(bl.CG(10), first=1e-6, attempts=3).solve(
        by(torch.diag(vector(1.0, -1.0))), (vector(1.0, 2.0),)
    )
    assert found.status is bl.Status.NEGATIVE_CURVATURE


@pytest.mark.parametrize("within", [bl.CG(20, 1e-10), MINRES(20, 1e-10), GMRES(20, 20, 1e-10), bl.Dense()])
def test_a_mask_solves_the_smaller_system_and_leaves_zero_elsewhere(within):
    A, b = with_values(torch.linspace(1.0, 3.0, 9, dtype=F64)), normal(9, seed=1)

    def product(v):
        flat = A @ torch.cat([v[0].reshape(-1), v[1]])
        return flat[:4].reshape(2, 2), flat[4:]

    some = torch.tensor([True, False, True, True, False])
    found = Masked(within, blocks=(True, some)).solve(product, (b[:4].reshape(2, 2), b[4:]))
    kept = torch.tensor([0, 1, 2, 3, 4, 6, 7])
    expected = torch.zeros(9, dtype=F64)
    expected[kept] = torch.linalg.solve(A[kept][:, kept], b[kept])
    torch.testing.assert_close(torch.cat([found.value[0].reshape(-1), found.value[1]]), expected, rtol=1e-7, atol=1e-9)
    assert found.residual < 1e-8


def test_a_mask_of_tasks_leaves_the_others_out_whatever_they_hold():
    A = torch.stack([with_values(vector(1.0, 2.0, 3.0)), torch.full((3, 3), float("nan"), dtype=F64)])
    b = torch.stack([normal(3, seed=1), normal(3, seed=2)])
    found = Masked(MINRES(10, 1e-10), tasks=torch.tensor([True, False])).solve(by(A), (b,), tasks=2)
    assert found.status is bl.Status.OK
    torch.testing.assert_close(found.value[0][0], torch.linalg.solve(A[0], b[0]), rtol=1e-8, atol=0)
    assert torch.equal(found.value[0][1], torch.zeros(3, dtype=F64))


# Tasks, vmap, fake tensors, dtypes


def stacked() -> tuple[Tensor, Tensor]:
    """Four definite systems; the first is solved in one step."""
    spread = [torch.ones(6, dtype=F64), *(torch.linspace(0.6, 0.6 + gap, 6, dtype=F64) for gap in (0.5, 1.5, 2.2))]
    return torch.stack([with_values(each, seed=i) for i, each in enumerate(spread)]), normal(4, 6, seed=5)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_tasks_are_solved_as_they_would_be_one_by_one(name, dtype):
    if name == "chosen damping":
        pytest.skip("its scale is the tasks' own")
    A, b = (each.to(dtype) for each in stacked())
    solver = EVERY[name]
    together = solver.solve(operator(A), (b,), tasks=4)
    alone = [solver.solve(operator(A[i]), (b[i],)) for i in range(4)]
    rtol = 1e-9 if dtype is F64 else 1e-4
    assert together.residual.shape == (4,)
    torch.testing.assert_close(together.value[0], torch.stack([one.value[0] for one in alone]), rtol=rtol, atol=rtol)
    assert abs(int(together.steps) - max(int(one.steps) for one in alone)) <= (0 if dtype is F64 else 4)
    assert together.status.code == max(one.status.code for one in alone)
    again = solver.solve(operator(A[:1]), (b[:1],), tasks=1)
    torch.testing.assert_close(together.value[0][0], again.value[0][0], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["b", "A"])
@pytest.mark.parametrize("name", EVERY)
def test_a_task_that_is_not_finite_is_reported_and_leaves_the_others_alone(name, where, bad):
    A, b = stacked()
    solver = EVERY[name]
    clean = solver.solve(operator(A), (b,), tasks=4)
    if where == "b":
        b[1, 0] = bad
    else:
        A[1, 0, 0] = bad
    found = solver.solve(operator(A), (b,), tasks=4)
    assert found.status is bl.Status.NONFINITE
    assert torch.isfinite(found.value[0]).all()
    for i in (0, 2, 3):
        torch.testing.assert_close(found.value[0][i], clean.value[0][i], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("start", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("name", EVERY)
def test_vmap_over_solve_equals_a_loop(name, start):
    A, b = stacked()
    solver, guess = EVERY[name], 0.1 * stacked()[1].flip(0)

    def one(matrix, rhs, first):
        found = solver.solve(operator(matrix), (rhs,), (first,) if start else None)
        return found.value[0], found.residual, torch.as_tensor(found.code)

    mapped = torch.func.vmap(one)(A, b, guess)
    looped = [torch.stack(parts) for parts in zip(*(one(A[i], b[i], guess[i]) for i in range(4)), strict=True)]
    for together, alone in zip(mapped, looped, strict=True):
        torch.testing.assert_close(together.expand_as(alone), alone, rtol=1e-8, atol=1e-9)


BRIEF = {
    "minres": MINRES(3),
    "gmres": GMRES(4, 2),
    "bicgstab": BiCGSTAB(3),
    "lsmr": LSMR(3),
    "normal cg": NormalCG(3),
    "chebyshev": Chebyshev(0.5, 3.0, 3),
    "nystrom": Nystrom(3, 0.1),
    "cg, jacobi": bl.CG(3, preconditioner=Jacobi(probes=2)),
    "cg, nystrom": bl.CG(3, preconditioner=NystromPreconditioner(2)),
    "chosen damping": LevenbergMarquardt(bl.CG(2), attempts=2),
    "masked": Masked(bl.CG(3)),
}


@pytest.mark.parametrize("name", BRIEF)
def test_solvers_run_on_fake_tensors_of_a_gpu_without_looking_at_a_number(name):
    """A fake tensor has no number to look at: what waited for a GPU would raise."""
    solver = BRIEF[name]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        for tasks, shape in ((None, (6,)), (3, (3, 6))):
            b = torch.ones(shape, dtype=F32)
            found = solver.solve(Product(lambda v: (2 * v[0],), True), (b,), (0.1 * b,), tasks=tasks)
            assert found.value[0].shape == b.shape
            assert found.residual.shape == (() if tasks is None else (tasks,))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_ok_in_16_bits_means_a_small_residual(name, dtype):
    A, b = stacked()
    A, b = A.to(dtype), (100 * b).to(dtype)

    def product(v):
        return ((A.float() @ v[0].float().unsqueeze(-1)).squeeze(-1).to(dtype),)

    found = EVERY[name].solve(Product(product, True), (b,), tasks=4)
    assert found.value[0].dtype is dtype
    v = found.value[0].double()
    shift = 0 if found.damping is None else found.damping[:, None] * v
    true = (b.double() - (A.double() @ v.unsqueeze(-1)).squeeze(-1) - shift).norm(dim=1) / b.double().norm(dim=1)
    assert (true <= 1).all()
    assert found.status is not bl.Status.OK or (true < 0.06).all()
    torch.testing.assert_close(found.residual.double(), true, rtol=0.2, atol=0.02)


@pytest.mark.parametrize("name", EVERY)
def test_zero_gives_zero_and_a_bad_start_is_no_start(name):
    A, b = stacked()
    A, b = A[2], b[2]
    solver = EVERY[name]
    for start in (None, (b,)):
        found = solver.solve(operator(A), (0 * b,), start)
        assert torch.equal(found.value[0], 0 * b)
        assert found.status is bl.Status.OK
    for first in (1e8, float("nan")):
        found = solver.solve(operator(A), (b,), (torch.full_like(b, first),))
        torch.testing.assert_close(found.value[0], torch.linalg.solve(A, b), rtol=1e-7, atol=1e-8)
    solution = torch.linalg.solve(A, b)
    warm = solver.solve(operator(A), (b,), (solution,))
    assert int(warm.steps) == 0
    torch.testing.assert_close(warm.value[0], solution, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("dtype", "scale"), [(F32, 1e20), (F32, 1e-25), (F64, 1e200), (F16, 300.0), (F16, 1e-3)], ids=str
)
@pytest.mark.parametrize("name", EVERY)
def test_the_scale_of_the_right_hand_side_does_not_matter_or_is_a_failure(name, dtype, scale):
    b = torch.tensor([1.0, 0.5, -0.25], dtype=dtype) * scale
    found = EVERY[name].solve(Product(lambda v: (2 * v[0],), True), (b,))
    if not found.status.failed:
        torch.testing.assert_close(found.value[0], b / 2, rtol=2e-2, atol=0)


@pytest.mark.parametrize("name", EVERY)
def test_several_leaves_are_one_system_and_are_not_changed(name):
    A, b = (each[3] for each in stacked())

    def product(v):
        flat = A @ torch.cat([leaf.reshape(-1) for leaf in v])
        return flat[:4].reshape(2, 2), flat[4:5].reshape(()), flat[5:5], flat[5:]

    leaves = (b[:4].reshape(2, 2), b[4], b[5:5], b[5:])
    versions = [leaf._version for leaf in leaves]
    found = EVERY[name].solve(product, leaves)
    assert [leaf.shape for leaf in found.value] == [leaf.shape for leaf in leaves]
    assert versions == [leaf._version for leaf in leaves]
    joined = torch.cat([leaf.reshape(-1) for leaf in found.value])
    torch.testing.assert_close(joined, torch.linalg.solve(A, b), rtol=1e-7, atol=1e-8)


PRODUCTS = {"minres": 7, "gmres": 7, "bicgstab": 14, "lsmr": 15, "normal cg": 15, "chebyshev": 7}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_budget_is_what_is_spent(name):
    solvers = {
        "minres": MINRES(7, 0.0),
        "gmres": GMRES(7, 3, 0.0),
        "bicgstab": BiCGSTAB(7, 0.0),
        "lsmr": LSMR(7, 0.0),
        "normal cg": NormalCG(7, 0.0),
        "chebyshev": Chebyshev(0.1, 3.0, 7, 0.0),
    }
    A, b, calls = with_values(torch.linspace(0.1, 3.0, 20, dtype=F64)), normal(20, seed=1), []

    def product(v):
        calls.append(1)
        return (A @ v[0],)

    solvers[name].prepare(product).iterate((b,))
    assert len(calls) == PRODUCTS[name]


# Operators of users


class Own(LinearOperator):
    """A user's operator that defines what it must, and no more."""

    def __init__(self, matrix: Tensor, *, symmetric: bool) -> None:
        self.matrix, self.symmetric = matrix, symmetric

    def matvec(self, v):
        return (self.matrix @ v[0],)


class Whole(Own):
    """One that defines everything."""

    def rmatvec(self, v):
        return (self.matrix.T @ v[0],)

    def diagonal(self):
        return (self.matrix.diagonal(),)


@pytest.mark.parametrize("name", EVERY)
def test_a_users_operator_is_accepted_where_it_has_what_is_needed_and_refused_in_words_where_not(name):
    A, b = normal(6, 6, seed=3) * 0.2 + torch.eye(6, dtype=F64), normal(6, seed=1)
    solver, own = EVERY[name], Own(A, symmetric=False)
    if name in ("gmres", "gmres, restarted", "bicgstab"):
        torch.testing.assert_close(solver.solve(own, (b,)).value[0], torch.linalg.solve(A, b), rtol=1e-7, atol=1e-8)
    elif name in ("lsmr", "normal cg"):
        with pytest.raises(ValueError, match=r"rmatvec[\s\S]*GMRES"):
            solver.solve(own, (b,))
        whole = solver.solve(Whole(A, symmetric=False), (b,))
        torch.testing.assert_close(whole.value[0], torch.linalg.solve(A, b), rtol=1e-7, atol=1e-8)
    else:
        with pytest.raises(ValueError, match=r"symmetric=False[\s\S]*GMRES"):
            solver.solve(own, (b,))


def test_what_does_not_fit_is_refused_in_words():
    A, b = stacked()[0][3], (stacked()[1][3],)
    with pytest.raises(ValueError, match=r"Own[\s\S]*Jacobi\(probes=20\)"):
        bl.CG(preconditioner=Jacobi()).solve(Own(A, symmetric=True), b)
    found = bl.CG(20, preconditioner=Jacobi()).solve(Whole(A, symmetric=True), b)
    assert found.status is bl.Status.OK
    with pytest.raises(TypeError, match="preconditioner"):
        bl.CG(preconditioner="jacobi")
    with pytest.raises(ValueError, match="comma"):
        bl.CG(preconditioner=lambda r: r[0]).solve(by(A), b)
    with pytest.raises(ValueError, match=r"Rectangular[\s\S]*LSMR"):
        GMRES().solve(Rectangular(by(A[:3]), by(A[:3].T)), b)
    with pytest.raises(ValueError, match="damping=0"):
        LSMR(damping=0.1).solve(Rectangular(by(A[:3]), by(A[:3].T)), (b[0][:3],))
    with pytest.raises(ValueError, match="2 blocks"):
        Masked(bl.CG(), blocks=(True, False)).solve(by(A), b)
    with pytest.raises(ValueError, match="no tasks"):
        Masked(bl.CG(), tasks=torch.ones(2, dtype=torch.bool)).solve(by(A), b)
    with pytest.raises(ValueError, match="column 9"):
        Nystrom(1, 0.1, columns=(9,)).solve(by(A), b)
    for wrong in (
        lambda: Nystrom(2, 0.1, columns=(0, 0)),
        lambda: Nystrom(2, 0.0),
        lambda: Chebyshev(2.0, 1.0),
        lambda: Chebyshev(0.0, 1.0),
        lambda: GMRES(restart=0),
        lambda: LevenbergMarquardt(bl.CG(), factor=1.0),
        lambda: Jacobi(probes=-1),
    ):
        with pytest.raises(ValueError, match="was given"):
            wrong()


# All at once


KINDS = (
    "definite",
    "consistent",
    "inconsistent",
    "indefinite",
    "zero",
    "ill",
    "nan",
    "tiny",
    "huge",
    "b = 0",
    "twisted",
)


def drawn(kind: str, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=F64)).Q
    values = 0.5 + 2.5 * torch.rand(size, generator=generator, dtype=F64)
    values[: size // 2] *= {"consistent": 0, "inconsistent": 0, "zero": 0, "indefinite": -1}.get(kind, 1)
    values = torch.logspace(0, -12, size, dtype=F64) if kind == "ill" else 0 * values if kind == "zero" else values
    A, b = basis * values @ basis.T, torch.randn(size, generator=generator, dtype=F64)
    b = A @ b if kind == "consistent" else 0 * b if kind == "b = 0" else b
    A = A * {"tiny": 1e-12, "huge": 1e12}.get(kind, 1)
    if kind == "twisted":
        A = A + torch.randn(size, size, generator=generator, dtype=F64)
    if kind == "nan":
        A[0, -1] = float("nan")
    return A, b


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_whatever_the_system_the_answer_is_no_worse_than_zero_and_the_status_is_true(name, dtype):
    generator, solver = torch.Generator().manual_seed(7), EVERY[name]
    for kind in KINDS:
        if kind == "twisted" and name not in ANY:
            continue
        for tasks in (None, 2):
            systems = [drawn(each, 7, generator) for each in ((kind,) if tasks is None else (kind, "definite"))]
            A, b = (torch.stack(parts).to(dtype) for parts in zip(*systems, strict=True))
            if tasks is None:
                A, b = A[0], b[0]
            wide = A.float() if dtype is BF16 else A

            def product(v, wide=wide):
                return ((wide @ v[0].to(wide.dtype).unsqueeze(-1)).squeeze(-1).to(dtype),)

            def turned(v, wide=wide):
                return ((wide.mT @ v[0].to(wide.dtype).unsqueeze(-1)).squeeze(-1).to(dtype),)

            found = solver.solve(Product(product, kind != "twisted", turned), (b,), tasks=tasks)
            where = f"{kind}, tasks {tasks}: {found.status.name} {found.residual}"
            v, good = found.value[0].double(), torch.isfinite(A).flatten(-2).all(-1)
            assert torch.isfinite(v).all(), where
            size = torch.where(b.double().norm(dim=-1) > 0, b.double().norm(dim=-1), 1.0)
            shift = 0 if found.damping is None else found.damping.unsqueeze(-1) * v
            true = (b.double() - (A.double() @ v.unsqueeze(-1)).squeeze(-1) - shift).norm(dim=-1) / size
            hidden = (A.double().abs() @ v.abs().unsqueeze(-1)).squeeze(-1).norm(dim=-1) / size
            blur = 30 * torch.finfo(dtype).eps * (1 + hidden)
            assert (true <= 1 + blur)[good].all(), where
            assert ((found.residual.double() - true).abs() <= blur + 0.01 * true)[good].all(), (where, true)
            if not good.all():
                assert found.status is bl.Status.NONFINITE, where
            elif found.status is bl.Status.OK:
                assert (true <= 0.06 + blur).all(), where


# The transposed product of a linearization, and preconditioners made at y


@dataclasses.dataclass(frozen=True)
class Twisted(bl.inner.Dynamics):
    """A condition whose derivative in y is not symmetric: the gradient, and a turn that is no gradient."""

    def _turned(self, inner, at):
        g = at.gradient(inner)
        return {
            "a": g["a"] + 0.3 * torch.roll(inner["a"], 1, dims=-1) ** 2 + inner["b"].sum(-1, keepdim=True) * inner["a"],
            "b": g["b"],
            "c": inner["c"],
        }

    def step(self, inner, state, outer, at):
        turned = self._turned(inner, at)
        return {name: leaf - 0.1 * turned[name] for name, leaf in inner.items()}, state

    def stationarity(self, inner, outer, at):
        return self._turned(inner, at)


def twisted_loss(y, x, batch):
    a, b = y["a"], y["b"]
    return ((a - x) ** 4).sum() / 4 + (a**2).sum() + (b * a[:3]).sum() ** 2 / 2 + (b**2).sum() + torch.tanh(b) @ batch


@dataclasses.dataclass(frozen=True)
class Spying(bl.linear.LinearSolver):
    """Writes down both products in every direction, and solves densely."""

    seen_pairs: list
    damping: float = 0.0
    tol: float = 1e-6

    def prepare(self, operator, space=None):
        spied = self

        class Spy(LinearOperator):
            def matvec(self, v):
                if space.tasks is None:
                    spied.seen_pairs.append((v, operator.matvec(v), operator.rmatvec(v)))
                return operator.matvec(v)

        return bl.Dense().prepare(Spy(), space)


ENGINES = {"eager": bl.Eager(), "graph": bl.Compiled(backend="graph")}


@pytest.mark.parametrize("engine", ENGINES)
def test_the_transposed_product_of_a_linearization_is_the_transpose(engine):
    problem = bl.Problem(twisted_loss, lambda y, x, batch: (y["a"] ** 2).sum() + y["b"].sum() + y["c"].sum())
    inner, pairs = {"a": normal(4), "b": normal(3, seed=1), "c": normal(2, seed=2)}, []
    batches = bl.Batches(torch.ones(3, dtype=F64), torch.ones(3, dtype=F64))
    hg = bl.hypergradient(
        problem,
        normal(4, seed=3),
        inner,
        batches,
        solver=bl.Descent(Twisted(), steps=2),
        estimator=bl.Implicit(Spying(pairs)),
        engine=ENGINES[engine],
    )
    assert hg.status is bl.Status.OK
    forth, back = (torch.stack([torch.cat(pair[i]) for pair in pairs], 1) for i in (1, 2))
    assert forth.shape == (9, 9)
    assert (forth - forth.T).abs().max() > 0.1
    torch.testing.assert_close(back, forth.T, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("tasks", [False, True])
@pytest.mark.parametrize(
    "linear", [LSMR(60, 1e-12), NormalCG(60, 1e-12), GMRES(20, 20, 1e-12), BiCGSTAB(40, 1e-12)], ids=str
)
def test_hypergradients_of_a_condition_that_is_not_symmetric(linear, tasks, engine):
    problem = bl.Problem(twisted_loss, lambda y, x, batch: (y["a"] ** 2).sum() + y["b"].sum() + y["c"].sum())
    inner = {"a": normal(4), "b": normal(3, seed=1), "c": normal(2, seed=2)}
    inner = {name: torch.stack([leaf, 0.5 * leaf]) for name, leaf in inner.items()} if tasks else inner
    data = torch.ones(2, 3, dtype=F64) if tasks else torch.ones(3, dtype=F64)

    def grad(solver):
        estimator = bl.Implicit(solver)
        hg = bl.hypergradient(
            problem,
            normal(4, seed=3),
            inner,
            bl.Batches(data, data),
            solver=bl.Descent(Twisted(), steps=3),
            estimator=bl.TaskMean(estimator) if tasks else estimator,
            engine=ENGINES[engine],
        )
        assert hg.status is bl.Status.OK
        return hg.grad

    torch.testing.assert_close(grad(linear), grad(bl.Dense()), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("corrected", [False, True])
def test_kfac_is_nearly_the_inverse_of_a_linear_models_hessian(corrected):
    pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    model, loss = torch.nn.Linear(8, 3).double(), torch.nn.MSELoss()
    x, targets = normal(60, 8) * torch.logspace(0, 2, 8, dtype=F64), normal(60, 3, seed=1)
    before = [each.detach().clone() for each in model.parameters()]

    def inner_loss(y, outer, batch):
        penalty = outer * sum((leaf**2).sum() for leaf in y.values())
        return loss(torch.func.functional_call(model, y, (batch[0],)), batch[1]) + penalty

    def outer_loss(y, outer, batch):
        return loss(torch.func.functional_call(model, y, (batch[0],)), batch[1])

    def solved(preconditioner):
        return bl.hypergradient(
            bl.Problem(inner_loss, outer_loss),
            torch.tensor(1e-3, dtype=F64),
            {name: leaf.detach().clone() for name, leaf in model.named_parameters()},
            bl.Batches((x, targets), (x, targets + 1)),
            solver=bl.Descent(bl.SGD(lr=1e-5), steps=3),
            estimator=bl.Implicit(bl.CG(60, 1e-8, preconditioner=preconditioner)),
        )

    factors = bl.linear.KFAC(model, loss, [(x, targets)], damping=1e-3, corrected=corrected)
    plain, found = solved(None), solved(factors)
    assert found.status is bl.Status.OK
    assert found.stats["linear_steps"] < plain.stats["linear_steps"] / 2
    exact = solved(lambda r: r)
    assert exact.status in (bl.Status.OK, bl.Status.MAX_STEPS)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(ValueError, match="named_parameters"):
        bl.CG(preconditioner=factors).solve(lambda v: v, (torch.ones(3),))


def test_the_hypergradient_says_what_damping_was_chosen():
    problem = bl.Problem(lambda y, x, b: (vector(1.0, -0.1) * y**2).sum() / 2 - x @ y, lambda y, x, b: y.sum())
    hg = bl.hypergradient(
        problem,
        vector(1.0, 1.0),
        vector(0.1, 0.1),
        bl.Batches(None, None),
        solver=bl.Descent(bl.SGD(0.1), 2),
        estimator=bl.Implicit(LevenbergMarquardt(bl.CG(5), first=0.2, factor=2.0)),
    )
    assert hg.status is bl.Status.OK
    torch.testing.assert_close(hg.grad, 1 / (vector(1.0, -0.1) + hg.stats["linear_damping"]))
    assert hg.stats["linear_damping"] > 0.1
