"""What comes in and goes out (issue 7, A5, A6, A9, A12): modules, features, tasks, idle parameters."""

import copy

import pytest
import torch
from right_or_refused import NONE, D, central, close, right_or_refused
from torch import nn

import bilevel as bl

KEEPS = ("graph", "iterates", "segments")
F = nn.functional


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).to(D)


INPUTS = torch.linspace(-1, 1, 8, dtype=D).reshape(4, 2)


def regression(call):
    return bl.Problem(
        lambda y, x, b: (call(y, INPUTS)[:, 0] - x).square().mean(), lambda y, x, b: call(y, INPUTS).square().mean()
    )


def test_frozen_parameters_of_a_module_stay_fixed():  # A5
    module = net()
    module[0].weight.requires_grad_(False)
    before = module[0].weight.clone()
    call, params = bl.functional(module)
    x, solver = torch.ones(4, dtype=D), bl.Descent(bl.SGD(0.1), 3)
    hg = bl.hypergradient(regression(call), x, params, NONE, solver=solver, estimator=bl.Unrolled())
    if "0.weight" in hg.inner:
        close(hg.inner["0.weight"], before, 0, 0)
    assert torch.equal(module[0].weight, before)

    def value(x):
        other = net()
        other[0].weight.requires_grad_(False)
        optimizer = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (other(INPUTS)[:, 0] - x).square().mean().backward()
            optimizer.step()
        return other(INPUTS).square().mean().detach()

    close(hg.grad, central(value, x), 1e-5)


def test_trainable_says_otherwise_for_frozen_parameters():  # A5, B: functional(module, trainable=...)
    module = net()
    module[0].weight.requires_grad_(False)
    call, params = bl.functional(module, trainable=True)
    assert set(params) == {name for name, _ in module.named_parameters()}
    assert call(params, INPUTS).shape == (4, 1)


@pytest.mark.parametrize("last", [None, 1, 2, 4, 9])
@pytest.mark.parametrize("per_step", [False, True], ids=["A6 one batch", "A6 per step"])
def test_the_three_keeps_agree_on_random_features_and_last_leaves_y_alone(last, per_step):
    def features(x, batch):
        return F.dropout(batch * x, 0.5, training=True)

    problem = bl.Problem(
        lambda y, x, z: (z @ y - 1).square().mean() + 0.1 * (y - x[:2]).square().sum(),
        lambda y, x, z: (z @ y - 2).square().mean(),
        features=features,
    )
    data = torch.linspace(-1, 2, 12, dtype=D).reshape(6, 2)
    batches = bl.Batches(bl.PerStep([data + k for k in range(4)]) if per_step else data, data + 0.5)
    x, y = torch.tensor([0.5, 1.5], dtype=D), torch.zeros(2, dtype=D)

    def at(keep, last):
        torch.manual_seed(0)
        estimator = bl.Unrolled(keep=keep, last=last)
        return bl.hypergradient(problem, x, y, batches, solver=bl.Descent(bl.SGD(0.1), 4), estimator=estimator)

    found = {keep: at(keep, last) for keep in KEEPS}
    for keep in KEEPS[1:]:
        close(found[keep].grad, found["graph"].grad, 1e-9)
        close(found[keep].outer_loss, found["graph"].outer_loss, 1e-9)
    for keep in KEEPS:
        close(found[keep].inner, at("iterates", None).inner, 1e-12)


@pytest.mark.parametrize("keep", KEEPS)
def test_random_features_are_drawn_once_for_one_batch(keep):  # A6: what declared features promise
    draws = []

    def features(x, batch):
        draws.append(torch.rand(2, dtype=D))
        return x * draws[-1]

    problem = bl.Problem(
        lambda y, x, z: (y - z).square().sum(), lambda y, x, z: 0.5 * y.square().sum(), features=features
    )
    x, y = torch.tensor([0.5, 1.5], dtype=D), torch.zeros(2, dtype=D)
    torch.manual_seed(0)
    hg = bl.hypergradient(
        problem, x, y, NONE, solver=bl.Descent(bl.SGD(0.1), 3), estimator=bl.Unrolled(keep=keep, last=2)
    )
    factor = 1 - 0.8**3
    close(hg.inner, factor * x * draws[0], 1e-9)
    close(hg.grad, (1 - 0.8**2) * draws[0] * hg.inner, 1e-9)


