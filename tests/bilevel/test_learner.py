"""The Learner against programs written by hand: which parameters adapt, from where, how, and what is learned."""

import copy
import dataclasses
import functools

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import bilevel as bl

TASKS, LR, STEPS = 3, 0.1, 4


def head(name):
    return name.startswith("2.")


def body(name):
    return not head(name)


def net(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def batches(seed=1, dtype=torch.float64, tasks=TASKS):
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        inputs = torch.randn(tasks, n, 2, generator=generator, dtype=dtype)
        return inputs, torch.arange(n).remainder(3).expand(tasks, n)

    return bl.Batches(inner=draw(6), outer=draw(9))


def by_hand(module, data, adapts, *, learned=True, pull=0.0, rate=lambda x, name, step: LR, extra=()):
    """d (mean query loss after STEPS steps) / dx by plain autograd; x: the module's parameters, and `extra`."""
    x = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    extra = dict(extra)
    total = 0
    for task in range(len(data.inner[0])):
        start = {name: x[name] if learned else x[name].detach().clone().requires_grad_() for name in x if adapts(name)}
        y = dict(start)
        for step in range(STEPS):
            g = cross_entropy(functional_call(module, {**x, **y}, (data.inner[0][task],)), data.inner[1][task])
            g = g + pull / 2 * sum((y[name] - start[name]).square().sum() for name in y)
            d = torch.autograd.grad(g, list(y.values()), create_graph=True)
            y = {n: v - rate(extra, n, step) * dv for (n, v), dv in zip(y.items(), d, strict=True)}
        total = total + cross_entropy(functional_call(module, {**x, **y}, (data.outer[0][task],)), data.outer[1][task])
    total = total / len(data.inner[0])
    found = torch.autograd.grad(total, [*x.values(), *extra.values()], allow_unused=True)
    names = list(x)
    return (
        total.detach(),
        dict(zip(names, found[: len(names)], strict=True)),
        dict(zip(extra, found[len(names) :], strict=True)),
    )


def solver(steps=STEPS):
    return bl.Descent(bl.SGD(lr=LR), steps)


@pytest.mark.parametrize("keep", ["graph", "iterates", "segments"])
@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("pull", [0.0, 0.7])
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("adapts", [True, head, body], ids=["all", "head", "body"])
def test_it_is_the_program_written_by_hand(adapts, learned, pull, reuse, chunk, keep):
    if adapts is True and not learned:
        pytest.skip("nothing would be learned")
    module, data = net(), batches()
    learner = bl.meta.Learner(
        module,
        cross_entropy,
        adapts=adapts,
        start=(bl.meta.Shared if learned else bl.meta.Fixed)(pull),
        solver=solver(),
        estimator=bl.Unrolled(keep=keep),
        chunk=chunk,
        reuse_features=reuse,
    )
    x = learner.outer()
    hg = learner.hypergradient(x, data)
    mask = (lambda name: True) if adapts is True else adapts
    loss, wanted, _ = by_hand(module, data, mask, learned=learned, pull=pull)
    torch.testing.assert_close(hg.outer_loss, loss, rtol=1e-12, atol=0)
    assert set(x["parameters"]) == {name for name in wanted if learned or not mask(name)}
    for name, found in hg.grad["parameters"].items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-11, atol=1e-14)
    assert hg.status is bl.Status.OK


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("per", ["element", "tensor", "all"])
def test_learned_rates_are_the_program_written_by_hand(per, per_step, log):
    module, data = net(), batches()
    learner = bl.meta.Learner(module, cross_entropy, solver=solver(), rates=bl.meta.Rates(per, per_step, 0.2, log))
    x = learner.outer()
    with torch.no_grad():
        for rate in x["rates"].values():
            rate += 0.05 * torch.rand_like(rate)

    def rate(extra, name, step):
        value = extra["all" if per == "all" else name]
        value = value[step] if per_step else value
        return value.exp() if log else value

    _, wanted, wanted_rates = by_hand(module, data, lambda name: True, rate=rate, extra=x["rates"])
    hg = learner.hypergradient(x, data)
    for group, expected in (("parameters", wanted), ("rates", wanted_rates)):
        for name, found in hg.grad[group].items():
            torch.testing.assert_close(found, expected[name], rtol=1e-11, atol=1e-14)


