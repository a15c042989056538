"""The multi-step loss of MAML++, F = sum of w_k f(y_k): every way of keeping the trajectory against autograd."""

import dataclasses
import gc

import bilevel_profiling
import catalogue
import pytest
import torch
from bilevel_profiling.cases.target import target_of
from bilevel_profiling.meters.tensors import Tensors
from torch import Tensor
from torch.utils import _pytree as pytree

import bilevel as bl

D = torch.float64
KEEPS = ("graph", "iterates", "segments")
NONE = bl.Batches(None, None)
WEIGHTS = {
    "uniform": (0.2, 0.2, 0.2, 0.2, 0.2),
    "towards the last": (0.05, 0.1, 0.15, 0.2, 0.5),
    "the last alone": (0, 0, 0, 0, 1),
    "one in the middle": (0.0, 0.0, 2.0, 0.0, 0.0),
    "with holes": (0.3, 0.0, 0.0, 0.7, 0.0),
    "the first alone": (1.5, 0.0, 0.0, 0.0, 0.0),
    "negative": (1.0, -0.5, 0.0, 0.25, -1.0),
}


def flat(tree):
    return torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(tree)])


def program(problem, inner, batches, optimizer, weights, *, cut=0):
    """F as a function of x; iterates up to y_cut are constants."""

    def function(x):
        y = inner if problem.init is None else problem.init(x, batches.inner_at(0))
        state, total = optimizer.init(y), 0.0
        for step, weight in enumerate(weights):
            gradient = torch.func.grad(problem.inner_loss)(y, x, batches.inner_at(step))
            y, state = optimizer.step(gradient, state, y, x)
            if step + 1 <= cut:
                y = pytree.tree_map(lambda leaf: leaf.detach(), y)
                state = pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, state)
            total = total + weight * problem.outer_loss(y, x, batches.outer)
        return total

    return function


def found_by(problem, outer, inner, batches, optimizer, weights, keep, **more):
    return bl.hypergradient(
        problem,
        outer,
        inner,
        batches,
        solver=bl.Descent(optimizer, len(weights)),
        estimator=bl.Unrolled(keep, step_weights=weights, **more),
    )


@pytest.mark.filterwarnings("ignore:outer variable .*log_lr")
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "learned lr"])
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_weighted_sum_equals_autograd_of_the_written_out_program(name, keep, optimizer):
    """Data weights, a learned decay and a term of f in x itself: direct gradients at every step."""
    problem, outer, inner, batches = catalogue.weighted_net()
    optimizer = catalogue.OPTIMIZERS[optimizer]
    function = program(problem, inner, batches, optimizer, WEIGHTS[name])
    found = found_by(problem, outer, inner, batches, optimizer, WEIGHTS[name], keep)
    assert found.status is bl.Status.OK
    torch.testing.assert_close(flat(found.grad), flat(torch.func.grad(function)(outer)), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.outer_loss, function(outer), rtol=1e-13, atol=0)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_learned_start_with_a_proximal_term(name, keep):
    problem, outer, inner, batches = catalogue.meta_start()
    function = program(problem, None, batches, bl.SGD(0.3), WEIGHTS[name])
    found = found_by(problem, outer, inner, batches, bl.SGD(0.3), WEIGHTS[name], keep)
    torch.testing.assert_close(flat(found.grad), flat(torch.func.grad(function)(outer)), rtol=1e-12, atol=1e-13)


@pytest.mark.filterwarnings("ignore:outer variable .*log_lr")
@pytest.mark.parametrize("last", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("keep", KEEPS)
def test_truncation_leaves_the_direct_gradients_of_the_steps_before(keep, last):
    problem, outer, inner, batches = catalogue.weighted_net()
    weights, optimizer = WEIGHTS["towards the last"], bl.SGD(0.2, momentum=0.5)
    function = program(problem, inner, batches, optimizer, weights, cut=max(5 - last, 0))
    x = pytree.tree_map(lambda leaf: leaf.clone().requires_grad_(), outer)
    # (torch.func.grad would let detach() pass as a constant too, but the state is cut with plain autograd.)
    y_graph = plain_program(problem, inner, batches, optimizer, weights, x, cut=max(5 - last, 0))
    expected = torch.autograd.grad(y_graph, pytree.tree_leaves(x), allow_unused=True)
    expected = [torch.zeros_like(a) if g is None else g for g, a in zip(expected, pytree.tree_leaves(x), strict=True)]
    found = found_by(problem, outer, inner, batches, optimizer, weights, keep, last=last)
    torch.testing.assert_close(flat(found.grad), flat(expected), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.outer_loss, function(outer), rtol=1e-13, atol=0)


def plain_program(problem, inner, batches, optimizer, weights, x, *, cut):
    """The same with torch.autograd alone."""
    y, total = pytree.tree_map(lambda leaf: leaf.clone().requires_grad_(), inner), 0.0
    state = optimizer.init(y)
    for step, weight in enumerate(weights):
        leaves, spec = pytree.tree_flatten(y)
        gradient = torch.autograd.grad(problem.inner_loss(y, x, batches.inner_at(step)), leaves, create_graph=True)
        y, state = optimizer.step(pytree.tree_unflatten(list(gradient), spec), state, y, x)
        if step + 1 <= cut:
            y = pytree.tree_map(lambda leaf: leaf.detach().requires_grad_(), y)
            state = pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, state)
        total = total + weight * problem.outer_loss(y, x, batches.outer)
    return total


