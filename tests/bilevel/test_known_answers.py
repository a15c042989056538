"""Known answers in float64: exact estimators to 1e-10, biased ones equal to their own closed form to 1e-10."""

import pytest
import torch

import bilevel as bl

D = torch.float64
NO_DATA = bl.Batches(None, None)

# TP1 of methods.md: g = h y^2/2 - x y, f = (y - t)^2/2 with h=2, x=1, t=0, SGD 0.25 from 0, K=4.
SCALAR = bl.Problem(lambda y, x, _: y**2 - x * y, lambda y, x, _: y**2 / 2)


def scalar(estimator, steps=4, lr=0.25, x=1.0):
    outer, inner = torch.tensor(x, dtype=D), torch.tensor(0.0, dtype=D)
    return bl.hypergradient(SCALAR, outer, inner, NO_DATA, solver=bl.Descent(bl.SGD(lr), steps), estimator=estimator)


def perturbed_iterate(nu, steps, h=2.0, x=1.0, lr=0.25):
    """y_K and x-derivative data of min h y^2/2 - x y + nu y^2/2 by K gradient steps from 0."""
    return x / (h + nu) * (1 - (1 - lr * (h + nu)) ** steps)


@pytest.mark.parametrize(
    ("estimator", "answer"),
    [
        (bl.Unrolled(keep="graph"), 0.2197265625),
        (bl.Unrolled(keep="iterates"), 0.2197265625),
        (bl.Unrolled(keep="segments"), 0.2197265625),
        (bl.Unrolled(keep="segments", segment=3), 0.2197265625),
        (bl.Unrolled(keep="graph", last=2), 0.17578125),
        (bl.Unrolled(keep="iterates", last=2), 0.17578125),
        (bl.Unrolled(keep="segments", last=2), 0.17578125),
        (bl.Implicit(bl.Neumann(steps=1, step_size=0.25)), 0.17578125),
        (bl.Implicit(bl.CG(max_steps=3)), 0.234375),
        (bl.Implicit(bl.Dense()), 0.234375),
        (bl.Implicit(bl.CG(max_steps=3, damping=0.1)), 0.46875 / 2.1),
        (bl.MemoryReduced(), 0.234375),
        # its own K-step closed form: dg/dx = -y, so the difference is of the iterates themselves
        (bl.FirstOrderCorrected(0.1), (perturbed_iterate(-0.1, 4) - perturbed_iterate(0.1, 4)) / 0.2),
        (bl.FirstOrderCorrected(0.1, "forward"), (perturbed_iterate(0.0, 4) - perturbed_iterate(0.1, 4)) / 0.1),
    ],
    ids=str,
)
def test_scalar_quadratic_after_four_steps(estimator, answer):
    found = scalar(estimator)
    assert found.grad.item() == pytest.approx(answer, abs=1e-10)
    assert found.status is bl.Status.OK
    if not isinstance(estimator, bl.FirstOrderCorrected):
        assert found.inner.item() == pytest.approx(0.46875, abs=1e-15)
        assert found.outer_loss.item() == pytest.approx(0.46875**2 / 2, abs=1e-15)
        assert found.inner_loss.item() == pytest.approx(0.46875**2 - 0.46875, abs=1e-15)


@pytest.mark.parametrize(("nu", "answer"), [(0.1, 0.25 * 4 / (4 - 0.01)), (0.5, 0.25 * 4 / (4 - 0.25))])
def test_symmetric_correction_has_its_closed_form_at_the_solution(nu, answer):
    assert scalar(bl.FirstOrderCorrected(nu), steps=100).grad.item() == pytest.approx(answer, abs=1e-10)


@pytest.mark.parametrize("nu", [0.1, 0.01])
def test_forward_correction_is_f2sa_with_penalty_one_over_nu(nu):
    penalty = 1 / nu
    assert scalar(bl.FirstOrderCorrected(nu, "forward"), steps=200).grad.item() == pytest.approx(
        0.25 * penalty * 2 / (1 + penalty * 2), abs=1e-10
    )


