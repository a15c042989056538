"""Names that issue 7 asks for (B): adapt, trainable, index and task_ids. They move y, or say which task is which."""

import inspect

import pytest
import torch
from right_or_refused import NONE, D, close, refusal_of
from torch import nn

import bilevel as bl

PROBLEM = bl.Problem(lambda y, x, b: (y - x - b).square().sum(), lambda y, x, b: 0.5 * y.square().sum())
X, Y, B = torch.ones(2, dtype=D), torch.zeros(3, 2, dtype=D), torch.arange(3.0, dtype=D)[:, None]
SOLVER = bl.Descent(bl.SGD(0.1, momentum=0.5), 4)


def inner_of(found):
    return found.inner if hasattr(found, "inner") else found


def test_adapt_moves_y_as_a_hypergradient_would():
    batches = bl.Batches(B[1], None)
    hg = bl.hypergradient(PROBLEM, X, Y[0], batches, solver=SOLVER, estimator=bl.Unrolled())
    close(inner_of(bl.adapt(PROBLEM, X, Y[0], batches, solver=SOLVER)), hg.inner, 1e-12)
    assert not Y.any()


def test_adapt_needs_no_second_derivative_and_no_influence_of_x():
    attention = torch.compiler.disable(nn.functional.scaled_dot_product_attention)
    q = torch.ones(1, 1, 2, 2, dtype=torch.float32)
    problem = bl.Problem(
        lambda y, x, b: attention(y * q, q, q).sum() + y.square().sum(), lambda y, x, b: y.sum(), init=lambda x, b: x
    )
    found = bl.adapt(problem, torch.ones(2), None, NONE, solver=bl.Descent(bl.SGD(0.1), 2))
    assert inner_of(found).shape == (2,)


@pytest.mark.parametrize("keep", ["graph", "iterates"])
def test_trainable_gives_outer_variables_that_iterate_accepts(keep):
    module = nn.Linear(2, 1).to(D)
    call, params = bl.functional(module, trainable=True)
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in params.values())
    maml = bl.Problem(
        lambda y, x, b: (call(y, Y) - 1).square().mean(),
        lambda y, x, b: (call(y, Y) - 1).square().mean(),
        init=lambda x, b: x,
    )
    optimizer = torch.optim.SGD(params.values(), lr=0.1)
    losses = [
        step.outer_loss.item()
        for step in bl.iterate(
            maml, params, None, [NONE] * 3, solver=SOLVER, estimator=bl.Unrolled(keep=keep), optimizer=optimizer
        )
    ]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["index", "task_ids"])
def test_batches_carry_their_index_and_task_ids(name):
    assert name in inspect.signature(bl.Batches).parameters


@pytest.mark.parametrize("chunk", [None, 1])
def test_warm_starts_follow_the_ids_of_tasks_or_are_refused(chunk):
    order = torch.tensor([2, 0, 1])
    estimator = bl.TaskMean(bl.MemoryReduced(steps=2, warm_inner=True, warm_adjoint=True), chunk)

    def call(rows, state=None):
        batches = bl.Batches(B[rows], B[rows], task_ids=rows.tolist())
        return bl.hypergradient(PROBLEM, X, Y, batches, solver=SOLVER, estimator=estimator, state=state)

    state = call(torch.arange(3)).state
    straight = call(torch.arange(3), state)
    turned = []
    if refusal_of(lambda: turned.append(call(order, state))) is None:
        close(turned[0].inner, straight.inner[order], 1e-9)
        close(turned[0].grad, straight.grad, 1e-9)
