"""Stencils of higher order wherever the two-point schemes work: trees, direct terms, tasks, states, noise, failures."""

import dataclasses
import functools
import math
import warnings
from typing import Any

import catalogue
import pytest
import torch
from right_or_refused import NONE, D, close
from torch import Tensor

import bilevel as bl
from bilevel.estimators.penalty.perturbation import default_nu, stencil_of
from bilevel.testing.storages import Storages

HIGHER = (3, 4, 6)


def flat(tree: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in torch.utils._pytree.tree_leaves(tree)])


def off(found: Any, exact: Any) -> float:
    return ((flat(found).double() - flat(exact)).norm() / flat(exact).norm()).item()


def quietly(*arguments: Any, **keywords: Any) -> bl.Hypergradient:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bl.hypergradient(*arguments, **keywords)


@functools.cache
def nets(name: str) -> tuple[Any, ...]:
    """A problem of the catalogue and its hypergradient at the solution, by dense solves."""
    posed = catalogue.PROBLEMS[name]()
    solver = bl.Converge(bl.SGD(1.0), tol=1e-10, max_steps=5000)
    return *posed, solver, quietly(*posed, solver=solver, estimator=bl.Implicit(bl.Dense())).grad


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_on_nets_with_direct_terms_the_error_falls_with_the_order(order):
    """Not quadratic, trees of tensors, x in both losses or in the start, against dense solves."""
    *posed, solver, exact = nets("meta start")
    errors = [
        off(quietly(*posed, solver=solver, estimator=bl.FirstOrderCorrected(nu, order)).grad, exact)
        for nu in (0.04, 0.01)
    ]
    assert math.log(errors[0] / errors[1]) / math.log(4) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("order", HIGHER)
def test_a_direct_term_is_taken_by_the_same_stencil(order):
    # F = |y*|^2 / 2 + <sin x, y*> + |x|^4, y* = x / h: every path, in closed form; and x in f alone.
    h, x = torch.tensor([1.0, 3.0], dtype=D), torch.tensor([0.4, -0.7], dtype=D)

    def f(y: Tensor, x: Tensor, b: Any) -> Tensor:
        return y.square().sum() / 2 + x.sin() @ y + x.pow(4).sum()

    solver = bl.Descent(bl.SGD(0.5), 60)
    both = bl.Problem(lambda y, x, b: (h * y.square()).sum() / 2 - x @ y, f)
    alone = bl.Problem(lambda y, x, b: (h * (y - 1).square()).sum() / 2, f)
    estimator = bl.FirstOrderCorrected(0.02, order)
    hg = bl.hypergradient(both, x, torch.zeros(2, dtype=D), NONE, solver=solver, estimator=estimator)
    close(hg.grad, x / h**2 + x.cos() * x / h + x.sin() / h + 4 * x**3, 0.02**order * 100, 1e-12)
    close(hg.inner, x / h, 0.02**order * 100, 1e-12)
    hg = bl.hypergradient(alone, x, torch.zeros(2, dtype=D), NONE, solver=solver, estimator=estimator)
    close(hg.grad, x.cos() + 4 * x**3, 0.02**order * 100, 1e-12)


@pytest.mark.parametrize("order", HIGHER)
def test_no_step_at_all_leaves_the_direct_term(order):
    problem = bl.Problem(lambda y, x, b: (y - x).square().sum(), lambda y, x, b: y.sum() + x.square().sum())
    x, solver = torch.tensor([1.0, -2.0], dtype=D), bl.Descent(bl.SGD(0.5), 0)
    hg = bl.hypergradient(problem, x, x * 0, NONE, solver=solver, estimator=bl.FirstOrderCorrected(scheme=order))
    close(hg.grad, 2 * x, 1e-14)
    assert torch.equal(hg.inner, x * 0)


def by_hand(problem: bl.Problem, x: Tensor, y0: Tensor, batches: list[Any], order: int, nu: float, lr: float) -> Tensor:
    """K gradient steps on g + j nu f for each node, by torch.func."""
    stencil, total = stencil_of(order), torch.zeros_like(x)
    for node, weight in zip(stencil.nodes, stencil.weights, strict=True):
        y = y0
        for batch in batches:
            inner = functools.partial(torch.func.grad(problem.inner_loss), y, x, batch)()
            y = y - lr * (inner + node * nu * torch.func.grad(problem.outer_loss)(y, x, None))
        total += weight / nu * torch.func.grad(problem.inner_loss, 1)(y, x, batches[-1])
        total += weight * node * torch.func.grad(problem.outer_loss, 1)(y, x, None)
    return total


