"""Every entry of the catalogue against the closed form of what it returns, its bias and its variance included.

entries x problems (one number; four; an indefinite Hessian; a singular one) x dtype, tasks or engine: each against the
first problem in float64, since a mean over tasks, a rounding and a trace do not know of each other.
"""

import functools
import math
import warnings

import pytest
import torch

import bilevel as bl
from bilevel.testing.catalogue import ENTRIES, FAMILIES, Need, Quadratic

STEPS = {"program": 7, "solution": 60}
DRAWS = 400
SPECTRA = {"one number": (1.5,), "definite": (0.5, 0.8, 1.3, 2.0)}
D, F = torch.float64, torch.float32
KINDS = {
    "float64": (D, None, None),
    "float32": (F, None, None),
    "tasks": (D, 3, None),
    "graph": (D, None, bl.Compiled(backend="graph")),
}


def flat(tree):
    return torch.cat([leaf.reshape(-1).double() for leaf in torch.utils._pytree.tree_leaves(tree)])


def settled(entry, posed, estimator=None, *, tasks=None, engine=None):
    """The last of as many calls as it needs, each going on from the one before."""
    posed = dict(posed)
    inner, state, solver = posed.pop("inner"), None, posed["solver"]
    if entry.settles > 1:  # the steps are shared out: y is carried as well
        posed["solver"] = bl.Descent(solver.optimizer, 1 + math.ceil(solver.steps / entry.settles))
    estimator = entry.estimator if estimator is None else estimator
    estimator = estimator if tasks is None else bl.TaskMean(estimator)
    for _ in range(entry.settles):
        found = bl.hypergradient(inner=inner, state=state, estimator=estimator, engine=engine, **posed)
        inner, state = inner if found.next_inner is None else found.next_inner, found.state
    return found


@functools.cache
def posed(steps, eigenvalues, kind):
    """A quadratic, and one problem of it for all entries: where x acts is looked for once, and what is traced is."""
    quadratic = Quadratic.example(steps, eigenvalues=eigenvalues, outer=min(3, len(eigenvalues)))
    return quadratic, quadratic.posed(*KINDS[kind][:2])


def labels(entries):
    return pytest.mark.parametrize("entry", entries, ids=lambda entry: entry.label)


@pytest.mark.parametrize(("problem", "kind"), [*(("definite", kind) for kind in KINDS), ("one number", "float64")])
@labels([entry for entry in ENTRIES if entry.variance is None])
def test_what_it_returns_on_a_quadratic_is_its_closed_form(entry, problem, kind):
    dtype, tasks, engine = KINDS[kind]
    eigenvalues = SPECTRA[problem]
    steps = STEPS[entry.target] if entry.settles == 1 else 130  # whoever goes on from call to call comes to the end
    quadratic, given = posed(steps, eigenvalues, kind)
    found = settled(entry, given, tasks=tasks, engine=engine)
    expected = (
        entry.expected(quadratic)
        if tasks is None
        else sum(entry.expected(quadratic.of_task(i)) for i in range(tasks)) / tasks
    )
    assert not found.status.failed
    assert {leaf.dtype for leaf in torch.utils._pytree.tree_leaves(found.grad)} == {dtype}
    # A difference quotient with its default width keeps the root of rounding, or a power near it.
    stated = entry.bias is None or entry.on_quadratic is not None
    bound = {D: 1e-9 if stated else 1e-6, F: 2e-5 if stated else 5e-3}[dtype]
    assert (flat(found.grad) - expected).norm() <= bound * expected.norm()


EXACT = [entry for entry in ENTRIES if entry.bias is None and entry.variance is None]


@pytest.mark.parametrize("eigenvalues", [(-0.3, 0.8, 1.3, 2.0), (0.0, 0.8, 1.3, 2.0)], ids=["indefinite", "singular"])
@labels([entry for entry in EXACT if entry in (*FAMILIES["implicit"], *FAMILIES["reverse"], *FAMILIES["forward"])])
def test_a_hessian_that_is_not_definite(entry, eigenvalues):
    """Right, or a failure; right where the entry needs no definite Hessian. (In the singular one every vector lies in
    the range of the Hessian.)"""
    quadratic = Quadratic.example(7, eigenvalues=eigenvalues)
    found = settled(entry, quadratic.posed())
    right = (flat(found.grad) - entry.expected(quadratic)).norm() <= 1e-7 * entry.expected(quadratic).norm()
    assert right or found.status.failed, found.status
    if Need.DEFINITE not in entry.needs and eigenvalues[0]:
        assert right, found.status


@labels([entry for entry in ENTRIES if entry.variance is not None])
def test_mean_and_variance_of_one_that_draws(entry):
    """The mean within 4.5 standard errors in each number; the variance within 4.5 of its own (as of a normal law,
    doubled for heavier tails)."""
    quadratic = Quadratic.example(2)
    given = quadratic.posed()  # one problem: where x acts is looked for once
    torch.manual_seed(0)
    draws = torch.stack([flat(settled(entry, given).grad) for _ in range(DRAWS)])
    expected = entry.expected(quadratic)
    error = (draws.mean(0) - expected).abs()
    assert (error <= 4.5 * draws.std(0) / math.sqrt(DRAWS) + 1e-9 * expected.norm()).all()
    variance, promised = float(draws.var(0).sum()), float(entry.variance(quadratic))
    assert abs(variance - promised) <= 2 * 4.5 * promised * math.sqrt(2 / DRAWS)


def smooth(quadratic):
    """The quadratic with a convex term that is none, and its exact hypergradient by a long unroll."""
    posed = quadratic.posed()
    problem = posed["problem"]

    def inner_loss(y, x, batch):
        bent = sum((leaf - 0.3).cosh().log().sum() for leaf in y.values())
        return problem.inner_loss(y, x, batch) + 0.5 * bent

    posed["problem"] = bl.Problem(inner_loss, problem.outer_loss)
    exact = bl.hypergradient(**posed, estimator=bl.Unrolled("iterates"))
    return posed, flat(exact.grad)


@labels([entry for entry in ENTRIES if entry.slope is not None])
def test_the_bias_falls_with_its_order(entry):
    quadratic = Quadratic.example(80, rate=0.6)
    errors = []
    for value in entry.slope.values:
        posed, exact = smooth(quadratic)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = settled(entry, posed, entry.slope.make(value))
        assert not found.status.failed
        errors.append(float((flat(found.grad) - exact).norm()))
    values = entry.slope.values
    for one, other, a, b in zip(errors, errors[1:], values, values[1:], strict=False):
        assert abs(math.log(one / other) / math.log(a / b) - entry.slope.order) < 0.15
