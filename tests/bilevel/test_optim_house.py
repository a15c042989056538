"""Every inner optimizer and wrapper in the whole house: all ways to keep, engines, tasks, solutions, fake tensors."""

import dataclasses

import pytest
import torch
from bilevel_profiling import Case, forecast, measure
from torch._subclasses.fake_tensor import FakeTensorMode

import bilevel as bl

o = bl.optim
D = torch.float64
KEEPS = ("graph", "iterates", "segments")
MUON = o.Muon(lr=lambda x: x["lr"], weight_decay=0.1, momentum=0.5)


def rate(x):
    return x["lr"]


OPTIMIZERS = {
    "rmsprop": o.RMSprop(lr=rate, alpha=0.8, momentum=0.3, centered=True),
    "adagrad": o.Adagrad(lr=rate, lr_decay=0.1, weight_decay=0.1),
    "adadelta": o.Adadelta(lr=lambda x: 10 * x["lr"], rho=0.5, eps=1e-3),
    "adamax": o.Adamax(lr=rate, betas=(0.5, 0.9)),
    "nadam": o.NAdam(lr=rate, betas=(lambda x: 10 * x["lr"], 0.9), weight_decay=0.1),
    "radam": o.RAdam(lr=rate, betas=(0.5, lambda x: 1 - 2 * x["lr"]), weight_decay=0.1, decoupled_weight_decay=True),
    "lion": o.Lion(lr=rate, weight_decay=0.2, smooth=0.3),
    "muon": o.Groups([(lambda name, shape: len(shape) == 2, MUON), ("", o.RMSprop(lr=rate))]),
    "groups": o.Groups({"net.w": bl.SGD(lr=rate, momentum=0.5), "": bl.Adam(lr=rate)}),
    "schedules": o.Schedules(bl.Adam(), {"lr": o.WarmUp(o.Cosine(rate, steps=4), steps=2, start=0.3)}),
    "learned rates": o.Schedules(bl.SGD(lr=0.1, momentum=0.5), {"lr": o.Tabulated(lambda x: x["rates"])}),
    "clipped by norm": o.ClippedByNorm(bl.SGD(lr=rate, momentum=0.5), limit=lambda x: 3 * x["lr"]),
    "clipped by value": o.ClippedByValue(bl.SGD(lr=rate, weight_decay=0.1), limit=lambda x: x["lr"]),
    "accumulated": o.Accumulated(bl.Adam(lr=rate), every=2),
    "clipped groups of accumulated": o.ClippedByNorm(
        o.Groups({"net.w": o.Accumulated(MUON, 3), "": o.ClippedByValue(bl.SGD(rate, 0.5), 0.05)}), limit=0.5
    ),
    "averaged": bl.inner.Averaged(bl.SGD(lr=rate, momentum=0.5), decay=lambda x: 5 * x["lr"], start=1),
    "plain mean of clipped": bl.inner.Averaged(o.ClippedByNorm(bl.Adam(lr=rate), 0.4), decay=None, start=2),
    "from torch": o.FromTorch(torch.optim.Adagrad, lr=0.1, lr_decay=0.1),
    "from torch, many numbers": o.FromTorch(torch.optim.ASGD, lr=0.1, lambd=0.1, t0=2),
}
FOREIGN = ("from torch", "from torch, many numbers")
STEPS = 5


def inner_loss(y, x, batch):
    hidden = torch.tanh(batch @ y["net"]["w"]) + y["b"]
    return (hidden.cosh() * x["weights"].exp()).sum() + (y["net"]["w"].square().sum() * x["weights"].sum()).sin()


def outer_loss(y, x, batch):
    return (torch.tanh(batch @ y["net"]["w"]) + y["b"] - 0.3).square().sum()


PROBLEM = bl.Problem(inner_loss, outer_loss, init=lambda x, batch: {"net": {"w": x["w"]}, "b": x["b"]})


