"""The mean over tasks equals a plain loop, whatever the estimator and the chunk."""

import functools

import catalogue
import pytest
import torch
from torch.utils import _pytree as pytree

import bilevel as bl

T = 5


def flat(tree):
    return torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(tree)])


@functools.cache
def tasks():
    problem, outer, _, _ = catalogue.meta_start()
    g = torch.Generator().manual_seed(1)
    X, Y = torch.randn(T, 12, 5, generator=g, dtype=catalogue.D), torch.randint(0, 3, (T, 12), generator=g)
    return problem, outer, bl.Batches(inner=[X[:, :8], Y[:, :8]], outer=[X[:, 8:], Y[:, 8:]])


def one(batches, i):
    return bl.Batches([leaf[i] for leaf in batches.inner], [leaf[i] for leaf in batches.outer])


SOLVER = bl.Descent(bl.SGD(0.3), 12)


@functools.cache
def looped(label):
    """Each task by itself, for all chunks."""
    problem, outer, batches = tasks()
    estimator = catalogue.ESTIMATORS[label]
    return [
        bl.hypergradient(problem, outer, None, one(batches, i), solver=SOLVER, estimator=estimator) for i in range(T)
    ]


@pytest.mark.parametrize("chunk", [None, 1, 2, 5, 9])
@pytest.mark.parametrize("estimator", [label for label in catalogue.ESTIMATORS if label not in catalogue.RANDOM])
def test_task_mean_equals_a_loop(estimator, chunk):
    problem, outer, batches = tasks()
    loop, solver, estimator = looped(estimator), SOLVER, catalogue.ESTIMATORS[estimator]
    found = bl.hypergradient(problem, outer, None, batches, solver=solver, estimator=bl.TaskMean(estimator, chunk))
    # a finite difference amplifies rounding by 1 / nu
    rtol = 1e-6 if isinstance(estimator, bl.FirstOrderCorrected) else 1e-10
    torch.testing.assert_close(flat(found.grad), sum(flat(hg.grad) for hg in loop) / T, rtol=rtol, atol=rtol / 100)
    for name in outer:
        torch.testing.assert_close(
            found.inner[name], torch.stack([hg.inner[name] for hg in loop]), rtol=1e-9, atol=1e-11
        )
    torch.testing.assert_close(found.outer_loss, torch.stack([hg.outer_loss for hg in loop]).mean())
    torch.testing.assert_close(found.inner_loss, torch.stack([hg.inner_loss for hg in loop]).mean())
    assert found.status is max((hg.status for hg in loop), key=lambda status: status.code)
    assert not found.status.failed
    assert found.stats["tasks"] == T


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_tasks_converge_and_solve_independently(chunk):
    """Tasks of very different conditioning stop at different steps; each keeps the answer it has alone."""
    scale = torch.tensor([1.0, 3.0, 0.2, 1.5], dtype=catalogue.D)
    problem = bl.Problem(
        lambda y, x, b: b * (y**2).sum() / 2 - (x * y).sum() + 0.05 * (y**4).sum(),
        lambda y, x, b: ((y - 1) ** 2).sum(),
        init=lambda x, b: x,
    )
    x = torch.tensor([0.3, -0.8], dtype=catalogue.D)
    solver, estimator = bl.Converge(bl.SGD(0.3), tol=1e-9, max_steps=2000), bl.Implicit(bl.CG(10, tol=1e-12))
    loop = [bl.hypergradient(problem, x, None, bl.Batches(s, None), solver=solver, estimator=estimator) for s in scale]
    assert len({hg.stats["inner_steps"] for hg in loop}) == 4
    found = bl.hypergradient(
        problem, x, None, bl.Batches(scale, scale), solver=solver, estimator=bl.TaskMean(estimator, chunk)
    )
    torch.testing.assert_close(found.grad, sum(hg.grad for hg in loop) / 4, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.inner, torch.stack([hg.inner for hg in loop]), rtol=1e-13, atol=1e-14)
    assert found.stats["linear_residual"].shape == (4,)


def test_per_step_batches_and_given_starts_have_a_task_dimension_too():
    p, outer, inner, _ = catalogue.weighted_net()
    g = torch.Generator().manual_seed(2)
    steps = [
        [torch.randn(T, 4, 5, generator=g, dtype=catalogue.D), torch.randint(0, 3, (T, 4), generator=g)]
        for _ in range(6)
    ]
    valid = [torch.randn(T, 4, 5, generator=g, dtype=catalogue.D), torch.randint(0, 3, (T, 4), generator=g)]
    starts = {name: torch.stack([leaf * (1 + 0.1 * i) for i in range(T)]) for name, leaf in inner.items()}
    outer.pop("log_lr")
    solver = bl.Descent(bl.SGD(0.3), 6)
    loop = [
        bl.hypergradient(
            p,
            outer,
            {name: leaf[i] for name, leaf in starts.items()},
            bl.Batches(bl.PerStep([[leaf[i] for leaf in step] for step in steps]), [leaf[i] for leaf in valid]),
            solver=solver,
            estimator=bl.Unrolled("iterates"),
        )
        for i in range(T)
    ]
    for chunk in (None, 1, 2):
        for keep in ("graph", "iterates", "segments"):
            found = bl.hypergradient(
                p,
                outer,
                starts,
                bl.Batches(bl.PerStep(steps), valid),
                solver=solver,
                estimator=bl.TaskMean(bl.Unrolled(keep), chunk),
            )
            torch.testing.assert_close(flat(found.grad), sum(flat(hg.grad) for hg in loop) / T, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_warm_starts_are_carried_task_by_task(chunk):
    problem, outer, batches = tasks()
    estimator = bl.MemoryReduced(steps=3, warm_inner=True, warm_adjoint=True)
    state, states = None, [None] * T
    for _ in range(3):
        found = bl.hypergradient(
            problem,
            outer,
            None,
            batches,
            solver=bl.Descent(bl.SGD(0.3), 2),
            estimator=bl.TaskMean(estimator, chunk),
            state=state,
        )
        loop = [
            bl.hypergradient(
                problem,
                outer,
                None,
                one(batches, i),
                solver=bl.Descent(bl.SGD(0.3), 2),
                estimator=estimator,
                state=states[i],
            )
            for i in range(T)
        ]
        state, states = found.state, [hg.state for hg in loop]
        torch.testing.assert_close(flat(found.grad), sum(flat(hg.grad) for hg in loop) / T, rtol=1e-10, atol=1e-13)


def test_dropout_masks_differ_between_tasks_and_are_replayed():
    problem, outer, batches = tasks()
    noisy = bl.Problem(
        lambda y, x, b: problem.inner_loss(y, x, (torch.nn.functional.dropout(b[0], 0.4), b[1])),
        problem.outer_loss,
        init=problem.init,
    )
    same = bl.Batches(
        [leaf[:1].expand_as(leaf) for leaf in batches.inner], [leaf[:1].expand_as(leaf) for leaf in batches.outer]
    )
    answers = []
    for keep in ("graph", "iterates", "segments"):
        torch.manual_seed(3)
        found = bl.hypergradient(
            noisy, outer, None, same, solver=bl.Descent(bl.SGD(0.3), 6), estimator=bl.TaskMean(bl.Unrolled(keep))
        )
        answers.append(flat(found.grad))
        assert not torch.allclose(found.inner["a"][0], found.inner["a"][1])
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(answers[2], answers[0], rtol=1e-11, atol=1e-14)
