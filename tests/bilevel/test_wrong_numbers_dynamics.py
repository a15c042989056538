"""The condition for a solution belongs to the dynamics (issue 7, A2, A3): converged starts, weight decay."""

import itertools

import pytest
import torch
from right_or_refused import NONE, D, central, close, refusal_of, right_or_refused

import bilevel as bl

UNROLLED = {keep: bl.Unrolled(keep=keep) for keep in ("graph", "iterates", "segments")}
CORRECTED = {"corrected": bl.FirstOrderCorrected(), "corrected forward": bl.FirstOrderCorrected(scheme="forward")}
AT_SOLUTION = {
    "CG": bl.Implicit(bl.CG(20, 1e-13)),
    "Dense": bl.Implicit(bl.Dense()),
    "Neumann": bl.Implicit(bl.Neumann(60, 0.4)),
    "memory reduced": bl.MemoryReduced(),
    **CORRECTED,
}


def every(estimators, item):
    return pytest.mark.parametrize("estimator", estimators.values(), ids=[f"{item} {name}" for name in estimators])


H = torch.tensor([1.0, 2.0, 0.5], dtype=D)
GOAL = torch.tensor([3.0, -1.0, 2.0], dtype=D)
PROBLEM = bl.Problem(
    lambda y, x, b: 0.5 * (H * (y - x).square()).sum(), lambda y, x, b: 0.5 * (y - GOAL).square().sum()
)


@every({**UNROLLED, **AT_SOLUTION}, "A2")
@pytest.mark.parametrize("distance", [0.0, 1e-8, 1e-3, 1.0], ids=lambda d: f"start off by {d:g}")
def test_a_converged_start_gives_the_hypergradient_and_not_zero(estimator, distance):
    x = torch.tensor([2.0, 1.0, -1.0], dtype=D)
    start, solver = x + distance, bl.Converge(bl.SGD(0.4), tol=1e-6, max_steps=1000)
    right = x - GOAL  # y* = x
    right_or_refused(lambda: bl.hypergradient(PROBLEM, x, start, NONE, solver=solver, estimator=estimator), right, 2e-2)


@every({**UNROLLED, **AT_SOLUTION}, "A2")
def test_a_carried_loop_with_converge_reaches_the_optimum_or_is_refused(estimator):
    x = torch.zeros(3, dtype=D, requires_grad=True)

    def loop():
        optimizer = torch.optim.SGD([x], lr=0.7)
        solver = bl.Converge(bl.SGD(0.4), tol=1e-8, max_steps=1000)
        for _ in bl.iterate(
            PROBLEM,
            x,
            torch.zeros(3, dtype=D),
            itertools.repeat(NONE, 15),
            solver=solver,
            estimator=estimator,
            optimizer=optimizer,
        ):
            pass

    if refusal_of(loop) is None:
        close(x, GOAL, 1e-3)


@every(CORRECTED, "A2")
@pytest.mark.parametrize("tol", [1e-6, 1e-9])
def test_the_chunk_of_taskmean_does_not_change_a_corrected_estimate_with_converge(estimator, tol):
    curvatures = torch.tensor([[1.0], [0.3], [2.0]], dtype=D)
    problem = bl.Problem(
        lambda y, x, h: 0.5 * (h * (y - x).square()).sum(), lambda y, x, b: 0.5 * (y - 3).square().sum()
    )
    x, start = torch.ones(1, dtype=D), torch.tensor([[1.0], [1 + 1e-7], [0.0]], dtype=D)
    for chunk in (None, 1, 2):
        right_or_refused(
            lambda chunk=chunk: bl.hypergradient(
                problem,
                x,
                start,
                bl.Batches(curvatures, None),
                solver=bl.Converge(bl.SGD(0.4), tol=tol, max_steps=500),
                estimator=bl.TaskMean(estimator, chunk),
            ),
            x - 3,
            1e-2,
        )


# Weight decay: y* solves h (y - x) + decay y = 0, coupled; the hypergradient at it has a closed form.
DECAY = 0.5
DECAYING = {
    "SGD": bl.SGD(0.3, weight_decay=DECAY),
    "momentum": bl.SGD(0.2, momentum=0.5, weight_decay=DECAY),
    "nesterov": bl.SGD(0.2, momentum=0.5, weight_decay=DECAY, nesterov=True),
    "dampened": bl.SGD(0.4, momentum=0.5, dampening=0.5, weight_decay=DECAY),
    "Adam": bl.Adam(0.02, weight_decay=DECAY),
}


@every(AT_SOLUTION, "A3")
@pytest.mark.parametrize("optimizer", DECAYING.values(), ids=DECAYING)
def test_weight_decay_of_the_inner_optimizer_is_part_of_the_hypergradient(estimator, optimizer):
    x = torch.tensor([2.0, 1.0, -1.0], dtype=D)
    right = (H * x / (H + DECAY) - GOAL) * H / (H + DECAY)
    solver = bl.Descent(optimizer, 400 if isinstance(optimizer, bl.Adam) else 150)
    start = H * x / (H + DECAY) + 1e-3
    rtol = 1e-2 if isinstance(optimizer, bl.Adam) else 1e-5
    right_or_refused(lambda: bl.hypergradient(PROBLEM, x, start, NONE, solver=solver, estimator=estimator), right, rtol)


@every(AT_SOLUTION, "A3")
def test_weight_decay_counts_with_converge(estimator):
    x = torch.tensor([2.0, 1.0, -1.0], dtype=D)
    right = (H * x / (H + DECAY) - GOAL) * H / (H + DECAY)
    solver = bl.Converge(DECAYING["SGD"], tol=1e-9, max_steps=300)
    # The gradient of g alone never vanishes here; INNER_MAX_STEPS is no failure, so the number must be right.
    right_or_refused(
        lambda: bl.hypergradient(PROBLEM, x, torch.zeros(3, dtype=D), NONE, solver=solver, estimator=estimator),
        right,
        1e-2,
    )