def feature_problem():
    """Features of x for both batches; every step its own batch; a tree with a tensor that only f uses."""
    g = torch.Generator().manual_seed(3)

    def features(x, batch):
        return torch.tanh(batch[0] @ x["embed"]), batch[1]

    def inner_loss(y, x, b):
        return ((b[0] @ y["w"] - b[1]) ** 2).mean() + 0.1 * y["w"].pow(4).sum()

    def outer_loss(y, x, b):
        return ((b[0] @ y["w"] + y["shift"] - b[1]) ** 2).mean() + 0.1 * (x["embed"][0] * y["w"]).sum()

    x = {"embed": torch.randn(4, 3, generator=g, dtype=D), "start": torch.randn(3, generator=g, dtype=D)}
    problem = bl.Problem(
        inner_loss,
        outer_loss,
        init=lambda x, b: {"w": x["start"], "shift": 0.1 * x["start"].sum()},
        features=features,
    )
    written_out = bl.Problem(
        lambda y, x, b: inner_loss(y, x, features(x, b)),
        lambda y, x, b: outer_loss(y, x, features(x, b)),
        init=problem.init,
    )

    def batch(*lead):
        return torch.randn(*lead, 6, 4, generator=g, dtype=D), torch.randn(*lead, 6, generator=g, dtype=D)

    return problem, written_out, x, batch


@dataclasses.dataclass(frozen=True)
class NoneForUnused(bl.Optimizer):
    """An optimizer of torch.func's gradients, for the reference: the shift, which g does not use, is left alone."""

    optimizer: bl.Optimizer

    def init(self, inner):
        return self.optimizer.init(inner)

    def step(self, grad, state, inner, outer):
        return self.optimizer.step(grad | {"shift": None}, state, inner, outer)