CURVED = bl.Problem(
    lambda y, x, b: (b * (y - x).square()).sum() + 0.1 * (y - x).pow(4).sum() + (y * x.sin()).sum(),
    lambda y, x, b: (y - 1).square().sum() + (x * y).sum(),
)
X = torch.tensor([0.7, -0.4], dtype=D)


@pytest.mark.parametrize("order", [1, 2, *HIGHER])
@pytest.mark.parametrize("per_step", [False, True])
def test_few_steps_on_batches_equal_the_program_written_out(order, per_step):
    steps = [torch.tensor([1.0, 0.5], dtype=D) * (1 + 0.2 * k * per_step) for k in range(6)]
    batches = bl.Batches(bl.PerStep(steps) if per_step else steps[0], None)
    solver, estimator = bl.Descent(bl.SGD(0.1), 6), bl.FirstOrderCorrected(0.05, order)
    hg = bl.hypergradient(CURVED, X, X * 0, batches, solver=solver, estimator=estimator)
    close(hg.grad, by_hand(CURVED, X, X * 0, steps, order, 0.05, 0.1), 1e-11)
    calls, sides = hg.stats["calls"], len(stencil_of(order).nodes)
    assert hg.stats["inner_steps"] == 6 * sides
    assert calls["inner_gradient"] == sides * 7
    assert calls["outer_gradient"] == sides * 7 - 6 * (order % 2)  # the middle side needs no f


@pytest.mark.parametrize("per_step", [False, True])
def test_all_four_sides_draw_the_same_random_numbers(per_step):
    drop = functools.partial(torch.nn.functional.dropout, p=0.4)
    data = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=D)
    problem = bl.Problem(
        lambda y, x, b: (drop(b * x) @ y - 1).square().mean() + y.square().sum(),
        lambda y, x, b: (drop(b) @ y - 2).square().mean(),
    )
    batches = bl.Batches(bl.PerStep([data] * 30) if per_step else data, data)
    grads = []
    for nu in (1e-2, 1e-3):
        torch.manual_seed(1)
        x, solver = torch.ones(3, dtype=D), bl.Descent(bl.SGD(0.1), 30)
        hg = bl.hypergradient(problem, x, x * 0, batches, solver=solver, estimator=bl.FirstOrderCorrected(nu, 4))
        grads.append(hg.grad)
    close(grads[0], grads[1], 1e-4)


# --- tasks


CURVATURES = torch.tensor([[1.0, 0.5], [0.3, 2.0], [2.0, 1.0]], dtype=D)


@pytest.mark.parametrize("order", [3, 4])
@pytest.mark.parametrize("solver", [bl.Descent(bl.SGD(0.2), 40), bl.Converge(bl.SGD(0.2), tol=1e-6)], ids=str)
def test_chunks_do_not_change_the_mean_over_tasks(order, solver):
    def run(estimator: bl.Estimator, batch: Tensor) -> bl.Hypergradient:
        y = torch.zeros(batch.shape, dtype=D)
        return bl.hypergradient(CURVED, X, y, bl.Batches(batch, None), solver=solver, estimator=estimator)

    one = bl.FirstOrderCorrected(1e-3, order)
    alone = [run(one, batch) for batch in CURVATURES]
    rtol = 1e-10 if solver.fixed else 1e-5
    for chunk in (None, 1, 2):
        together = run(bl.TaskMean(one, chunk), CURVATURES)
        close(together.grad, sum(hg.grad for hg in alone) / 3, rtol)
        close(together.inner, torch.stack([hg.inner for hg in alone]), rtol)


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_warm_sides_of_tasks_are_carried_and_saved(chunk):
    estimator = bl.TaskMean(bl.FirstOrderCorrected(1e-2, 4, warm_sides=True), chunk)

    def call(state: Any, steps: int) -> bl.Hypergradient:
        solver = bl.Descent(bl.SGD(0.2), steps)
        batches = bl.Batches(CURVATURES, None)
        return bl.hypergradient(
            CURVED, X, torch.zeros(3, 2, dtype=D), batches, solver=solver, estimator=estimator, state=state
        )

    state = None
    for _ in range(40):
        hg = call(state, 2)
        state = hg.state.to_dict() if hg.state is not None else None
    assert [side.shape for side in hg.state.sides] == [(3, 2)] * 4
    close(hg.grad, call(None, 80).grad, 1e-9)