def test_learned_rates_begin_at_the_solvers_and_are_one_a_step():
    learner = bl.meta.Learner(net(), cross_entropy, solver=solver(), rates=bl.meta.Rates("tensor", per_step=True))
    assert {tuple(rate.shape) for rate in learner.outer()["rates"].values()} == {(STEPS,)}
    plain = bl.meta.Learner(net(), cross_entropy, solver=solver())
    data = batches()
    a, b = (each.hypergradient(each.outer(), data) for each in (learner, plain))
    torch.testing.assert_close(a.outer_loss, b.outer_loss)
    torch.testing.assert_close(a.grad["parameters"], b.grad["parameters"])


def rated(module, rates, solver):
    return bl.meta.Learner(module, cross_entropy, rates=rates, solver=solver)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda m: rated(m, bl.meta.Rates(), bl.Descent(bl.SGD(lr=lambda x: 0.1), 2)), "initial=0.1"),
        (lambda m: rated(m, bl.meta.Rates(per_step=True), bl.Converge(bl.SGD(lr=0.1), 1e-3)), "Descent"),
        (lambda m: bl.meta.Rates(per="layer"), "'element'"),
        (lambda m: bl.meta.Rates(initial=0.0), "positive"),
        (lambda m: bl.meta.Shared(pull=-1.0), "at least 0"),
        (lambda m: bl.meta.Fixed(pull=float("inf")), "at least 0"),
        (lambda m: bl.meta.Learner(m, cross_entropy, adapts="nothing"), "no parameter of the module"),
        (lambda m: bl.meta.Learner(m, cross_entropy, adapts=lambda name: False), "none of the parameters"),
        (lambda m: bl.meta.Learner(m, cross_entropy, adapts=lambda name: True), "adapts=True"),
        (lambda m: bl.meta.Learner(m, cross_entropy, adapts=["0", "2"]), "adapts=True"),
        (lambda m: bl.meta.Learner(m, cross_entropy, start=bl.meta.Fixed()), "nothing to learn"),
        (lambda m: bl.meta.Learner(m.requires_grad_(False), cross_entropy), "requires grad"),
        (lambda m: bl.meta.Learner(m, cross_entropy, start="shared"), "Shared()"),
        (lambda m: bl.meta.Learner(m, cross_entropy, solver=5), "Descent"),
        (lambda m: bl.meta.Learner(m, None), "a function was needed"),
        (lambda m: bl.meta.Learner(m, cross_entropy, optimizer=None), "a function was needed"),
        (lambda m: bl.meta.Learner(cross_entropy, m), "nn.Module"),
        (lambda m: bl.meta.Learner(m, cross_entropy, estimator=bl.TaskMean(bl.Unrolled())), "one task"),
        (lambda m: bl.meta.Learner(m, cross_entropy, chunk=0), "chunk=0"),
    ],
)  # fmt: skip
def test_bad_input_is_named_where_it_is_given(bad, words):
    with pytest.raises((TypeError, ValueError), match=words.replace("(", r"\(").replace(")", r"\)")):
        bad(net())


@pytest.mark.parametrize("estimator", [bl.Implicit(bl.CG()), bl.MemoryReduced(), bl.FirstOrderCorrected()])
def test_an_estimator_at_the_solution_needs_a_pull_to_see_the_start(estimator):
    learner = bl.meta.Learner(net(), cross_entropy, estimator=estimator)
    with pytest.raises(ValueError, match="start of the inner loop"):
        learner.hypergradient(learner.outer(), batches())


@pytest.mark.parametrize("estimator", [bl.Implicit(bl.CG(60, tol=1e-13)), bl.FirstOrderCorrected()])
def test_with_a_pull_and_a_solved_inner_problem_they_agree_with_the_long_unroll(estimator):
    module, data = net(), batches()
    make = functools.partial(
        bl.meta.Learner, module, cross_entropy, start=bl.meta.Shared(pull=2.0), solver=bl.Descent(bl.SGD(lr=0.3), 150)
    )
    exact, other = make(), make(estimator=estimator)
    a, b = exact.hypergradient(exact.outer(), data), other.hypergradient(other.outer(), data)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-9)


def test_reptile_is_the_mean_displacement():
    module, data = net(), batches()
    learner = bl.meta.Learner(module, cross_entropy, solver=solver(), estimator=bl.meta.Reptile())
    x = learner.outer()
    hg = learner.hypergradient(x, data)
    for name, found in hg.grad["parameters"].items():
        torch.testing.assert_close(found, (x["parameters"][name] - hg.inner[name]).mean(0))
    assert "outer_gradient" not in hg.stats["calls"] or hg.stats["calls"]["outer_gradient"] == 0
    anil = bl.meta.Learner(module, cross_entropy, adapts="2", estimator=bl.meta.Reptile())
    with pytest.raises(ValueError, match="Reptile"):
        anil.hypergradient(anil.outer(), data)


