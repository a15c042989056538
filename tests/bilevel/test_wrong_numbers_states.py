"""States that belong elsewhere, and storages that results share (issue 7, A13)."""

import dataclasses

import pytest
import torch
from catalogue import ESTIMATORS, PROBLEMS
from right_or_refused import NONE, D, refusal_of

import bilevel as bl

SIMPLE = bl.Problem(lambda y, x, b: (y["a"] - x).square().sum(), lambda y, x, b: 0.5 * y["a"].square().sum())
WARM = bl.MemoryReduced(steps=5, warm_inner=True, warm_adjoint=True)


def warm(dtype=D, size=2, name="a", estimator=WARM, state=None):
    problem = bl.Problem(lambda y, x, b: (y[name] - x).square().sum(), lambda y, x, b: 0.5 * y[name].square().sum())
    x = torch.ones(size, dtype=dtype)
    solver = bl.Descent(bl.SGD(0.2), 3)
    return bl.hypergradient(problem, x, {name: 0 * x}, NONE, solver=solver, estimator=estimator, state=state)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        pytest.param({"dtype": torch.float32}, {}, id="A13 another dtype"),
        pytest.param({}, {"dtype": torch.float32}, id="A13 another dtype, down"),
        pytest.param({"size": 3}, {}, id="A13 another shape"),
        pytest.param({"name": "b"}, {}, id="A13 another structure"),
        pytest.param({}, {"estimator": bl.Implicit(bl.CG(3))}, id="A13 Implicit"),
        pytest.param({}, {"estimator": bl.Unrolled()}, id="A13 Unrolled"),
        pytest.param({}, {"estimator": bl.FirstOrderCorrected()}, id="A13 corrected"),
    ],
)
def test_a_state_that_belongs_elsewhere_is_refused(given, taken):
    state = warm(**given).state
    assert state is not None
    assert refusal_of(lambda: warm(state=state, **taken)) is not None


@pytest.mark.parametrize("state", [3, "warm", {}, torch.zeros(2), (1, 2)], ids=repr)
def test_what_is_no_state_at_all_is_refused(state):  # A13
    assert refusal_of(lambda: warm(state=state)) is not None
    assert refusal_of(lambda: warm(state=state, estimator=bl.Unrolled())) is not None


def storages(value):
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # typed states
        leaves += [t for f in dataclasses.fields(value) for t in storages(getattr(value, f.name))]
        return leaves
    return leaves


VIEWS = bl.Problem(  # losses that are views of y, and gradients that are expanded
    lambda y, x, b: (y * x).sum() + 0.5 * y.square().sum(), lambda y, x, b: y[0] + 0 * x.sum()
)


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("pose", [*PROBLEMS, "views", "identity"])
@pytest.mark.parametrize(
    "estimator", [*ESTIMATORS.values(), WARM], ids=[*(f"A13 {name}" for name in ESTIMATORS), "A13 warm"]
)
def test_results_share_no_storage_with_each_other_or_with_what_was_given(estimator, pose, steps):
    if pose in PROBLEMS:
        problem, outer, inner, batches = PROBLEMS[pose]()
    else:
        outer, inner, batches = torch.ones(2, dtype=D), torch.ones(2, dtype=D), NONE
        problem = VIEWS
        if pose == "identity":
            inner = torch.ones((), dtype=D)
            problem = bl.Problem(lambda y, x, b: y * x.sum() + y.square(), lambda y, x, b: y)
    solver = bl.Descent(bl.SGD(0.1), steps)
    hg = None

    def call():
        nonlocal hg
        hg = bl.hypergradient(problem, outer, inner, batches, solver=solver, estimator=estimator)

    if refusal_of(call) is not None:
        return
    groups = {
        "outer": outer,
        "inner given": inner,
        "batches": [batches.inner, batches.outer],
        "grad": hg.grad,
        "inner": hg.inner,
        "outer_loss": hg.outer_loss,
        "inner_loss": hg.inner_loss,
        "state": hg.state,
    }
    owner = {}
    for name, value in groups.items():
        for leaf in storages(value):
            if leaf.numel():
                key = leaf.untyped_storage().data_ptr()
                assert owner.setdefault(key, name) == name or {owner[key], name} == {"outer", "inner given"}, (
                    f"{name} shares its storage with {owner[key]}"
                )
