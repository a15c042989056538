"""Three levels by layers inside of losses: equal to Betty's program of three levels, and to difference quotients."""

import importlib.util
import pathlib

import betty_programs as programs
import pytest
import torch
from betty_programs import DOUBLE, Quiet, Vector, Watched, edges, problem, run, sgd

import bilevel as bl
from bilevel.integrations import betty

PATH = pathlib.Path(__file__).resolve().parents[2] / "examples" / "three_levels.py"


@pytest.fixture(scope="module")
def toy():
    """The example, as a module."""
    spec = importlib.util.spec_from_file_location("three_levels", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def solved(toy):
    """At one strength: the strength, the weights, the model, and the gradient by layers."""
    x = torch.tensor(-2.5, dtype=DOUBLE, requires_grad=True)
    (gradient,) = torch.autograd.grad(toy.audit_loss(x), x)
    with torch.no_grad():
        weights = toy.weights_of(x)
        return x, weights, toy.model_of(weights), gradient


def test_layers_within_layers_are_the_derivative_of_the_whole_program(toy, solved):
    x, _, _, gradient = solved
    with torch.no_grad():
        up, down = (toy.audit_loss(x + sign * 1e-3) for sign in (1, -1))
    torch.testing.assert_close(gradient, (up - down) / 2e-3, rtol=1e-5, atol=0)


@programs.recent
def test_layers_within_layers_equal_bettys_program_of_three_levels(toy, solved):
    """Betty moves from the solution of the layers, and gives the same gradient on top."""
    x, weights, model, gradient = solved

    class Top(Watched):
        def training_step(self, batch):
            right = (~toy.wrong[: toy.AUDITED]).to(DOUBLE)
            return torch.nn.functional.binary_cross_entropy_with_logits(self.weights()[: toy.AUDITED], right)

    class Weights(Quiet):
        def training_step(self, batch):
            own = self.module()
            error = (toy.clean @ self.model() - toy.clean_labels).square().mean()
            return error + 0.5 * self.top().exp() * own.square().sum()

    class Model(Quiet):
        def training_step(self, batch):
            return toy.fit_loss(self.module(), {"weights": self.weights()}, batch)

    def type_of(below=None):
        return {"type": betty.register(bl.Implicit(bl.CG(60, tol=1e-13)), below=below), "retain_graph": True}

    top = problem(Top, "top", Vector(x), sgd(0.0))
    middle = problem(Weights, "weights", Vector(weights), sgd(1.0), unroll_steps=2, **type_of(below=60))
    lowest = problem(Model, "model", Vector(model), sgd(0.55), unroll_steps=2, **type_of())
    run(
        [top, middle, lowest],
        edges(u2l={top: [middle], middle: [lowest]}, l2u={lowest: [middle], middle: [top]}),
        4,
    )
    torch.testing.assert_close(top.gradients[-1][0], gradient, rtol=1e-6, atol=0)


START, NONE, STEPS = torch.zeros(2, dtype=DOUBLE), bl.Batches(None, None), bl.Descent(bl.SGD(0.5), 15)
ESTIMATORS = {
    "implicit": bl.Implicit(bl.CG(20, tol=1e-13)),
    "graph": bl.Unrolled(),
    "iterates": bl.Unrolled("iterates"),
    "corrected": bl.FirstOrderCorrected(),
}
AGAIN = ("implicit", "graph")


def nested(low):
    """A middle problem whose inner loss has a solution of its own in it, not linear in anything."""
    lowest = bl.Problem(
        lambda z, y, b: (z - y).square().sum() / 2 + (z**4).sum() / 8 + z.square().sum() / 2, lambda z, y, b: z.sum()
    )

    def middle(y, x, batch):
        z = bl.solution(lowest, y, START, NONE, solver=STEPS, estimator=ESTIMATORS[low])
        return (y - x).square().sum() / 2 + z.square().sum() / 2 + (z * y).sum() / 4

    return bl.Problem(middle, lambda y, x, b: y.sin().sum())


@pytest.fixture(scope="module")
def wanted():
    """By differences of the whole program."""
    problem, x, found = nested("implicit"), torch.tensor([0.5, 1.0], dtype=DOUBLE), []
    for i in range(2):
        ends = []
        for sign in (1, -1):
            moved = x.clone()
            moved[i] += sign * 1e-4
            y = bl.adapt(problem, moved, START, NONE, solver=STEPS).inner
            ends.append(y.sin().sum())
        found.append((ends[0] - ends[1]) / 2e-4)
    return torch.stack(found)


@pytest.mark.parametrize("mid", ESTIMATORS)
@pytest.mark.parametrize("low", ESTIMATORS)
def test_every_estimator_stands_above_every_other_or_says_why_not(low, mid, wanted):
    """Those that need second derivatives of the middle loss need an estimator below that is differentiable again."""
    problem, x = nested(low), torch.tensor([0.5, 1.0], dtype=DOUBLE, requires_grad=True)

    def by_layer():
        y = bl.solution(problem, x, START, NONE, solver=STEPS, estimator=ESTIMATORS[mid])
        return torch.autograd.grad(y.sin().sum(), x)[0]

    if low not in AGAIN and mid != "corrected":
        with pytest.raises(bl.NotTwiceDifferentiableError, match="create_graph=True"):
            by_layer()
        return
    torch.testing.assert_close(by_layer(), wanted, rtol=1e-6, atol=0)
    if low == "implicit":
        hg = bl.hypergradient(problem, x, START, NONE, solver=STEPS, estimator=ESTIMATORS[mid])
        torch.testing.assert_close(hg.grad, wanted, rtol=1e-6, atol=0)


def test_levels_under_tasks_go_one_after_another_and_are_not_compiled():
    problem, x = nested("implicit"), torch.tensor([0.5, 1.0], dtype=DOUBLE)
    data, starts = bl.Batches(torch.zeros(2, 1), torch.zeros(2, 1)), torch.zeros(2, 2, dtype=DOUBLE)
    with pytest.raises(ValueError, match=r"TaskMean\(estimator, chunk=1\)"):
        bl.hypergradient(problem, x, starts, data, solver=STEPS, estimator=bl.TaskMean(bl.Unrolled()))
    engine = bl.Compiled(backend="graph")
    with pytest.raises(bl.NotTraceableError):
        bl.hypergradient(problem, x, START, NONE, solver=STEPS, estimator=bl.Unrolled(), engine=engine)