def posed():
    g = torch.Generator().manual_seed(2)
    x = {
        "weights": torch.tensor([0.3, -0.2], dtype=D),
        "lr": torch.tensor(0.08, dtype=D),
        "rates": torch.tensor([0.1, 0.05, 0.08, 0.02, 0.03], dtype=D),
        "w": torch.randn(3, 2, generator=g, dtype=D),
        "b": torch.randn(2, generator=g, dtype=D),
    }
    return x, torch.randn(4, 2, 3, generator=g, dtype=D), torch.randn(4, 2, 3, generator=g, dtype=D)


def value(optimizer, x, batches, test):
    """The outer loss after the steps, with gradients by torch alone."""
    y = {"net": {"w": x["w"]}, "b": x["b"]}
    averaged = isinstance(optimizer, bl.inner.Averaged)
    moves = optimizer.optimizer if averaged else optimizer
    state, mean, count = moves.init(y), None, 0
    for step in range(STEPS):
        w, b = (leaf.detach().requires_grad_() for leaf in (y["net"]["w"], y["b"]))
        gw, gb = torch.autograd.grad(inner_loss({"net": {"w": w}, "b": b}, x, batches[step % len(batches)]), [w, b])
        with torch.no_grad():
            y, state = moves.step({"net": {"w": gw}, "b": gb}, state, y, x)
        if averaged and step >= optimizer.start:
            count += 1
            decay = 1 - 1 / count if optimizer.decay is None else optimizer.decay(x)
            flat = torch.cat([y["net"]["w"].reshape(-1), y["b"]])
            mean = flat if mean is None else decay * mean + (1 - decay) * flat
    if averaged:
        y = {"net": {"w": mean[:6].reshape(3, 2)}, "b": mean[6:]}
    return outer_loss(y, x, test).item()


def differences(optimizer, x, batches, test, along):
    up, down = ({k: leaf + sign * 1e-6 * along[k] for k, leaf in x.items()} for sign in (1, -1))
    return (value(optimizer, up, batches, test) - value(optimizer, down, batches, test)) / 2e-6


def direction(x):
    g = torch.Generator().manual_seed(5)
    return {k: torch.randn(leaf.shape, generator=g, dtype=D) for k, leaf in x.items()}


def call(optimizer, estimator, x, batches, test, **more):
    solver = bl.Descent(optimizer, STEPS)
    return bl.hypergradient(PROBLEM, x, None, bl.Batches(batches, test), solver=solver, estimator=estimator, **more)


