"""Linear solvers on systems that cannot be solved: nothing worse than v = 0 comes back, and the status says why."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import bilevel as bl
from bilevel.linear import LinearOperator, Product, Transposed
from bilevel.linear.operator import Shifted
from bilevel.space.inner_product import Space

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SOLVERS = {"cg": bl.CG(max_steps=30, tol=1e-8), "neumann": bl.Neumann(steps=40, step_size=0.2), "dense": bl.Dense()}
every_solver = pytest.mark.parametrize("name", SOLVERS)
every_dtype = pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)


def vector(*numbers: float, dtype: torch.dtype = F64) -> Tensor:
    return torch.tensor(numbers, dtype=dtype)


def by(matrix: Tensor) -> Callable:
    """v -> A v on one leaf, or per task; summed up in float32 at least, as every device does."""
    wide = matrix.float() if matrix.dtype in (BF16, F16) else matrix
    return lambda v: ((wide @ v[0].to(wide.dtype).unsqueeze(-1)).squeeze(-1).to(v[0].dtype),)


def true_residual(matrix: Tensor, b: Tensor, v: Tensor, damping: float = 0.0) -> Tensor:
    """In float64, per row."""
    matrix, b, v = matrix.double(), b.double(), v.double()
    size = b.norm(dim=-1)
    missing = b - (matrix @ v.unsqueeze(-1)).squeeze(-1) - damping * v
    return missing.norm(dim=-1) / torch.where(size > 0, size, 1.0)


# Singular


UNTOUCHED = {
    "half of b": vector(1.0, 2.0, 1.0, -1.0),
    "all of b": vector(0.0, 0.0, 1.0, -1.0),
    "a little of b": vector(1.0, 2.0, 1e-2, 0.0),
}


@every_dtype
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("case", UNTOUCHED)
@every_solver
def test_a_right_hand_side_outside_the_range_is_never_answered_by_something_worse_than_zero(name, case, rotated, dtype):
    """An inner variable that g does not touch but f does. CG once returned 1e33 with MAX_STEPS."""
    basis = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(2), dtype=F64)).Q
    basis = basis if rotated else torch.eye(4, dtype=F64)
    A, b = ((basis * vector(3.0, 1.0, 0.0, 0.0)) @ basis.T).to(dtype), (basis @ UNTOUCHED[case]).to(dtype)
    found = SOLVERS[name].solve(by(A), (b,))
    assert true_residual(A, b, found.value[0]) <= 1.02
    assert found.residual <= 1.02
    if name == "cg" and not (case == "a little of b" and dtype in (BF16, F16)):
        assert found.status in (bl.Status.BREAKDOWN, bl.Status.NEGATIVE_CURVATURE, bl.Status.UNSOLVED)
    if name == "dense" and dtype is F64:
        assert found.status is bl.Status.BREAKDOWN


def test_a_step_along_a_curvature_that_proves_to_be_noise_is_taken_back():
    """The largest curvature shows only after the step: v = 1e17 would otherwise come back with a small residual."""
    found = bl.CG(max_steps=3, tol=1e-12).solve(by(torch.diag(vector(1e-17, 1.0))), (vector(1.0, 1e-9),))
    assert found.status is bl.Status.BREAKDOWN
    assert found.value[0].abs().max() <= 1
    assert found.residual <= 1


def test_negative_curvature_and_a_singular_matrix_are_told_apart():
    singular = bl.CG().solve(by(torch.diag(vector(1.0, 0.0))), (vector(0.0, 1.0),))
    assert singular.status is bl.Status.BREAKDOWN
    for diagonal in (vector(1.0, -1.0), vector(2.0, -1.0), vector(-1.0, -1.0)):
        assert bl.CG().solve(by(torch.diag(diagonal)), (vector(1.0, 1.0),)).status is bl.Status.NEGATIVE_CURVATURE


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_over_parametrized_least_squares_is_solved(dtype):
    root = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=F64)
    A, b = (root.T @ root).to(dtype), (root.T @ torch.ones(5, dtype=F64)).to(dtype)
    for solver in (bl.CG(max_steps=40), bl.Dense(tol=1e-5)):
        found = solver.solve(by(A), (b,))
        assert found.status is bl.Status.OK
        torch.testing.assert_close(
            found.value[0], (torch.linalg.pinv(root.T @ root) @ b.double()).to(dtype), rtol=1e-2, atol=1e-4
        )


# Above v = 0


def test_cg_that_ends_worse_than_zero_returns_its_best_iterate():
    A, b = torch.diag(torch.logspace(0, -6, 12, dtype=F64)), torch.ones(12, dtype=F64)
    risen, best = 0, 1.0
    for steps in range(1, 12):
        found = bl.CG(steps, tol=1e-12).prepare(by(A)).iterate((b,))
        torch.testing.assert_close(true_residual(A, b, found.value[0]), found.residual)
        if found.status is bl.Status.UNSOLVED:
            risen += 1
            assert found.residual.item() == pytest.approx(best)
        best = min(best, found.residual.item())
    assert 0 < risen < 11, "no solve ends above v = 0: the case tests nothing"
    assert bl.Status.UNSOLVED.failed


def test_only_the_tasks_that_end_worse_than_zero_go_back():
    steep, mild = torch.logspace(0, -6, 12, dtype=F64), torch.linspace(1, 2, 12, dtype=F64)
    A, b = torch.stack([torch.diag(steep), torch.diag(mild)]), torch.ones(2, 12, dtype=F64)
    solver = bl.CG(max_steps=5, tol=1e-12)
    together = solver.solve(by(A), (b,), tasks=2)
    alone = [solver.solve(by(A[i]), (b[i],)) for i in range(2)]
    assert together.status is alone[0].status is bl.Status.UNSOLVED
    assert alone[1].status is bl.Status.MAX_STEPS
    for i in range(2):
        torch.testing.assert_close(together.value[0][i], alone[i].value[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(together.residual[i], alone[i].residual, rtol=1e-8, atol=1e-12)


def test_where_values_cannot_be_read_zero_comes_back_with_the_failed_status():
    A, b = torch.diag(torch.logspace(0, -6, 12, dtype=F64)), torch.ones(3, 12, dtype=F64)

    def one(rhs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = bl.CG(max_steps=5, tol=1e-12).solve(by(A), (rhs,))
        return found.value[0], found.residual, torch.as_tensor(found.code)

    value, residual, code = torch.func.vmap(one)(b)
    assert (code == bl.Status.UNSOLVED.code).all()
    assert torch.equal(value, torch.zeros_like(b))
    assert torch.equal(residual, torch.ones(3, dtype=F64))


@every_solver
def test_solvers_run_on_fake_tensors(name):
    with FakeTensorMode():
        found = SOLVERS[name].solve(lambda v: (2 * v[0],), (torch.ones(3),), (torch.ones(3),))
        assert found.value[0].shape == (3,)


def test_neumann_that_grows_returns_its_best_term():
    # Contracts in the first direction, grows slowly in the second: the residual falls before it rises.
    A, b = torch.diag(vector(1.0, 2.5)), vector(1.0, 1e-3)
    found = bl.Neumann(steps=60, step_size=0.9).solve(by(A), (b,))
    assert found.status is bl.Status.NOT_CONTRACTIVE
    assert found.residual < 0.1
    torch.testing.assert_close(found.residual, true_residual(A, b, found.value[0]))


def test_a_null_direction_shows_in_the_residual_of_neumann():
    found = bl.Neumann(steps=200, step_size=0.5).solve(by(torch.diag(vector(1.0, 0.0))), (vector(1.0, 1.0),))
    torch.testing.assert_close(found.residual, vector(0.5**0.5)[0])
    nothing = bl.Neumann(steps=200, step_size=0.5).solve(by(torch.diag(vector(1.0, 0.0))), (vector(0.0, 1.0),))
    assert nothing.status is not bl.Status.OK


# Not finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@every_solver
def test_an_operator_that_is_not_finite_is_nonfinite_and_no_negative_curvature(name, bad):
    A = torch.diag(vector(1.0, 2.0, 3.0))
    A[1, 1] = bad
    found = SOLVERS[name].solve(by(A), (vector(1.0, 1.0, 1.0),))
    assert found.status is bl.Status.NONFINITE
    assert torch.isfinite(found.value[0]).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@every_solver
def test_a_right_hand_side_that_is_not_finite_is_nonfinite(name, bad):
    found = SOLVERS[name].solve(by(torch.eye(3, dtype=F64)), (vector(1.0, bad, 1.0),))
    assert found.status is bl.Status.NONFINITE


@every_solver
def test_a_task_that_is_not_finite_leaves_the_others_alone(name):
    A, b = torch.stack([torch.diag(vector(1.0, 2.0))] * 3), torch.ones(3, 2, dtype=F64)
    clean = SOLVERS[name].solve(by(A), (b,), tasks=3)
    A[1, 0, 0] = float("nan")
    found = SOLVERS[name].solve(by(A), (b,), tasks=3)
    assert found.status is bl.Status.NONFINITE
    assert torch.isfinite(found.value[0]).all()
    for i in (0, 2):
        torch.testing.assert_close(found.value[0][i], clean.value[0][i], rtol=1e-12, atol=1e-12)


def test_an_answer_that_the_dtype_cannot_hold_is_nonfinite_and_not_infinite():
    for solver in (bl.CG(), bl.Dense()):
        found = solver.solve(lambda v: (1e-30 * v[0],), (torch.full((2,), 1e20),))
        assert found.status.failed
        assert torch.isfinite(found.value[0]).all()


# 16 bits


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_ok_in_16_bits_means_a_small_residual(dtype, seed):
    """Once CG said OK at 0.6, since 100 eps = 0.78."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(20, 20, generator=generator, dtype=F64)).Q
    for condition, steps in ((5, 20), (15, 20), (100, 60), (1000, 3)):
        A = (basis * torch.logspace(0, -1, 20, base=condition, dtype=F64) @ basis.T).to(dtype)
        b = torch.randn(20, generator=generator, dtype=F64).to(dtype)
        found = bl.CG(max_steps=steps).solve(by(A), (b,))
        assert found.value[0].dtype is dtype
        if found.status is bl.Status.OK:
            assert true_residual(A, b, found.value[0]) <= 0.06
        if condition <= 15:
            assert found.status is bl.Status.OK, "a well-conditioned system"


