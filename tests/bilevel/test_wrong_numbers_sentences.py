"""Raw errors become sentences, or the right number (issue 7, A15)."""

import itertools

import pytest
import torch
from right_or_refused import NONE, D, close, is_refusal, refusal_of, right_or_refused

import bilevel as bl

F = torch.nn.functional
ESTIMATORS = {
    **{keep: bl.Unrolled(keep=keep) for keep in ("graph", "iterates", "segments")},
    "CG": bl.Implicit(bl.CG(20, 1e-12)),
    "Dense": bl.Implicit(bl.Dense()),
    "memory reduced": bl.MemoryReduced(),
    "corrected": bl.FirstOrderCorrected(),
}
EVERY = pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=[f"A15 {name}" for name in ESTIMATORS])
SOLVER = bl.Descent(bl.SGD(0.4), 30)
# y* = x, f = |b y|^2 / 2, dF/dx = b^2 x
PROBLEM = bl.Problem(
    lambda y, x, b: (y - x).square().sum(), lambda y, x, b: 0.5 * (y * (1 if b is None else b)).square().sum()
)
X, ZERO = torch.tensor([1.0, 2.0], dtype=D), torch.zeros(2, dtype=D)


@EVERY
@pytest.mark.parametrize("where", ["outer", "inner", "batch", "all"])
def test_inference_tensors_are_taken_or_refused_in_words(where, estimator):
    with torch.inference_mode():
        x, y, batch = X.clone(), ZERO.clone(), torch.full((2,), 2.0, dtype=D)
    x, y = (x if where in ("outer", "all") else X), (y if where in ("inner", "all") else ZERO)
    batch = batch if where in ("batch", "all") else torch.full((2,), 2.0, dtype=D)
    right_or_refused(
        lambda: bl.hypergradient(PROBLEM, x, y, bl.Batches(batch, batch), solver=SOLVER, estimator=estimator),
        4 * X,
        1e-5,
    )


@EVERY
def test_inference_mode_around_the_call_is_no_fault_of_the_loss(estimator):
    def call():
        with torch.inference_mode():
            return bl.hypergradient(PROBLEM, X, ZERO, NONE, solver=SOLVER, estimator=estimator)

    error = refusal_of(call)
    if error is None:
        right_or_refused(call, X, 1e-5)
    else:
        assert "inference" in str(error)


@EVERY
def test_no_grad_around_the_call_changes_nothing(estimator):
    with torch.no_grad():
        hg = bl.hypergradient(PROBLEM, X, ZERO, NONE, solver=SOLVER, estimator=estimator)
    close(hg.grad, X, 1e-5)


@pytest.mark.parametrize("estimator", [bl.Unrolled(), bl.Implicit(bl.CG(5))], ids=["A15 graph", "A15 CG"])
def test_lbfgs_as_outer_optimizer_works_or_is_refused_at_the_entry(estimator):
    x = torch.zeros(2, dtype=D, requires_grad=True)
    problem = bl.Problem(PROBLEM.inner_loss, lambda y, x, b: (y - torch.tensor([3.0, -1.0], dtype=D)).square().sum())

    def make():
        return bl.iterate(
            problem,
            x,
            ZERO,
            itertools.repeat(NONE, 4),
            solver=SOLVER,
            estimator=estimator,
            optimizer=torch.optim.LBFGS([x], lr=1.0),
        )

    refusal = None
    try:
        loop = make()
    except (TypeError, ValueError) as error:
        refusal = error
    if refusal is None:
        for _ in loop:
            pass
        close(x, torch.tensor([3.0, -1.0]), 1e-4)
    else:
        assert is_refusal(refusal)
        assert "LBFGS" in str(refusal)


INDEX = torch.tensor([0, 2, 2])


@EVERY
@pytest.mark.parametrize("where", ["inner", "outer"])
@pytest.mark.parametrize("decay", [0.0, 0.1], ids=["", "regularized"])
def test_sparse_gradients_are_taken_or_refused_in_words(where, decay, estimator):
    table, other = torch.ones(3, 2, dtype=D), torch.ones(3, 2, dtype=D) / 2

    def problem(sparse):
        def row(t):
            return F.embedding(INDEX, t, sparse=sparse)

        def beside(t):  # a sum with a dense gradient makes the whole of it dense
            return decay * t.square().sum() if decay else 0.0

        if where == "inner":
            return bl.Problem(
                lambda y, x, b: (row(y) - x).square().sum() + beside(y), lambda y, x, b: row(y).square().sum()
            )
        return bl.Problem(
            lambda y, x, b: (row(x) - y).square().sum() + beside(x), lambda y, x, b: 0.5 * y.square().sum()
        )

    x, y = (other, table) if where == "inner" else (table, other)
    solver = bl.Descent(bl.SGD(0.2), 3)
    exact = bl.hypergradient(problem(False), x, y, NONE, solver=solver, estimator=estimator)
    if exact.status.failed:  # a row that nothing uses, singular for implicit estimators
        return
    right_or_refused(
        lambda: bl.hypergradient(problem(True), x, y, NONE, solver=solver, estimator=estimator), exact.grad, 1e-9
    )


