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
