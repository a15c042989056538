"""bl.Scheduled: another optimizer at each inner step, under every estimator, right or refused."""

import dataclasses
import itertools

import catalogue
import pytest
import torch
from optim_cases import gradient_of, start
from torch.utils import _pytree as pytree

import bilevel as bl

D = torch.float64
KEEPS = ("graph", "iterates", "segments")
NONE = bl.Batches(None, None)


def flat(tree):
    return torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(tree)])


def by_hand(problem, outer, inner, batches, optimizers, steps):
    """The K-step program with optimizers[k] at step k, written out for torch.func.grad; state goes on."""

    def program(x):
        y = inner if problem.init is None else problem.init(x, batches.inner_at(0))
        state = optimizers[0].init(y)
        for step in range(steps):
            gradient = torch.func.grad(problem.inner_loss)(y, x, batches.inner_at(step))
            y, state = optimizers[min(step, len(optimizers) - 1)].step(gradient, state, y, x)
        return problem.outer_loss(y, x, batches.outer)

    return torch.func.grad(program)(outer)


def learned(step):
    return bl.SGD(lr=lambda x: (x["log_lr"] - 0.3 * step).exp())


def per_tensor(step):
    return bl.SGD(lr={"a": 0.1 + 0.05 * step, "b": 0.4 - 0.05 * step}, momentum=0.1 * (step + 1))


SCHEDULES = {
    "sgd": [bl.SGD(0.3 / (k + 1)) for k in range(6)],
    "one and the same": [bl.SGD(0.2)] * 6,
    "momentum that grows": [bl.SGD(0.1, momentum=0.1 * (k + 1)) for k in range(6)],
    "momentum off and on": [bl.SGD(0.1, momentum=lambda x, k=k: 0.8 * (k % 2)) for k in range(6)],
    "adam": [bl.Adam(0.05 * (k + 1), weight_decay=0.01 * k) for k in range(6)],
    "adamw": [bl.AdamW(0.05, weight_decay=0.1 * k) for k in range(6)],
    "learned": [learned(k) for k in range(6)],
    "per tensor": [per_tensor(k) for k in range(6)],
    "learned in the last step": [*[bl.SGD(0.1)] * 5, bl.SGD(lr=lambda x: x["log_lr"].exp())],
}


