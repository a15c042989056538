"""Combinations of the newer estimators and dynamics that gave a wrong number, or an error that said nothing."""

import dataclasses
import math

import pytest
import torch
from right_or_refused import NONE, D, close, refusal_of
from torch import nn

import bilevel as bl
from bilevel.estimators import KL, Aimed, FurtherSteps, Matching
from bilevel.estimators.stochastic import Covariance, Pathwise

KEEPS = ["graph", "iterates", "segments"]

# --- a target ahead of dynamics that follow f


def g(y, x, b):
    return (y - x).square().sum() / 2 + 0.1 * y.pow(4).sum()


def f(y, x, b):
    return (y - b).square().cosh().sum() + x.sum()


GOALS = torch.tensor([[1.0, 0.2], [0.3, -1.0], [0.5, 0.2]], dtype=D)
X, START, DATA = torch.tensor([0.5, 1.5], dtype=D), torch.zeros(3, 2, dtype=D), bl.Batches(GOALS, GOALS)


def mixed(x, steps, y=START):
    """Steps along (1 - 1 / 2t) dg/dy + 1 / 2t df/dy with momentum, for all tasks."""
    velocity = torch.zeros_like(START)
    for step in range(1, steps + 1):
        y = y if y.requires_grad else y.detach().requires_grad_()
        in_g, in_f = (torch.autograd.grad(loss(y, x, GOALS), y, create_graph=True)[0] for loss in (g, f))
        velocity = 0.5 * velocity + (1 - 0.5 / step) * in_g + 0.5 / step * in_f
        y = y - 0.1 * velocity
    return y


@dataclasses.dataclass(frozen=True)
class Own(bl.inner.Dynamics):
    """The same without momentum, of the user's own."""

    def step(self, inner, state, outer, at):
        share = 0.5 / (at.step + 1)
        return inner - 0.1 * ((1 - share) * at.gradient(inner) + share * at.outer_gradient(inner)), state


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("features", [False, True], ids=["", "features"])
def test_a_bootstrapped_loop_that_follows_f_goes_on_following_f(keep, chunk, features):
    x = X.clone().requires_grad_()
    y, target = mixed(x, 4), mixed(x, 6).detach()
    (expected,) = torch.autograd.grad((target - y).square().sum() / 6, x)
    hg = bl.hypergradient(
        bl.Problem(g, f, features=(lambda x, b: b * x.sum() / x.detach().sum()) if features else None),
        X,
        START,
        DATA,
        solver=bl.Descent(bl.inner.Aggregated(bl.SGD(0.1, momentum=0.5), 0.5), 4),
        estimator=bl.TaskMean(bl.Bootstrapped(bl.Unrolled(keep), FurtherSteps(2)), chunk=chunk),
    )
    close(hg.inner, y.detach())
    if not features:
        close(hg.grad, expected + 1)


def test_so_does_one_of_the_users_own():
    arguments = bl.Problem(g, f), X, START[0], bl.Batches(GOALS[0], GOALS[0])
    plain = bl.adapt(*arguments, solver=bl.Descent(Own(), 4))
    hg = bl.hypergradient(
        *arguments, solver=bl.Descent(Own(), 4), estimator=bl.Bootstrapped(bl.Unrolled(), FurtherSteps(2))
    )
    close(hg.inner, plain.inner)
    close(hg.outer_loss, plain.outer_loss)


@pytest.mark.parametrize(
    "estimator",
    [Covariance(), Pathwise(), bl.Unrolled(step_weights=(0.5, 0.5))],
    ids=["covariance", "pathwise", "step weights"],
)
def test_a_target_is_ahead_of_one_iterate(estimator):
    """hg.outer_loss was f(y_K), not the F of that estimator, and stats["final_outer_loss"] was the matching loss."""
    assert "the last one alone" in str(refusal_of(lambda: bl.Bootstrapped(estimator, FurtherSteps(1))))


@pytest.mark.parametrize("estimator", [bl.Unrolled(), bl.Implicit(bl.CG()), bl.FirstOrderCorrected(0.01)])
@pytest.mark.parametrize("chunk", [None, 1, 0])
def test_a_target_is_ahead_of_the_random_start_that_is_matched(estimator, chunk):
    """FirstOrderCorrected drew another: the matching loss was of the distance between two starts."""

    def init(x, b):
        return x + torch.rand_like(x)

    problem = bl.proximal(bl.Problem(g, f, init=init), 1.0)
    ahead, solver = bl.Bootstrapped(estimator, FurtherSteps(1)), bl.Descent(bl.SGD(1e-4), 2)
    batches = DATA if chunk != 0 else bl.Batches(GOALS[0], GOALS[0])
    torch.manual_seed(0)
    ahead = bl.TaskMean(ahead, chunk=chunk) if chunk != 0 else ahead
    hg = bl.hypergradient(problem, X, None, batches, solver=solver, estimator=ahead)
    assert (hg.stats["matching_loss"] < 1e-5).all()


