"""Wrong numbers on the shelves (issue 11): linear solvers and operators of users, zeroth order, the logarithm."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

import bilevel as bl
from bilevel.linear.operator import as_operator
from bilevel.problems.logarithmic import logarithmic, restored

D = torch.float64
NONE = bl.Batches(None, None)
A = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=D)
H = torch.tensor([1.0, 2.0, 3.0])
LINEAR = {
    "CG": bl.CG(20),
    "preconditioned CG": bl.CG(20, preconditioner=bl.linear.Jacobi(probes=2)),
    "MINRES": bl.linear.MINRES(),
    "GMRES": bl.linear.GMRES(),
    "BiCGSTAB": bl.linear.BiCGSTAB(),
    "LSMR": bl.linear.LSMR(),
    "NormalCG": bl.linear.NormalCG(),
    "Chebyshev": bl.linear.Chebyshev(0.5, 3.0),
    "Dense": bl.Dense(),
    "Neumann": bl.Neumann(50, 0.3),
    "Nystrom": bl.linear.Nystrom(2, 1e-6),
    "LevenbergMarquardt": bl.linear.LevenbergMarquardt(bl.CG(20)),
    "Masked": bl.linear.Masked(bl.CG(20)),
}
EVERY = pytest.mark.parametrize("solver", LINEAR.values(), ids=list(LINEAR))


class Own(bl.linear.LinearOperator):
    """An operator of the user's own."""

    symmetric = True

    def __init__(self, product):
        self.product = product

    def matvec(self, v):
        return self.product(v)


def in_place(v):
    v[0].mul_(2)
    return (A @ v[0] / 2,)


@EVERY
@pytest.mark.parametrize("wrap", [Own, lambda product: product], ids=["operator", "function"])
def test_a_product_that_changes_v_is_refused(solver, wrap):
    """Dense said OK of a wrong number, and GMRES, MINRES and Nystrom MAX_STEPS."""
    with pytest.raises(ValueError, match="changed v in place"):
        solver.solve(wrap(in_place), (torch.ones(2, dtype=D),))


@EVERY
@pytest.mark.parametrize(
    ("product", "words"),
    [
        (lambda v: A @ v[0], "returned Tensor"),
        (lambda v: (A @ v[0])[None], "returned Tensor"),
        (lambda v: (1.0,), "returned tuple"),
        (lambda v: ((A @ v[0]).float(),), "returned torch.float32 for a v of torch.float64"),
        (lambda v: (A[:1] @ v[0],), r"returned \[\(1,\)\]"),
    ],
)
def test_an_operator_of_the_users_own_is_held_against_v(solver, product, words):
    """Torch's errors of sizes and dtypes came out; of float32 Chebyshev said MAX_STEPS."""
    with pytest.raises(ValueError, match=words):
        solver.solve(Own(product), (torch.ones(2, dtype=D),))


def test_a_transposed_operator_is_held_as_well():
    with pytest.raises(ValueError, match="changed v in place"):
        bl.Dense().solve(bl.linear.Transposed(Own(in_place)), (torch.ones(2, dtype=D),))


@EVERY
@pytest.mark.parametrize(
    ("b", "start", "tasks", "words"),
    [
        (torch.ones(2, dtype=D), None, None, "b=a tensor"),
        ((), None, None, r"b=\(\)"),
        (None, None, None, "b=None"),
        ((1.0,), None, None, "1.0 in b"),
        ((torch.ones(2, dtype=torch.long),), None, None, "torch.int64 in b"),
        ((torch.ones(2, dtype=D),), torch.ones(2, dtype=D), None, "start=a tensor"),
        ((torch.ones(2, dtype=D),), (torch.ones(3, dtype=D),), None, r"start of the shapes \[\(3,\)\]"),
        ((torch.ones(2, 2, dtype=D),), None, 3, "tasks=3"),
        ((torch.ones((), dtype=D),), None, 1, "tasks=1"),
    ],
)
def test_vectors_that_are_none_are_refused_in_words(solver, b, start, tasks, words):
    with pytest.raises((TypeError, ValueError), match=words):
        solver.solve(lambda v: tuple(2 * leaf for leaf in v), b, start, tasks=tasks)


