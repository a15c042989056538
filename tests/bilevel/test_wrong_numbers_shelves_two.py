"""Inner optimizers as a stranger uses them: in 16 bits, within autocast, truncated, under TaskMean."""

import dataclasses

import pytest
import torch
from right_or_refused import NONE, D, close

import bilevel as bl

SIXTEEN = (torch.bfloat16, torch.float16)


def posed(dtype, seed=1):
    torch.manual_seed(seed)
    shapes = ((6, 4), (6, 3), (3,), (4, 3))
    a, b, x, y = (torch.randn(*shape, dtype=D) if len(shape) > 1 else torch.rand(*shape, dtype=D) for shape in shapes)
    a, b, x, y = ((a / 2).to(dtype), b.to(dtype), (x + 0.5).to(dtype), y.to(dtype))
    problem = bl.Problem(
        lambda y, x, batch: ((a.to(y.dtype) @ y - b).square().mean(0) * x).sum() + 0.1 * y.square().sum(),
        lambda y, x, batch: (a.to(y.dtype) @ y - b / 2).square().mean(),
    )
    return problem, x, y, NONE


def found(update, dtype, steps, estimator=None):
    hg = bl.hypergradient(
        *posed(dtype), solver=bl.Descent(update, steps), estimator=estimator or bl.Unrolled("iterates")
    )
    assert not hg.status.failed
    return hg.grad.double()


def error(one, exact):
    return ((one - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("steps", [1, 2])
def test_muon_of_bfloat16_variables_has_a_hypergradient(adjust, steps):
    muon = bl.optim.Muon(0.1, adjust=adjust)
    # The losses have eight bits, and rounding their arguments changes it by as much. It was 4.0 and 2.0.
    assert error(found(muon, torch.bfloat16, steps), found(muon, D, steps)) < 0.2


def test_muon_within_autocast_is_not_made_in_sixteen_bits():
    problem, x, y, none = posed(torch.float32)
    wide = bl.Problem(
        *(lambda y, x, b, loss=loss: loss(y.double(), x, b) for loss in (problem.inner_loss, problem.outer_loss))
    )
    solver = bl.Descent(bl.optim.Muon(0.1), 4)
    exact = bl.hypergradient(wide, x, y, none, solver=solver, estimator=bl.Unrolled()).grad
    with torch.autocast("cpu", torch.bfloat16):
        cast = bl.hypergradient(wide, x, y, none, solver=solver, estimator=bl.Unrolled()).grad
    assert error(cast, exact) < 1e-3


@pytest.mark.parametrize("size", [1e-3, 1e-2])
@pytest.mark.parametrize(
    "optimizer",
    [
        bl.Adam(0.1),
        bl.AdamW(0.1),
        bl.optim.RMSprop(0.05),
        bl.optim.RMSprop(0.05, centered=True),
        bl.optim.Adadelta(),
        bl.optim.NAdam(0.1),
        bl.optim.Adagrad(0.1),
        bl.optim.RAdam(0.1, betas=(0.9, 0.9)),
    ],
    ids=repr,
)
def test_float16_moments_do_not_underflow(optimizer, size):
    if size == 1e-2 and isinstance(optimizer, (bl.optim.Adagrad, bl.optim.RAdam)):
        size = 1e-3 / 3  # larger ones were right
    ends = []
    for dtype in (torch.float16, D):
        y = torch.zeros(3, dtype=dtype)
        state = optimizer.init(y)
        for k in range(8):
            g = torch.tensor([1.0, -2.0, 0.5], dtype=D) * size * (1 + k / 10)
            y, state = optimizer.step(g.to(dtype), state, y, None)
        assert y.dtype == dtype
        ends.append(y.double())
    assert error(*ends) < 1.5e-3


@pytest.mark.parametrize("decay", [0.5, 0.999, None])
@pytest.mark.parametrize("optimizer", [bl.SGD(0.1), bl.Adam(0.1)], ids=repr)
def test_averaged_steps_may_be_truncated(optimizer, decay):
    averaged = bl.inner.Averaged(optimizer, decay)
    close(found(averaged, D, 5, bl.Unrolled(last=2)), found(averaged, D, 5, bl.Unrolled("iterates", last=2)), 1e-12)


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_a_slow_mean_of_sixteen_bits_has_a_derivative(dtype):
    averaged, two = bl.inner.Averaged(bl.SGD(0.1)), bl.Unrolled("iterates", last=2)  # by default the decay is 0.999
    assert error(found(averaged, dtype, 5, two), found(averaged, D, 5, two)) < 0.05


@dataclasses.dataclass(frozen=True)
class Decaying(bl.Optimizer):
    """One of one's own, whose numbers do not depend on the number of tasks, up to rounding."""

    def init(self, inner):
        return None

    def step(self, grad, state, inner, outer):
        return inner - 0.1 * (grad + 0.3 * inner), state

    def stationarity(self, grad, inner, outer):
        return grad + 0.3 * inner


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize(
    ("optimizer", "estimator"),
    [(bl.optim.FromTorch(torch.optim.ASGD, lr=0.1), bl.Unrolled()), (Decaying(), bl.Implicit(bl.CG(2)))],
    ids=["mixed", "rest"],
)
def test_own_optimizers_of_sixteen_bits_are_not_refused_for_their_rounding(optimizer, estimator, dtype):
    for seed in range(6):
        torch.manual_seed(seed)
        a, b, y = (torch.randn(*shape, dtype=D).to(dtype) for shape in ((3, 6, 4), (3, 6, 3), (3, 4, 3)))
        problem = bl.Problem(
            lambda y, x, batch: ((batch[0] @ y - batch[1]).square().mean(0) * x).sum() / 4 + 0.1 * y.square().sum(),
            lambda y, x, batch: (batch[0] @ y - batch[1] / 2).square().mean(),
        )
        bl.hypergradient(
            *(problem, torch.ones(3, dtype=dtype), y, bl.Batches((a, b), (a, b))),
            solver=bl.Descent(optimizer, 20),
            estimator=bl.TaskMean(estimator),
        )
