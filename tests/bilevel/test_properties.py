"""Properties of random problems: smooth losses, pytrees of any shape, any K, any optimizer.

All exact estimators are one number; all accurate linear solves at one point are one number; the biases of damping,
truncation and an unfinished inner loop fall with their orders. The draws are the same in every run (derandomize).
"""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bilevel as bl
from bilevel.testing import ENTRIES

D = torch.float64
QUICK = settings(max_examples=12, deadline=None, derandomize=True, database=None)
EXACT = [entry for entry in ENTRIES if entry.exact and entry.bias is None]
SOLVES = [entry for entry in ENTRIES if entry.target == "solution" and entry.bias is None and entry.settles == 1]
SOLVES = [entry for entry in SOLVES if entry.label != "implicit neumann"]  # 2,500 products each
shapes = st.lists(st.lists(st.integers(1, 3), max_size=2).map(tuple), min_size=1, max_size=3)


@dataclasses.dataclass(frozen=True)
class Smooth:
    """A random smooth bilevel problem; `curved` is the strength of what is not quadratic in y."""

    inner: list
    outer: list
    seed: int
    started: bool
    batches: int
    curved: float = 0.3

    def posed(self, steps):
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=D)

        def count(tree):
            return sum(math.prod(shape) for shape in tree)

        P, Q = count(self.inner), count(self.outer)
        mixing, cross, bent, target = normal(P, P) / P, normal(P, Q), normal(P, P), normal(P)
        start = normal(P, Q)

        def vector(tree):
            return torch.cat([leaf.reshape(-1) for leaf in torch.utils._pytree.tree_leaves(tree)])

        def tree(values, shapes):
            parts = values.split([math.prod(shape) for shape in shapes])
            made = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
            return {"first": made[0], "rest": made[1:]}

        def inner_loss(y, x, batch):
            y, x = vector(y), vector(x)
            quadratic = y.square().sum() + (mixing @ y).square().sum() / 2 - y @ cross @ x.tanh()
            return (1 + batch) * quadratic / 2 + self.curved * (bent @ y + x.sum().sin()).cosh().log().sum() / P

        def outer_loss(y, x, batch):
            y, x = vector(y), vector(x)
            return (y - target).square().sum() / 2 + (y @ cross @ x).sin() + x.square().sum() / 10 + batch

        outer, inner = tree(normal(Q), self.outer), tree(normal(P), self.inner)
        init = (lambda x, batch: tree(start @ vector(x).sin(), self.inner)) if self.started else None
        some = torch.linspace(0, 0.3, self.batches, dtype=D)
        batch = bl.PerStep([some[k % self.batches] for k in range(max(steps, 1))]) if self.batches > 1 else some[0]
        return {
            "problem": bl.Problem(inner_loss, outer_loss, init=init),
            "outer": outer,
            "inner": None if self.started else inner,
            "batches": bl.Batches(batch, some[0]),
        }


problems = st.builds(
    Smooth, shapes, shapes, st.integers(0, 2**16), started=st.booleans(), batches=st.sampled_from([1, 3])
)
standing = st.builds(Smooth, shapes, shapes, st.integers(0, 2**16), started=st.just(False), batches=st.just(1))
optimizers = st.sampled_from(
    [
        bl.SGD(0.2),
        bl.SGD(0.1, momentum=0.7, weight_decay=0.05),
        bl.SGD(0.1, momentum=0.7, nesterov=True),
        bl.SGD(lr=lambda x: 0.2 * x["first"].sum().sigmoid()),
        bl.Adam(0.1, weight_decay=0.01),
        bl.AdamW(0.1),
    ]
)


def flat(hg):
    return torch.cat([leaf.reshape(-1) for leaf in torch.utils._pytree.tree_leaves(hg.grad)])


@pytest.mark.parametrize("entry", EXACT, ids=lambda entry: entry.label)
@QUICK
@given(problem=problems, steps=st.integers(0, 6), optimizer=optimizers)
def test_all_exact_estimators_are_one_number(entry, problem, steps, optimizer):
    posed, solver = problem.posed(steps), bl.Descent(optimizer, steps)
    expected = flat(bl.hypergradient(**posed, solver=solver, estimator=bl.Unrolled()))
    try:
        found = bl.hypergradient(**posed, solver=solver, estimator=entry.estimator)
    except ValueError:  # (refused: an optimizer that it is not for)
        return
    torch.testing.assert_close(flat(found), expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("entry", SOLVES, ids=lambda entry: entry.label)
@QUICK
@given(problem=standing, steps=st.integers(0, 4))
def test_all_accurate_solves_at_one_point_are_one_number(entry, problem, steps):
    """At any K: what they differentiate is the condition at y_K. The Hessian is definite here, the losses convex."""
    posed, solver = problem.posed(steps), bl.Descent(bl.SGD(0.2), steps)
    expected = flat(bl.hypergradient(**posed, solver=solver, estimator=bl.Implicit(bl.Dense())))
    found = bl.hypergradient(**posed, solver=solver, estimator=entry.estimator)
    assert not found.status.failed
    torch.testing.assert_close(flat(found), expected, rtol=1e-8, atol=1e-9)


@QUICK
@given(problem=standing)
def test_the_bias_of_damping_is_of_first_order(problem):
    posed, solver = problem.posed(1), bl.Converge(bl.SGD(0.3), tol=1e-11, max_steps=2000)
    exact = flat(bl.hypergradient(**posed, solver=solver, estimator=bl.Implicit(bl.Dense())))
    errors = []
    for damping in (1e-4, 5e-5):
        found = flat(bl.hypergradient(**posed, solver=solver, estimator=bl.Implicit(bl.Dense(damping=damping))))
        errors.append(float((found - exact).norm()))
    if errors[1] > 1e-9:
        assert abs(math.log2(errors[0] / errors[1]) - 1) < 0.02


@QUICK
@given(problem=standing, last=st.integers(4, 8))
def test_truncation_and_an_unfinished_loop_forget_at_the_rate_of_the_loop(problem, last):
    """Each further step shrinks both errors by 1 - lr h for the curvatures h of the problem: all within [.5, .9]."""
    quadratic = dataclasses.replace(problem, curved=0.0)
    posed = quadratic.posed(1)
    exact = flat(bl.hypergradient(**posed, solver=bl.Descent(bl.SGD(0.2), 200), estimator=bl.Implicit(bl.Dense())))

    def errors(estimator, steps):
        found = bl.hypergradient(**posed, solver=bl.Descent(bl.SGD(0.2), steps), estimator=estimator)
        return float((flat(found) - exact).norm())

    for ours in (
        [errors(bl.Unrolled("iterates", last=k), 200) for k in (last, last + 1)],
        [errors(bl.Implicit(bl.Dense()), steps) for steps in (last + 20, last + 21)],
    ):
        if ours[1] > 1e-9 * float(exact.norm()):
            assert 0.4 < ours[1] / ours[0] < 0.9