# --- classes that are left out, and a matching loss that is not finite


@pytest.mark.parametrize("first", ["target", "inner"])
def test_a_masked_class_is_no_part_of_the_divergence(first):
    masked, kl = torch.tensor([-math.inf], dtype=D), KL(lambda y, x, b: y, first)
    y, z = torch.tensor([0.3, 0.7], dtype=D, requires_grad=True), torch.tensor([0.1, 2.0], dtype=D)
    found = kl.distance(Aimed(torch.cat([z, masked]), ()), torch.cat([y, masked]), None, None)
    expected = kl.distance(Aimed(z, ()), y, None, None)
    close(found, expected)
    close(torch.autograd.grad(found, y)[0], torch.autograd.grad(expected, y)[0])


@dataclasses.dataclass(frozen=True)
class Infinite(Matching):
    """A distance that is infinite, with a finite derivative."""

    def distance(self, target, inner, outer, batch):
        return inner.sum() + math.inf


def test_a_matching_loss_that_is_not_finite_is_a_failure():
    hg = bl.hypergradient(
        bl.Problem(g, f),
        X,
        START[0],
        bl.Batches(GOALS[0], GOALS[0]),
        solver=bl.Descent(bl.SGD(0.1), 2),
        estimator=bl.Bootstrapped(bl.Unrolled(), FurtherSteps(1), Infinite()),
    )
    assert hg.grad.isfinite().all()
    assert hg.status is bl.Status.NONFINITE


# --- one example of each class: the base learner starts on the kink of its residuals