@pytest.mark.parametrize("keep", ["graph", "iterates", "segments"])
def test_derivative_with_respect_to_a_learned_step_size(keep):
    problem = bl.Problem(lambda y, x, _: y**2 - y, lambda y, x, _: y**2 / 2)
    found = bl.hypergradient(
        problem,
        {"lr": torch.tensor(0.25, dtype=D)},
        torch.tensor(0.0, dtype=D),
        NO_DATA,
        solver=bl.Descent(bl.SGD(lr=lambda x: x["lr"]), 4),
        estimator=bl.Unrolled(keep=keep),
    )
    assert found.grad["lr"].item() == pytest.approx(0.234375, abs=1e-12)


def spd(size, generator, low=1.0, high=4.0):
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=D)).Q
    return basis @ torch.diag(torch.linspace(low, high, size, dtype=D)) @ basis.T


def quadratics(size=8, strength=1.0):
    """papers.md 1.6a: f = (y-a)'A(y-a)/2, h = (y-b)'B(y-b)/2, proximal start; every closed form follows from A, B, a,
    b, x."""
    g = torch.Generator().manual_seed(0)
    A, B = spd(size, g), spd(size, g, 0.5, 2.0)
    a, b, x = (torch.randn(size, generator=g, dtype=D) for _ in range(3))
    maml = bl.Problem(
        lambda y, x, _: (y - a) @ A @ (y - a) / 2, lambda y, x, _: (y - b) @ B @ (y - b) / 2, init=lambda x, _: x
    )
    return A, B, a, b, x, bl.proximal(maml, strength)


def converged(problem, x, estimator):
    return bl.hypergradient(problem, x, None, NO_DATA, solver=bl.Descent(bl.SGD(0.2), 400), estimator=estimator)


def test_four_roads_to_the_proximal_hypergradient_agree():
    """The master cross-test of papers.md: dense solve, conjugate gradients, finite difference, long unroll."""
    A, B, a, b, x, problem = quadratics()
    eye = torch.eye(8, dtype=D)
    solution = torch.linalg.solve(A + eye, A @ a + x)
    exact = torch.linalg.solve(A + eye, B @ (solution - b))
    for estimator in (
        bl.Implicit(bl.Dense()),
        bl.Implicit(bl.CG(20, tol=1e-14)),
        bl.MemoryReduced(tol=1e-14),
        bl.Unrolled("segments"),
    ):
        found = converged(problem, x, estimator)
        assert (found.grad - exact).norm() / exact.norm() < 1e-10
        assert (found.inner - solution).norm() < 1e-10


