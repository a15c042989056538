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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e25, 1e38])
def test_a_ball_holds_numbers_whose_squares_overflow(dtype, size):
    point = bl.outer.Ball(1.0)(torch.tensor([0.75, 1.0, 0.0], dtype=dtype) * size)
    close(point.double(), torch.tensor([0.6, 0.8, 0.0], dtype=D), 1e-2)  # it was the center


@pytest.mark.parametrize(
    ("simplex", "x"), [(bl.outer.Simplex(), torch.zeros(0)), (bl.outer.Simplex(dim=1), torch.ones(2))]
)
def test_a_simplex_without_numbers_is_refused_in_words(simplex, x):
    with pytest.raises(ValueError, match="at least one number along it, was needed"):
        simplex(x)


def test_a_simplex_passes_nan_on():
    rows = torch.tensor([[0.5, float("nan")], [3.0, 1.0]])
    point = bl.outer.Simplex()(rows)
    assert point[0].isnan().any()
    assert point[1].tolist() == [1.0, 0.0]


def test_a_simplex_of_many_numbers_is_a_projection():
    simplex = bl.outer.Simplex(1000.0)
    for seed in range(20):
        torch.manual_seed(seed)
        x = simplex(torch.randn(30000, dtype=D)).requires_grad_()
        assert abs(x.sum().item() - 1000) < 1e-11
        bl.outer.Projected(torch.optim.SGD([x], lr=0.1), simplex)


def test_a_projection_in_another_order_of_keys_swaps_nothing():
    problem = bl.Problem(
        lambda y, x, b: (y["a"] - x).square() / 2 + (y["b"] - 2 * x).square() / 2,
        lambda y, x, b: (y["a"] - 1).square() + (y["b"] - 3).square(),
    )
    found, zero = [], torch.zeros((), dtype=D)
    for order in ("ab", "ba"):
        estimator = bl.estimators.LVHBA(
            lambda y, x, b: torch.stack([y["a"] - 1.5, y["b"] - 1.5]),
            lambda y, x, b, order=order: {name: y[name].clamp_max(1.5) for name in order},
            c=5.0,
        )
        state, arguments = None, (problem, torch.tensor(1.0, dtype=D), {"a": zero, "b": zero}, NONE)
        for _ in range(5):
            hg = bl.hypergradient(*arguments, solver=bl.Descent(bl.SGD(0.3), 1), estimator=estimator, state=state)
            state = hg.state
        found.append(hg.grad)
    close(*found, 1e-12)


def test_a_projection_of_another_structure_is_refused_in_words():
    estimator = bl.estimators.LVHBA(lambda y, x, b: y["a"] - 1, lambda y, x, b: {}, c=5.0)
    problem = bl.Problem(lambda y, x, b: (y["a"] - x).square(), lambda y, x, b: y["a"].square())
    with pytest.raises(ValueError, match="LVHBA's projection returned the structure"):
        bl.hypergradient(
            *(problem, torch.ones(()), {"a": torch.ones(())}, NONE),
            solver=bl.Descent(bl.SGD(0.3), 1),
            estimator=estimator,
        )


@dataclasses.dataclass(frozen=True)
class Returning(bl.Optimizer):
    """Gradient descent whose answers have another order or structure."""

    step_in: str
    rest_in: str

    def init(self, inner):
        return None

    def step(self, grad, state, inner, outer):
        return {name: inner[name] - 0.1 * grad[name] for name in self.step_in}, state

    def stationarity(self, grad, inner, outer):
        return {name: grad[name] for name in self.rest_in}


def answered(optimizer, estimator):
    problem = bl.Problem(
        lambda y, x, b: (y["a"] - x).square() + (y["b"] - 2 * x).square(),
        lambda y, x, b: (y["a"] - 1).square() + (y["b"] - 3).square(),
    )
    arguments = problem, torch.ones((), dtype=D), {"a": torch.zeros((), dtype=D), "b": torch.zeros((), dtype=D)}, NONE
    return bl.hypergradient(*arguments, solver=bl.Descent(optimizer, 100), estimator=estimator).grad


@pytest.mark.parametrize("estimator", [bl.Implicit(bl.CG()), bl.estimators.F2SA(1e6)], ids=lambda e: type(e).__name__)
def test_a_rest_in_another_order_of_keys_is_no_other_rest(estimator):
    close(answered(Returning("ba", "ba"), estimator), torch.tensor(-4.0, dtype=D), 1e-4)


@pytest.mark.parametrize("optimizer", [Returning("a", "ab"), Returning("ab", "a")], ids=repr)
def test_an_answer_of_another_structure_is_refused_in_words(optimizer):
    with pytest.raises(ValueError, match="returned the structure"):
        answered(optimizer, bl.Implicit(bl.CG()))
