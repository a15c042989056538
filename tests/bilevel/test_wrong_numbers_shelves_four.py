"""Inner dynamics under estimators that had not met them, and users' classes that are wrong in a subtle way."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from inner_cases import BATCHES, CASES, START, X, slope
from right_or_refused import NONE, D

import bilevel as bl
from bilevel.inner.newton import Newton
from bilevel.linear.operator import as_operator
from bilevel.space.inner_product import PLAIN
from bilevel.testing import check_estimator

FORWARD = ("LBFGS", "Newton-CG", "LeastSquares", "accelerated L1", "FixedPoint, Anderson", "Root, Newton")


def along(hg: bl.Hypergradient, direction: dict[str, Any]) -> torch.Tensor:
    return sum((hg.grad[name] * direction[name]).sum() for name in direction)


@pytest.mark.parametrize("name", FORWARD)
def test_forward_mode_goes_through_dynamics_that_are_no_optimizer(name):
    case = CASES[name]
    direction = {key: torch.linspace(1, 2, leaf.numel(), dtype=D).reshape(leaf.shape) for key, leaf in X.items()}
    arguments = START, BATCHES
    solver = bl.Descent(case.dynamics, case.steps)
    found = bl.hypergradient(case.problem, X, *arguments, solver=solver, estimator=bl.estimators.Forward())
    wanted = slope(lambda x: bl.adapt(case.problem, x, *arguments, solver=solver).outer_loss, X, direction)
    assert torch.allclose(along(found, direction), wanted, rtol=1e-6)
    unrolled = bl.hypergradient(case.problem, X, *arguments, solver=solver, estimator=bl.Unrolled())
    assert found.status == unrolled.status


@pytest.mark.parametrize("last", [1, 3])
def test_a_truncated_mean_of_iterates_is_the_same_however_it_is_kept(last):
    case = CASES["LBFGS"]
    solver = bl.Descent(bl.inner.Averaged(bl.SGD(lr=0.02), decay=0.5), steps=5)
    kept = [
        bl.hypergradient(case.problem, X, START, BATCHES, solver=solver, estimator=bl.Unrolled(keep, last=last)).grad
        for keep in ("graph", "iterates", "segments")
    ]
    for other in kept[1:]:
        assert all(torch.allclose(kept[0][name], other[name], rtol=1e-12) for name in X)


# --- L-BFGS and Newton


def bowl(condition: float) -> tuple[bl.Problem, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A quadratic, its solution per x, and dF/dx there."""
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(10, 10, generator=draw, dtype=D))[0]
    h = (basis * torch.logspace(0, torch.tensor(condition).log10().item(), 10, dtype=D)) @ basis.T
    c, goal = torch.randn(10, 4, generator=draw, dtype=D), torch.randn(10, generator=draw, dtype=D)
    x = torch.randn(4, generator=draw, dtype=D)
    problem = bl.Problem(lambda y, x, b: y @ h @ y / 2 - (c @ x) @ y, lambda y, x, b: (y - goal).square().sum() / 2)
    solution = torch.linalg.solve(h, c @ x)
    return problem, x, solution, c.T @ torch.linalg.solve(h, solution - goal)