def test_one_step_of_reptile_is_joint_training():
    module, data = net(), batches()
    learner = bl.meta.Learner(module, cross_entropy, solver=solver(1), estimator=bl.meta.Reptile())
    x = learner.outer()
    loss = sum(
        cross_entropy(functional_call(module, x["parameters"], (data.inner[0][task],)), data.inner[1][task])
        for task in range(TASKS)
    )
    wanted = torch.autograd.grad(loss / TASKS, list(x["parameters"].values()))
    found = learner.hypergradient(x, data).grad["parameters"].values()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, LR * b)


def test_adapt_gives_the_modules_own_state_dict():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(2, 4)
            self.tied = self.body
            self.norm = nn.BatchNorm1d(4, track_running_stats=False)
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.register_buffer("scale", torch.tensor(2.0))
            self.head = nn.Linear(4, 3)

        def forward(self, inputs):
            return self.head(self.frozen(self.norm(self.tied(inputs)).relu()) * self.scale)

    torch.manual_seed(0)
    module = Net().double()
    before = copy.deepcopy(module.state_dict())
    data = batches()
    learner = bl.meta.Learner(module, cross_entropy, adapts="head", solver=solver())
    x = learner.outer()
    assert sorted(x["parameters"]) == [
        "body.bias",
        "body.weight",
        "head.bias",
        "head.weight",
        "norm.bias",
        "norm.weight",
    ]
    with torch.no_grad():
        x["parameters"]["body.weight"] += 0.1
    support = data.inner[0][0], data.inner[1][0]
    state = learner.adapt(x, support)
    assert {name: value.shape for name, value in state.items()} == {n: v.shape for n, v in before.items()}
    torch.testing.assert_close(module.state_dict(), before)  # the module is read, never written
    torch.testing.assert_close(state["tied.weight"], x["parameters"]["body.weight"].detach())
    fresh = Net().double()
    fresh.load_state_dict(state)
    y = {name: x["parameters"][name] for name in ("head.weight", "head.bias")}
    for _ in range(STEPS):
        loss = cross_entropy(functional_call(module, {**x["parameters"], **y}, support[0]), support[1])
        y = {n: v - LR * d for (n, v), d in zip(y.items(), torch.autograd.grad(loss, list(y.values())), strict=True)}
    for name, value in y.items():
        torch.testing.assert_close(state[name], value.detach())
    queries = data.outer[0][0]
    torch.testing.assert_close(learner.predict(x, support, queries), fresh(queries).detach())
    stacked = learner.adapt(x, data.inner, tasks=True)
    torch.testing.assert_close(stacked["head.weight"][0], state["head.weight"])
    assert stacked["head.weight"].shape[0] == TASKS


def test_x_is_a_copy_and_fresh_each_time():
    module = net()
    learner = bl.meta.Learner(module, cross_entropy)
    x, again = learner.outer(), learner.outer()
    with torch.no_grad():
        x["parameters"]["0.weight"].zero_()
    assert again["parameters"]["0.weight"].abs().sum() > 0
    assert module[0].weight.abs().sum() > 0


def test_frozen_parameters_neither_adapt_nor_are_learned():
    module = net()
    module[0].requires_grad_(False)
    learner = bl.meta.Learner(module, cross_entropy, solver=solver())
    x = learner.outer()
    assert sorted(x["parameters"]) == ["2.bias", "2.weight"]
    assert sorted(learner.hypergradient(x, batches()).inner) == ["2.bias", "2.weight"]


def test_evaluate_is_the_mean_over_tasks_with_its_interval():
    module = net(dtype=torch.float32)
    learner = bl.meta.Learner(module, cross_entropy, solver=solver(), chunk=2)
    x, loader = learner.outer(), [batches(seed, torch.float32) for seed in range(4)]
    found = learner.evaluate(x, loader)
    scores = []
    for data in loader:
        for task in range(TASKS):
            own = copy.deepcopy(module)
            own.load_state_dict(learner.adapt(x, (data.inner[0][task], data.inner[1][task])))
            scores.append((own(data.outer[0][task]).argmax(1) == data.outer[1][task]).double().mean())
    scores = torch.stack(scores)
    assert found.tasks == 12
    assert found.scores == pytest.approx(scores.tolist())
    assert found.score == pytest.approx(scores.mean().item())
    assert found.interval == pytest.approx(1.96 * scores.std().item() / 12**0.5)
    assert f"{found.interval:.3f}" in str(found)
    assert learner.evaluate(x, loader, tasks=5).tasks == 5
    assert learner.evaluate(x, loader, tasks=5).scores == found.scores[:5]