@pytest.mark.parametrize("solver", [bl.linear.LSMR(), bl.linear.NormalCG(), bl.Neumann(50, 0.3)], ids=repr)
def test_a_start_of_another_dtype_is_a_start(solver):
    """The answer was of float32, or none came."""
    found = solver.solve(lambda v: (A @ v[0],), (torch.ones(2, dtype=D),), (torch.ones(2),))
    assert found.value[0].dtype == D
    assert (A @ found.value[0] - 1).norm() < 1e-4


@pytest.mark.parametrize("block", [1, 0, None, "all"])
def test_a_block_that_is_no_mask_is_refused_in_words(block):
    """'int' object has no attribute 'dtype'."""
    with pytest.raises(TypeError, match="a tensor of bools, or True or False, was needed"):
        bl.linear.Masked(bl.CG(), blocks=(block,)).solve(lambda v: (A @ v[0],), (torch.ones(2, dtype=D),))


class PreparedOwn(bl.linear.Prepared):
    def iterate(self, b, start=None):
        return self.solver.answer(b)


@dataclasses.dataclass(frozen=True)
class OwnSolver(bl.LinearSolver):
    """A linear solver of the user's own."""

    answer: Callable
    tol: float = 1e-3
    damping: float = 0.0

    def prepare(self, operator, space=None):
        return PreparedOwn(self, as_operator(operator), space)


OK = bl.Status.OK.code


def hypergradient(solver):
    problem = bl.Problem(lambda y, x, b: 0.5 * y @ A @ y - y @ x, lambda y, x, b: (y + 1) @ (y + 1))
    start = torch.zeros(2, dtype=D)
    return bl.hypergradient(
        problem, start, start, NONE, solver=bl.Descent(bl.SGD(0.3), 3), estimator=bl.Implicit(solver)
    )


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda b: None, "returned None; a LinearSolution was needed"),
        (lambda b: b, "a LinearSolution was needed"),
        (lambda b: bl.LinearSolution(b[0], torch.tensor(0.0), 1, OK), "value=a tensor of torch.float64"),
        (lambda b: bl.LinearSolution((b[0][:1],), torch.tensor(0.0), 1, OK), r"shapes \[\(1,\)\]"),
        (lambda b: bl.LinearSolution(b, torch.tensor(0.0), 1, bl.Status.OK), "code=OK; its integer"),
        (lambda b: bl.LinearSolution((b[0].mul_(2),), torch.tensor(0.0), 1, OK), "changed b in place"),
    ],
)
@pytest.mark.parametrize(
    "use",
    [
        lambda s: s.solve(lambda v: (A @ v[0],), (torch.ones(2, dtype=D),)),
        lambda s: bl.linear.Masked(s).solve(lambda v: (A @ v[0],), (torch.ones(2, dtype=D),)),
        lambda s: bl.linear.LevenbergMarquardt(s).solve(lambda v: (A @ v[0],), (torch.ones(2, dtype=D),)),
        hypergradient,
    ],
    ids=["solve", "Masked", "LevenbergMarquardt", "Implicit"],
)
def test_what_a_solver_of_the_users_own_returns_is_looked_at(answer, words, use):
    """Torch's errors and attribute errors came out."""
    with pytest.raises((TypeError, ValueError), match=words):
        use(OwnSolver(answer))


def test_plain_numbers_and_a_narrow_answer_of_a_users_solver_are_taken():
    solver = OwnSolver(lambda b: bl.LinearSolution((torch.linalg.solve(A, b[0]).float(),), 0.0, 1, OK))
    b = (torch.ones(2, dtype=D),)
    for found in (solver, bl.linear.LevenbergMarquardt(solver), bl.linear.Masked(solver)):
        assert found.solve(lambda v: (A @ v[0],), b).status is bl.Status.OK


class OwnDiagonal(Own):
    def diagonal(self):
        return (torch.ones(3, dtype=D),)


