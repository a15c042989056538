"""Stencils of any order, and how large nu is (papers.md section 1): known answers, and what a stranger would try."""

import dataclasses
import itertools
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from right_or_refused import NONE, D, close
from torch import Tensor

import bilevel as bl
from bilevel.estimators.penalty.perturbation import order_of, stencil_of

ORDERS = (1, 2, 3, 4)


def spd(size: int, generator: torch.Generator, low: float, high: float) -> Tensor:
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=D)).Q
    return basis @ torch.diag(torch.linspace(low, high, size, dtype=D)) @ basis.T


def off(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def slope(scales: list[float], errors: list[float]) -> float:
    """Least squares in the logarithms."""
    xs, ys = [math.log(x) for x in scales], [math.log(y) for y in errors]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


# --- the stencils themselves


@pytest.mark.parametrize(
    ("order", "weights"),
    [
        (1, {0: "-1", 1: "1"}),
        (2, {-1: "-1/2", 1: "1/2"}),
        (3, {-1: "-1/3", 0: "-1/2", 1: "1", 2: "-1/6"}),
        (4, {-2: "1/12", -1: "-2/3", 1: "2/3", 2: "-1/12"}),
        (6, {-3: "-1/60", -2: "3/20", -1: "-3/4", 1: "3/4", 2: "-3/20", 3: "1/60"}),
    ],
)
def test_the_weights_are_those_of_the_textbook(order, weights):
    """papers.md 1.2."""
    stencil = stencil_of(order)
    assert dict(zip(stencil.nodes, stencil.weights, strict=True)) == {j: float(Fraction(a)) for j, a in weights.items()}


@pytest.mark.parametrize("order", range(1, 11))
def test_a_stencil_of_order_p_is_exact_on_polynomials_of_degree_p(order):
    """papers.md 1.2: an even p needs p inner solves, an odd one p + 1; a polynomial of degree p + 1 shows."""
    stencil = stencil_of(order)
    assert len(stencil.nodes) == order + order % 2
    for degree in range(order + 1):
        assert sum(a * j**degree for j, a in zip(stencil.nodes, stencil.weights, strict=True)) == pytest.approx(
            float(degree == 1), abs=1e-9
        )
    for degree in range(order):
        assert sum(c * j**degree for j, c in zip(stencil.nodes, stencil.shares, strict=True)) == pytest.approx(
            float(degree == 0), abs=1e-9
        )
    assert abs(sum(a * j ** (order + 1) for j, a in zip(stencil.nodes, stencil.weights, strict=True))) > 0.5


@pytest.mark.parametrize("scheme", [0, -1, True, 2.0, "central", None, ""])
def test_a_scheme_that_is_none_is_refused_where_it_is_given(scheme):
    for call in (bl.FirstOrderCorrected, lambda scheme: bl.best_nu(1e-3, scheme)):
        with pytest.raises(ValueError, match=r"scheme=.*'symmetric', 'forward', or the order"):
            call(scheme=scheme)


def test_names_and_orders_are_the_same_schemes():
    assert [order_of(scheme) for scheme in ("forward", "symmetric", 1, 2, 7)] == [1, 2, 1, 2, 7]
    problem, x, _ = proximal_quadratic()
    for name, order in (("forward", 1), ("symmetric", 2)):
        one, other = (solved(problem, x, bl.FirstOrderCorrected(0.1, scheme)) for scheme in (name, order))
        assert torch.equal(one.grad, other.grad)
        assert torch.equal(one.inner, other.inner)


# --- papers.md 1.6 a and b: quadratics


def proximal_quadratic(linear: bool = False) -> tuple[bl.Problem, Tensor, Any]:
    """papers.md 1.6 a: d = 8, lam = 1. Returns the problem, x, and the minimizer of the inner problem at nu."""
    g = torch.Generator().manual_seed(0)
    A, B = spd(8, g, 1.0, 4.0), spd(8, g, 0.5, 2.0)
    a, b, x = (torch.randn(8, generator=g, dtype=D) for _ in range(3))
    B = 0 * B if linear else B

    def minimizer(nu: float) -> Tensor:
        rest = -nu * b if linear else nu * B @ b
        return torch.linalg.solve(A + nu * B + torch.eye(8, dtype=D), A @ a + rest + x)

    maml = bl.Problem(
        lambda y, x, _: (y - a) @ A @ (y - a) / 2,
        lambda y, x, _: b @ y if linear else (y - b) @ B @ (y - b) / 2,
        init=lambda x, _: x,
    )
    return bl.proximal(maml, 1.0), x, minimizer


def solved(problem: bl.Problem, x: Tensor, estimator: bl.Estimator, steps: int = 45) -> bl.Hypergradient:
    return bl.hypergradient(problem, x, None, NONE, solver=bl.Descent(bl.SGD(0.3), steps), estimator=estimator)


def exact_of(problem: bl.Problem, x: Any, inner: Any = None, solver: bl.InnerSolver | None = None) -> Any:
    return bl.hypergradient(
        problem, x, inner, NONE, solver=solver or bl.Descent(bl.SGD(0.3), 150), estimator=bl.Implicit(bl.Dense())
    ).grad


@pytest.mark.parametrize("order", ORDERS)
def test_the_bias_falls_with_the_order_in_nu_and_is_that_of_the_closed_form(order):
    """papers.md 1.6 a: slopes 1 (forward) and 2 (symmetric) in nu, d = 8; and p for order p."""
    problem, x, minimizer = proximal_quadratic()
    exact, stencil = exact_of(problem, x), stencil_of(order)
    scales, errors = [0.1, 0.05, 0.025], []
    for nu in scales:
        own = -sum(a * minimizer(j * nu) for j, a in zip(stencil.nodes, stencil.weights, strict=True)) / nu
        found = solved(problem, x, bl.FirstOrderCorrected(nu, order))
        close(found.grad, own, 1e-10)
        shares = sum(c * minimizer(j * nu) for j, c in zip(stencil.nodes, stencil.shares, strict=True))
        close(found.inner, shares, 1e-10)
        errors.append(off(found.grad, exact))
    assert slope(scales, errors) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("nu", [0.5, 1e-3])
def test_every_order_is_exact_for_a_linear_outer_loss(order, nu):
    """papers.md 1.6 b: y_nu is affine in nu, so that even forward is exact at nu = 0.5."""
    problem, x, _ = proximal_quadratic(linear=True)
    close(solved(problem, x, bl.FirstOrderCorrected(nu, order)).grad, exact_of(problem, x), 1e-11)


# --- papers.md 1.6 c: inexact solves


@dataclasses.dataclass(frozen=True)
class Inexact(bl.Optimizer):
    """Gradient steps whose last lands at a distance `delta`, another way each time: of every side by itself."""

    lr: float
    steps: int
    delta: float
    generator: torch.Generator

    def init(self, inner):
        return 0

    def step(self, grad, state, inner, outer):
        moved = inner - self.lr * grad
        if state == self.steps - 1:
            error = torch.randn(inner.shape, generator=self.generator, dtype=inner.dtype)
            moved = moved + self.delta * error / error.norm()
        return moved, state + 1

    def stationarity(self, grad, inner, outer):
        return grad


@pytest.mark.parametrize(("order", "expected"), [(1, 1 / 2), (2, 2 / 3), (4, 4 / 5)])
def test_the_best_error_falls_with_the_accuracy_of_the_inner_solves(order, expected):
    """papers.md 1.6 c: with solutions off by delta each, delta^(1/2) forward and delta^(2/3) symmetric; at best_nu."""
    problem, x, _ = proximal_quadratic()
    exact, deltas, errors = exact_of(problem, x), [1e-3, 1e-5, 1e-7], []
    for delta in deltas:
        trials = []
        for seed in range(3):
            optimizer = Inexact(0.3, 40, delta, torch.Generator().manual_seed(seed))
            found = bl.hypergradient(
                problem,
                x,
                None,
                NONE,
                solver=bl.Descent(optimizer, 40),
                estimator=bl.FirstOrderCorrected(bl.best_nu(delta, order), order),
            )
            trials.append(off(found.grad, exact))
        errors.append(sum(trials) / len(trials))
    assert slope(deltas, errors) == pytest.approx(expected, abs=0.07)


def test_the_chosen_nu_minimizes_its_bound():
    """papers.md 1.3: sqrt(2 lam delta / C1) and (lam delta / (2 C2))^(1/3)."""
    assert bl.best_nu(1e-4, "forward", sensitivity=0.5, truncation=3.0) == pytest.approx((2 * 0.5 * 1e-4 / 3) ** 0.5)
    assert bl.best_nu(1e-4, sensitivity=0.5, truncation=3.0) == pytest.approx((0.5 * 1e-4 / (2 * 3)) ** (1 / 3))

    def bound(nu: float, order: int) -> float:
        return sum(map(abs, stencil_of(order).weights)) * 0.5 * 1e-4 / nu + 3 * nu**order

    for order in range(1, 7):
        nu = bl.best_nu(1e-4, order, sensitivity=0.5, truncation=3.0)
        assert bound(nu, order) < min(bound(0.9 * nu, order), bound(1.1 * nu, order))
    # 1.3: the error at the best nu of the symmetric scheme is 1.89 (lam delta)^(2/3) C2^(1/3)
    assert bound(bl.best_nu(1e-4, sensitivity=0.5, truncation=3.0), 2) == pytest.approx(
        1.89 * (0.5 * 1e-4) ** (2 / 3) * 3 ** (1 / 3), rel=1e-3
    )


@pytest.mark.parametrize("options", [{"delta": 0.0}, {"sensitivity": -1.0}, {"truncation": float("inf")}])
def test_best_nu_refuses_constants_out_of_range(options):
    with pytest.raises(ValueError, match=rf"best_nu was given {next(iter(options))}=.*positive"):
        bl.best_nu(**{"delta": 1e-3, **options})


# --- papers.md 1.6 d: smoothness that grows with the gradient

COSINE = bl.proximal(bl.Problem(lambda y, x, _: y.cos(), lambda y, x, _: y**2 / 2, init=lambda x, _: x), 2.0)


def cosine(theta: Tensor, scheme: int = 4, steps: int = 40) -> Tensor:
    """F' of f = cos, h = phi^2 / 2, lam = 2, by the library."""
    solver = bl.Descent(bl.SGD(0.5), steps)  # curvatures lie in [1, 3]: half the error is left after each step
    estimator = bl.FirstOrderCorrected(1e-5, scheme)
    return bl.hypergradient(COSINE, theta, None, NONE, solver=solver, estimator=estimator).grad


def test_the_meta_objective_has_no_global_smoothness_but_a_generalized_one():
    """papers.md 1.6 d: max |F''| on |theta| <= 10, 100, 1000 is 11, 133, 1394; |F''| / (4 + 2 |F'|) is at most 1."""
    largest, ratio = {}, 0.0
    for bound in (10, 100, 1000):
        phi = torch.linspace(-bound - 1, bound + 1, 400_001, dtype=D)
        phi = phi[(phi - phi.sin() / 2).abs() <= bound]  # theta = phi + f'(phi) / lam
        A = 2 / (2 - phi.cos())
        second = A**2 - phi * A * 2 * phi.sin() / (2 - phi.cos()) ** 2
        largest[bound] = second.abs().max().item()
        ratio = max(ratio, (second.abs() / (4 + 2 * (A * phi).abs())).max().item())
    assert [round(value) for value in largest.values()] == [11, 133, 1394]
    assert ratio == pytest.approx(1.0, abs=1e-9)
    # and the library's F' and F'' are these: by differences of its hypergradient, with tasks for points
    phi = torch.tensor([0.0, 1.0, 7.0, 60.0, -61.0, 600.3], dtype=D)
    A = 2 / (2 - phi.cos())
    second = A**2 - phi * A * 2 * phi.sin() / (2 - phi.cos()) ** 2
    for value, slope_there, theta in zip(A * phi, second, phi - phi.sin() / 2, strict=True):
        close(cosine(theta), value, 1e-8, 1e-9)
        close((cosine(theta + 1e-4) - cosine(theta - 1e-4)) / 2e-4, slope_there, 1e-4, 1e-4)


def test_a_step_size_that_fits_the_start_fails_later_where_clipped_and_normalized_steps_arrive():
    """papers.md 1.6 d: at phi = 3 pi, F'' = 4/9, and 1 / F'' is too long where F'' is larger."""

    def ends(make: Any, steps: int, decay: float = 1.0) -> float:
        theta = torch.tensor(3 * math.pi, dtype=D, requires_grad=True)
        optimizer = make([theta])
        for _ in range(steps):
            bl.set_grad(theta, cosine(theta, 2, 12))
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= decay
        return cosine(theta, 2).abs().item()

    assert ends(lambda xs: torch.optim.SGD(xs, lr=9 / 4), 60) > 1.0
    # (1 / L0 is short enough: in one dimension, with h = phi^2 / 2, no step passes the minimizer.)
    assert ends(lambda xs: torch.optim.SGD(xs, lr=1 / 4), 40) < 1e-4
    # 1.3: 1 / (2 L0) and 1 / (2 L1), with L0 = 4 and L1 = 2
    assert ends(lambda xs: bl.ClippedSGD(xs, lr=1 / 8, radius=1 / 4), 65) < 1e-4
    assert ends(lambda xs: bl.NormalizedSGD(xs, lr=1 / 4, momentum=0.5), 150, 0.98) < 0.1


# --- papers.md 1.6 e: matched budgets


def logistic(dtype: torch.dtype = D, strength: float = 0.5) -> tuple[bl.Problem, Tensor]:
    g = torch.Generator().manual_seed(2)
    X, labels = (
        torch.randn(40, 6, generator=g, dtype=D).to(dtype),
        torch.rand(40, generator=g, dtype=D).round().to(dtype),
    )
    x, loss = torch.randn(6, generator=g, dtype=D).to(dtype), torch.nn.functional.binary_cross_entropy_with_logits
    maml = bl.Problem(
        lambda y, x, _: loss(X @ y, labels),
        lambda y, x, _: loss(X[:10] @ y, 1 - labels[:10]),
        init=lambda x, _: x,
    )
    return bl.proximal(maml, strength), x


def test_unequal_budgets_blow_up_like_delta_over_nu_where_equal_ones_do_not():
    """papers.md 1.6 e: K = 20 against K and K + 1 steps."""
    problem, x = logistic()
    exact = exact_of(problem, x, solver=bl.Converge(bl.SGD(0.8), 1e-13, 2000))

    def side(nu: float, steps: int) -> Tensor:
        perturbed = bl.Problem(
            lambda y, x, b: problem.inner_loss.inner_loss(y, x, b) + nu * problem.outer_loss(y, x, b),
            problem.outer_loss,
            init=problem.init,
        )
        solver = bl.Descent(bl.SGD(0.8), steps)
        return bl.adapt(bl.proximal(perturbed, 0.5), x, None, NONE, solver=solver).inner

    def by_hand(nu: float, more: int) -> Tensor:
        return 0.5 * (side(-nu, 20) - side(nu, 20 + more)) / (2 * nu)

    scales = [1e-2, 1e-3, 1e-4]
    found = [solved_by(problem, x, nu) for nu in scales]
    for nu, grad in zip(scales, found, strict=True):
        close(grad, by_hand(nu, 0), 1e-9)
    equal = [off(grad, exact) for grad in found]
    unequal = [off(by_hand(nu, 1), exact) for nu in scales]
    assert slope(scales, unequal) == pytest.approx(-1, abs=0.1)
    assert equal[2] == pytest.approx(equal[1], rel=0.05)
    assert unequal[-1] > 50 * equal[-1]


def solved_by(problem: bl.Problem, x: Tensor, nu: float | None, scheme: Any = "symmetric", steps: int = 20) -> Tensor:
    return bl.hypergradient(
        problem, x, None, NONE, solver=bl.Descent(bl.SGD(0.8), steps), estimator=bl.FirstOrderCorrected(nu, scheme)
    ).grad


@pytest.mark.parametrize(("scheme", "bound"), [("symmetric", 2e-4), (4, 2e-4)])
def test_float32_is_best_near_the_default_and_rounding_takes_over_below(scheme, bound):
    """papers.md 1.6 e: float32, K = 60: best about nu = 1e-2; at 1e-4 rounding is back."""
    problem, x = logistic(torch.float32)
    exact = exact_of(*logistic(), solver=bl.Converge(bl.SGD(0.8), 1e-13, 2000))
    errors = {nu: off(solved_by(problem, x, nu, scheme, 60), exact) for nu in (None, 1e-1, 1e-2, 1e-3, 1e-4)}
    assert errors[None] == errors[1e-2] < bound
    assert errors[None] < 3 * min(errors.values())
    assert errors[1e-4] > 10 * errors[None]


def test_a_wider_type_for_the_subtraction_would_gain_nothing():
    """papers.md 1.5 has it as an option. What is divided by nu is a sum of exact differences already."""
    problem, x = logistic(torch.float32)
    exact = exact_of(*logistic(), solver=bl.Converge(bl.SGD(0.8), 1e-13, 2000))
    for order, nu in itertools.product((2, 4), (1e-2, 1e-3, 1e-4)):
        estimator = bl.FirstOrderCorrected(nu, order, warm_sides=True)
        found = bl.hypergradient(problem, x, None, NONE, solver=bl.Descent(bl.SGD(0.8), 60), estimator=estimator)
        sides, stencil = [side.double() for side in found.state.sides], stencil_of(order)
        wide = sum(0.5 * a * (x.double() - y) for a, y in zip(stencil.weights, sides, strict=True)) / nu
        assert off(found.grad, exact) < 1.05 * off(wide, exact) + 1e-6