def test_the_state_of_another_scheme_is_refused():
    solver = bl.Descent(bl.SGD(0.2), 3)

    def call(scheme: Any, state: Any) -> bl.Hypergradient:
        estimator = bl.FirstOrderCorrected(1e-2, scheme, warm_sides=True)
        return bl.hypergradient(
            CURVED, X, X * 0, bl.Batches(CURVATURES[0], None), solver=solver, estimator=estimator, state=state
        )

    with pytest.raises(ValueError, match="state whose 'sides' does not have the shapes"):
        call(4, call("symmetric", None).state)


def test_four_warm_sides_follow_x_without_a_false_alarm():
    h = torch.tensor([1.0, 0.1], dtype=D)
    problem = bl.Problem(
        lambda y, x, b: 0.5 * (h * (y - x).square()).sum(),
        lambda y, x, b: 0.5 * (y - 1).square().sum() + 0.05 * x.square().sum(),
    )
    x = torch.tensor([3.0, -2.0], dtype=D, requires_grad=True)
    loop = bl.iterate(
        problem,
        x,
        torch.zeros(2, dtype=D),
        [NONE] * 60,
        solver=bl.Descent(bl.SGD(lr=0.9), 3),
        estimator=bl.FirstOrderCorrected(1e-2, 4, warm_sides=True),
        optimizer=torch.optim.SGD([x], lr=0.2),
    )
    assert len(list(loop)) == 60
    close(x, torch.full((2,), 1 / 1.1, dtype=D), 0.05)


# --- failures


@pytest.mark.parametrize("tasks", [None, 3])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_far_side_that_runs_away_is_told_where_the_near_ones_are_bounded(tasks, sign):
    # Curvature 1 + j nu at nu = 0.8: 0.2 for j = -1, -0.6 for j = -2. And a concave f: then j = 2 runs away.
    problem = bl.Problem(
        lambda y, x, b: 0.5 * (y - x).square().sum(), lambda y, x, b: sign * 0.5 * (y - 3).square().sum()
    )
    y, batch = torch.zeros(2, dtype=D), None
    if tasks:
        y, batch = y.expand(3, 2), torch.zeros(3)

    def run(scheme: Any) -> bl.Hypergradient:
        estimator: bl.Estimator = bl.FirstOrderCorrected(0.8, scheme)
        return bl.hypergradient(
            problem,
            X,
            y,
            bl.Batches(batch, None),
            solver=bl.Descent(bl.SGD(0.4), 30),
            estimator=bl.TaskMean(estimator) if tasks else estimator,
        )

    assert run(4).status is bl.Status.UNBOUNDED
    assert run("symmetric").status is not bl.Status.UNBOUNDED


@pytest.mark.parametrize(("scheme", "nu"), [("symmetric", 1.5), ("symmetric", 1.0), (4, 0.8), (4, 0.5)])
@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_a_side_that_runs_away_under_a_tolerance_is_told(scheme, nu, chunk):
    """It ran out of steps somewhere at 1e79, which alone is no failed status."""
    problem = bl.Problem(lambda y, x, b: 0.5 * (y - x).square().sum(), lambda y, x, b: 0.5 * (y - 3).square().sum())
    hg = bl.hypergradient(
        problem,
        X,
        torch.zeros(3, 2, dtype=D),
        bl.Batches(torch.zeros(3), None),
        solver=bl.Converge(bl.SGD(0.4), 1e-8, 100),
        estimator=bl.TaskMean(bl.FirstOrderCorrected(nu, scheme), chunk),
    )
    assert hg.status is bl.Status.UNBOUNDED


@pytest.mark.parametrize("start", ["solution", "near", "far"])
@pytest.mark.parametrize("scheme", ["forward", "symmetric", 3, 4])
def test_sides_that_meet_their_tolerance_or_are_slow_alike_raise_no_alarm(scheme, start):
    problem = bl.Problem(
        lambda y, x, b: 0.5 * (CURVATURES[0] * (y - x).square()).sum(), lambda y, x, b: 0.5 * (y - 3).square().sum()
    )
    y = X + {"solution": 0.0, "near": 1e-6, "far": 5.0}[start]
    for steps in (3, 10, 1000):
        solver = bl.Converge(bl.SGD(0.4), 1e-6, steps)
        hg = bl.hypergradient(problem, X, y, NONE, solver=solver, estimator=bl.FirstOrderCorrected(0.02, scheme))
        assert not hg.status.failed, (steps, hg.status)
    close(hg.grad, X - 3, 0.05)


