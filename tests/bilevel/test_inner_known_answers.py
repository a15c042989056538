"""Inner dynamics against closed forms and other libraries: active sets, formulas, trajectories, equilibria."""

import pytest
import torch
from right_or_refused import D, close

import bilevel as bl
from bilevel.inner import proximal, root

G = torch.Generator().manual_seed(1)
A = torch.randn(12, 6, generator=G, dtype=D)
B = A @ torch.tensor([2.0, -1.5, 0.0, 0.0, 1.0, 0.0], dtype=D) + 0.1 * torch.randn(12, generator=G, dtype=D)
V = torch.randn(9, 6, generator=G, dtype=D)
RATE = 1 / float(torch.linalg.matrix_norm(A.T @ A, 2))
NONE = bl.Batches(None, None)
ZERO = torch.zeros(6, dtype=D)
BACKWARD = {
    "Dense": bl.Implicit(bl.Dense()),
    "Neumann": bl.Implicit(bl.Neumann(600, step_size=1.0)),
    "GMRES": bl.Implicit(bl.linear.GMRES(tol=1e-10)),
    "BiCGSTAB": bl.Implicit(bl.linear.BiCGSTAB(50, tol=1e-10)),
    "NormalCG": bl.Implicit(bl.linear.NormalCG(50, tol=1e-10)),
    "Unrolled": bl.Unrolled("segments"),
}


def fit(y, x, batch):
    return (A @ y - B).square().sum() / 2


def score(y, x, batch):
    return (V @ y - 1).square().sum() / 2


def solved(operator, x, estimator, *, accelerated=True, start=ZERO, loss=fit):
    solver = bl.Converge(bl.inner.ProximalGradient(operator, RATE, accelerated), tol=1e-11, max_steps=3000)
    hg = bl.hypergradient(bl.Problem(loss, score), x, start, NONE, solver=solver, estimator=estimator)
    assert hg.status is bl.Status.OK
    return hg.inner, hg.grad


every_backward = pytest.mark.parametrize("estimator", BACKWARD.values(), ids=BACKWARD)


@every_backward
def test_the_lasso_moves_on_its_active_set(estimator):
    x = torch.tensor(0.5, dtype=D)
    y, grad = solved(proximal.L1(lambda x: x.exp()), x, estimator)
    held = y == 0
    assert 0 < held.sum() < 6
    free = A[:, ~held]
    lam = x.exp()
    by_hand = torch.linalg.solve(free.T @ free, free.T @ B - lam * y[~held].sign())
    torch.testing.assert_close(y[~held], by_hand, rtol=1e-8, atol=1e-9)
    moves = -torch.linalg.solve(free.T @ free, y[~held].sign()) * lam
    close(grad, (V.T @ (V @ y - 1))[~held] @ moves, 1e-6)


def test_the_lasso_is_that_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    y, _ = _lasso(1.3)
    theirs = linear_model.Lasso(alpha=1.3 / len(B), fit_intercept=False, tol=1e-12, max_iter=100_000)
    theirs.fit(A.numpy(), B.numpy())
    torch.testing.assert_close(y, torch.tensor(theirs.coef_), rtol=1e-6, atol=1e-8)


def _lasso(lam):
    dynamics = bl.inner.ProximalGradient(proximal.L1(lam), RATE, accelerated=True)
    found = bl.adapt(
        bl.Problem(fit, score), torch.zeros(1, dtype=D), ZERO, NONE, solver=bl.Converge(dynamics, 1e-11, 3000)
    )
    return found.inner, found.status


@every_backward
def test_a_penalty_for_each_coefficient_moves_it_alone_or_not_at_all(estimator):
    x = torch.linspace(-0.5, 2.0, 6, dtype=D)
    y, grad = solved(proximal.L1(lambda x: x.exp()), x, estimator)
    free = y != 0
    moves = torch.zeros(6, 6, dtype=D)
    moves[free.nonzero(), free.nonzero().T] = torch.linalg.inv(A[:, free].T @ A[:, free])
    close(grad, -(moves @ (V.T @ (V @ y - 1))) * y.sign() * x.exp(), 1e-6)


