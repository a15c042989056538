"""Tuning the step size (methods.md A8, TP3): the table, the traps of float32, and what the library says of them."""

import math

import bilevel_profiling
import pytest
import torch

import bilevel as bl
from bilevel.problems import step_size
from bilevel.problems.step_size import Rescaled, StepSize

D, F32 = torch.float64, torch.float32
TABLE = {
    0.1: (6.8e-5, -5.7e-3, -0.1199, -1.052632),
    0.5: (2.6e-21, -2.7e-19, -0.5927, -1.333333),
    0.8: (4.0e-36, 1.6e-33, -1.0189, 5.000000),
    1.05: (4.2e6, 1.2e9, 0.1906, 3.636364),
    1.2: (2.4e23, 5.5e25, 0.6729, 2.857143),
}
"""methods.md A8: eta -> F, F', G, G' for H = diag(2, .5), w_0 = (1, 1), T = 80."""
FIVE = {(0.5, 80): -1.333333, (0.8, 400): 4.999996, (1.9, 80): 1.428572, (3.0, 80): 0.8000, (20.0, 80): 0.1025641}
"""methods.md A8, "Fix to ship": (eta, T) -> G' measured in float32."""
TRUE = {(0.5, 80): -4 / 3, (0.8, 400): 5.0, (1.9, 80): 10 / 7, (3.0, 80): 0.8, (20.0, 80): 4 / 39}


def known(steps=80):
    return StepSize(torch.tensor([2.0, 0.5], dtype=D), torch.ones(2, dtype=D), steps)


def rescaled(eta, steps, dtype, estimator=None):
    problem, outer, inner, batches = step_size.setup(rate=eta, steps=steps, dtype=dtype)
    return bl.hypergradient(
        problem,
        outer,
        inner,
        batches,
        solver=bl.Descent(Rescaled(), steps),
        estimator=estimator or bl.Unrolled(),
    )


def naive(eta, steps, dtype, *, log):
    """Plain descent, and F or log F / T at its end."""
    hessian = torch.diag(torch.tensor([2.0, 0.5], dtype=dtype))

    def f(y, x, b):
        return 0.5 * y @ hessian @ y

    problem = bl.Problem(f, (lambda y, x, b: f(y, x, b).log() / steps) if log else f)
    return bl.hypergradient(
        problem,
        torch.tensor(eta, dtype=dtype),
        torch.ones(2, dtype=dtype),
        bl.Batches(None, None),
        solver=bl.Descent(bl.SGD(lr=lambda x: x), steps),
        estimator=bl.Unrolled(),
    )


@pytest.mark.parametrize("eta", TABLE)
def test_the_table_of_values_and_slopes(eta):
    """methods.md A8, TP3: F, F', G, G', by closed form and by backpropagation in float64."""
    f, df, g, dg = TABLE[eta]
    exact = known()
    assert exact.value(eta).item() == pytest.approx(g, abs=5e-5)
    assert exact.slope(eta).item() == pytest.approx(dg, abs=5e-7)
    plain = naive(eta, 80, D, log=False)
    assert plain.outer_loss.item() == pytest.approx(f, rel=0.02)
    assert plain.grad.item() == pytest.approx(df, rel=0.02)
    for hg in (naive(eta, 80, D, log=True), rescaled(eta, 80, D)):
        assert hg.outer_loss.item() == pytest.approx(exact.value(eta).item(), rel=1e-11)
        assert hg.grad.item() == pytest.approx(exact.slope(eta).item(), rel=1e-10)


def test_the_best_step_size():
    """methods.md A8: .79584 for T = 80, and its limit 2 / (h_max + h_min) = .8."""
    assert known().best(0.1, 1.0) == pytest.approx(0.79584, abs=5e-6)
    assert known(20_000).best(0.1, 1.0) == pytest.approx(0.8, abs=1e-4)
    with pytest.raises(ValueError, match="a change of sign"):
        known().best(0.1, 0.2)