@pytest.mark.parametrize("make", [bl.CG, bl.linear.MINRES])
def test_what_a_preconditioner_is_made_of_is_looked_at(make):
    b = (torch.ones(2, dtype=D),)
    with pytest.raises(ValueError, match=r"diagonal\(\) has the shapes \[\(3,\)\]"):
        make(preconditioner=bl.linear.Jacobi()).solve(OwnDiagonal(lambda v: (A @ v[0],)), b)
    with pytest.raises(ValueError, match="changed r in place"):
        make(preconditioner=lambda r: (r[0].mul_(2),)).solve(Own(lambda v: (A @ v[0],)), b)
    narrow = make(preconditioner=lambda r: (r[0].float(),)).solve(Own(lambda v: (A @ v[0],)), b)
    assert narrow.status is bl.Status.OK
    empty = make(preconditioner=bl.linear.NystromPreconditioner(2)).solve(lambda v: v, (torch.zeros(0),))
    assert empty.status is bl.Status.OK


def far(size, offset):
    """y follows x / size; f is `offset` above what matters."""
    return bl.Problem(
        lambda y, x, b: 0.5 * (H * (y - x / size) ** 2).sum(), lambda y, x, b: 0.5 * ((y - 2) ** 2).sum() + offset
    )


@pytest.mark.parametrize(
    ("estimator", "size", "offset"),
    [
        (bl.estimators.EvolutionStrategies(0.01, 3), 1e8, 0.0),
        (bl.estimators.EvolutionStrategies(0.01, 3), 1.0, 1e9),
        (bl.estimators.PersistentES(0.01, 3), 1e8, 0.0),
        (bl.estimators.PersistentES(0.01, 3), 1.0, 1e9),
        (bl.estimators.PZOBO(None, 3), 1e8, 0.0),
        (bl.estimators.PZOBO(1e-7, 3), 1.0, 0.0),
    ],
    ids=repr,
)
@pytest.mark.parametrize("tasks", [False, True])
def test_a_move_or_a_difference_that_rounding_takes_is_no_gradient_of_zero(estimator, size, offset, tasks):
    """Zero with OK: x + std e was x, and f(x + std e) was f(x)."""

    def run(size, offset, dtype, estimator):
        torch.manual_seed(0)
        x, y = torch.full((3,), size, dtype=dtype), torch.zeros(3, dtype=dtype)
        return bl.hypergradient(
            *(far(size, offset), x, y.expand(2, 3) if tasks else y, NONE),
            solver=bl.Descent(bl.SGD(0.2), 7),
            estimator=bl.TaskMean(estimator) if tasks else estimator,
        )

    found = run(size, offset, torch.float32, estimator)
    assert found.status is bl.Status.DIGITS_LOST
    assert found.digits.max() < 1
    sound = run(1.0, 0.0, D, type(estimator)(0.01, 3))
    assert sound.status is bl.Status.OK
    assert sound.digits.min() > 8
    direct = bl.Problem(lambda y, x, b: (y**2).sum(), lambda y, x, b: (y**2).sum() + (x**2).sum())  # y stands still
    solver = bl.Descent(bl.SGD(0.1), 2)
    found = bl.hypergradient(direct, torch.ones(3), torch.ones(3), NONE, solver=solver, estimator=type(estimator)())
    assert found.status is bl.Status.OK


H2 = torch.tensor([2.0, 0.5], dtype=D)
SOLVER = bl.Descent(bl.SGD(lr=lambda x: x, momentum=0.5), 6)


def held(problem, x, y, batches=NONE, solver=SOLVER, degree=2.0):
    """The logarithm of a problem, and that of its plain run."""
    plain = bl.hypergradient(problem, x, y, batches, solver=solver, estimator=bl.Unrolled())
    made, start, steps = logarithmic(problem, x, y, batches, solver, degree=degree)
    found = bl.hypergradient(made, x, start, batches, solver=steps, estimator=bl.Unrolled())
    assert found.outer_loss.item() == pytest.approx(plain.outer_loss.log().item() / solver.max_steps, rel=1e-12)
    assert found.grad.item() == pytest.approx((plain.grad / plain.outer_loss / solver.max_steps).item(), rel=1e-11)
    return plain, found