@every(AT_SOLUTION, "A3")
def test_weight_decay_counts_per_leaf_and_under_tasks(estimator):
    x = {"a": torch.tensor([2.0, 1.0, -1.0], dtype=D), "b": torch.tensor(1.5, dtype=D)}
    decay = {"a": torch.tensor(0.5, dtype=D), "b": torch.tensor(0.1, dtype=D)}
    problem = bl.Problem(
        lambda y, x, b: 0.5 * (H * (y["a"] - x["a"]).square()).sum() + 0.5 * (y["b"] - x["b"]).square(),
        lambda y, x, b: 0.5 * (y["a"] - b).square().sum() + 2 * y["b"].square(),
    )
    goals = torch.stack([GOAL, -GOAL])
    ya, fa, fb = H * x["a"] / (H + 0.5), H / (H + 0.5), 1 / 1.1
    right = {"a": ya * fa, "b": 4 * x["b"] * fb * fb}
    optimizer = bl.SGD(0.4, weight_decay=lambda x: decay)
    for chunk in (None, 1):
        right_or_refused(
            lambda chunk=chunk: bl.hypergradient(
                problem,
                x,
                {"a": torch.zeros(2, 3, dtype=D), "b": torch.zeros(2, dtype=D)},
                bl.Batches(torch.zeros(2, 1, dtype=D), goals),
                solver=bl.Descent(optimizer, 200),
                estimator=bl.TaskMean(estimator, chunk),
            ),
            right,
            1e-5,
        )


@every(AT_SOLUTION, "A3")
def test_a_learned_weight_decay_is_seen_or_refused(estimator):
    x = {"goal": torch.tensor([2.0, 1.0, -1.0], dtype=D), "decay": torch.tensor(-0.7, dtype=D)}

    def value(goal, log):
        return 0.5 * (H * goal / (H + log.exp()) - GOAL).square().sum()

    leaves = [leaf.clone().requires_grad_() for leaf in x.values()]
    right = dict(zip(x, torch.autograd.grad(value(*leaves), leaves), strict=True))
    problem = bl.Problem(lambda y, x, b: PROBLEM.inner_loss(y, x["goal"], b), PROBLEM.outer_loss)
    solver = bl.Descent(bl.SGD(0.3, weight_decay=lambda x: x["decay"].exp()), 200)
    right_or_refused(
        lambda: bl.hypergradient(problem, x, torch.zeros(3, dtype=D), NONE, solver=solver, estimator=estimator),
        right,
        1e-5,
    )


@every(AT_SOLUTION, "A3")
def test_one_tensor_in_the_loss_and_in_the_decay_is_seen_both_ways_or_refused(estimator):
    x = torch.tensor([0.5, 1.0, 0.2], dtype=D)
    leaf = x.clone().requires_grad_()
    value = 0.5 * (H * leaf / (H + leaf.square().sum()) - GOAL).square().sum()
    (right,) = torch.autograd.grad(value, leaf)
    solver = bl.Descent(bl.SGD(0.3, weight_decay=lambda x: x.square().sum()), 200)
    right_or_refused(
        lambda: bl.hypergradient(PROBLEM, x, torch.zeros(3, dtype=D), NONE, solver=solver, estimator=estimator),
        right,
        1e-5,
    )


@every(AT_SOLUTION, "A3")
def test_decoupled_decay_is_refused_where_it_is_not_seen(estimator):
    x = torch.tensor([2.0, 1.0, -1.0], dtype=D)
    lr, decay, steps, (b1, b2), eps = 0.05, 0.5, 150, (0.9, 0.999), 1.0

    def value(x):  # AdamW by hand; eps = 1 lets it come to rest
        y, m, v = torch.zeros(3, dtype=D), torch.zeros(3, dtype=D), torch.zeros(3, dtype=D)
        for t in range(1, steps + 1):
            g = H * (y - x)
            y = y * (1 - lr * decay)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            y = y - lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).clamp_min(1e-300).sqrt() + eps)
        return 0.5 * (y - GOAL).square().sum()

    leaf = x.clone().requires_grad_()
    (right,) = torch.autograd.grad(value(leaf), leaf)
    solver = bl.Descent(bl.AdamW(lr, eps=eps, weight_decay=decay), steps)
    right_or_refused(
        lambda: bl.hypergradient(PROBLEM, x, torch.zeros(3, dtype=D), NONE, solver=solver, estimator=estimator),
        right,
        2e-2,
    )


@every(UNROLLED, "A3")
def test_unrolling_through_decoupled_decay_equals_the_program(estimator):
    x, lr, decay = torch.tensor([2.0, 1.0, -1.0], dtype=D), 0.1, 0.5
    solver = bl.Descent(bl.AdamW(lr, weight_decay=decay), 3)

    def value(x):
        y = torch.nn.Parameter(torch.full((3,), 0.4, dtype=D))
        optimizer = torch.optim.AdamW([y], lr=lr, weight_decay=decay)
        for _ in range(3):
            y.grad = H * (y.detach() - x)
            optimizer.step()
        return 0.5 * (y.detach() - GOAL).square().sum()

    hg = bl.hypergradient(PROBLEM, x, torch.full((3,), 0.4, dtype=D), NONE, solver=solver, estimator=estimator)
    close(hg.grad, central(value, x), 1e-5)