@pytest.mark.parametrize(("eta", "steps"), FIVE)
@pytest.mark.parametrize("keep", ["graph", "iterates", "segments"])
def test_rescaled_iterates_are_exact_in_single_precision(eta, steps, keep):
    """methods.md A8, "Fix to ship": five cases, to 6 digits."""
    hg = rescaled(eta, steps, F32, bl.Unrolled(keep))
    assert hg.grad.dtype == F32
    assert hg.grad.item() == pytest.approx(TRUE[eta, steps], rel=2e-6)
    assert hg.grad.item() == pytest.approx(FIVE[eta, steps], rel=2e-6)
    assert hg.outer_loss.item() == pytest.approx(known(steps).value(eta).item(), rel=1e-5)
    assert not hg.status.failed


def test_the_traps_of_single_precision_are_traps_and_are_flagged():
    """methods.md A8: F underflows (gradient NaN), F = inf (gradient 0 without a word), and inf - inf."""
    fine = naive(0.5, 80, F32, log=True)
    assert fine.grad.item() == pytest.approx(-1.3333324, rel=2e-6)
    assert not fine.status.failed
    vanished = naive(0.8, 400, F32, log=True)
    assert math.isnan(vanished.grad.item())
    assert vanished.outer_loss.item() == -math.inf
    assert vanished.status is bl.Status.NONFINITE
    silent = naive(1.9, 80, F32, log=True)
    assert silent.grad.item() == 0.0  # the true one is 1.428571
    assert silent.outer_loss.item() == math.inf
    assert silent.status is bl.Status.NONFINITE
    gone = naive(3.0, 80, F32, log=True)
    assert math.isnan(gone.grad.item())
    assert gone.status is bl.Status.DIVERGED
    for hg in (vanished, silent, gone):
        with pytest.raises(bl.BilevelError):
            hg.raise_if_failed()


def test_the_profiler_flags_an_outer_loss_that_is_not_finite():
    """methods.md A8, "Use for us": the record of a measurement says so."""
    hessian = torch.diag(torch.tensor([2.0, 0.5]))

    def setup(device):
        problem = bl.Problem(lambda y, x, b: 0.5 * y @ b @ y, lambda y, x, b: (0.5 * y @ b @ y).log() / 80)
        return problem, torch.tensor(1.9), torch.ones(2), bl.Batches(hessian, hessian)

    solver, estimator = bl.Descent(bl.SGD(lr=lambda x: x), 80), bl.Unrolled()
    case = bilevel_profiling.Case(setup, solver=solver, estimator=estimator)
    assert bilevel_profiling.measure(case, repeats=1).status == "NONFINITE"


def test_the_rule_of_the_released_code_finds_the_best_step_size():
    """methods.md A8: eta <- max(0, eta - .01 / sqrt(i) G'(eta)) from .1, 1000 steps; the first ten by iterate, in
    float32."""
    problem, outer, inner, batches = step_size.setup(dtype=F32)
    optimizer = torch.optim.SGD([outer], lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / math.sqrt(i + 1))
    loop = bl.iterate(
        problem,
        outer,
        inner,
        [batches] * 10,
        solver=bl.Descent(Rescaled(), 80),
        estimator=bl.Unrolled(),
        optimizer=optimizer,
        carry=False,
    )
    path, eta = [], 0.1
    for _ in loop:
        schedule.step()
        path.append(outer.item())
    for i in range(1, 1001):
        eta = max(0.0, eta - 0.01 / math.sqrt(i) * known().slope(eta).item())
        if i <= 10:
            assert path[i - 1] == pytest.approx(eta, rel=1e-5)
    assert eta == pytest.approx(0.79584, abs=2e-3)


def test_tasks_have_scales_of_their_own():
    problem, outer, inner, _ = step_size.setup(rate=0.7, dtype=F32)
    hessians = torch.stack([torch.diag(torch.tensor(h, dtype=F32)) for h in ((2.0, 0.5), (1.0, 0.2), (5.0, 1.0))])
    every = bl.Batches(hessians, (hessians, 80))
    many = {name: leaf.expand(3, *leaf.shape) for name, leaf in inner.items()}
    solver = bl.Descent(Rescaled(), 80)
    found = bl.hypergradient(problem, outer, many, every, solver=solver, estimator=bl.TaskMean(bl.Unrolled()))
    slopes = [StepSize(h.diagonal().double(), torch.ones(2, dtype=D), 80).slope(0.7).item() for h in hessians]
    assert found.grad.item() == pytest.approx(sum(slopes) / 3, rel=1e-5)
    assert found.inner["log_scale"].shape == (3,)