pytestmark = [pytest.mark.filterwarnings("ignore:outer variable")]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_way_to_keep_and_the_compiled_engine_have_the_derivative_of_the_program(name):
    optimizer, (x, train, test) = OPTIMIZERS[name], posed()
    along = direction(x)
    expected = differences(optimizer, x, list(train), test[0], along)
    for engine in (None, bl.Compiled(backend="graph")):
        for keep in KEEPS if engine is None else ("iterates",):
            more = {} if engine is None else {"engine": engine}
            found = call(optimizer, bl.Unrolled(keep), x, bl.PerStep(list(train) * 2), test[0], **more)
            assert found.status is bl.Status.OK
            assert found.outer_loss.item() == pytest.approx(value(optimizer, x, list(train), test[0]), rel=1e-12)
            slope = sum((found.grad[k] * along[k]).sum().item() for k in x)
            assert slope == pytest.approx(expected, rel=2e-6, abs=1e-8)
    assert abs(expected) > 1e-3, "the path must matter"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_tasks_move_each_by_itself(name):
    optimizer, (x, train, test) = OPTIMIZERS[name], posed()
    alone = [call(optimizer, bl.Unrolled("graph"), x, train[i], test[i]) for i in range(3)]
    for chunk in (None, 2) if name != "muon" else (None, 1, 2):
        together = call(optimizer, bl.TaskMean(bl.Unrolled("iterates"), chunk=chunk), x, train[:3], test[:3])
        for key in x:
            mean = torch.stack([each.grad[key] for each in alone]).mean(0)
            torch.testing.assert_close(together.grad[key], mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(together.inner["b"], torch.stack([each.inner["b"] for each in alone]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_narrower_dtypes_give_the_numbers_they_can_hold(name, dtype):
    if (name, dtype) == ("muon", torch.bfloat16):
        pytest.skip("eight bits of a polynomial of degree 5^5 have no derivative")
    optimizer, (x, train, test) = OPTIMIZERS[name], posed()
    exact = call(optimizer, bl.Unrolled(), x, train[0], test[0])
    narrow = call(
        optimizer, bl.Unrolled(), {k: v.to(dtype) for k, v in x.items()}, train[0].to(dtype), test[0].to(dtype)
    )
    assert all(leaf.dtype == dtype for leaf in narrow.grad.values())
    found, wanted = (torch.cat([each.grad[k].double().reshape(-1) for k in x]) for each in (narrow, exact))
    assert (found - wanted).norm() < {torch.float32: 1e-3, torch.bfloat16: 0.5}[dtype] * wanted.norm()


@pytest.mark.parametrize(
    "name", [name for name in OPTIMIZERS if name not in FOREIGN and isinstance(OPTIMIZERS[name], bl.Optimizer)]
)
def test_steps_run_on_tensors_without_data(name):
    """Forecasts of memory, and the search for the paths of x, ask for it: no step may look at a number."""
    optimizer, (x, _, _) = OPTIMIZERS[name], posed()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {key: mode.from_tensor(leaf) for key, leaf in x.items()}
        y = {"net": {"w": fake["w"]}, "b": fake["b"]}
        state = optimizer.init(y)
        for _ in range(3):
            y, state = optimizer.step({"net": {"w": y["net"]["w"] + 1}, "b": None}, state, y, fake)
    assert y["net"]["w"].shape == (3, 2)


@pytest.mark.parametrize("name", ["schedules", "clipped groups of accumulated"])
def test_a_forecast_is_what_is_measured_to_the_byte(name):
    x, train, test = posed()

    def setup(device):
        return PROBLEM, {key: leaf.clone() for key, leaf in x.items()}, None, bl.Batches(train[0], test[0])

    case = Case(setup, solver=bl.Descent(OPTIMIZERS[name], 3), estimator=bl.Unrolled("iterates"), name=name)
    measured = measure(case, repeats=1, errors=False)
    assert forecast(case).peak_tensor_bytes == measured.peak_tensor_bytes


# At the solution: y* = (H + wd)^-1 x for optimizers that say where they rest; the others are refused.

H = torch.tensor([1.0, 2.0, 0.5], dtype=D)
QUADRATIC = bl.Problem(
    lambda y, x, b: (H * y["a"].square()).sum() / 2 - x @ y["a"], lambda y, x, b: (y["a"] - 1).square().sum() / 2
)
RESTS = {
    "rmsprop": (o.RMSprop(lr=0.02, weight_decay=0.5, momentum=0.5), 0.5),
    "adagrad": (o.Adagrad(lr=0.5, weight_decay=0.5), 0.5),
    "adadelta": (o.Adadelta(lr=3.0, eps=1e-4), 0.0),
    "groups": (o.Groups({"": bl.SGD(0.3, weight_decay=0.5)}), 0.5),
    "schedules": (o.Schedules(bl.SGD(0.3, weight_decay=0.5), {"lr": o.StepDecay(0.4, 0.999)}), 0.5),
    "clipped by norm": (o.ClippedByNorm(bl.SGD(0.3), 0.5), 0.0),
    "clipped by value": (o.ClippedByValue(bl.SGD(0.3), 0.5), 0.0),
    "accumulated": (o.Accumulated(bl.SGD(0.3, weight_decay=0.5), 2), 0.5),
    "averaged": (bl.inner.Averaged(bl.SGD(0.3, weight_decay=0.5), decay=0.9), 0.5),
    "plain steps of torch": (
        o.FromTorch(torch.optim.SGD, lr=0.3, weight_decay=0.5, stationary=lambda g, y, x: {"a": g["a"] + 0.5 * y["a"]}),
        0.5,
    ),
}
PERTURBED = ("rmsprop", "groups", "schedules", "clipped by norm", "accumulated")
RESTLESS = {
    "lion": o.Lion(lr=0.01),
    "nadam decoupled": o.NAdam(weight_decay=0.1, decoupled_weight_decay=True),
    "radam decoupled": o.RAdam(weight_decay=0.1, decoupled_weight_decay=True),
    "clip and decay": o.ClippedByNorm(bl.SGD(0.1, weight_decay=0.1), 1.0),
    "clip of entries and decay": o.ClippedByValue(bl.SGD(0.1, weight_decay=0.1), 1.0),
    "clip and decay, accumulated": o.Accumulated(o.ClippedByNorm(bl.SGD(0.1, weight_decay=0.1), 1.0), 2),
    "a scheduled decay": o.Schedules(bl.SGD(0.1, weight_decay=0.1), {"weight_decay": o.StepDecay(0.1)}),
    "rates by tensor": o.Schedules(bl.SGD(0.1), {"lr": lambda step, x: {"a": 0.1}}),
    "from torch": o.FromTorch(torch.optim.SGD, lr=0.1),
}


@pytest.mark.parametrize("name", RESTS)
def test_at_the_solution_the_closed_form(name):
    optimizer, decay = RESTS[name]
    x, y = torch.tensor([1.0, 2.0, 3.0], dtype=D), {"a": torch.zeros(3, dtype=D)}
    perturbed = (bl.FirstOrderCorrected(),) if isinstance(optimizer, bl.Optimizer) and name in PERTURBED else ()
    for estimator in (bl.Implicit(bl.CG(20, 1e-12)), *perturbed):
        found = bl.hypergradient(
            QUADRATIC,
            x,
            y,
            bl.Batches(None, None),
            solver=bl.Converge(optimizer, 1e-7, 6000),
            estimator=estimator,
        )
        assert found.status is bl.Status.OK
        torch.testing.assert_close(found.grad, (x / (H + decay) - 1) / (H + decay), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", RESTLESS)
def test_where_the_rest_is_not_known_estimators_at_the_solution_refuse(name):
    x, y = torch.tensor([1.0, 2.0, 3.0], dtype=D), {"a": torch.zeros(3, dtype=D)}
    with pytest.raises(ValueError, match="does not say"):
        bl.hypergradient(
            QUADRATIC,
            x,
            y,
            bl.Batches(None, None),
            solver=bl.Descent(RESTLESS[name], 20),
            estimator=bl.Implicit(bl.CG(5)),
        )


@pytest.mark.parametrize("keep", ["graph", "iterates"])
@pytest.mark.parametrize(
    "optimizer",
    [
        *(kind() for kind in (o.RMSprop, o.Adagrad, o.Adadelta, o.Adamax, o.NAdam, o.RAdam)),
        o.RMSprop(centered=True, eps=0.0, momentum=0.5),
        o.Adadelta(eps=0.0),
        o.Adamax(eps=0.0),
        o.Lion(smooth=0.1),
        o.ClippedByNorm(bl.SGD(0.1), 1.0),
        o.Groups({"dead": o.ClippedByNorm(bl.SGD(0.1), 1.0), "live": bl.Adam()}),
        o.Groups({"dead": o.Muon(), "live": bl.SGD(0.1)}),
    ],
    ids=str,
)
def test_a_unit_that_is_dead_at_every_step_moves_nothing_and_has_no_nan(optimizer, keep):
    problem = bl.Problem(
        lambda y, x, b: ((y["live"] - x) ** 4).sum() + (torch.relu(y["dead"] - 10) * x).sum(),
        lambda y, x, b: (y["live"] + y["dead"] + 1).square().sum(),
    )
    x = torch.full((2, 2), 0.7, dtype=D)
    y = {"live": torch.zeros(2, 2, dtype=D), "dead": torch.zeros(2, 2, dtype=D)}
    found = bl.hypergradient(
        problem, x, y, bl.Batches(None, None), solver=bl.Descent(optimizer, 7), estimator=bl.Unrolled(keep)
    )
    found.raise_if_failed(strict=True)
    assert found.grad.isfinite().all()
    assert found.inner["dead"].eq(0).all()
    # (Without eps, Adadelta never begins to move.)
    assert optimizer == o.Adadelta(eps=0.0) or found.grad.abs().max() > 1e-8


def test_a_copy_for_tasks_is_made_of_what_a_wrapper_holds_and_only_where_it_matters():
    clip = o.ClippedByNorm(bl.SGD(0.1), 1.0)
    assert o.Accumulated(clip, 2).over(3).optimizer.tasks == 3
    assert o.Groups({"": clip}).over(3).rules[0][1].tasks == 3
    assert bl.Scheduled([clip, clip]).over(3).optimizers[1].tasks == 3
    assert bl.inner.Averaged(clip).over(3).optimizer.tasks == 3
    assert bl.inner.GradientDynamics(clip).over(3).optimizer.tasks == 3
    for same in (bl.Adam(), o.Accumulated(bl.Adam(), 2), bl.inner.GradientDynamics(bl.SGD(0.1))):
        assert same.over(3) is same


@dataclasses.dataclass(frozen=True)
class Hidden(bl.Optimizer):
    """A user's, with a weight decay that its stationarity does not tell of."""

    def init(self, inner):
        return None

    def step(self, grad, state, inner, outer):
        return torch.utils._pytree.tree_map(lambda y, g: y - 0.1 * (g + 0.5 * y), inner, grad), None

    def stationarity(self, grad, inner, outer):
        return grad


@dataclasses.dataclass(frozen=True)
class Normed(bl.Optimizer):
    """A user's, along g / |g|; `over` tasks each by its own norm."""

    tasks: bool = False
    knows: bool = True

    def init(self, inner):
        return None

    def over(self, tasks):
        return dataclasses.replace(self, tasks=self.knows)

    def step(self, grad, state, inner, outer):
        norm = grad["a"].square().sum(-1 if self.tasks else None, keepdim=True).sqrt()
        return {"a": inner["a"] - 0.1 * grad["a"] / norm}, None


def test_a_users_optimizer_that_says_how_it_moves_over_tasks_is_taken_at_its_word_where_that_is_so():
    problem = bl.Problem(QUADRATIC.inner_loss, lambda y, x, b: (y["a"] - b).square().sum())
    x, y = torch.tensor([1.0, 2.0, 3.0], dtype=D), {"a": torch.arange(6, dtype=D).reshape(2, 3)}
    tasks = torch.tensor([1.0, -1.0], dtype=D)

    def call(optimizer, estimator, y, b):
        solver = bl.Descent(o.Groups({"": optimizer}), 4)
        return bl.hypergradient(problem, x, y, bl.Batches(b, b), solver=solver, estimator=estimator).grad

    found = call(Normed(), bl.TaskMean(bl.Unrolled()), y, tasks)
    alone = [call(Normed(), bl.Unrolled(), {"a": y["a"][i]}, tasks[i]) for i in range(2)]
    torch.testing.assert_close(found, torch.stack(alone).mean(0), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match=r"mixes tasks.*over\(tasks\)"):
        call(Normed(knows=False), bl.TaskMean(bl.Unrolled()), y, tasks)


COUPLED = [o.RMSprop, o.Adagrad, o.Adadelta, o.Adamax, o.NAdam, o.RAdam]


@pytest.mark.parametrize("kind", COUPLED)
def test_coupled_decay_is_part_of_the_rest_and_a_step_rests_there(kind):
    y = {"a": torch.tensor([1.0, -2.0], dtype=D)}
    optimizer, g = kind(weight_decay=0.3), {"a": -0.3 * y["a"]}
    assert optimizer.stationarity(g, y, None)["a"].abs().max() == 0
    assert kind().stationarity(g, y, None)["a"] is g["a"]
    moved, _ = optimizer.step(g, optimizer.init(y), y, None)
    torch.testing.assert_close(moved["a"], y["a"], rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "wrapped",
    [
        o.Accumulated(Hidden(), 2),
        o.Groups({"": Hidden()}),
        o.Groups({"a": o.Accumulated(Hidden(), 2)}),
        o.ClippedByNorm(o.Groups({"a": Hidden()}), 100.0),
        o.FromTorch(torch.optim.SGD, lr=0.1, weight_decay=0.5, stationary=lambda g, y, x: g),
    ],
    ids=["accumulated", "groups", "accumulated in a group", "clipped groups", "from torch"],
)
def test_what_a_users_optimizer_hides_is_found_in_every_wrapper(wrapped):
    x, y = torch.tensor([1.0, 2.0, 3.0], dtype=D), {"a": torch.zeros(3, dtype=D)}
    with pytest.raises(ValueError, match=r"moves y where its stationarity\(\) is zero"):
        bl.hypergradient(
            QUADRATIC, x, y, bl.Batches(None, None), solver=bl.Descent(wrapped, 6), estimator=bl.Implicit(bl.CG(5))
        )


def test_what_the_docstrings_say_of_the_length_of_steps():
    y, g = torch.zeros(1, dtype=D), torch.full((1,), 3.0, dtype=D)

    def lengths(optimizer, y=y, steps=7, g=g):
        state, found = optimizer.init(y), []
        for _ in range(steps):
            moved, state = optimizer.step(g, state, y, None)
            found.append((y - moved).item())
            y = moved
        return found

    assert lengths(o.RAdam(lr=0.1))[:5] == pytest.approx([0.3] * 5)  # plain, at first
    assert lengths(o.RAdam(lr=0.1))[5] < 0.05
    assert lengths(o.RMSprop(lr=0.1, alpha=0.96))[0] == pytest.approx(0.1 / 0.2)  # lr / sqrt(1 - alpha)
    assert lengths(o.Adadelta(rho=0.96))[0] == pytest.approx((1e-6 / 0.04) ** 0.5, rel=1e-4)  # sqrt(eps / (1 - rho))
    ends = 4.0 - torch.tensor(lengths(o.Lion(lr=0.1, weight_decay=0.5), y + 4.0, 400)).cumsum(0)
    assert -2.0 <= ends[-1] < -1.99  # it stays inside 1 / weight_decay, where g is 3
    matrix, muon = torch.ones(1, 1, dtype=D), o.Muon(lr=0.1, weight_decay=0.0)
    assert lengths(muon, matrix, g=matrix) == pytest.approx(lengths(muon, matrix, g=1e-3 * matrix))  # whatever |g| is


@pytest.mark.parametrize(
    "estimator", [bl.Implicit(bl.CG(10, 1e-12)), bl.FirstOrderCorrected(), bl.estimators.PBGD(gamma=10.0, rate=0.05)]
)
def test_rules_that_look_at_shapes_see_those_of_one_task_also_at_the_solution(estimator):
    problem = bl.Problem(
        lambda y, x, b: (y["m"] - b * x).square().sum() + (y["v"] - x.sum()).square().sum(),
        lambda y, x, b: (y["m"].sum() - 1) ** 2 + y["v"].sum(),
    )
    x, tasks = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=D), torch.tensor([1.0, -1.0], dtype=D)
    decayed = bl.SGD(0.2, weight_decay=0.1)
    solver = bl.Descent(o.Groups([(lambda name, shape: len(shape) == 2, decayed), ("", bl.SGD(0.3))]), 60)

    def call(estimator, batch, *shape):
        y = {"m": torch.zeros(*shape, 2, 2, dtype=D), "v": torch.zeros(*shape, 2, dtype=D)}
        batches = bl.Batches(batch, None)
        return bl.hypergradient(problem, x, y, batches, solver=solver, estimator=estimator).grad

    alone = torch.stack([call(estimator, task) for task in tasks]).mean(0)
    torch.testing.assert_close(call(bl.TaskMean(estimator), tasks, 2), alone, rtol=1e-9, atol=1e-9)