def test_evaluate_says_what_is_missing():
    learner = bl.meta.Learner(net(), cross_entropy, solver=solver())
    x = learner.outer()
    with pytest.raises(ValueError, match="at least 600"):
        learner.evaluate(x, [batches()], tasks=600)
    with pytest.raises(ValueError, match="at least 2"):
        learner.evaluate(x, [])
    data = batches()
    probabilities = torch.zeros(TASKS, 9, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="score="):
        learner.evaluate(x, [bl.Batches(data.inner, (data.outer[0], probabilities))])


def test_train_moves_x_by_the_optimizer_that_was_asked_for():
    module, data = net(), batches()
    learner = bl.meta.Learner(
        module, cross_entropy, solver=solver(), optimizer=functools.partial(torch.optim.SGD, lr=0.5)
    )
    x = learner.outer()
    before = copy.deepcopy(x)
    hg = learner.hypergradient(x, data)
    (step,) = learner.train(x, [data])
    torch.testing.assert_close(step.hypergradient.grad, hg.grad)
    for name, value in x["parameters"].items():
        torch.testing.assert_close(value, before["parameters"][name] - 0.5 * hg.grad["parameters"][name])


def test_features_that_do_not_adapt_are_computed_once():
    class Counting(nn.Linear):
        calls = 0

        def forward(self, inputs):
            type(self).calls += 1
            return super().forward(inputs)

    module = nn.Sequential(Counting(2, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    for reuse, most in ((True, 4), (False, 3 * STEPS)):
        learner = bl.meta.Learner(module, cross_entropy, adapts="2", solver=solver(), chunk=None, reuse_features=reuse)
        x = learner.outer()
        learner.hypergradient(x, batches())  # looks up the paths
        Counting.calls = 0
        learner.hypergradient(x, batches())
        assert Counting.calls <= most
        if not reuse:
            assert Counting.calls >= STEPS + 1


def test_a_layer_that_stands_below_and_above_is_not_taken_apart():
    torch.manual_seed(0)
    shared, middle = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
    module = nn.Sequential(shared, nn.Tanh(), middle, nn.Tanh(), shared)
    data = bl.Batches(
        *((torch.randn(TASKS, n, 3).double(), torch.arange(n).remainder(3).expand(TASKS, n)) for n in (6, 9))
    )
    learner = bl.meta.Learner(module, cross_entropy, adapts="2", solver=solver())
    assert learner.problem.features is None
    x = learner.outer()
    leaves = {name: value.detach().clone().requires_grad_() for name, value in x["parameters"].items()}

    def forward(y, inputs):
        first = torch.tanh(inputs @ leaves["0.weight"].T + leaves["0.bias"])
        second = torch.tanh(first @ y[0].T + y[1])
        return second @ leaves["0.weight"].T + leaves["0.bias"]

    total = 0
    for task in range(TASKS):
        y = [leaves["2.weight"], leaves["2.bias"]]
        for _ in range(STEPS):
            loss = cross_entropy(forward(y, data.inner[0][task]), data.inner[1][task])
            y = [v - LR * d for v, d in zip(y, torch.autograd.grad(loss, y, create_graph=True), strict=True)]
        total = total + cross_entropy(forward(y, data.outer[0][task]), data.outer[1][task]) / TASKS
    wanted = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    torch.testing.assert_close(learner.hypergradient(x, data).grad["parameters"], wanted, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(("width", "chunk", "expected"), [(16, None, None), (400, None, 1), (400, 7, 7), (16, 1, 1)])
def test_the_default_chunk_is_what_was_measured(width, chunk, expected):
    module = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 3))
    learner = bl.meta.Learner(module, cross_entropy, chunk=chunk)
    assert learner._task_mean().chunk == expected


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("adapts", [True, "2"])
def test_examples_are_not_taken_for_tasks(adapts, chunk):
    """One task's support, without a task dimension, would read as tasks of one example each."""
    data = batches()
    alone = bl.Batches(*((inputs[0], targets[0]) for inputs, targets in (data.inner, data.outer)))
    alone = dataclasses.replace(alone, outer=alone.inner)
    learner = bl.meta.Learner(net(), cross_entropy, adapts=adapts, solver=solver(), chunk=chunk)
    x = learner.outer()
    with pytest.raises(ValueError, match=r"targets\.unsqueeze\(0\)"):
        learner.hypergradient(x, alone)
    with pytest.raises(ValueError, match=r"targets\.unsqueeze\(0\)"):
        learner.evaluate(x, [alone])
    learner.adapt(x, alone.inner)  # of one task, which is what this is