def test_a_point_that_has_arrived_stays_and_other_inner_variables_are_refused():
    problem, outer, inner, batches = step_size.setup(rate=0.5, curvatures=(2.0,), start=(1.0,), steps=3)
    found = bl.adapt(problem, outer, inner, batches, solver=bl.Descent(Rescaled(), 3), evaluate=False)
    assert found.inner["point"].item() == 0.0
    flagged = bl.adapt(problem, outer, inner, batches, solver=bl.Descent(Rescaled(), 3))
    assert flagged.status is bl.Status.NONFINITE  # log 0
    with pytest.raises(ValueError, match="Rescaled moves an inner variable"):
        bl.adapt(
            bl.Problem(lambda y, x, b: y.sum(), lambda y, x, b: y.sum()),
            outer,
            torch.ones(2, dtype=D),
            bl.Batches(None, None),
            solver=bl.Descent(Rescaled(), 1),
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StepSize(torch.ones(2), torch.ones(3), 5), "two vectors of one length"),
        (lambda: StepSize(torch.tensor([1.0, -1.0]), torch.ones(2), 5), "the curvatures positive"),
        (lambda: StepSize(torch.ones(2), torch.ones(2), 0), "steps=0; an integer of at least 1"),
        (lambda: step_size.setup(curvatures=(1.0,)), "positive curvatures, as many starts"),
        (lambda: step_size.setup(steps=0), "at least one step"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Train-by-train against train-by-validation


def regression(samples, tasks=20, dimension=20, noise=1.0):
    """y = x . w* + noise with |w*| = 1: the batches of each task and the risk |w - w*|^2 / 2 of an answer."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(tasks, dimension, generator=generator, dtype=D)
    truth = truth / truth.norm(dim=1, keepdim=True)

    def draw():
        inputs = torch.randn(tasks, samples, dimension, generator=generator, dtype=D)
        answers = (inputs @ truth.unsqueeze(-1)).squeeze(-1)
        return inputs, answers + noise * torch.randn(tasks, samples, generator=generator, dtype=D)

    return draw(), draw(), lambda w: 0.5 * (w - truth).square().sum(1).mean().item()


def squared(y, x, batch):
    return 0.5 * (batch[0] @ y - batch[1]).square().mean()


def tuned(inner, outer, risk):
    """The step size of 40 steps from 0 that is best on the outer batches, and the risk of what it gives."""
    problem, found = bl.Problem(squared, squared), {}
    start = torch.zeros(inner[0].shape[0], inner[0].shape[2], dtype=D)
    for eta in torch.logspace(-2.5, -0.2, 10, dtype=D):
        done = bl.adapt(
            problem, eta, start, bl.Batches(inner, outer), solver=bl.Descent(bl.SGD(lr=lambda x: x), 40), tasks=True
        )
        found[eta.item()] = done.outer_loss.mean().nan_to_num(math.inf).item(), risk(done.inner)
    best = min(found, key=lambda eta: found[eta][0])
    return best, found[best][1]


def test_training_loss_tunes_for_interpolation_and_validation_loss_does_not():
    """methods.md A8: few noisy samples tell the two apart, many do not (n / d = 1 and 100)."""
    train, valid, risk = regression(samples=20)
    by_train, by_valid = tuned(train, train, risk), tuned(train, valid, risk)
    assert by_train[0] > 3 * by_valid[0]
    assert by_train[1] > 2 * by_valid[1]
    train, valid, risk = regression(samples=2000, tasks=10)
    by_train, by_valid = tuned(train, train, risk), tuned(train, valid, risk)
    assert by_train[1] == pytest.approx(by_valid[1], rel=0.05)