@pytest.mark.parametrize("nu", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("scheme", ["symmetric", "forward"])
def test_correction_equals_its_own_closed_form_and_order(nu, scheme):
    A, B, a, b, x, problem = quadratics()
    eye = torch.eye(8, dtype=D)

    def minimizer(nu):
        return torch.linalg.solve(A + nu * B + eye, A @ a + nu * B @ b + x)

    biased = (
        (minimizer(-nu) - minimizer(nu)) / (2 * nu) if scheme == "symmetric" else (minimizer(0.0) - minimizer(nu)) / nu
    )
    exact = torch.linalg.solve(A + eye, B @ (minimizer(0.0) - b))
    found = converged(problem, x, bl.FirstOrderCorrected(nu, scheme)).grad
    assert (found - biased).norm() / biased.norm() < 1e-10
    # the bias itself: forward loses one digit per digit of nu, symmetric two
    error = ((found - exact).norm() / exact.norm()).item()
    assert error < (nu**2 if scheme == "symmetric" else nu) * 2


def test_forward_correction_is_exact_for_a_linear_outer_loss():
    g = torch.Generator().manual_seed(1)
    A, c, x = spd(5, g), torch.randn(5, generator=g, dtype=D), torch.randn(5, generator=g, dtype=D)
    problem = bl.proximal(bl.Problem(lambda y, x, _: y @ A @ y / 2, lambda y, x, _: c @ y, init=lambda x, _: x), 1.0)
    found = converged(problem, x, bl.FirstOrderCorrected(0.5, "forward")).grad
    torch.testing.assert_close(found, torch.linalg.solve(A + torch.eye(5, dtype=D), c), rtol=1e-12, atol=1e-13)


def test_equal_budgets_keep_the_correction_from_blowing_up():
    """papers.md 1.6e: with the same K on both sides the error tends to the truncation error as nu -> 0 and stays
    there."""
    g = torch.Generator().manual_seed(2)
    X, labels, x = (
        torch.randn(40, 6, generator=g, dtype=D),
        torch.rand(40, generator=g, dtype=D).round(),
        torch.randn(6, generator=g, dtype=D),
    )
    logistic = torch.nn.functional.binary_cross_entropy_with_logits
    problem = bl.proximal(
        bl.Problem(
            lambda y, x, _: logistic(X @ y, labels),
            lambda y, x, _: logistic(X[:10] @ y, 1 - labels[:10]),
            init=lambda x, _: x,
        ),
        0.5,
    )
    exact = bl.hypergradient(
        problem, x, None, NO_DATA, solver=bl.Converge(bl.SGD(0.8), 1e-13, 2000), estimator=bl.Implicit(bl.Dense())
    ).grad

    def error(nu):
        found = bl.hypergradient(
            problem, x, None, NO_DATA, solver=bl.Descent(bl.SGD(0.8), 20), estimator=bl.FirstOrderCorrected(nu)
        ).grad
        return ((found - exact).norm() / exact.norm()).item()

    floor = error(1e-3)
    assert error(1e-1) > 3 * floor
    assert error(1e-5) == pytest.approx(floor, rel=0.05)


@pytest.mark.parametrize("steps", [1, 3, 5, 10])
def test_multi_step_maml_is_the_ordered_product(steps):
    """papers.md 2.7a: v <- grad l_T(w_N); v <- v - alpha H(w_j) v for j = N-1..0, on a logistic loss with alpha = 1/(8
    N L)."""
    g = torch.Generator().manual_seed(3)
    X, labels, w0 = (
        torch.randn(30, 4, generator=g, dtype=D),
        torch.rand(30, generator=g, dtype=D).round(),
        torch.randn(4, generator=g, dtype=D),
    )
    smoothness = torch.linalg.eigvalsh(X.T @ X / 30)[-1].item() / 4
    alpha = 1 / (8 * steps * smoothness)

    def support(w, *_):
        return torch.nn.functional.binary_cross_entropy_with_logits(X[:20] @ w, labels[:20])

    def query(w, *_):
        return torch.nn.functional.binary_cross_entropy_with_logits(X[20:] @ w, labels[20:])

    path, w = [], w0
    for _ in range(steps):
        path.append(w)
        w = w - alpha * torch.func.grad(support)(w)
    v = torch.func.grad(query)(w)
    for w in reversed(path):
        v = v - alpha * torch.func.jacrev(torch.func.grad(support))(w) @ v
    problem = bl.Problem(support, query, init=lambda x, _: x)
    for keep in ("graph", "iterates", "segments"):
        found = bl.hypergradient(
            problem, w0, None, NO_DATA, solver=bl.Descent(bl.SGD(alpha), steps), estimator=bl.Unrolled(keep=keep)
        )
        torch.testing.assert_close(found.grad, v, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("steps", [0, 1, 4, 12])
def test_maml_on_a_quadratic_and_its_first_order_form(steps):
    """papers.md 2.7b, and FOMAML's own closed form: the product replaced by the identity."""
    g = torch.Generator().manual_seed(4)
    H, c, q, w = spd(5, g), *(torch.randn(5, generator=g, dtype=D) for _ in range(3))
    P = torch.linalg.matrix_power(torch.eye(5, dtype=D) - 0.1 * H, steps)
    problem = bl.Problem(
        lambda y, x, _: (y - c) @ H @ (y - c) / 2, lambda y, x, _: (y - q).square().sum() / 2, init=lambda x, _: x
    )
    adapted = c + P @ (w - c)

    def run(estimator):
        return bl.hypergradient(problem, w, None, NO_DATA, solver=bl.Descent(bl.SGD(0.1), steps), estimator=estimator)

    for keep in ("graph", "iterates", "segments"):
        torch.testing.assert_close(run(bl.Unrolled(keep=keep)).grad, P @ (adapted - q), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(run(bl.FirstOrder()).grad, adapted - q, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(run(bl.FirstOrder()).inner, adapted, rtol=1e-12, atol=1e-13)


def vector_problem(size=6, outer=4):
    """papers.md 3.7: g = y'Hy/2 - y'Cx, f = |y-a|^2/2 + 0.05|x|^2; the exact hypergradient is 0.1 x + C'H^-1 (y* -
    a)."""
    g = torch.Generator().manual_seed(5)
    H, C = spd(size, g), torch.randn(size, outer, generator=g, dtype=D)
    a, x = torch.randn(size, generator=g, dtype=D), torch.randn(outer, generator=g, dtype=D)
    problem = bl.Problem(
        lambda y, x, _: y @ H @ y / 2 - y @ C @ x, lambda y, x, _: (y - a).square().sum() / 2 + 0.05 * x.square().sum()
    )
    return H, C, a, x, problem


@pytest.mark.parametrize("steps", [5, 20, 80])
def test_memory_reduced_equals_an_exact_solve_at_the_kth_iterate(steps):
    H, C, a, x, problem = vector_problem()
    star = torch.linalg.solve(H, C @ x)
    iterate = star - torch.linalg.matrix_power(torch.eye(6, dtype=D) - 0.2 * H, steps) @ star
    own = 0.1 * x + C.T @ torch.linalg.solve(H, iterate - a)
    solver = bl.Descent(bl.SGD(0.2), steps)
    for estimator in (bl.MemoryReduced(steps=6, tol=1e-14), bl.Implicit(bl.CG(6, tol=1e-13)), bl.Implicit(bl.Dense())):
        found = bl.hypergradient(problem, x, torch.zeros(6, dtype=D), NO_DATA, solver=solver, estimator=estimator)
        torch.testing.assert_close(found.grad, own, rtol=1e-10, atol=1e-12)
        assert found.stats["linear_residual"].item() < 1e-10


def test_truncated_conjugate_gradients_say_so():
    _, _, _, x, problem = vector_problem()
    found = bl.hypergradient(
        problem,
        x,
        torch.zeros(6, dtype=D),
        NO_DATA,
        solver=bl.Descent(bl.SGD(0.2), 80),
        estimator=bl.Implicit(bl.CG(2, tol=1e-8)),
    )
    assert found.status is bl.Status.MAX_STEPS
    assert found.stats["linear_residual"].item() > 1e-3
    found.raise_if_failed()
    with pytest.raises(bl.BilevelError, match="MAX_STEPS"):
        found.raise_if_failed(strict=True)


def test_warm_starts_remove_the_error_of_a_single_inner_step():
    """papers.md 3.7: fixed task, slowly moving x, K=1: with warm starts of y and v the error goes to 0, without it
    stays."""
    H, C, a, x, problem = vector_problem()

    def exact(x):
        return 0.1 * x + C.T @ torch.linalg.solve(H, torch.linalg.solve(H, C @ x) - a)

    def errors(estimator):
        here, state, found = x.clone(), None, []
        for _ in range(100):
            hg = bl.hypergradient(
                problem,
                here,
                torch.zeros(6, dtype=D),
                NO_DATA,
                solver=bl.Descent(bl.SGD(0.4), 1),
                estimator=estimator,
                state=state,
            )
            state = hg.state
            found.append(((hg.grad - exact(here)).norm() / exact(here).norm()).item())
        return found

    warm = errors(bl.MemoryReduced(steps=2, tol=1e-13, warm_inner=True, warm_adjoint=True))
    cold = errors(bl.MemoryReduced(steps=2))
    assert warm[-1] < 1e-8
    assert cold[-1] == pytest.approx(cold[0])
    assert cold[-1] > 0.1


def test_momentum_and_adam_unrolls_equal_reverse_mode_through_torch_func():
    """An independent way through the same program: torch.func.grad over a hand-written loop."""
    H, C, a, x, problem = vector_problem()

    def program(x, optimizer, steps):
        y, state = torch.zeros(6, dtype=D), None
        state = optimizer.init(y)
        for _ in range(steps):
            y, state = optimizer.step(H @ y - C @ x, state, y, x)
        return (y - a).square().sum() / 2 + 0.05 * x.square().sum()

    for optimizer in (bl.SGD(0.1, momentum=0.9, nesterov=True), bl.Adam(0.05), bl.AdamW(0.05, weight_decay=0.1)):
        expected = torch.func.grad(program)(x, optimizer, 15)
        for keep in ("graph", "iterates", "segments"):
            found = bl.hypergradient(
                problem,
                x,
                torch.zeros(6, dtype=D),
                NO_DATA,
                solver=bl.Descent(optimizer, 15),
                estimator=bl.Unrolled(keep=keep),
            )
            torch.testing.assert_close(found.grad, expected, rtol=1e-11, atol=1e-13)
