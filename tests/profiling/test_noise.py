"""A loss that draws random numbers: its float64 reference draws the same, or there is none, and the note says why."""

import random

import numpy
import pytest
import torch
from bilevel_profiling import Case, measure
from bilevel_profiling.measurement.noise import Draws
from bilevel_profiling.measurement.references import Reference, References

import bilevel as bl

GENERATOR = torch.Generator()


def scaled(noise):
    return lambda y: y * (1 + noise(y))


@pytest.fixture(autouse=True)
def _nothing_compiled():
    """What an earlier test compiled would be said of these: the note is of the process."""
    import torch._dynamo.utils

    torch._dynamo.utils.counters.clear()


NOISES = {
    "randn_like": scaled(torch.randn_like),
    "dropout": lambda y: torch.nn.functional.dropout(y, 0.3),
    "in place": scaled(lambda y: torch.empty_like(y).uniform_(-1, 1)),
    "a dtype": scaled(lambda y: torch.randn(y.shape, dtype=y.dtype)),
    "the default dtype": scaled(lambda y: torch.randn(y.shape)),
    "always float64": scaled(lambda y: torch.randn(y.shape, dtype=torch.float64).to(y.dtype)),
    "of a probability": lambda y: y * torch.bernoulli(torch.full_like(y, 0.6)),
    "integers": lambda y: y[torch.randperm(len(y))] * torch.arange(1, len(y) + 1),
    "attention": lambda y: torch.nn.functional.scaled_dot_product_attention(
        *[y.reshape(1, 1, -1, 4)] * 3, dropout_p=0.2
    ).flatten(),
}


def case(noise, estimator=None, dtype=torch.float32, **options):
    """A net's worth of noise in both losses, at 40 inner numbers."""

    def setup(device):
        inner, outer = torch.linspace(-1, 1, 40, dtype=dtype), torch.linspace(0.5, 1, 40, dtype=dtype)
        problem = bl.Problem(
            lambda y, x, b: ((noise(y) - x) ** 2).mean() + 0.1 * (y**4).mean(),
            lambda y, x, b: ((noise(y) - 1) ** 2).mean(),
        )
        return problem, outer, inner, bl.Batches(None, None)

    return Case(setup, solver=bl.Descent(bl.SGD(lr=0.5), 4), estimator=estimator or bl.Unrolled(), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("noise", NOISES)
def test_an_exact_estimator_of_a_noisy_loss_is_right_to_rounding(noise, dtype):
    found = measure(case(NOISES[noise], dtype=dtype), repeats=1)
    assert found.program_relative_error < (1e-5 if dtype == torch.float32 else 1e-12)
    assert found.program_cosine == pytest.approx(1)
    assert f"the random numbers of a {str(dtype)[6:]} run" in found.reference_note


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_tasks_that_draw_together_do_so_in_the_reference(chunk):
    def setup(device):
        rows = torch.linspace(0.5, 1.5, 3 * 20).reshape(3, 20)
        loss = lambda y, x, b: ((torch.nn.functional.dropout(y, 0.4) - x * b) ** 2).mean()  # noqa: E731
        return bl.Problem(loss, loss, init=lambda x, b: x), torch.ones(20), None, bl.Batches(rows, rows)

    estimator = bl.TaskMean(bl.Unrolled(), chunk)
    found = measure(Case(setup, solver=bl.Descent(bl.SGD(lr=1.0), 2), estimator=estimator), repeats=1)
    assert found.program_relative_error < 1e-5


@pytest.mark.parametrize(
    "noise",
    [
        lambda y: torch.randn(y.shape, generator=GENERATOR),
        lambda y: random.random(),
        lambda y: torch.as_tensor(numpy.random.rand(len(y)), dtype=y.dtype),
    ],
    ids=["a generator", "random", "numpy"],
)
def test_noise_that_cannot_be_had_again_leaves_no_error_and_a_reason(noise):
    found = measure(case(scaled(noise)), repeats=1)
    assert found.program_relative_error is None
    assert "draw from torch's global generator" in found.reference_note


def test_another_program_in_float64_leaves_no_error_and_a_reason():
    twice = scaled(lambda y: torch.randn_like(y) + (torch.randn_like(y) if y.dtype == torch.float64 else 0))
    found = measure(case(twice), repeats=1)
    assert found.program_relative_error is None
    assert "draw other random numbers" in found.reference_note


def test_a_noisy_loss_has_no_solution_to_be_far_from():
    solution = bl.Converge(bl.SGD(lr=0.5), tol=1e-9, max_steps=5)
    found = measure(case(NOISES["dropout"], solution=solution), repeats=1)
    assert found.solution_relative_error is None
    assert "no one solution" in found.reference_note


def test_compiled_losses_draw_others_than_the_reference():
    sound = References(Reference((torch.ones(1),), "made."), Reference(None, "none."))
    assert sound.of_compiled() is sound
    noisy = References(Reference((torch.ones(1),), "made.", random=True), Reference(None, "none."))
    assert noisy.of_compiled().program.grad is None
    assert "compiled" in noisy.of_compiled().note


def test_what_could_draw_and_does_not_is_computed_in_float64():
    tensors = [torch.randn(1, 1, 4, 8, dtype=torch.float64) for _ in range(3)]
    with Draws() as own:
        torch.rand(1)
    with Draws(like=own) as draws:
        found = torch.nn.functional.scaled_dot_product_attention(*tensors)
    assert not draws.log
    assert torch.equal(found, torch.nn.functional.scaled_dot_product_attention(*tensors))