@every_backward
@pytest.mark.parametrize("groups", [torch.tensor([0, 0, 1, 1, 2, 2]), None], ids=["numbered", "the tensor"])
def test_the_group_lasso_equals_finite_differences(estimator, groups):
    operator = proximal.GroupLasso(lambda x: 12 * x.exp(), groups)
    ends = []
    for step in (1e-5, -1e-5):
        dynamics = bl.inner.ProximalGradient(operator, RATE, accelerated=True)
        ends.append(
            bl.adapt(
                bl.Problem(fit, score),
                torch.tensor(step, dtype=D),
                ZERO,
                NONE,
                solver=bl.Converge(dynamics, 1e-12, 3000),
            )
        )
    y, grad = solved(operator, torch.tensor(0.0, dtype=D), estimator)
    held = [(part == 0).all() for part in y.reshape(3, 2)]
    assert groups is None or (any(held) and not all(held))
    close(grad, (ends[0].outer_loss - ends[1].outer_loss) / 2e-5, 1e-5)


@every_backward
def test_a_box_holds_some_coordinates_at_learned_bounds(estimator):
    x = torch.tensor([-0.3, 0.8], dtype=D)
    y, grad = solved(proximal.Box(lambda x: x[0], lambda x: x[1]), x, estimator)
    low, high = y == x[0], y == x[1]
    free = ~low & ~high
    assert low.any()
    assert high.any()
    assert free.any()
    bend = A.T @ A
    moves = torch.zeros(6, 2, dtype=D)
    moves[low, 0] = moves[high, 1] = 1
    moves[free] = -torch.linalg.solve(bend[free][:, free], bend[free][:, ~free] @ moves[~free])
    close(grad, (V.T @ (V @ y - 1)) @ moves, 1e-6)


@every_backward
def test_a_simplex_of_learned_size_moves_on_its_face(estimator):
    x = torch.tensor(1.5, dtype=D)
    y, grad = solved(proximal.Simplex(lambda x: x), x, estimator)
    free = y > 0
    count = int(free.sum())
    assert 1 < count < 6
    close(y.sum(), x, 1e-9)
    kkt = torch.zeros(count + 1, count + 1, dtype=D)
    kkt[:count, :count] = A[:, free].T @ A[:, free]
    kkt[count, :count] = kkt[:count, count] = 1
    right = torch.zeros(count + 1, dtype=D)
    right[count] = 1
    moves = torch.linalg.solve(kkt, right)[:count]
    close(grad, (V.T @ (V @ y - 1))[free] @ moves, 1e-6)