# A9: tasks


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize(
    "estimator", [bl.Unrolled(), bl.Unrolled(keep="segments"), bl.Implicit(bl.CG(3))], ids=["graph", "segments", "CG"]
)
def test_a_diverging_task_is_not_hidden_by_good_ones(estimator, chunk):  # A9
    problem = bl.Problem(lambda y, x, h: 0.5 * (h * (y - x).square()).sum(), lambda y, x, b: 0.5 * y.square().sum())
    h = torch.tensor([[1.0], [1.0], [2.5]], dtype=D)  # lr = 1: the third task grows by 1.5 a step
    y = torch.tensor([[100.0], [100.0], [1.1]], dtype=D)
    hg = bl.hypergradient(
        problem,
        torch.ones(1, dtype=D),
        y,
        bl.Batches(h, None),
        solver=bl.Descent(bl.SGD(1.0), 8),
        estimator=bl.TaskMean(estimator, chunk),
    )
    assert hg.status is not bl.Status.OK


@pytest.mark.parametrize("estimator", [bl.Unrolled(), bl.Implicit(bl.CG(3))], ids=["A9 graph", "A9 CG"])
@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("rows", [5, 4, 2])
def test_a_later_batch_with_another_number_of_tasks_is_refused(rows, chunk, estimator):
    class Stream:  # indexable, so that nothing can be checked beforehand
        def __len__(self):
            return 3

        def __getitem__(self, step):
            return torch.ones(3 if step < 2 else rows, 2, dtype=D)

    problem = bl.Problem(lambda y, x, b: ((y - x) * b).square().sum(), lambda y, x, b: y.square().sum())
    for steps in (bl.PerStep(Stream()), bl.PerStep([Stream()[k] for k in range(3)], ragged=True)):
        with pytest.raises(ValueError, match="task"):
            bl.hypergradient(
                problem,
                torch.ones(2, dtype=D),
                torch.zeros(3, 2, dtype=D),
                bl.Batches(steps, torch.zeros(3, 1, dtype=D)),
                solver=bl.Descent(bl.SGD(0.1), 3),
                estimator=bl.TaskMean(estimator, chunk),
            )


def test_a_problem_with_tasks_but_no_taskmean_returns_no_sums():  # A9
    loss = lambda y, x, b: (y - x - b).square().sum()  # noqa: E731
    h = torch.arange(3.0, dtype=D)[:, None]
    try:
        problem = bl.Problem(loss, lambda y, x, b: y.square().sum(), tasks=3)
    except TypeError:  # the argument is gone
        return

    def call():
        return bl.hypergradient(
            problem,
            torch.ones(1, dtype=D),
            torch.zeros(3, 1, dtype=D),
            bl.Batches(h, h),
            solver=bl.Descent(bl.SGD(0.5), 1),
            estimator=bl.Unrolled(),
        )

    hg = right_or_refused(call, 2 * (1 + h).mean(0))
    if hg is not None:
        close(hg.outer_loss, (1 + h).square().mean(), 1e-9)


# A12: equality with torch.optim where a step leaves a parameter alone

TORCH = {
    "decay": (bl.SGD(0.1, weight_decay=0.3), lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.3)),
    "momentum": (bl.SGD(0.1, momentum=0.9), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
    "nesterov": (
        bl.SGD(0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    ),
    "Adam": (bl.Adam(0.1), lambda p: torch.optim.Adam(p, 0.1)),
    "Adam with decay": (bl.Adam(0.1, weight_decay=0.2), lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.2)),
    "AdamW": (bl.AdamW(0.1, weight_decay=0.2), lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.2)),
}


@pytest.mark.parametrize("order", [(0, 1, 0, 1, 1), (1, 1, 0, 0, 1)], ids=["A12 in turn", "A12 one starts late"])
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize(("optimizer", "make"), TORCH.values(), ids=TORCH)
def test_two_heads_used_in_turn_move_as_torch_moves_them(optimizer, make, keep, order):
    start = {"body": torch.tensor([0.5, -0.3]), "0": torch.tensor([1.0, 2.0]), "1": torch.tensor([-1.0, 0.7])}
    start = {name: leaf.to(D) for name, leaf in start.items()}

    def loss(y, x, head):
        return ((y["body"].sin() * y[str(int(head))]).sum() - x).square().sum()

    def outer_loss(y, x, b):
        return (y["body"] * y["0"] + y["1"]).square().sum()

    def program(x):
        y = {name: leaf.clone().requires_grad_() for name, leaf in start.items()}
        optimizer = make(list(y.values()))
        for head in order:
            optimizer.zero_grad(set_to_none=True)
            loss(y, x, head).backward()
            optimizer.step()
        return {name: leaf.detach() for name, leaf in y.items()}

    x = torch.tensor([0.4, -0.9], dtype=D)
    batches = bl.Batches(bl.PerStep([torch.tensor(head) for head in order]), None)
    hg = bl.hypergradient(
        bl.Problem(loss, outer_loss),
        x,
        start,
        batches,
        solver=bl.Descent(optimizer, len(order)),
        estimator=bl.Unrolled(keep=keep),
    )
    close(hg.inner, program(x), 1e-9)
    close(hg.grad, central(lambda x: outer_loss(program(x), x, None), x), 1e-4, 1e-7)