def test_variables_without_data_have_no_autocast():
    x = torch.zeros(3, device="meta")
    problem = bl.Problem(lambda y, x, b: (y - x).square().sum(), lambda y, x, b: y.square().sum())
    estimator = bl.FirstOrderCorrected(scheme=4)
    hg = bl.hypergradient(problem, x, x, NONE, solver=bl.Descent(bl.SGD(0.4), 3), estimator=estimator)
    assert hg.grad.shape == (3,)


@pytest.mark.parametrize("scale", [1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float32, D], ids=["float32", "float64"])
@pytest.mark.parametrize("order", HIGHER)
def test_a_small_inner_loss_gives_no_absurd_estimate(scale, dtype, order):
    problem = bl.Problem(lambda y, x, b: scale * (y - x).square().sum(), lambda y, x, b: 0.5 * (y - 3).square().sum())
    x, solver = X.to(dtype), bl.Descent(bl.SGD(0.3 / scale), 30)
    hg = quietly(problem, x, x * 0, NONE, solver=solver, estimator=bl.FirstOrderCorrected(scheme=order))
    if not hg.status.failed:
        close(hg.grad, X - 3, 0.5)


# --- how large nu is


@pytest.mark.parametrize(
    ("dtype", "expected"), [(D, 1e-4), (torch.float32, 1e-2), (torch.float16, 0.05), (torch.bfloat16, 0.05)]
)
def test_the_default_of_order_four(dtype, expected):
    assert default_nu(dtype, 4) == expected


@pytest.mark.parametrize("order", HIGHER)
@pytest.mark.parametrize("dtype", [torch.float32, D], ids=["float32", "float64"])
def test_the_default_of_higher_orders_is_near_the_best_of_a_grid(order, dtype):
    exact = nets("meta start")[-1]
    problem, x, _, batches = catalogue.meta_start(dtype)

    def error(nu: float | None) -> float:
        estimator = bl.FirstOrderCorrected(nu, order)
        return off(
            quietly(problem, x, None, batches, solver=bl.Descent(bl.SGD(0.5), 110), estimator=estimator).grad, exact
        )

    nu = default_nu(dtype, order)
    assert error(None) == error(nu) < (1e-4 if dtype == torch.float32 else 1e-9)
    assert error(None) < 15 * min(error(nu * factor) for factor in (0.1, 10.0))