def test_a_sparse_embedding_module_as_inner_model_works_or_is_refused():
    def grad(sparse):
        torch.manual_seed(0)
        module = torch.nn.Embedding(4, 2, sparse=sparse, dtype=D)
        call, params = bl.functional(module)
        problem = bl.Problem(
            lambda y, x, b: (call(y, INDEX) - x).square().mean(), lambda y, x, b: call(y, INDEX).square().mean()
        )
        solver = bl.Descent(bl.SGD(0.2, momentum=0.5, weight_decay=0.1), 3)
        return bl.hypergradient(problem, X, params, NONE, solver=solver, estimator=bl.Unrolled())

    right = grad(False).grad
    right_or_refused(lambda: grad(True), right, 1e-9)


@EVERY
@pytest.mark.parametrize("where", ["a leaf", "all of inner", "all of outer"])
@pytest.mark.parametrize("tasks", [False, True], ids=["", "tasks"])
def test_empty_tensors_are_taken_or_refused_in_words(where, tasks, estimator):
    empty = torch.zeros(0, dtype=D)
    problem = bl.Problem(
        lambda y, x, b: (y["a"] - x["a"].sum()).square().sum() + y["e"].sum() + x["e"].sum(),
        lambda y, x, b: 0.5 * y["a"].square().sum() + y["e"].sum(),
    )
    x = {"a": empty if where == "all of outer" else X, "e": empty}
    y = {"a": empty if where == "all of inner" else ZERO, "e": empty}
    right = {"a": X * 0 + (2 * X.sum() if where == "a leaf" else 0), "e": empty}
    right = {**right, "a": right["a"] if x["a"].numel() else empty}
    batches = NONE
    if tasks:
        y = {name: torch.stack([leaf, leaf]) for name, leaf in y.items()}
        estimator, batches = bl.TaskMean(estimator), bl.Batches(torch.zeros(2, 1, dtype=D), None)
    right_or_refused(lambda: bl.hypergradient(problem, x, y, batches, solver=SOLVER, estimator=estimator), right, 1e-5)


def test_an_empty_batch_is_no_number_that_passes():
    problem = bl.Problem(lambda y, x, b: ((y - x) * b).square().mean(), lambda y, x, b: y.square().sum())
    batch = torch.zeros(0, 2, dtype=D)
    hg = bl.hypergradient(
        problem, X, ZERO, bl.Batches(batch, batch), solver=bl.Descent(bl.SGD(0.1), 2), estimator=bl.Unrolled()
    )
    assert hg.status.failed


def _inside(difference, batch):
    z = batch.clone().requires_grad_()
    (slope,) = torch.autograd.grad((z * difference).sum(), z, create_graph=True)
    return slope.square().sum()


UNMAPPABLE = {
    "A15 a branch on data": lambda y, x, b: (y - x).square().sum() if y.sum() > -9 else y.sum(),
    "A15 a mask": lambda y, x, b: (y - x)[b > 0].square().sum(),
    "A15 item": lambda y, x, b: (y - x).square().sum() * (1 + 0 * b.sum().item()),
    "A15 nonzero": lambda y, x, b: (y - x)[torch.nonzero(b)[:, 0]].square().sum(),
    "A15 a gradient inside": lambda y, x, b: _inside(y - x, b),
}


@pytest.mark.parametrize(
    "estimator", [ESTIMATORS["graph"], ESTIMATORS["CG"], ESTIMATORS["corrected"]], ids=["graph", "CG", "corrected"]
)
@pytest.mark.parametrize("loss", UNMAPPABLE.values(), ids=UNMAPPABLE)
def test_a_loss_that_vmap_cannot_map_names_chunk_one(loss, estimator):
    problem = bl.Problem(loss, lambda y, x, b: 0.5 * y.square().sum())
    batches = bl.Batches(torch.ones(3, 2, dtype=D), None)

    def call(chunk):
        y = torch.zeros(3, 2, dtype=D)
        return bl.hypergradient(problem, X, y, batches, solver=SOLVER, estimator=bl.TaskMean(estimator, chunk))

    close(call(1).grad, X, 1e-5)
    raised = hg = None
    try:
        hg = call(None)
    except Exception as error:
        raised = error
    if raised is not None:
        assert "chunk=1" in str(raised)
    else:
        close(hg.grad, X, 1e-5)