def test_a_module_that_stands_in_two_places_keeps_its_parameters():  # A12
    torch.manual_seed(0)
    shared = nn.Linear(2, 2).to(D)
    module = nn.Sequential(shared, nn.Tanh(), nn.Sequential(shared), nn.Linear(2, 1).to(D))
    expected, names = module(INPUTS), [name for name, _ in module.named_parameters()]
    call, params = bl.functional(module)
    for _ in range(2):
        close(call(params, INPUTS), expected, 1e-12)
        assert all(isinstance(module[i].weight, nn.Parameter) for i in (0, 3))
        assert module[2][0] is module[0]
        assert [name for name, _ in module.named_parameters()] == names
    # A name of its own per parameter: moving it moves both places.
    moved = {name: leaf + 1 for name, leaf in params.items()}
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 1
    close(call(moved, INPUTS), other(INPUTS), 1e-12)


def test_tied_parameters_move_together():  # A12, beyond the list
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).to(D)
    module[1].weight = module[0].weight
    call, params = bl.functional(module)
    moved = {name: leaf + 1 for name, leaf in params.items()}
    weight = module[0].weight.detach() + 1
    close(call(moved, INPUTS), INPUTS @ weight.T @ weight.T, 1e-12)
    assert module[1].weight is module[0].weight


LEAVES = {"a": torch.tensor([1.0, -2.0], dtype=D), "b": torch.tensor([[0.5]], dtype=D)}


@pytest.mark.parametrize(
    ("optimizer", "make"),
    [
        pytest.param(
            bl.SGD(lr=lambda x: {"a": 0.1, "b": 0.2}),
            lambda y: torch.optim.SGD([{"params": [y["a"]], "lr": 0.1}, {"params": [y["b"]], "lr": 0.2}], 0.1),
            id="A12 lr of floats",
        ),
        pytest.param(
            bl.Adam(lr=lambda x: {"a": 0.1, "b": 0.2}),
            lambda y: torch.optim.Adam([{"params": [y["a"]], "lr": 0.1}, {"params": [y["b"]], "lr": 0.2}], 0.1),
            id="A12 Adam lr of floats",
        ),
        pytest.param(
            bl.SGD(lr=0.1, weight_decay=lambda x: {"a": 0.0, "b": 0.5}),
            lambda y: torch.optim.SGD([{"params": [y["a"]]}, {"params": [y["b"]], "weight_decay": 0.5}], 0.1),
            id="A12 decay of floats",
        ),
        pytest.param(
            bl.SGD(lr=0.1, momentum=lambda x: {"a": torch.tensor(0.9, dtype=D), "b": torch.tensor(0.5, dtype=D)}),
            lambda y: torch.optim.SGD(
                [{"params": [y["a"]], "momentum": 0.9}, {"params": [y["b"]], "momentum": 0.5}], 0.1
            ),
            id="A12 momentum per leaf",
        ),
        pytest.param(
            bl.Adam(0.1, betas=(lambda x: {"a": torch.tensor(0.9, dtype=D), "b": torch.tensor(0.5, dtype=D)}, 0.99)),
            lambda y: torch.optim.Adam(
                [{"params": [y["a"]], "betas": (0.9, 0.99)}, {"params": [y["b"]], "betas": (0.5, 0.99)}], 0.1
            ),
            id="A12 betas per leaf",
        ),
    ],
)
def test_hyperparameters_per_leaf_move_as_torchs_parameter_groups(optimizer, make):
    def loss(y):
        return y["a"].square().sum() * 0.5 + (y["b"] - 1).square().sum() + y["a"].sum() * y["b"].sum()

    y = {name: leaf.clone().requires_grad_() for name, leaf in LEAVES.items()}
    other = make(y)
    for _ in range(4):
        other.zero_grad()
        loss(y).backward()
        other.step()
    problem = bl.Problem(lambda y, x, b: loss(y), lambda y, x, b: loss(y) * x)
    x = torch.ones((), dtype=D)
    solver = bl.Descent(optimizer, 4)
    for keep in KEEPS:
        hg = bl.hypergradient(problem, x, LEAVES, NONE, solver=solver, estimator=bl.Unrolled(keep=keep))
        close(hg.inner, {name: leaf.detach() for name, leaf in y.items()}, 1e-9)