def one_shot(slope, dtype=D):
    """5-way 1-shot: the start meets the own targets of all examples up to rounding."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=D).to(dtype)  # noqa: E731
    net = nn.Linear(6, 8).to(dtype)
    learner = bl.meta.FewIteration(ways=5)
    problem, x = learner.problem(net)
    x = {
        "parameters": {"weight": draw(8, 6), "bias": draw(8)},
        "objective": {name: leaf.detach() for name, leaf in x["objective"].items()}
        | {"slope": torch.tensor(slope, dtype=dtype)},
    }
    labels = torch.arange(5).expand(3, 5)
    batches = bl.Batches((draw(3, 5, 6), labels), (draw(3, 5, 6), labels))

    def at(x, chunk=None):
        estimator = bl.TaskMean(bl.Unrolled(), chunk=chunk)
        return bl.hypergradient(problem, x, None, batches, solver=learner.solver(1), estimator=estimator)

    return x, at


@pytest.mark.parametrize("slope", [(1.0, 1.0), (0.3, 0.6), (0.0, 0.0)])
def test_rounding_does_not_choose_a_side_of_the_kink(slope):
    (x, at), (narrow, narrowly) = one_shot(slope), one_shot(slope, torch.float32)
    hg, other = at(x), narrowly(narrow)
    close(other.outer_loss.double(), hg.outer_loss, 1e-5)
    close(other.grad["objective"]["slope"].double(), hg.grad["objective"]["slope"], 1e-3, 1e-5)
    close(at(x, chunk=1).grad["objective"]["slope"], hg.grad["objective"]["slope"], 1e-9)
    for i in range(2):
        off = torch.zeros(2, dtype=D)
        off[i] = 1e-5
        up, down = (
            at({**x, "objective": {**x["objective"], "slope": x["objective"]["slope"] + sign * off}}).outer_loss
            for sign in (1, -1)
        )
        close(hg.grad["objective"]["slope"][i], (up - down) / 2e-5, 1e-5, 1e-7)


# --- what came out of torch, or Python, in place of a refusal


@pytest.mark.parametrize("answer", [lambda v: v[0], lambda v: (v[0].sum(),), lambda v: None])
@pytest.mark.parametrize(
    "use", [lambda a: bl.CG().solve(a, (torch.ones(3),)), lambda a: spectrum(a)], ids=["CG", "ends"]
)
def test_a_product_that_is_not_like_v_is_refused(answer, use):
    assert "a tuple of tensors like v" in str(refusal_of(lambda: use(answer)))


def spectrum(a):
    return bl.linear.spectrum(a, (torch.ones(3),))


def test_calibrated_nu_wants_hypergradients():
    problem = bl.Problem(lambda y, x, b: (y - x) ** 2, lambda y, x, b: y**2)
    arguments = problem, torch.tensor(1.0), torch.tensor(0.0), NONE
    solver = bl.Descent(bl.SGD(0.25), 3)

    def at(nu):
        return bl.hypergradient(*arguments, solver=solver, estimator=bl.FirstOrderCorrected(nu)).grad

    assert "bilevel.hypergradient was needed" in str(refusal_of(lambda: bl.calibrated_nu(at)))


# --- sides of another scheme


@pytest.mark.parametrize(("first", "then"), [("forward", "symmetric"), ("symmetric", 1), (4, 3), (3, 4)])
@pytest.mark.parametrize("saved", [False, True], ids=["", "saved"])
@pytest.mark.parametrize("tasks", [False, True], ids=["", "tasks"])
def test_sides_of_another_scheme_with_as_many_are_refused(first, then, saved, tasks):
    """They were taken for its own: each side went on from where another had been."""
    problem = bl.Problem(lambda y, x, b: (y - b * x).square().sum(), lambda y, x, b: (y - b).square().sum())
    start = START if tasks else START[0]
    batches = DATA if tasks else bl.Batches(GOALS[0], GOALS[0])

    def at(scheme, state=None, chunk=None):
        estimator = bl.FirstOrderCorrected(0.05, scheme, warm_sides=True)
        estimator = bl.TaskMean(estimator, chunk=chunk) if tasks else estimator
        solver = bl.Descent(bl.SGD(0.1), 2)
        return bl.hypergradient(problem, X, start, batches, solver=solver, estimator=estimator, state=state)

    state = at(first).state
    state = state.to_dict() if saved else state
    assert "the state of a scheme with sides at" in str(refusal_of(lambda: at(then, state)))
    for chunk in (None, 1, 2):
        close(at(first, at(first, chunk=chunk).state, chunk).grad, at(first, state).grad)


@pytest.mark.parametrize(
    "estimator", [bl.FirstOrderCorrected(0.05, warm_sides=True), bl.MemoryReduced(warm_adjoint=True)]
)
@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_a_saved_state_draws_what_the_state_itself_does(estimator, chunk):
    """TaskMean drew a start to know what is saved, and all later random numbers were others."""
    posed = bl.Problem(g, lambda y, x, b: (y - b).square().sum(), init=lambda x, b: x + torch.rand_like(x))
    problem = bl.proximal(posed, 1.0)

    def at(state):
        torch.manual_seed(0)
        solver, by_task = bl.Descent(bl.SGD(0.1), 3), bl.TaskMean(estimator, chunk=chunk)
        return bl.hypergradient(problem, X, None, DATA, solver=solver, estimator=by_task, state=state)

    state = at(None).state
    close(at(state.to_dict()).grad, at(state).grad, 0.0, 0.0)


# --- steps that are not pure, or no pair


@dataclasses.dataclass(frozen=True)
class InPlace(bl.inner.Dynamics):
    """Changes y."""

    def step(self, inner, state, outer, at):
        return inner.sub_(0.1 * at.gradient(inner)), state

    def stationarity(self, inner, outer, at):
        return at.gradient(inner)


@dataclasses.dataclass(frozen=True)
class InPlaceState(bl.inner.Dynamics):
    """Changes its state."""

    def init(self, inner, outer):
        return torch.zeros_like(inner)

    def step(self, inner, state, outer, at):
        return inner - 0.1 * state.add_(at.gradient(inner)), state

    def stationarity(self, inner, outer, at):
        return at.gradient(inner)


@dataclasses.dataclass(frozen=True)
class Alone(bl.inner.Dynamics):
    """Leaves the state out."""

    def step(self, inner, state, outer, at):
        return inner - 0.1 * at.gradient(inner)

    def stationarity(self, inner, outer, at):
        return at.gradient(inner)


@dataclasses.dataclass(frozen=True)
class InPlaceOptimizer(bl.Optimizer):
    """Changes y."""

    def init(self, inner):
        return None

    def step(self, grad, state, inner, outer):
        return inner.sub_(0.1 * grad), state


ESTIMATORS = [bl.Implicit(bl.Dense()), *map(bl.Unrolled, KEEPS), bl.Bootstrapped(bl.Unrolled(), FurtherSteps(1)), None]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=[*("implicit", *KEEPS, "bootstrapped", "adapt")])
@pytest.mark.parametrize("dynamics", [InPlace(), InPlaceState(), Alone(), InPlaceOptimizer()])
def test_an_impure_step_is_refused_in_words(estimator, dynamics):
    """Implicit and adapt went through, and left the caller's start changed."""
    start = torch.zeros(2, dtype=D)
    arguments = bl.Problem(g, f), X, start, bl.Batches(GOALS[0], GOALS[0])

    def call():
        if estimator is None:
            return bl.adapt(*arguments, solver=bl.Descent(dynamics, 3))
        return bl.hypergradient(*arguments, solver=bl.Descent(dynamics, 3), estimator=estimator)

    if isinstance(estimator, bl.Implicit) and isinstance(dynamics, InPlaceOptimizer):
        return  # refused for its stationarity
    said = str(refusal_of(call))
    assert ("a pair, the new inner variable" if isinstance(dynamics, Alone) else "in place") in said