# Start


@pytest.mark.parametrize("name", ["cg", "neumann"])
def test_a_warm_start_for_a_vanishing_right_hand_side_gives_zero(name):
    """At the very optimum of the outer loss; once inf."""
    b, start = torch.zeros(3, dtype=F64), (vector(1.0, 2.0, 3.0),)
    found = SOLVERS[name].solve(by(torch.diag(vector(1.0, 2.0, 4.0))), (b,), start)
    assert torch.equal(found.value[0], b)
    assert (found.residual.item(), found.status) == (0.0, bl.Status.OK)


@pytest.mark.parametrize("first", [1e6, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["cg", "neumann"])
def test_a_start_worse_than_zero_is_no_start_for_its_task(name, first):
    A, b = torch.diag(vector(1.0, 2.0, 4.0)), torch.ones(2, 3, dtype=F64)
    good = vector(0.9, 0.5, 0.2)
    found = SOLVERS[name].solve(by(A), (b,), (torch.stack([torch.full((3,), first, dtype=F64), good]),), tasks=2)
    assert not found.status.failed
    torch.testing.assert_close(found.value[0], b / torch.diag(A), rtol=1e-3, atol=0)


# Operators


def rotation() -> Tensor:
    return torch.tensor([[2.0, 1.0], [-1.0, 2.0]], dtype=F64)


class Turned(LinearOperator):
    """A non-symmetric operator with all its products."""

    def matvec(self, v):
        return (rotation() @ v[0],)

    def rmatvec(self, v):
        return (rotation().T @ v[0],)

    def diagonal(self):
        return (rotation().diagonal(),)


def test_cg_refuses_an_operator_that_is_not_symmetric():
    with pytest.raises(ValueError, match=r"CG was given Turned.*symmetric=False.*Neumann.*Dense"):
        bl.CG().solve(Turned(), (vector(1.0, 1.0),))
    with pytest.raises(TypeError, match="given Tensor for A; a LinearOperator or a function"):
        bl.CG().solve(rotation(), (vector(1.0, 1.0),))


@pytest.mark.parametrize("solver", [bl.Dense(damping=0.5), bl.Neumann(300, 0.3, damping=0.5)], ids=["dense", "neumann"])
@pytest.mark.parametrize("transposed", [False, True])
def test_systems_that_are_not_symmetric_are_solved_as_given(solver, transposed):
    operator, A, b = Turned(), rotation(), vector(1.0, -3.0)
    found = solver.solve(Transposed(operator) if transposed else operator, (b,))
    A = (A.T if transposed else A) + 0.5 * torch.eye(2, dtype=F64)
    torch.testing.assert_close(found.value[0], torch.linalg.solve(A, b), rtol=1e-9, atol=1e-12)
    assert found.status is bl.Status.OK


def test_products_of_derived_operators():
    v = (vector(1.0, 2.0),)
    shifted = Shifted(Turned(), 0.5)
    assert torch.equal(shifted.rmatvec(v)[0], rotation().T @ v[0] + 0.5 * v[0])
    assert torch.equal(shifted.diagonal()[0], vector(2.5, 2.5))
    assert torch.equal(Transposed(Turned()).rmatvec(v)[0], rotation() @ v[0])
    assert not shifted.symmetric
    assert Product(lambda v: v).diagonal() is None
    with pytest.raises(NotImplementedError, match="Product was asked for a product with its transpose"):
        Product(lambda v: v, symmetric=False).rmatvec(v)


def test_dense_makes_its_products_once_for_all_right_hand_sides():
    calls = []

    def product(v):
        calls.append(1)
        return (torch.diag(vector(1.0, 2.0, 4.0)) @ v[0],)

    prepared = bl.Dense().prepare(product)
    for b in (vector(1.0, 2.0, 3.0), vector(0.0, 0.0, 1.0)):
        torch.testing.assert_close(prepared.iterate((b,)).value[0], b / vector(1.0, 2.0, 4.0))
    assert len(calls) == 3


# Space


@pytest.mark.parametrize("tasks", [None, 2])
def test_leaves_without_elements_count_as_zero(tasks):
    lead = () if tasks is None else (tasks,)
    x = (torch.ones(*lead, 3), torch.ones(*lead, 0), torch.ones(*lead, 2, 0))
    space = Space(tasks)
    for found, expected in ((space.dot(x, x), 3.0), (space.norm(x) ** 2, 3.0), (space.largest(x), 1.0)):
        assert found.shape == lead
        torch.testing.assert_close(found, torch.full(lead, expected, dtype=found.dtype))
    for solver in SOLVERS.values():
        found = solver.solve(lambda v: tuple(2 * leaf for leaf in v), x, tasks=tasks)
        assert [leaf.shape for leaf in found.value] == [leaf.shape for leaf in x]
        torch.testing.assert_close(found.value[0], torch.full((*lead, 3), 0.5), rtol=1e-3, atol=0)
        empty = solver.solve(lambda v: v, x[1:], tasks=tasks)
        assert empty.status is bl.Status.OK


def test_select_lets_nothing_through():
    x = (torch.tensor([[1.0, 2.0], [float("nan"), float("inf")]]),)
    assert torch.equal(Space(2).where(torch.tensor([True, False]), x)[0], torch.tensor([[1.0, 2.0], [0.0, 0.0]]))


# All at once


KINDS = ("definite", "consistent", "inconsistent", "indefinite", "zero", "ill", "nan", "tiny", "huge", "b = 0", "b nan")


def drawn(kind: str, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    def uniform() -> float:
        return float(torch.rand((), generator=generator))

    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=F64)).Q
    values = 0.1 + 3 * torch.rand(size, generator=generator, dtype=F64)
    values[: size // 2] *= {"consistent": 0, "inconsistent": 0, "zero": 0, "indefinite": -1}.get(kind, 1)
    values = torch.logspace(0, -12, size, dtype=F64) if kind == "ill" else 0 * values if kind == "zero" else values
    A, b = basis * values @ basis.T, torch.randn(size, generator=generator, dtype=F64)
    b = A @ b if kind == "consistent" else 0 * b if kind == "b = 0" else b
    if kind in ("tiny", "huge"):
        sign = -1 if kind == "tiny" else 1
        A, b = A * 10 ** (sign * 15 * uniform()), b * 10 ** (sign * 15 * uniform())
    if kind == "nan":
        A[0, -1] = float("nan")
    if kind == "b nan":
        b[0] = float("inf") if uniform() < 0.5 else float("nan")
    return A, b


@every_dtype
@pytest.mark.parametrize("seed", range(12))
def test_whatever_the_system_the_answer_is_safe_and_the_status_is_true(seed, dtype):
    generator = torch.Generator().manual_seed(1000 + seed)
    narrow = dtype in (BF16, F16)

    def pick(options):
        return options[int(torch.randint(len(options), (), generator=generator))]

    for _ in range(6):
        tasks, size, damping = pick((None, 3)), pick((2, 5, 9)), pick((0.0, 0.0, 0.3))
        kinds = [pick(KINDS) for _ in range(tasks or 1)]
        systems = [drawn(kind, size, generator) for kind in kinds]
        A, b = (torch.stack(parts).to(dtype) for parts in zip(*systems, strict=True))
        wide, cut, lead = A.float() if narrow else A, [1, 0, size - 1], () if tasks is None else (tasks,)

        def split(rows, cut=cut, lead=lead):
            one, none, rest = rows.split(cut, dim=1)
            return one.reshape(*lead, 1, 1), none.reshape(*lead, 0), rest.reshape(*lead, -1)

        def join(leaves, count=tasks or 1):
            return torch.cat([leaf.reshape(count, leaf.numel() // count) for leaf in leaves], dim=1)

        def product(v, wide=wide, join=join, split=split):
            return split((wide @ join(v).to(wide.dtype).unsqueeze(-1)).squeeze(-1).to(dtype))

        solver = pick(
            (
                bl.CG(pick((1, 3, 9, 40)), pick((0.0, 1e-6, 0.1)), damping),
                bl.Dense(damping),
                bl.Neumann(pick((1, 5, 60)), pick((0.1, 0.5, 2.0)), damping=damping),
            )
        )
        start = pick((None, split(10 ** pick((-2, 0, 3)) * torch.randn(b.shape, generator=generator).to(dtype))))
        found = solver.solve(product, split(b), start, tasks=tasks)
        where = f"{solver}, {kinds}, start {start is not None}: {found.status.name}"
        v = join(found.value).double()
        assert torch.isfinite(v).all(), where
        good = torch.isfinite(A).flatten(1).all(1) & torch.isfinite(b).all(1)
        residual, size_of_b = true_residual(A, b, v, damping), b.double().norm(dim=1)
        size_of_b = torch.where(size_of_b > 0, size_of_b, 1.0)
        # What rounding A v to this dtype can hide, its subnormal numbers included.
        finfo = torch.finfo(dtype)
        hidden = (A.double().abs() @ v.abs().unsqueeze(-1)).squeeze(-1).norm(dim=1) / size_of_b
        blur = 30 * finfo.eps * (1 + hidden) + 30 * finfo.tiny * finfo.eps / size_of_b
        assert (residual <= 1 + blur)[good].all(), (where, residual)
        reported = found.residual.reshape(-1).double()
        assert ((reported - residual).abs() <= blur + 0.01 * residual)[good].all(), (where, reported, residual)
        if found.status is bl.Status.OK:
            assert good.all(), where
            assert (residual <= 1.1 * max(0.05, solver.tol) + blur).all(), (where, residual)
        if not good.all():
            assert found.status is bl.Status.NONFINITE, where
