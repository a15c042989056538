"""Linear solvers: known answers, failures as statuses, tasks that do not disturb each other.

That no answer is worse than v = 0, whatever the system, is in test_linear_safety.py.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import bilevel as bl

F64 = torch.float64
SOLVERS = {
    "cg": bl.CG(max_steps=40, tol=1e-12),
    "neumann": bl.Neumann(steps=2000, step_size=0.1),
    "dense": bl.Dense(tol=1e-10),
}


def vector(*numbers: float, dtype: torch.dtype = F64) -> Tensor:
    return torch.tensor(numbers, dtype=dtype)


def by(matrix: Tensor) -> Callable:
    """v -> A v on one leaf; on (T, P) with a stack of matrices."""
    return lambda v: ((matrix @ v[0].unsqueeze(-1)).squeeze(-1),)


def definite(size: int, condition: float, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    """Symmetric positive definite with eigenvalues spread from 10 / condition to 10."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=F64)).Q
    return (basis * torch.logspace(0, -1, size, base=condition, dtype=F64) * 10 @ basis.T).to(dtype)


def right_hand_side(size: int, seed: int = 1, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def counted(product: Callable, calls: list) -> Callable:
    def call(v):
        calls.append(1)
        return product(v)

    return call


# Known answers


def test_cg_solves_the_identity_in_one_step():
    b = vector(1.0, 2.0, 3.0)
    found = bl.CG(max_steps=10, tol=1e-12).solve(lambda v: v, (b,))
    assert torch.equal(found.value[0], b)
    assert (int(found.steps), found.status, found.residual.item()) == (1, bl.Status.OK, 0.0)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_well_conditioned_system_is_solved(name):
    A, b = definite(6, condition=5), right_hand_side(6)
    found = SOLVERS[name].solve(by(A), (b,))
    torch.testing.assert_close(found.value[0], torch.linalg.solve(A, b), rtol=1e-9, atol=1e-12)
    assert found.status is bl.Status.OK


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_cg_is_exact_after_as_many_steps_as_unknowns_and_not_before(size):
    # (Condition 5: one step on a worse matrix can end above the residual of v = 0, which is a failure of its own.)
    A, b = definite(size, condition=5), right_hand_side(size)
    found = bl.CG(max_steps=size, tol=1e-10).solve(by(A), (b,))
    torch.testing.assert_close(found.value[0], torch.linalg.solve(A, b), rtol=1e-8, atol=1e-10)
    assert (int(found.steps), found.status) == (size, bl.Status.OK)
    if size > 1:
        early = bl.CG(max_steps=size - 1, tol=1e-10).solve(by(A), (b,))
        assert early.status is bl.Status.MAX_STEPS
        assert not early.status.failed
        assert early.residual > 1e-6


def test_cg_returns_the_iterate_that_met_the_tolerance():
    A, b = definite(8, condition=30), right_hand_side(8)
    for tol in (1e-1, 1e-2, 1e-4):
        found = bl.CG(max_steps=20, tol=tol).solve(by(A), (b,))
        before = bl.CG(max_steps=max(int(found.steps) - 1, 1), tol=tol).solve(by(A), (b,))
        assert found.residual <= tol < before.residual


def test_a_tree_of_several_leaves_is_one_system():
    A, b = definite(6, condition=5), right_hand_side(6)

    def product(v):
        flat = A @ torch.cat([v[0].reshape(-1), v[1].reshape(-1), v[2].reshape(-1)])
        return flat[:4].reshape(2, 2), flat[4:5].reshape(()), flat[5:]

    leaves = (b[:4].reshape(2, 2), b[4], b[5:])
    for solver in SOLVERS.values():
        found = solver.solve(product, leaves)
        assert [leaf.shape for leaf in found.value] == [leaf.shape for leaf in leaves]
        torch.testing.assert_close(
            torch.cat([leaf.reshape(-1) for leaf in found.value]), torch.linalg.solve(A, b), rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize(
    ("steps", "step_size", "expected"),
    [(1, 0.25, 0.375), (3, 0.25, 0.25 * (1 + 0.5 + 0.25 + 0.125)), (60, 0.25, 0.5)],
)
def test_neumann_is_the_sum_of_its_series(steps, step_size, expected):
    found = bl.Neumann(steps=steps, step_size=step_size).solve(lambda v: (2 * v[0],), (vector(1.0),))
    torch.testing.assert_close(found.value[0], vector(expected), rtol=1e-12, atol=0)


def test_neumann_on_a_diagonal_agrees_with_the_known_answer():
    found = bl.Neumann(steps=50, step_size=0.5).solve(by(torch.diag(vector(2.0, 0.5))), (vector(1.0, 1.0),))
    torch.testing.assert_close(found.value[0], vector(0.5, 1.9999992), rtol=0, atol=5e-8)
    assert found.status is bl.Status.OK


# Singular, indefinite, zero


def test_cg_solves_a_singular_consistent_system():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(8, 4, generator=generator, dtype=F64)
    A = root @ root.T
    b = A @ right_hand_side(8)
    found = bl.CG(max_steps=20, tol=1e-10).solve(by(A), (b,))
    assert found.status is bl.Status.OK
    # From zero CG stays in the range of A: the solution of least norm.
    torch.testing.assert_close(found.value[0], torch.linalg.pinv(A) @ b, rtol=1e-7, atol=1e-9)


def softmax_hessian(seed: int) -> Tensor:
    """Hessian of cross-entropy in a linear head: adding one vector to all class rows changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    inputs, weights = (
        torch.randn(30, 4, generator=generator, dtype=F64),
        torch.randn(4, 3, generator=generator, dtype=F64),
    )
    total = torch.zeros(12, 12, dtype=F64)
    for x in inputs:
        p = (x @ weights).softmax(-1)
        total += torch.kron(torch.outer(x, x), torch.diag(p) - torch.outer(p, p)) / len(inputs)
    return total


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-6), (torch.float32, 1e-8), (F64, 1e-8), (F64, 0.0)])
def test_cg_on_a_softmax_head_is_no_failure_however_small_the_tolerance(dtype, tol, seed):
    """MemoryReduced's default is tol=1e-8 with 20 steps, which float32 cannot meet: past rounding CG must stop, not
    wander off."""
    A = softmax_hessian(seed).to(dtype)
    b = A @ right_hand_side(12, seed=seed).to(dtype)
    found = bl.CG(max_steps=20, tol=tol).solve(by(A), (b,))
    assert found.residual <= (1e-5 if dtype is torch.float32 else 1e-8)
    assert not found.status.failed


SINGULAR = {
    "zero pivot": (torch.diag(vector(1.0, 0.0)), vector(1.0, 0.0)),
    "ones": (torch.ones(2, 2, dtype=F64), vector(1.0, 1.0)),
    "softmax head": (softmax_hessian(0), softmax_hessian(0) @ right_hand_side(12)),
}


@pytest.mark.parametrize("name", SINGULAR)
def test_dense_solves_a_singular_consistent_system_with_the_least_norm(name):
    A, b = SINGULAR[name]
    found = bl.Dense().solve(by(A), (b,))
    assert found.status is bl.Status.OK
    torch.testing.assert_close(found.value[0], torch.linalg.pinv(A) @ b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", SINGULAR)
def test_dense_reports_a_right_hand_side_outside_the_range_and_returns_least_squares(name):
    A, b = SINGULAR[name]
    b = b + right_hand_side(len(b), seed=5)
    found = bl.Dense().solve(by(A), (b,))
    assert found.status is bl.Status.BREAKDOWN
    torch.testing.assert_close(found.value[0], torch.linalg.pinv(A) @ b, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.residual, (b - A @ found.value[0]).norm() / b.norm())


def test_dense_solves_for_a_zero_right_hand_side_even_where_the_matrix_is_zero():
    found = bl.Dense().solve(lambda v: (0 * v[0],), (torch.zeros(3, dtype=F64),))
    assert torch.equal(found.value[0], torch.zeros(3, dtype=F64))
    assert (found.residual.item(), found.status) == (0.0, bl.Status.OK)


INDEFINITE = {
    "p'Hp = 0": (vector(1.0, -1.0), vector(1.0, -1.0)),
    "met at the second step": (vector(2.0, -1.0), vector(0.5, -1.0)),
}


@pytest.mark.parametrize(("diagonal", "solution"), INDEFINITE.values(), ids=list(INDEFINITE))
def test_cg_reports_an_indefinite_matrix_and_keeps_a_finite_iterate(diagonal, solution):
    found = bl.CG(max_steps=10).solve(by(torch.diag(diagonal)), (vector(1.0, 1.0),))
    assert found.status is bl.Status.NEGATIVE_CURVATURE
    assert found.status.failed
    assert torch.isfinite(found.value[0]).all()


@pytest.mark.parametrize(("diagonal", "solution"), INDEFINITE.values(), ids=list(INDEFINITE))
def test_dense_solves_an_indefinite_system(diagonal, solution):
    found = bl.Dense().solve(by(torch.diag(diagonal)), (vector(1.0, 1.0),))
    torch.testing.assert_close(found.value[0], solution, rtol=1e-12, atol=0)
    assert found.status is bl.Status.OK


@pytest.mark.parametrize(
    ("diagonal", "steps"),
    [(diagonal, steps) for diagonal in [(2.0, 2.0), (2.0, 0.5)] for steps in (1, 2, 3, 50)]
    + [((1.0, -1.0), 3), ((1.0, -1.0), 50)],
    ids=str,
)
def test_neumann_reports_a_series_that_grows_however_short(diagonal, steps):
    found = bl.Neumann(steps=steps, step_size=1.5).solve(by(torch.diag(vector(*diagonal))), (vector(1.0, 1.0),))
    assert found.status is bl.Status.NOT_CONTRACTIVE
    assert found.status.failed
    assert found.residual <= 1
    true = vector(1.0, 1.0) - vector(*diagonal) * found.value[0]
    torch.testing.assert_close(found.residual, true.norm() / 2**0.5)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_zero_right_hand_side_has_the_zero_solution(name):
    found = SOLVERS[name].solve(by(definite(4, condition=5)), (torch.zeros(4, dtype=F64),))
    assert torch.equal(found.value[0], torch.zeros(4, dtype=F64))
    assert (found.residual.item(), found.status) == (0.0, bl.Status.OK)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_right_hand_side_that_is_not_finite_is_a_failure(name, bad):
    """Otherwise CG returns zeros with MAX_STEPS, which raise_if_failed lets pass."""
    found = SOLVERS[name].solve(by(definite(3, condition=5)), (vector(1.0, bad, 1.0),))
    assert found.status.failed


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e20),
        (torch.float32, 1e-25),
        (torch.float32, 1e-20),
        (torch.float16, 300.0),
        (torch.float16, 1e-4),
        (torch.bfloat16, 1e-4),
    ],
    ids=str,
)
@pytest.mark.parametrize("solver", [bl.CG(), bl.Neumann(steps=20, step_size=0.25)], ids=["cg", "neumann"])
def test_the_scale_of_the_right_hand_side_does_not_matter_or_is_a_failure(solver, dtype, scale):
    """|b|^2 over- or underflows long before b does; zeros must not come back as if they solved the system."""
    b = torch.full((2,), scale, dtype=dtype)
    found = solver.solve(lambda v: (2 * v[0],), (b,))
    if not found.status.failed:
        torch.testing.assert_close(found.value[0], b / 2, rtol=2e-2, atol=0)


# Start, damping, residual


@pytest.mark.parametrize("name", ["cg", "neumann"])
def test_an_exact_start_stays(name):
    A, b = definite(5, condition=5), right_hand_side(5)
    solution = torch.linalg.solve(A, b)
    found = SOLVERS[name].solve(by(A), (b,), (solution,))
    torch.testing.assert_close(found.value[0], solution, rtol=1e-12, atol=1e-14)
    if name == "cg":
        assert int(found.steps) == 0
        assert torch.equal(found.value[0], solution)


def test_a_start_close_to_the_solution_saves_steps():
    A, b = definite(8, condition=100), right_hand_side(8)
    cold = bl.CG(max_steps=20, tol=1e-4).solve(by(A), (b,))
    solution = torch.linalg.solve(A, b)
    warm = bl.CG(max_steps=20, tol=1e-4).solve(by(A), (b,), (solution + 1e-4 * right_hand_side(8, seed=2),))
    assert warm.steps < cold.steps
    assert warm.residual <= 1e-4


@pytest.mark.parametrize("start", [None, "random"])
@pytest.mark.parametrize("name", SOLVERS)
def test_damping_equals_solving_the_shifted_system(name, start):
    A, b = definite(5, condition=5), right_hand_side(5)
    guess = None if start is None else (right_hand_side(5, seed=9),)
    kwargs = {field: getattr(SOLVERS[name], field) for field in SOLVERS[name].__dataclass_fields__}
    damped = type(SOLVERS[name])(**{**kwargs, "damping": 0.7}).solve(by(A), (b,), guess)
    shifted = SOLVERS[name].solve(by(A + 0.7 * torch.eye(5, dtype=F64)), (b,), guess)
    torch.testing.assert_close(damped.value[0], shifted.value[0], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(
        damped.value[0], torch.linalg.solve(A + 0.7 * torch.eye(5, dtype=F64), b), rtol=1e-9, atol=1e-12
    )
    assert damped.residual < 1e-9


RESIDUALS = {
    "cg, unfinished": bl.CG(max_steps=2),
    "cg, damped": bl.CG(max_steps=2, damping=0.5),
    "neumann": bl.Neumann(steps=3, step_size=0.05),
    "neumann, damped": bl.Neumann(steps=3, step_size=0.05, damping=0.5),
    "dense": bl.Dense(),
}


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("name", RESIDUALS)
def test_the_residual_of_solve_is_the_true_one(name, dtype):
    solver, A, b = RESIDUALS[name], definite(6, condition=20, dtype=dtype), right_hand_side(6, dtype=dtype)
    found = solver.solve(by(A), (b,))
    v = found.value[0].double()
    true = (b.double() - A.double() @ v - solver.damping * v).norm() / b.double().norm()
    floor = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.residual.double(), true, rtol=floor, atol=floor)


@pytest.mark.parametrize("name", SOLVERS)
def test_float32_reaches_its_own_precision(name):
    A, b = definite(5, condition=5, dtype=torch.float32), right_hand_side(5, dtype=torch.float32)
    solver = (
        bl.CG(max_steps=20, tol=1e-6)
        if name == "cg"
        else bl.Neumann(steps=200, step_size=0.1)
        if name == "neumann"
        else bl.Dense()
    )
    found = solver.solve(by(A), (b,))
    assert found.value[0].dtype is torch.float32
    assert found.status is bl.Status.OK
    torch.testing.assert_close(found.value[0], torch.linalg.solve(A.double(), b.double()).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SOLVERS)
def test_solve_changes_neither_right_hand_side_nor_start(name):
    A, b, start = definite(4, condition=5), right_hand_side(4), right_hand_side(4, seed=3)
    before, versions = (b.clone(), start.clone()), (b._version, start._version)
    SOLVERS[name].solve(by(A), (b,), (start,))
    assert versions == (b._version, start._version)
    assert torch.equal(b, before[0])
    assert torch.equal(start, before[1])


def test_cg_makes_one_product_a_step_and_one_for_the_residual():
    A, b, calls = definite(6, condition=20), right_hand_side(6), []
    found = bl.CG(max_steps=20, tol=1e-8).solve(counted(by(A), calls), (b,))
    assert len(calls) == int(found.steps) + 1


# Tasks


def stacked(dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    """Four systems of increasing condition number, the first solved in one step. None so bad that six steps are not
    exact to rounding."""
    matrices = [
        10 * torch.eye(6, dtype=F64),
        *(definite(6, condition=c, seed=i) for i, c in ((1, 3.0), (2, 10.0), (3, 30.0))),
    ]
    return torch.stack(matrices).to(dtype), torch.stack([right_hand_side(6, seed=i) for i in range(4)]).to(dtype)


TASK_SOLVERS = {
    "cg": bl.CG(max_steps=6, tol=1e-8),
    "cg, cut short": bl.CG(max_steps=3, tol=1e-8),
    "cg, loose and damped": bl.CG(max_steps=6, tol=1e-2, damping=0.1),
    "neumann": bl.Neumann(steps=30, step_size=0.05),
    "dense": bl.Dense(),
}


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("name", TASK_SOLVERS)
def test_tasks_are_solved_as_they_would_be_one_by_one(name, dtype):
    A, b = stacked(dtype)
    solver = TASK_SOLVERS[name]
    together = solver.solve(by(A), (b,), tasks=4)
    alone = [solver.solve(by(A[i]), (b[i],)) for i in range(4)]
    rtol = 1e-10 if dtype is F64 else 1e-3
    assert together.residual.shape == (4,)
    torch.testing.assert_close(together.value[0], torch.stack([one.value[0] for one in alone]), rtol=rtol, atol=rtol)
    # The residual is relative to b already.
    torch.testing.assert_close(together.residual, torch.stack([one.residual for one in alone]), rtol=rtol, atol=rtol)
    assert int(together.steps) == max(int(one.steps) for one in alone)
    assert together.status.code == max(one.status.code for one in alone)


def test_a_converged_task_is_frozen_while_the_others_go_on():
    A, b = stacked()
    short = bl.CG(max_steps=1, tol=1e-8).solve(by(A), (b,), tasks=4)
    long = bl.CG(max_steps=6, tol=1e-8).solve(by(A), (b,), tasks=4)
    assert torch.equal(short.value[0][0], long.value[0][0])
    assert not torch.equal(short.value[0][1], long.value[0][1])


def test_a_task_with_negative_curvature_does_not_disturb_the_others():
    A, b = stacked()
    A[1] = torch.diag(vector(1.0, -1.0, 1.0, -1.0, 1.0, -1.0))
    b[1] = 1.0
    together = bl.CG(max_steps=6, tol=1e-8).solve(by(A), (b,), tasks=4)
    assert together.status is bl.Status.NEGATIVE_CURVATURE
    assert torch.isfinite(together.value[0]).all()
    for i in (0, 2, 3):
        torch.testing.assert_close(together.value[0][i], torch.linalg.solve(A[i], b[i]), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "solver", [bl.CG(max_steps=6, tol=1e-8), bl.Neumann(steps=20, step_size=0.05)], ids=["cg", "neumann"]
)
def test_a_task_that_is_not_finite_does_not_disturb_the_others_and_is_reported(solver):
    A, b = stacked()
    clean = solver.solve(by(A), (b,), tasks=4)
    b[1, 0] = float("nan")
    together = solver.solve(by(A), (b,), tasks=4)
    assert together.status.failed
    for i in (0, 2, 3):
        torch.testing.assert_close(together.value[0][i], clean.value[0][i], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("name", ["cg", "cg, cut short", "cg, loose and damped", "neumann"])
def test_vmap_over_solve_equals_a_loop(name, start):
    A, b = stacked()
    solver = TASK_SOLVERS[name]
    guess = 0.1 * b.flip(0)

    def one(matrix, rhs, first):
        found = solver.solve(by(matrix), (rhs,), (first,) if start else None)
        return found.value[0], found.residual, torch.as_tensor(found.code), torch.as_tensor(found.steps)

    mapped = torch.func.vmap(one)(A, b, guess)
    looped = [torch.stack(parts) for parts in zip(*(one(A[i], b[i], guess[i]) for i in range(4)), strict=True)]
    for together, alone in zip(mapped, looped, strict=True):
        torch.testing.assert_close(together.expand_as(alone), alone, rtol=1e-10, atol=1e-11)


OPTIMIZERS = {
    "sgd": (bl.SGD(lr=0.09), 1e-8, 4000),
    "momentum": (bl.SGD(lr=0.05, momentum=0.5), 1e-8, 4000),
    "adam": (bl.Adam(lr=0.05, betas=(0.8, 0.99)), 1e-4, 4000),
}


def quadratic(y, x, batch):
    matrix, rhs = batch
    return 0.5 * y @ matrix @ y - rhs @ y


def converge(solver, A, b, *, tasks):
    problem = bl.Problem(quadratic, lambda y, x, batch: y.sum())
    y0 = torch.zeros(b.shape, dtype=F64)
    found = bl.adapt(problem, y0[..., :1], y0, bl.Batches((A, b), b), solver=solver, tasks=tasks)
    assert torch.equal(y0, torch.zeros(b.shape, dtype=F64))
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_converge_stops_each_task_by_itself_as_it_would_alone(name):
    A, b = stacked()
    optimizer, tol, most = OPTIMIZERS[name]
    solver = bl.Converge(optimizer, tol=tol, max_steps=most)
    together = converge(solver, A, b, tasks=True)
    alone = [converge(solver, A[i], b[i], tasks=False) for i in range(4)]
    steps = [one.stats["inner_steps"] for one in alone]
    assert together.status is bl.Status.OK
    assert len(set(steps)) > 1, "the tasks are too alike to test anything"
    assert together.stats["inner_steps"] == max(steps)
    assert (together.stats["inner_residual"] <= tol).all()
    # A task that went on after it had arrived would be off by about tol.
    torch.testing.assert_close(together.inner, torch.stack([one.inner for one in alone]), rtol=0, atol=tol / 100)


def test_converge_reports_the_task_that_did_not_arrive():
    A, b = stacked()
    found = converge(bl.Converge(bl.SGD(lr=0.09), tol=1e-8, max_steps=50), A, b, tasks=True)
    assert found.status is bl.Status.INNER_MAX_STEPS
    residual = found.stats["inner_residual"]
    assert (residual <= 1e-8).tolist() == [True, True, False, False], residual