@pytest.mark.parametrize("search", [None, bl.inner.Armijo(), bl.inner.Wolfe()], ids=["none", "Armijo", "Wolfe"])
def test_the_unrolled_derivative_of_lbfgs_lags_by_no_more_than_the_figure_says(search):
    problem, x, solution, exact = bowl(100.0)
    arguments = x, torch.zeros(10, dtype=D), NONE
    for steps in (20, 30, 60):
        solver = bl.Descent(bl.inner.LBFGS(search=search), steps)
        hg = bl.hypergradient(problem, *arguments, solver=solver, estimator=bl.Unrolled())
        off = (hg.grad - exact).norm() / exact.norm()
        assert off <= 10 * hg.stats["cotangent_left"] + 1e-9
        if steps == 30:  # the numbers of the docstring
            assert off > 10 * (hg.inner - solution).norm() / solution.norm()
    stopped = bl.Converge(bl.inner.LBFGS(search=search), tol=1e-3)
    hg = bl.hypergradient(problem, *arguments, solver=stopped, estimator=bl.Unrolled())
    assert hg.status.name == "STOPPED_EARLY" or (hg.grad - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.parametrize(
    ("linear", "status"),
    [
        (bl.CG(20), "NEGATIVE_CURVATURE"),
        (bl.CG(1), "UNSOLVED"),
        (bl.Neumann(steps=20, step_size=3.0), "NOT_CONTRACTIVE"),
        (bl.linear.Chebyshev(0.1, 0.2), "NOT_CONTRACTIVE"),
    ],
    ids=["CG", "CG, one step", "Neumann", "Chebyshev"],
)
@pytest.mark.parametrize("estimator", [bl.Unrolled(), bl.estimators.Forward()], ids=["Unrolled", "Forward"])
def test_plain_newton_that_stands_still_is_no_ok(linear, status, estimator):
    h = torch.tensor([1.0, -2.0, 3.0], dtype=D)
    saddle = bl.Problem(
        lambda y, x, b: (h * y.square()).sum() / 2 - x * y.sum(), lambda y, x, b: (y - 1).square().sum()
    )
    hg = bl.hypergradient(
        *(saddle, torch.tensor(1.5, dtype=D), torch.zeros(3, dtype=D), NONE),
        solver=bl.Descent(Newton(linear, search=None), steps=3),
        estimator=estimator,
    )
    assert hg.inner.eq(0).all()
    assert hg.status.name == status


def test_plain_newton_is_ok_at_a_solution_that_a_singular_hessian_does_not_determine():
    h = torch.tensor([1.0, 2.0, 0.0], dtype=D)
    flat = bl.Problem(lambda y, x, b: (h * y.square()).sum() / 2 - x * y[:2].sum(), lambda y, x, b: y.square().sum())
    for start in (torch.zeros(3, dtype=D), torch.tensor([1.5, 0.75, 0.0], dtype=D)):
        arguments = flat, torch.tensor(1.5, dtype=D), start, NONE
        solver = bl.Descent(Newton(bl.CG(5), search=None), steps=3)
        assert bl.hypergradient(*arguments, solver=solver, estimator=bl.Unrolled()).status.name == "OK"


# --- classes of users


@dataclasses.dataclass(frozen=True)
class Misstated(bl.Estimator):
    """The gradient of Unrolled, with another number in one field."""

    field: str

    sees = frozenset(bl.Path)

    def estimate(self, instance, state):
        found = bl.Unrolled().estimate(instance, state)
        value = getattr(found, self.field)
        wrong = instance.oracles.start() if self.field == "inner" else 2 * value
        return dataclasses.replace(found, **{self.field: wrong})


@pytest.mark.parametrize("field", ["inner", "outer_loss", "inner_loss"])
def test_check_estimator_sees_what_is_said_beside_the_gradient(field):
    with pytest.raises(AssertionError, match=f"another inner variable or loss than it says.*hg.{field} is"):
        check_estimator(Misstated(field), target="program")


class Answering(bl.linear.Prepared):
    def iterate(self, b, start=None):
        return self.solver.answered(b, bl.Dense().prepare(self.operator, self.space).iterate(b).value)


@dataclasses.dataclass(frozen=True)
class OfUser(bl.LinearSolver):
    """Says what `answered` makes of the right-hand side and the right answer."""

    answered: Callable[[Any, Any], Any]
    tol: float = 1e-6
    damping: float = 0.0

    def prepare(self, operator, space=PLAIN):
        return Answering(self, as_operator(operator), space)


def found(value, code=0):
    return bl.LinearSolution(value, torch.tensor(0.0), 1, code)


def in_place(b, value):
    for leaf in b:
        leaf.mul_(2)
    return found(tuple(2 * v for v in value))


ANSWERS = {
    "in place": (in_place, "changed b in place"),
    "reshaped": (lambda b, value: found(tuple(v.reshape(-1, 1) for v in value)), "a value of the shapes"),
    "one short": (lambda b, value: found(value[:-1]), "a value of the shapes"),
    "bare": (lambda b, value: value, "a LinearSolution was needed"),
    "a status": (lambda b, value: found(value, bl.Status.OK), "returned code=OK"),
}


PULL = bl.Problem(lambda y, x, b: (y - x).square().sum() + y[0] ** 4, lambda y, x, b: (y - 3).square().sum())
PULLED = PULL, torch.full((3,), 2.0, dtype=D), torch.ones(3, dtype=D), NONE


@pytest.mark.parametrize(("answered", "words"), ANSWERS.values(), ids=ANSWERS)
def test_a_linear_solver_that_breaks_its_contract_is_refused_in_words(answered, words):
    solver = OfUser(answered)
    loop = bl.Descent(bl.SGD(lr=0.1), steps=20)
    with pytest.raises((TypeError, ValueError), match=words):
        bl.hypergradient(*PULLED, solver=loop, estimator=bl.Implicit(solver))
    with pytest.raises((TypeError, ValueError), match=words):
        bl.adapt(*PULLED, solver=bl.Descent(Newton(solver), steps=1))


class Clock:
    def __init__(self) -> None:
        self.time = 0


@dataclasses.dataclass(frozen=True)
class Counting(bl.Optimizer):
    """A rate that falls with the calls that it has seen."""

    clock: Clock = dataclasses.field(default_factory=Clock)

    def init(self, inner):
        return None

    def step(self, grad, state, inner, outer):
        self.clock.time += 1
        return inner - 0.1 / self.clock.time * grad, state

    def stationarity(self, grad, inner, outer):
        return grad


@dataclasses.dataclass(frozen=True)
class CountingMap(bl.inner.Dynamics):
    clock: Clock = dataclasses.field(default_factory=Clock)

    def step(self, inner, state, outer, at):
        self.clock.time += 1
        return inner - 0.1 / self.clock.time * at.gradient(inner), state

    def stationarity(self, inner, outer, at):
        return at.gradient(inner)


@pytest.mark.parametrize("make", [Counting, CountingMap])
@pytest.mark.parametrize("estimator", [bl.Unrolled(), bl.Unrolled("iterates"), bl.Implicit(bl.Dense())])
def test_a_step_that_counts_outside_of_its_state_is_refused(make, estimator):
    with pytest.raises(ValueError, match="gave two answers for the same arguments"):
        bl.hypergradient(*PULLED, solver=bl.Descent(make(), steps=6), estimator=estimator)


@dataclasses.dataclass(frozen=True)
class Decayed(bl.inner.Dynamics):
    """A gradient step with a decay, which only one of both says."""

    told: bool

    def step(self, inner, state, outer, at):
        return inner - 0.1 * (at.gradient(inner) + inner), state

    def stationarity(self, inner, outer, at):
        return at.gradient(inner) + inner if self.told else at.gradient(inner)


@pytest.mark.parametrize("told", [True, False])
def test_a_dynamics_that_rests_where_its_stationarity_is_not_zero_is_refused(told):
    problem = dataclasses.replace(PULL)
    more = {"solver": bl.Descent(Decayed(told), steps=200), "estimator": bl.Implicit(bl.Dense())}
    if not told:
        with pytest.raises(ValueError, match="comes to rest where its stationarity"):
            bl.hypergradient(problem, *PULLED[1:], **more)
        return
    right = bl.hypergradient(problem, *PULLED[1:], **more)
    unrolled = bl.hypergradient(problem, *PULLED[1:], **(more | {"estimator": bl.Unrolled()}))
    assert torch.allclose(right.grad, unrolled.grad, rtol=1e-6)