@pytest.mark.parametrize("alone", [True, False])
def test_the_logarithm_rescales_tensors_without_a_dimension(alone):
    """The lengths were counted and the number was not divided by them: -10.4 in place of -1.7, and OK."""
    x, one = torch.tensor(0.3, dtype=D), torch.tensor(2.0, dtype=D)
    if alone:
        plain, found = held(bl.Problem(*2 * [lambda y, x, b: y * y]), x, one)
    else:
        problem = bl.Problem(*2 * [lambda y, x, b: (H2 * y["a"] ** 2).sum() + y["z"] ** 2 + y["z"] * y["a"].sum()])
        plain, found = held(problem, x, {"a": torch.ones(2, dtype=D), "z": one})
    for a, b in zip(*(torch.utils._pytree.tree_leaves(t) for t in (restored(found.inner), plain.inner)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_logarithm_looks_at_the_batch_of_each_step():
    """Only the first was looked at, where this one is homogeneous; another gradient, and OK."""
    problem = bl.Problem(lambda y, x, b: ((y - b) ** 2).sum(), lambda y, x, b: (y**2).sum())
    steps = bl.Batches(bl.PerStep(torch.tensor([0.0, 2.0, 0.5], dtype=D)), None)
    x, y = torch.tensor(0.3, dtype=D), torch.ones(2, dtype=D)
    with pytest.raises(ValueError, match="inner_loss is not homogeneous"):
        logarithmic(problem, x, y, steps, bl.Descent(bl.SGD(0.1), 3))
    sound = bl.Problem(lambda y, x, b: (1 + b) * (H2 * y**2).sum(), lambda y, x, b: (y**2).sum())
    held(sound, x / 10, y, steps, bl.Descent(bl.SGD(lr=lambda x: x), 3))


def test_the_logarithm_refuses_what_has_none():
    problem = bl.Problem(lambda y, x, b: (y**2).sum(), lambda y, x, b: -(y**2).sum())
    with pytest.raises(ValueError, match="a positive one was needed"):
        logarithmic(problem, torch.tensor(0.1), torch.ones(2), NONE, bl.Descent(bl.SGD(0.1), 3))
    with pytest.raises(ValueError, match="largest number is inf"):
        logarithmic(problem, torch.tensor(0.1), torch.full((2,), float("inf")), NONE, bl.Descent(bl.SGD(0.1), 3))


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e20, 1e30])
def test_the_logarithm_takes_a_start_whose_square_is_out_of_range(size):
    """It was called not homogeneous: 0 where 0 was needed, inf where inf was."""
    problem = bl.Problem(*2 * [lambda y, x, b: (y**2).sum()])
    x, y = torch.tensor(0.2), torch.full((2,), size)
    made, start, solver = logarithmic(problem, x, y, NONE, bl.Descent(bl.SGD(lr=lambda x: x), 5))
    found = bl.hypergradient(made, x, start, NONE, solver=solver, estimator=bl.Unrolled())
    assert found.status is bl.Status.OK
    assert found.grad.item() == pytest.approx(-4 / 0.6, rel=1e-5)
    assert restored(found.inner)[0].item() == pytest.approx(size * 0.6**5, rel=1e-4)


def test_a_number_of_zero_is_restored_as_zero():
    """It was NaN where the scale is out of range."""
    y = restored({"point": torch.tensor([0.0, 1e-20, 1.0]), "log_scale": torch.tensor(100.0)})
    assert y[0] == 0
    assert y[1].item() == pytest.approx(2.688e23, rel=1e-3)
    assert y[2] == float("inf")


def test_each_task_is_restored_by_its_own_scale():
    """With as many tasks as numbers each number was scaled as another task."""
    y = restored({"point": torch.ones(2, 2), "log_scale": torch.tensor([0.0, 3.0])})
    torch.testing.assert_close(y, torch.tensor([[1.0, 1.0], [20.085537, 20.085537]]))