def test_non_negative_least_squares_is_that_of_scipy():
    optimize = pytest.importorskip("scipy.optimize")
    dynamics = bl.inner.ProximalGradient(proximal.NonNegative(), RATE, accelerated=True)
    found = bl.adapt(
        bl.Problem(fit, score), torch.zeros(1, dtype=D), ZERO, NONE, solver=bl.Converge(dynamics, 1e-11, 3000)
    )
    assert (found.inner == 0).any()
    torch.testing.assert_close(found.inner, torch.tensor(optimize.nnls(A.numpy(), B.numpy())[0]), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("operator", "point", "expected"),
    [
        (proximal.L1(1.0), [1.0, -1.0, 2.0], [0.0, 0.0, 1.0]),
        (proximal.Box(0.0, 1.0), [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]),
        (proximal.NonNegative(), [0.0, -0.0, 0.5], [0.0, 0.0, 1.0]),
        (proximal.GroupLasso(5.0), [3.0, 4.0, 0.0], [0.0, 0.0, 0.0]),
        (proximal.Simplex(), [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, proximal.Prox) else "",
)
def test_a_coordinate_at_a_tie_counts_as_held(operator, point, expected):
    v = torch.tensor(point, dtype=D, requires_grad=True)
    (slope,) = torch.autograd.grad(operator.apply(v, 1.0, None)[0 if "Simplex" in str(operator) else ...].sum(), v)
    assert slope.tolist() == expected


@pytest.mark.parametrize(
    "operator",
    [
        proximal.L1(lambda x: -x.exp()),
        proximal.GroupLasso(lambda x: -x.exp()),
        proximal.Simplex(lambda x: -x.exp()),
        proximal.Box(lambda x: x.exp(), lambda x: -x.exp()),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_learned_penalty_or_set_without_a_minimum_is_a_failed_status(operator):
    dynamics = bl.inner.ProximalGradient(operator, RATE)
    x = torch.tensor(0.3, dtype=D)
    for estimator in (bl.Implicit(bl.Dense()), bl.Unrolled()):
        hg = bl.hypergradient(
            bl.Problem(fit, score), x, ZERO, NONE, solver=bl.Descent(dynamics, 3), estimator=estimator
        )
        assert hg.status.failed


# L-BFGS and Newton.


def rosenbrock(y, x, batch):
    return (100 * (y[1:] - y[:-1].square()).square() + (x - y[:-1]).square()).sum()


def test_lbfgs_takes_the_steps_of_torch():
    start = torch.tensor([-0.5, 0.4, 0.3], dtype=D)
    y = torch.nn.Parameter(start.clone())
    theirs = torch.optim.LBFGS([y], lr=0.3, max_iter=25, history_size=4, tolerance_grad=0, tolerance_change=0)

    def closure():
        theirs.zero_grad()
        loss = rosenbrock(y, 1.0, None)
        loss.backward()
        return loss

    theirs.step(closure)
    dynamics = bl.inner.LBFGS(memory=4, lr=0.3)
    ours = bl.adapt(
        bl.Problem(rosenbrock, rosenbrock), torch.ones((), dtype=D), start, NONE, solver=bl.Descent(dynamics, 25)
    )
    assert (ours.inner - start).norm() > 0.1
    torch.testing.assert_close(ours.inner, y.detach(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "dynamics",
    [
        bl.inner.LBFGS(search=bl.inner.Armijo()),
        bl.inner.LBFGS(search=bl.inner.Wolfe()),
        bl.inner.Newton(bl.CG(20, 1e-10)),
        bl.inner.Newton(bl.Dense(), search=bl.inner.Wolfe()),
    ],
    ids=["LBFGS, Armijo", "LBFGS, Wolfe", "Newton-CG", "Newton, Wolfe"],
)
def test_a_curved_valley_is_followed_to_its_end_and_differentiated_there(dynamics):
    problem = bl.Problem(rosenbrock, lambda y, x, b: y.sum())
    x, start = torch.tensor(0.9, dtype=D), torch.tensor([-1.2, 1.0], dtype=D)
    hg = bl.hypergradient(
        problem, x, start, NONE, solver=bl.Converge(dynamics, 1e-7, 200), estimator=bl.Implicit(bl.Dense())
    )
    assert hg.status is bl.Status.OK
    assert hg.stats["inner_steps"] < 80
    close(hg.inner, torch.tensor([0.9, 0.81], dtype=D), 1e-6)
    close(hg.grad, 1 + 2 * x, 1e-5)


@pytest.mark.parametrize("search", [bl.inner.Armijo(), bl.inner.Wolfe()], ids=["Armijo", "Wolfe"])
def test_newton_with_a_search_leaves_a_maximum_that_plain_newton_goes_to(search):
    problem = bl.Problem(lambda y, x, b: torch.cos(y) + 0.01 * (y - x).square(), lambda y, x, b: y)
    x, start = torch.tensor(0.3, dtype=D), torch.tensor(0.4, dtype=D)
    ends = [
        bl.adapt(problem, x, start, NONE, solver=bl.Converge(bl.inner.Newton(bl.Dense(), each), 1e-8, 60)).inner
        for each in (None, search)
    ]
    assert abs(ends[0]) < 0.1  # the top
    assert ends[1] > 2.5


# Closed forms.


def test_ridge_has_the_hypergradient_of_the_textbook():
    from bilevel.problems import ridge

    problem, outer, inner, batches = ridge.setup()
    n = len(batches.inner[1])
    dynamics = bl.inner.Ridge(lambda y, x, batch: (batch[0] @ y - batch[1]) / n**0.5, lambda x: x["log_penalty"].exp())
    for estimator in (bl.Unrolled(), bl.Implicit(bl.CG(20, 1e-12))):
        hg = bl.hypergradient(problem, outer, inner, batches, solver=bl.Descent(dynamics, 1), estimator=estimator)
        close(hg.inner, ridge.solution({"log_penalty": outer["log_penalty"].detach()}, batches.inner), 1e-10)
        close(hg.grad, ridge.hypergradient(outer, batches.inner, batches.outer), 1e-8)


def gaussian(x, batch):
    return torch.exp(-x["gamma"].exp() * (batch[0][:, None] - batch[0]).square())


@pytest.mark.parametrize("shape", [(5,), (5, 2)], ids=["one target", "two"])
def test_kernel_ridge_has_the_hypergradient_of_its_formula(shape):
    machine = bl.inner.KernelRidge(gaussian, lambda x, batch: batch[1], lambda x: x["lam"].exp())
    points, targets = torch.linspace(0, 3, 5, dtype=D), torch.randn(shape, generator=G, dtype=D)
    x = {"gamma": torch.tensor(0.2, dtype=D), "lam": torch.tensor(-1.0, dtype=D)}

    def primal(a, x, batch):
        error = batch[1] - gaussian(x, batch) @ a
        return error.square().sum() / 2 + x["lam"].exp() * (a * (gaussian(x, batch) @ a)).sum() / 2

    def outer_loss(a, x, batch):
        return (gaussian(x, batch) @ a - 1).square().sum()

    batch = points, targets
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in x.items()}
    matrix = gaussian(leaves, batch) + leaves["lam"].exp() * torch.eye(5, dtype=D)
    value = outer_loss(torch.linalg.solve(matrix, targets), leaves, batch)
    right = dict(zip(x, torch.autograd.grad(value, list(leaves.values())), strict=True))
    for loss in (machine.loss, primal):
        for estimator in (bl.Unrolled(), bl.Implicit(bl.Dense())):
            hg = bl.hypergradient(
                bl.Problem(loss, outer_loss),
                x,
                torch.zeros(shape, dtype=D),
                bl.Batches(batch, batch),
                solver=bl.Descent(machine, 1),
                estimator=estimator,
            )
            close(hg.grad, right, 1e-6)


WRONG = {
    "a mean in place of a sum": lambda y, x, b: (A @ y - B).square().mean() + x.exp() * y.square().sum() / 2,
    "no regularizer": fit,
    "not quadratic": lambda y, x, b: fit(y, x, b) + x.exp() * y.square().sum() / 2 + y.pow(4).sum(),
}


@pytest.mark.parametrize("loss", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("estimator", [bl.Unrolled(), bl.Implicit(bl.CG(10))], ids=["Unrolled", "Implicit"])
def test_a_formula_of_another_loss_is_refused(loss, estimator):
    x = torch.tensor(0.0, dtype=D)

    def formula(y, x, b):
        return torch.linalg.solve(A.T @ A + x.exp() * torch.eye(6, dtype=D), A.T @ B)

    for dynamics in (
        bl.inner.ClosedForm(formula),
        bl.inner.Ridge(lambda y, x, b: A @ y - B, lambda x: x.exp()),
    ):
        with pytest.raises(ValueError, match=r"does not solve this inner loss|cannot see how"):
            bl.hypergradient(
                bl.Problem(loss, score), x, ZERO, NONE, solver=bl.Descent(dynamics, 1), estimator=estimator
            )


def test_unknowns_that_residuals_do_not_determine_are_refused():
    def residuals(y, x, b):
        return y[:2] * x - 1

    problem = bl.Problem(bl.inner.half_square(residuals), score)
    with pytest.raises(ValueError, match=r"do not determine.*Ridge"):
        bl.hypergradient(
            problem,
            torch.ones((), dtype=D),
            ZERO,
            NONE,
            solver=bl.Descent(bl.inner.LeastSquares(residuals), 1),
            estimator=bl.Unrolled(),
        )


# Roots and equilibria.


def net(z, x, inputs):
    return torch.tanh(z @ x["w"] + inputs @ x["u"])


X = {
    "w": 0.3 * torch.randn(4, 4, generator=G, dtype=D),
    "u": torch.randn(3, 4, generator=G, dtype=D),
}
INPUTS = torch.randn(5, 3, generator=G, dtype=D)


def equilibrium(method, estimator, solver=None, inputs=INPUTS):
    layer = bl.inner.DeepEquilibrium(net, method)
    problem = bl.Problem(bl.inner.half_square(layer.residual), lambda z, x, b: (z - 0.5).square().sum())
    solver = solver or bl.Converge(layer, 1e-11, 200)
    return bl.hypergradient(
        problem, X, inputs.new_zeros(len(inputs), 4), bl.Batches(inputs, None), solver=solver, estimator=estimator
    )


@pytest.mark.parametrize(
    "method", [root.Anderson(4), root.Broyden(10), root.Plain()], ids=lambda each: type(each).__name__
)
def test_an_equilibrium_layer_has_the_gradient_of_its_long_unroll(method):
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in X.items()}
    z = INPUTS.new_zeros(5, 4)
    for _ in range(120):
        z = net(z, leaves, INPUTS)
    right = dict(zip(X, torch.autograd.grad((z - 0.5).square().sum(), list(leaves.values())), strict=True))
    for linear in (bl.Dense(), bl.Neumann(120, step_size=1.0)):
        hg = equilibrium(method, bl.Implicit(linear))
        assert hg.status is bl.Status.OK
        close(hg.grad, right, 1e-8)
    steps = hg.stats["inner_steps"]
    assert steps <= (60 if isinstance(method, root.Plain) else 25)


def test_an_example_of_a_layer_is_found_as_if_it_were_alone():
    layer = bl.inner.DeepEquilibrium(net, root.Anderson(3))
    solver = bl.Descent(layer, 4)
    together = equilibrium(root.Anderson(3), bl.Unrolled(), solver)
    for n in range(2):
        alone = equilibrium(root.Anderson(3), bl.Unrolled(), solver, INPUTS[n : n + 1])
        close(together.inner[n], alone.inner[0], 1e-11)


def test_examples_of_tasks_are_examples():
    layer = bl.inner.DeepEquilibrium(net, root.Broyden(3))
    problem = bl.Problem(bl.inner.half_square(layer.residual), lambda z, x, b: (z - 0.5).square().sum())
    batches = bl.Batches(torch.stack([INPUTS, 2 * INPUTS]), torch.zeros(2, 1, dtype=D))
    solver = bl.Descent(layer, 5)
    hg = bl.hypergradient(
        problem,
        X,
        torch.zeros(2, 5, 4, dtype=D),
        batches,
        solver=solver,
        estimator=bl.TaskMean(bl.Unrolled("iterates")),
    )
    parts = [equilibrium(root.Broyden(3), bl.Unrolled(), solver, scale * INPUTS).grad for scale in (1, 2)]
    close(hg.grad, {name: (parts[0][name] + parts[1][name]) / 2 for name in X}, 1e-9)


def test_a_neumann_series_at_the_solution_is_backpropagation_through_the_last_iterations():
    layer = bl.inner.FixedPoint(net, root.Plain())
    problem = bl.Problem(bl.inner.half_square(layer.residual), lambda z, x, b: (z - 0.5).square().sum())
    start = bl.adapt(
        problem, X, torch.zeros(5, 4, dtype=D), bl.Batches(INPUTS, None), solver=bl.Descent(layer, 200)
    ).inner
    arguments = problem, X, start, bl.Batches(INPUTS, None)
    short = bl.hypergradient(*arguments, solver=bl.Descent(layer, 4), estimator=bl.Unrolled())
    series = bl.hypergradient(
        *arguments, solver=bl.Descent(layer, 4), estimator=bl.Implicit(bl.Neumann(3, step_size=1.0))
    )
    close(series.grad, short.grad, 1e-10)


def test_unknown_methods_and_shapes_are_refused_in_words():
    with pytest.raises(TypeError, match=r"method=0.5; a method was needed"):
        bl.inner.Root(net, 0.5)
    with pytest.raises(ValueError, match="each example of it"):
        bl.inner.DeepEquilibrium(net, root.NewtonRoot(bl.Dense()))
    layer = bl.inner.DeepEquilibrium(lambda z, x, b: z / 2 + x, root.Plain())
    with pytest.raises(ValueError, match="leading dimension is that of the examples"):
        bl.adapt(
            bl.Problem(lambda z, x, b: z, lambda z, x, b: z),
            torch.ones((), dtype=D),
            torch.ones((), dtype=D),
            NONE,
            solver=bl.Descent(layer, 1),
        )
    for wrong in (lambda y, x, b: y[:2], lambda y, x, b: y.float()):
        with pytest.raises(ValueError, match="like the inner variable was needed"):
            bl.adapt(
                bl.Problem(fit, score),
                torch.ones((), dtype=D),
                ZERO,
                NONE,
                solver=bl.Descent(bl.inner.Root(wrong, root.Plain()), 1),
            )
    with pytest.raises(TypeError, match="a linear solver was needed"):
        bl.inner.Newton(bl.CG)
    with pytest.raises(TypeError, match="a proximal operator was needed"):
        bl.inner.ProximalGradient(lambda v: v, 0.1)