@pytest.mark.filterwarnings("ignore:outer variable .*log_lr")
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_hypergradients_through_a_schedule_equal_the_written_out_program(name, keep):
    problem, outer, inner, batches = catalogue.weighted_net()
    expected = by_hand(problem, outer, inner, batches, SCHEDULES[name], 6)
    found = bl.hypergradient(
        problem,
        outer,
        inner,
        batches,
        solver=bl.Descent(bl.Scheduled(SCHEDULES[name]), 6),
        estimator=bl.Unrolled(keep=keep),
    )
    assert found.status is bl.Status.OK
    torch.testing.assert_close(flat(found.grad), flat(expected), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("keep", KEEPS)
def test_truncation_counts_steps_from_the_start_of_the_loop(keep):
    """The last two of five steps are differentiated with the settings of steps 3 and 4, not of 0 and 1."""
    problem, outer, inner, batches = catalogue.weighted_net()
    optimizers = [learned(k) for k in range(5)]
    y, state = inner, optimizers[0].init(inner)
    for step in range(3):
        gradient = torch.func.grad(problem.inner_loss)(y, outer, batches.inner)
        y, state = optimizers[step].step(gradient, state, y, outer)
    expected = by_hand(problem, outer, y, batches, optimizers[3:], 2)
    found = bl.hypergradient(
        problem,
        outer,
        inner,
        batches,
        solver=bl.Descent(bl.Scheduled(optimizers), 5),
        estimator=bl.Unrolled(keep, last=2),
    )
    torch.testing.assert_close(flat(found.grad), flat(expected), rtol=1e-12, atol=1e-14)


def test_steps_are_those_of_torch_optim_under_a_scheduler():
    y, (rate, decay), steps = start(), (0.1, 0.7), 12
    scheduled = bl.Scheduled([bl.SGD(rate * decay**k, momentum=0.9) for k in range(steps)])
    theirs = {name: leaf.clone().requires_grad_() for name, leaf in y.items()}
    reference = torch.optim.SGD(list(theirs.values()), lr=rate, momentum=0.9)
    rule = torch.optim.lr_scheduler.ExponentialLR(reference, decay)
    state = scheduled.init(y)
    for _ in range(steps):
        for name, leaf in gradient_of(theirs).items():
            theirs[name].grad = leaf
        reference.step()
        rule.step()
        y, state = scheduled.step(gradient_of(y), state, y, None)
    assert state["step"] == steps
    torch.testing.assert_close(flat(y), flat(theirs).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("keep", KEEPS)
def test_tasks_each_take_the_schedule(keep, chunk):
    problem = bl.Problem(
        lambda y, x, b: (y - b) ** 2 + 0.1 * y**4, lambda y, x, b: (y - b) ** 2, init=lambda x, b: x["y"]
    )
    x = {"y": torch.tensor(3.0, dtype=D), "lr": torch.tensor([0.2, 0.1, 0.05], dtype=D)}
    tasks = torch.tensor([0.0, 1.0, 2.0, 4.0, -1.0], dtype=D)
    optimizers = [bl.SGD(lr=lambda x, k=k: x["lr"][k], momentum=0.5) for k in range(3)]
    expected = [by_hand(problem, x, None, bl.Batches(task, task + 1), optimizers, 3) for task in tasks]
    found = bl.hypergradient(
        problem,
        x,
        None,
        bl.Batches(tasks, tasks + 1),
        solver=bl.Descent(bl.Scheduled(optimizers), 3),
        estimator=bl.TaskMean(bl.Unrolled(keep), chunk=chunk),
    )
    for name in x:
        mean = torch.stack([each[name] for each in expected]).mean(0)
        torch.testing.assert_close(found.grad[name], mean, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("keep", KEEPS)
def test_tasks_that_come_to_rest_by_themselves_are_those_solved_alone(keep):
    problem = bl.Problem(lambda y, x, b: b[1] * (y - b[0] * x) ** 2 / 2, lambda y, x, b: (y - 1) ** 2)
    x, y = torch.tensor(1.5, dtype=D), torch.zeros(3, dtype=D)
    tasks = torch.tensor([1.0, -2.0, 0.5], dtype=D), torch.tensor([1.0, 0.3, 2.0], dtype=D)
    optimizer = bl.Scheduled([bl.SGD(0.9 / (1 + 0.05 * k)) for k in range(10)], hold=True)
    solver = bl.Converge(optimizer, tol=1e-6, max_steps=500)
    alone = [
        bl.hypergradient(
            problem, x, y[i], bl.Batches((tasks[0][i], tasks[1][i]), None), solver=solver, estimator=bl.Unrolled(keep)
        )
        for i in range(3)
    ]
    assert len({each.stats["inner_steps"] for each in alone}) == 3
    found = bl.hypergradient(
        problem, x, y, bl.Batches(tasks, None), solver=solver, estimator=bl.TaskMean(bl.Unrolled(keep))
    )
    assert found.status is bl.Status.OK
    torch.testing.assert_close(found.grad, torch.stack([each.grad for each in alone]).mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.inner, torch.stack([each.inner for each in alone]), rtol=1e-12, atol=0)


def quadratic():
    h = torch.tensor([1.0, 2.0, 0.5], dtype=D)
    problem = bl.Problem(lambda y, x, b: (h * y**2).sum() / 2 - x["to"] @ y, lambda y, x, b: ((y - 1) ** 2).sum() / 2)
    return problem, {"to": torch.tensor([1.0, 2.0, 3.0], dtype=D)}, torch.zeros(3, dtype=D), h


AT_SOLUTION = {
    "implicit": bl.Implicit(bl.CG(50, tol=1e-12)),
    "memory reduced": bl.MemoryReduced(steps=50, tol=1e-12),
    "corrected": bl.FirstOrderCorrected(),
}


@pytest.mark.parametrize("name", AT_SOLUTION)
@pytest.mark.parametrize("solver", ["descent", "converge"])
def test_at_the_solution_a_schedule_that_agrees_on_it_gives_the_closed_form(solver, name):
    """(H + wd)^-1 (y* - 1) with y* = (H + wd)^-1 x: where it rests depends on the decay and not on the rates."""
    problem, x, y, h = quadratic()
    schedule = bl.Scheduled(
        [bl.SGD(0.4 / (1 + 0.01 * k), momentum=0.3, weight_decay=0.5) for k in range(30)], hold=True
    )
    solver = bl.Descent(schedule, 300) if solver == "descent" else bl.Converge(schedule, 1e-12, 2000)
    found = bl.hypergradient(problem, x, y, NONE, solver=solver, estimator=AT_SOLUTION[name])
    assert found.status is bl.Status.OK
    solution = x["to"] / (h + 0.5)
    torch.testing.assert_close(found.grad["to"], (solution - 1) / (h + 0.5), rtol=1e-7, atol=1e-7)


DISAGREE = {
    "weight decays": [bl.SGD(0.1, weight_decay=0.1), bl.SGD(0.1, weight_decay=0.2)],
    "one decay, one none": [bl.Adam(0.1), bl.Adam(0.1, weight_decay=0.1)],
    "functions that may differ": [bl.SGD(0.1, weight_decay=lambda x: 0.1), bl.SGD(0.1, weight_decay=lambda x: 0.1)],
    "adamw": [bl.AdamW(0.1), bl.AdamW(0.2)],
    "a tensor held at one step": [bl.SGD({"y": 0.1, "z": 0.0}), bl.SGD(0.1)],
    "a tensor held at the last step": [bl.SGD(0.1), bl.SGD({"y": 0.1, "z": 0.0})],
}


@pytest.mark.parametrize("estimator", AT_SOLUTION.values(), ids=list(AT_SOLUTION))
@pytest.mark.parametrize("optimizers", DISAGREE.values(), ids=list(DISAGREE))
def test_a_schedule_that_has_no_one_point_of_rest_is_refused_at_the_solution(optimizers, estimator):
    problem = bl.Problem(
        lambda y, x, b: (y["y"] ** 2 + y["z"] ** 2 - x * y["y"]).sum(), lambda y, x, b: (y["y"] + y["z"]).sum()
    )
    x, y = torch.ones(2, dtype=D), {"y": torch.zeros(2, dtype=D), "z": torch.ones(2, dtype=D)}
    schedule = bl.Scheduled(optimizers, hold=True)
    with pytest.raises(ValueError, match="Scheduled does not say"):
        bl.hypergradient(problem, x, y, NONE, solver=bl.Descent(schedule, 20), estimator=estimator)
    with pytest.raises(ValueError, match="Scheduled does not say"):
        bl.hypergradient(problem, x, y, NONE, solver=bl.Converge(schedule), estimator=bl.Unrolled())


@pytest.mark.parametrize("estimator", AT_SOLUTION.values(), ids=list(AT_SOLUTION))
@pytest.mark.parametrize("at", [0, 3])
def test_an_outer_tensor_that_acts_through_a_rate_of_any_step_is_refused_where_it_cannot_be_seen(at, estimator):
    problem, x, y, _ = quadratic()
    x = x | {"lr": torch.tensor(0.2, dtype=D)}
    optimizers = [bl.SGD(lr=(lambda x: x["lr"]) if k == at else 0.3) for k in range(5)]
    with pytest.raises(ValueError, match=r"\['lr'\] through a hyper-parameter"):
        bl.hypergradient(problem, x, y, NONE, solver=bl.Descent(bl.Scheduled(optimizers), 5), estimator=estimator)


def test_the_paths_of_one_schedule_are_not_taken_for_those_of_another():
    problem, x, y, _ = quadratic()
    x = x | {"lr": torch.tensor(0.2, dtype=D)}
    estimator = bl.Implicit(bl.CG(20))

    def with_schedule(optimizers):
        return bl.hypergradient(
            problem, x, y, NONE, solver=bl.Descent(bl.Scheduled(optimizers), 40), estimator=estimator
        )

    with pytest.warns(UserWarning, match="influences neither loss"):
        with_schedule([bl.SGD(0.3)] * 40)
    with pytest.raises(ValueError, match="hyper-parameter"):
        with_schedule([*[bl.SGD(0.3)] * 39, bl.SGD(lr=lambda x: x["lr"])])


@dataclasses.dataclass(frozen=True)
class Own(bl.Optimizer):
    """A user's optimizer; `hidden` adds a weight decay that its stationarity does not tell of."""

    rate: float = 0.1
    hidden: float = 0.0

    def init(self, inner):
        return {"count": 0}

    def step(self, grad, state, inner, outer):
        moved = pytree.tree_map(lambda y, g: y - self.rate * (g + self.hidden * y), inner, grad)
        return moved, {"count": state["count"] + 1}

    def stationarity(self, grad, inner, outer):
        return grad


def test_optimizers_of_a_user_are_scheduled_and_agree_only_where_they_are_equal():
    problem, x, y, _ = quadratic()
    schedule = bl.Scheduled([Own(0.1 * (k + 1)) for k in range(3)])
    expected = by_hand(problem, x, y, NONE, schedule.optimizers, 3)
    for keep in KEEPS:
        found = bl.hypergradient(problem, x, y, NONE, solver=bl.Descent(schedule, 3), estimator=bl.Unrolled(keep))
        torch.testing.assert_close(found.grad["to"], expected["to"], rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="Scheduled does not say"):
        bl.hypergradient(problem, x, y, NONE, solver=bl.Descent(schedule, 3), estimator=bl.Implicit(bl.CG(5)))
    assert bl.Scheduled([Own(), Own()]).stationarity(y, y, None) is y


def test_what_a_user_optimizer_hides_is_found_at_whichever_step_it_stands():
    problem, x, y, _ = quadratic()
    for place in (0, 1):
        optimizers = [Own(0.1, 0.5)] * 2 if place == 0 else [Own(0.1, 0.0), Own(0.1, 0.5)]
        with pytest.raises(ValueError, match=r"moves y where its stationarity\(\) is zero|does not say"):
            bl.hypergradient(
                problem, x, y, NONE, solver=bl.Descent(bl.Scheduled(optimizers), 2), estimator=bl.Implicit(bl.CG(5))
            )


REFUSED = {
    "no sequence": (lambda: bl.Scheduled(bl.SGD(0.1)), TypeError, "a sequence of inner optimizers was needed"),
    "a function": (lambda: bl.Scheduled(lambda step: bl.SGD(0.1)), TypeError, "a sequence of inner optimizers"),
    "none": (lambda: bl.Scheduled([]), ValueError, "at least one was needed"),
    "no optimizers": (lambda: bl.Scheduled([0.1, 0.2]), TypeError, "was given float for step 0"),
    "two classes": (lambda: bl.Scheduled([bl.SGD(0.1), bl.Adam()]), TypeError, "classes Adam, SGD; one class"),
    "nested": (lambda: bl.Scheduled([bl.Scheduled([bl.SGD(0.1)])]), TypeError, "no schedule of schedules"),
    "hold": (lambda: bl.Scheduled([bl.SGD(0.1)], hold=2), TypeError, "hold=2"),
    "too many steps": (lambda: bl.Descent(bl.Scheduled([bl.SGD(0.1)] * 3), 4), ValueError, "4 steps .* made for 3"),
    "converge": (lambda: bl.Converge(bl.Scheduled([bl.SGD(0.1)] * 3)), ValueError, "hold=True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_refused_with_what_to_write(name):
    make, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        make()


def test_a_step_beyond_the_schedule_is_refused_where_no_solver_could_know():
    schedule, y = bl.Scheduled([bl.SGD(0.1)]), torch.zeros(2)
    y, state = schedule.step(y, schedule.init(y), y, None)
    with pytest.raises(ValueError, match="holds 1 optimizers and was asked for step 1"):
        schedule.step(y, state, y, None)


def test_states_that_cannot_go_on_are_refused():
    schedule = bl.Scheduled([bl.SGD(0.1), bl.SGD(0.1, momentum=0.9)])
    problem, x, y, _ = quadratic()
    with pytest.raises(ValueError, match="states differ"):
        bl.hypergradient(problem, x, y, NONE, solver=bl.Descent(schedule, 2), estimator=bl.Unrolled())


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_fewer_steps_than_the_schedule_has_and_none(steps, dtype):
    """y_K = x: the start; d/dx of (y_K - 1)^2 = 2 (y_K - 1) prod (1 - lr_k)."""
    problem = bl.Problem(lambda y, x, b: y**2 / 2, lambda y, x, b: (y - 1) ** 2, init=lambda x, b: x)
    rates = [0.5, 0.25, 0.125, 0.0625]
    x = torch.tensor(3.0, dtype=dtype)
    product = float(torch.tensor([1 - rate for rate in rates[:steps]], dtype=D).prod())
    for keep, (schedule, hold) in itertools.product(KEEPS, ((rates, False), (rates[: max(steps, 1)], True))):
        solver = bl.Descent(bl.Scheduled([bl.SGD(rate) for rate in schedule], hold=hold), steps)
        found = bl.hypergradient(problem, x, None, NONE, solver=solver, estimator=bl.Unrolled(keep))
        assert found.grad.dtype == dtype
        torch.testing.assert_close(found.grad.double().item(), 2 * (3 * product - 1) * product, rtol=1e-6, atol=1e-6)


def test_the_same_steps_by_bl_adapt():
    problem, x, y, h = quadratic()
    found = bl.adapt(problem, x, y, NONE, solver=bl.Descent(bl.Scheduled([bl.SGD(0.5), bl.SGD(0.1)]), 2))
    first = 0.5 * x["to"]
    torch.testing.assert_close(found.inner, first - 0.1 * (h * first - x["to"]), rtol=1e-14, atol=0)