@pytest.mark.parametrize("optimizer", [bl.SGD(0.1), bl.SGD(0.1, momentum=0.9, weight_decay=0.1), bl.Adam(0.1)])
@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("keep", KEEPS)
def test_features_unused_tensors_and_batches_per_step(keep, per_step, optimizer):
    problem, written_out, x, batch = feature_problem()
    inner = bl.PerStep([batch() for _ in range(5)]) if per_step else batch()
    batches = bl.Batches(inner, batch())
    for weights in (WEIGHTS["with holes"], WEIGHTS["uniform"]):
        function = program(written_out, None, batches, NoneForUnused(optimizer), weights)
        found = found_by(problem, x, None, batches, optimizer, weights, keep)
        torch.testing.assert_close(flat(found.grad), flat(torch.func.grad(function)(x)), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("keep", KEEPS)
def test_the_mean_over_tasks(keep, chunk):
    problem, written_out, x, batch = feature_problem()
    inner, outer, weights = batch(5), batch(5), WEIGHTS["towards the last"]
    values, gradients, last = [], [], []
    for task in range(5):
        alone = bl.Batches((inner[0][task], inner[1][task]), (outer[0][task], outer[1][task]))
        function = program(written_out, None, alone, NoneForUnused(bl.SGD(0.1, momentum=0.5)), weights)
        values.append(function(x))
        gradients.append(flat(torch.func.grad(function)(x)))
        last.append(program(written_out, None, alone, NoneForUnused(bl.SGD(0.1, momentum=0.5)), (0, 0, 0, 0, 1))(x))
    found = bl.hypergradient(
        problem,
        x,
        None,
        bl.Batches(inner, outer),
        solver=bl.Descent(bl.SGD(0.1, momentum=0.5), 5),
        estimator=bl.TaskMean(bl.Unrolled(keep, step_weights=weights), chunk=chunk),
    )
    torch.testing.assert_close(flat(found.grad), torch.stack(gradients).mean(0), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.outer_loss, torch.stack(values).mean(), rtol=1e-13, atol=0)
    torch.testing.assert_close(found.stats["final_outer_loss"].reshape(-1), torch.stack(last), rtol=1e-13, atol=0)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize(("steps", "dtype"), [(1, D), (1, torch.float32), (3, torch.float32), (40, D)])
def test_closed_form_of_a_bare_tensor(keep, steps, dtype):
    """g = y^2/2, f = (y - 1)^2/2: y_k = r^k x, dF/dx = sum of w_k r^k (r^k x - 1)."""
    problem = bl.Problem(lambda y, x, b: y**2 / 2, lambda y, x, b: (y - 1) ** 2 / 2, init=lambda x, b: x)
    weights = [1 / (k + 1) for k in range(steps)]
    found = found_by(problem, torch.tensor(3.0, dtype=dtype), None, NONE, bl.SGD(0.1), weights, keep)
    expected = sum(w * 0.9**k * (3 * 0.9**k - 1) for k, w in enumerate(weights, start=1))
    assert found.grad.dtype == dtype
    assert found.status is bl.Status.OK
    assert found.grad.item() == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("keep", KEEPS)
def test_random_numbers_of_the_losses_are_those_of_one_forward_pass(keep):
    """Noise in both losses; the sweep takes the outer losses from the last to the first, and so does the reference."""
    x = torch.linspace(0.5, 1.5, 4, dtype=D)
    problem = bl.Problem(
        lambda y, x, b: (torch.rand(4, dtype=D) * y.pow(4)).sum() / 4 + (torch.rand(4, dtype=D) * x * y).sum(),
        lambda y, x, b: (torch.rand(4, dtype=D) * y.pow(3)).sum() + (torch.rand(4, dtype=D) * x).sum(),
        init=lambda x, b: x,
    )
    weights = (0.5, 1.0, 0.0, 2.0)
    torch.manual_seed(7)
    found = found_by(problem, x, None, NONE, bl.SGD(0.1), weights, keep)
    after = torch.rand(1)
    torch.manual_seed(7)
    leaf, iterates = x.clone().requires_grad_(), []
    y = leaf * 1.0
    for _ in weights:
        y = y - 0.1 * torch.autograd.grad(problem.inner_loss(y, leaf, None), y, create_graph=True)[0]
        iterates.append(y)
    losses = {k: problem.outer_loss(iterates[k], leaf, None) for k in reversed(range(4)) if weights[k]}
    total = sum(weights[k] * loss for k, loss in losses.items())
    torch.testing.assert_close(found.grad, torch.autograd.grad(total, leaf)[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.outer_loss, total.detach(), rtol=1e-13, atol=0)
    problem.inner_loss(y, leaf, None)  # hg.inner_loss
    assert torch.equal(after, torch.rand(1)), "the caller's generator goes on where the losses left it"


COUNTS = {
    # keep: inner gradients for 6 steps of which `back` are gone back through
    "graph": lambda back: 6,
    "iterates": lambda back: 6 + back,
}


@pytest.mark.parametrize("keep", COUNTS)
@pytest.mark.parametrize(
    ("weights", "last", "terms", "back"),
    [
        ((1, 1, 1, 1, 1, 1), None, 6, 6),
        ((0, 0, 0, 0, 0, 1), None, 1, 6),
        ((1, 0, 1, 0, 0, 0), None, 2, 3),
        ((1, 1, 1, 1, 1, 1), 2, 6, 2),
        ((0, 1, 0, 0, 1, 0), 3, 2, 2),
    ],
)
def test_oracle_calls(keep, weights, last, terms, back):
    """One outer gradient per weight that is not 0; products for the steps before the last weighted iterate alone."""
    problem, outer, inner, batches = catalogue.meta_start()
    calls = found_by(problem, outer, inner, batches, bl.SGD(0.3), weights, keep, last=last).stats["calls"]
    assert calls == {"inner_gradient": COUNTS[keep](back), "outer_gradient": terms, "hvp": back, "mixed": 0}


@pytest.mark.filterwarnings("ignore:outer variable .*log_lr")
def test_growth_figures_agree_and_do_not_take_the_terms_on_the_way_for_growth():
    """At the end of a converged loop df/dy(y_K) is tiny beside df/dy(y_1): no instability."""
    problem = bl.Problem(lambda y, x, b: (y - x) ** 2 / 2, lambda y, x, b: (y - x) ** 4, init=lambda x, b: x + 3)
    x = torch.tensor(1.0, dtype=D)
    weights = (1.0,) * 40
    figures = []
    for keep in KEEPS:
        found = found_by(problem, x, None, NONE, bl.SGD(0.3), weights, keep)
        assert found.status is bl.Status.OK
        figures.append([found.stats[name].item() for name in ("cotangent_growth", "digits")])
    assert figures[0] == pytest.approx(figures[1], rel=1e-9)
    assert figures[0] == pytest.approx(figures[2], rel=1e-9)
    assert figures[0][0] <= 1.0 + 1e-12


@pytest.mark.parametrize("keep", KEEPS)
def test_an_unstable_loop_is_still_said_to_be_unstable(keep):
    problem = bl.Problem(lambda y, x, b: -(y**2) / 2, lambda y, x, b: (y - 1) ** 2, init=lambda x, b: x)
    found = found_by(problem, torch.tensor(1e-3, dtype=D), None, NONE, bl.SGD(0.5), (0.05,) * 20, keep)
    assert found.status is not bl.Status.OK
    assert found.stats["cotangent_growth"] > 100


NUMBERS = 4000


def peak(keep, steps, weights):
    """The most bytes alive, over those of one vector."""
    scale = torch.linspace(0.5, 1.5, NUMBERS)
    problem = bl.Problem(
        lambda y, x, b: (scale * (y - x).tanh().square()).sum() / 2, lambda y, x, b: (y - 1).square().sum() / 2
    )
    outer, inner = torch.linspace(-1, 1, NUMBERS), torch.zeros(NUMBERS)
    gc.collect()
    with Tensors() as meter:
        found = bl.hypergradient(
            problem,
            outer,
            inner,
            NONE,
            solver=bl.Descent(bl.SGD(0.1), steps),
            estimator=bl.Unrolled(keep, step_weights=weights and weights(steps)),
        )
    del found
    assert meter.live_bytes == 0, "something outlives the result"
    return meter.peak_bytes / inner.nbytes


@pytest.mark.parametrize("keep", ["iterates", "segments"])
@pytest.mark.parametrize("steps", [10, 50, 200])
def test_terms_on_the_way_cost_no_memory_that_grows(keep, steps):
    """The law of the trajectory stays: sqrt(2 K) iterates in segments. Of a term only its own gradient is added."""
    alone, summed = peak(keep, steps, None), peak(keep, steps, lambda k: (1 / k,) * k)
    assert summed <= alone + 4
    if keep == "segments":
        assert summed <= (2 * steps) ** 0.5 + 20


def test_the_law_of_segments_is_a_square_root_and_that_of_the_graph_is_not():
    def growth(keep):
        return peak(keep, 200, lambda k: (1 / k,) * k) / peak(keep, 10, lambda k: (1 / k,) * k)

    assert growth("segments") < 20**0.5
    assert growth("graph") > 10  # the positive control


REFUSED = {
    "too few": ((0.5, 0.5), 3, {}, "2 step_weights and the inner solver takes 3 steps"),
    "too many": ((0.5, 0.5), 1, {}, "2 step_weights and the inner solver takes 1 steps"),
    "no steps": ((1.0,), 0, {}, "1 step_weights and the inner solver takes 0 steps"),
    "cut off": ((1.0, 0.0, 0.0), 3, {"last": 2}, "0 for all of the last=2 steps"),
}


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("name", REFUSED)
def test_weights_that_do_not_fit_the_steps_are_refused(name, keep):
    weights, steps, more, message = REFUSED[name]
    problem, outer, inner, batches = catalogue.meta_start()
    estimator = bl.Unrolled(keep, step_weights=weights, **more)
    for each in (estimator, bl.TaskMean(estimator)):
        tasks = (
            batches
            if each is estimator
            else bl.Batches([b[None] for b in batches.inner], [b[None] for b in batches.outer])
        )
        with pytest.raises(ValueError, match=message):
            bl.hypergradient(problem, outer, inner, tasks, solver=bl.Descent(bl.SGD(0.1), steps), estimator=each)


@pytest.mark.parametrize(
    "weights",
    [
        (),
        (0.0, 0.0),
        0.5,
        "ab",
        (float("nan"), 1.0),
        (float("inf"),),
        (True, 1.0),
        (torch.tensor(1.0),),
        ("1", 2.0),
        {1: 2.0},
    ],
)
def test_weights_that_are_no_finite_numbers_are_refused_at_once(weights):
    with pytest.raises(ValueError, match="a sequence of one finite number per inner step"):
        bl.Unrolled(step_weights=weights)


def test_a_solver_that_stops_by_itself_is_refused():
    problem, outer, inner, batches = catalogue.meta_start()
    with pytest.raises(ValueError, match=r"step_weights with Converge.*Descent\(optimizer, steps=2\)"):
        bl.hypergradient(
            problem, outer, inner, batches, solver=bl.Converge(bl.SGD(0.1)), estimator=bl.Unrolled(step_weights=(1, 1))
        )


def test_a_list_is_kept_as_a_tuple_so_that_the_estimator_stays_as_it_was_made():
    weights = [0.5, 0.5]
    estimator = bl.Unrolled(step_weights=weights)
    weights[0] = 7.0
    assert estimator.step_weights == (0.5, 0.5)
    assert estimator == bl.Unrolled(step_weights=(0.5, 0.5))


def test_growth_figures_agree_where_a_tensor_is_handed_on_by_every_step():
    """The shift has one value at all steps; its cotangents enter at each, and each is held against what came so far."""
    problem, _, x, batch = feature_problem()
    batches, weights, figures = bl.Batches(batch(), batch()), (1.0, 1.0, 1.0, 1.0, 1e-6), []
    for keep in KEEPS:
        found = found_by(problem, x, None, batches, bl.SGD(0.1), weights, keep)
        assert found.status is bl.Status.OK
        figures.append(found.stats["cotangent_growth"].item())
    assert figures == pytest.approx([figures[0]] * 3, rel=1e-9)


def case_of(device):
    g = torch.Generator().manual_seed(0)
    problem = bl.Problem(
        lambda y, x, b: ((b @ y - x["targets"]) ** 2).mean() + y.pow(4).sum() / 100,
        lambda y, x, b: ((y - 1) ** 2).sum(),
    )
    rows = torch.randn(2, 8, 300, generator=g) / 20
    return (
        problem,
        {"targets": torch.randn(8, generator=g)},
        torch.zeros(300),
        bl.Batches(rows[0], None, curvature=rows[1]),
    )


@pytest.mark.parametrize(
    "estimator",
    [
        *(bl.Unrolled(keep, step_weights=(0.1, 0.0, 0.2, 0.3, 0.4)) for keep in KEEPS),
        *(bl.Unrolled(keep, resampled=True) for keep in ("iterates", "segments")),
        bl.Unrolled("segments", step_weights=(0.1, 0.0, 0.2, 0.3, 0.4), resampled=True, last=3),
    ],
    ids=str,
)
def test_forecasts_are_exact_and_no_target_is_claimed(estimator):
    """Peak bytes and oracle calls on tensors without data equal those of a run."""
    solver = bl.Descent(bl.SGD(0.1, momentum=0.9), 5)
    forecast = bilevel_profiling.forecast(bilevel_profiling.Case(case_of, solver=solver, estimator=estimator))
    problem, outer, inner, batches = case_of("cpu")
    bl.hypergradient(problem, outer, inner, batches, solver=solver, estimator=estimator)  # what is made once
    gc.collect()
    with Tensors() as meter:
        found = bl.hypergradient(problem, outer, inner, batches, solver=solver, estimator=estimator)
    assert forecast.calls == found.stats["calls"]
    assert forecast.peak_tensor_bytes == meter.peak_bytes
    assert target_of(estimator) is None


@pytest.mark.parametrize("last", [1, 2, 3])
def test_truncated_noise_is_the_same_for_every_way_of_keeping(last):
    """Terms of the iterates that are cut off are evaluated on the way there, by all three at the same moment."""
    x = {"w": torch.linspace(0.5, 1.5, 4, dtype=D), "to": torch.linspace(-1, 1, 4, dtype=D)}
    problem = bl.Problem(
        lambda y, x, b: (torch.rand(4, dtype=D) * (y - x["to"]).pow(4)).sum() / 4,
        lambda y, x, b: (torch.rand(4, dtype=D) * y.pow(3)).sum() + (torch.rand(4, dtype=D) * x["w"]).sum(),
    )
    answers = []
    for keep in KEEPS:
        torch.manual_seed(7)
        found = found_by(problem, x, torch.ones(4, dtype=D), NONE, bl.SGD(0.1), (0.5, 1, 0, 2, 1), keep, last=last)
        answers.append(torch.cat([flat(found.grad), found.outer_loss.reshape(1), torch.rand(1, dtype=D)]))
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(answers[2], answers[0], rtol=1e-12, atol=0)