def test_an_autocast_around_the_call_sets_the_default():
    # Chosen for float32, it divides the rounding of bfloat16 by 1e-2.
    problem, x, _, batches = catalogue.meta_start(torch.float32)
    exact = nets("meta start")[-1]
    found = {}
    for nu in (None, 1e-2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hg = quietly(
                problem,
                x,
                None,
                batches,
                solver=bl.Descent(bl.SGD(0.5), 60),
                estimator=bl.FirstOrderCorrected(nu),
            )
        found[hg.stats["nu"]] = off(hg.grad, exact)
    assert list(found) == [0.1, 1e-2]
    assert found[0.1] < 0.5 * found[1e-2]
    assert (
        quietly(problem, x, None, batches, solver=bl.Descent(bl.SGD(0.5), 2), estimator=bl.FirstOrderCorrected()).stats[
            "nu"
        ]
        == 1e-2
    )


def corrected(problem: bl.Problem, solver: bl.InnerSolver, scheme: Any, dtype: torch.dtype = D) -> Any:
    x = X.to(dtype)

    def at(nu: float) -> bl.Hypergradient:
        return quietly(problem, x, x * 0, NONE, solver=solver, estimator=bl.FirstOrderCorrected(nu, scheme))

    return at


@pytest.mark.parametrize("scheme", ["forward", "symmetric", 4])
@pytest.mark.parametrize("dtype", [torch.float32, D], ids=["float32", "float64"])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_a_measured_nu_follows_the_scale_of_the_inner_loss(scheme, dtype, scale):
    """The default does not: at a scale of 1e-4 its sides have no minimum, and at 1e4 rounding is all there is."""
    problem = bl.Problem(
        lambda y, x, b: scale * ((y - x).square().sum() + 0.1 * (y - x).pow(4).sum()),
        lambda y, x, b: (y - 3).square().sum() + 0.1 * (y - 3).pow(3).sum() + (x * y).sum(),
    )
    right = 2 * (X - 3) + 0.3 * (X - 3) ** 2 + 2 * X  # y* = x
    at = corrected(problem, bl.Descent(bl.SGD(0.3 / scale), 60), scheme, dtype)
    found = at(bl.calibrated_nu(at, [10.0**power for power in range(4, -11, -1)]))
    assert not found.status.failed
    bound = {torch.float32: {"forward": 2e-2, "symmetric": 2e-3, 4: 2e-3}, D: {"forward": 1e-5}}[dtype]
    close(found.grad, right, bound.get(scheme, 1e-7))


def test_a_measured_nu_sees_reduced_precision_inside_of_a_loss():
    def narrow(y: Tensor, x: Tensor, b: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return (torch.eye(2) @ (y - x)[:, None]).float().square().sum() / 2 + 0.01 * (y - x).pow(4).sum()

    problem = bl.Problem(narrow, lambda y, x, b: (y - 3).square().sum() / 2)
    at = corrected(problem, bl.Descent(bl.SGD(0.5), 40), "symmetric", torch.float32)
    nu = bl.calibrated_nu(at)
    close(at(nu).grad, X - 3, 0.05)


def test_a_measured_nu_is_not_fooled_where_both_sides_agree_to_the_last_digit():
    # Below float32's resolution the difference is 0, whatever nu is, and the direct term alone does not change.
    problem = bl.Problem(
        lambda y, x, b: (y - x).square().sum() + 0.1 * (y - x).pow(4).sum(),
        lambda y, x, b: (y - 3).square().sum() + x.sum() + 0.1 * y.pow(3).sum(),
    )
    at = corrected(problem, bl.Descent(bl.SGD(0.2), 60), "symmetric", torch.float32)
    nu = bl.calibrated_nu(at, [10.0**-power for power in range(16)])
    close(at(nu).grad, 2 * (X - 3) + 1 + 0.3 * X**2, 1e-3)


def test_a_measured_nu_says_what_it_needs():
    at = corrected(CURVED, bl.Descent(bl.SGD(0.1), 5), "symmetric")
    for candidates in ([1e-3, 1e-2], [1e-2, 1e-2], [1.0, 0.0], [1.0, -1.0]):
        with pytest.raises(ValueError, match="from large to small"):
            bl.calibrated_nu(at, candidates)
    diverging = bl.Problem(lambda y, x, b: -(y - x).square().sum(), lambda y, x, b: (y - 1).square().sum())
    with pytest.raises(ValueError, match="no two neighbors"):
        bl.calibrated_nu(corrected(diverging, bl.Descent(bl.SGD(1e3), 110), "symmetric"))


# --- memory


def test_memory_does_not_grow_with_the_number_of_points():
    y, x = torch.zeros(4000, dtype=D), torch.ones(4000, dtype=D)
    problem = bl.Problem(lambda y, x, b: 0.5 * (y - x).square().sum(), lambda y, x, b: 0.5 * y.square().sum())

    def peak(scheme: int, **options: Any) -> float:
        def call() -> None:
            bl.hypergradient(
                problem,
                x,
                y,
                NONE,
                solver=bl.Descent(bl.SGD(0.5), 4),
                estimator=bl.FirstOrderCorrected(0.01, scheme, **options),
            )

        call()
        with Storages() as storages:
            call()
        return storages.peak / x.nbytes

    peaks = {scheme: peak(scheme) for scheme in (2, 4, 8, 16)}
    assert peaks[4] <= peaks[2] + 2
    assert peaks[16] == pytest.approx(peaks[8], abs=0.05) == pytest.approx(peaks[4], abs=0.05)
    assert peak(8, warm_sides=True) <= peaks[8] + 8


def test_schemes_are_frozen_and_comparable():
    assert bl.FirstOrderCorrected(scheme=4) == dataclasses.replace(bl.FirstOrderCorrected(), scheme=4)
    assert "nu^4" in bl.FirstOrderCorrected(scheme=4).bias
