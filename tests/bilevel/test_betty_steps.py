"""Steps that Betty made, differentiated: against autograd alone, with all that moves a real program."""

import pytest
import torch
from betty_programs import Net, Quadratic, Reweighting, Weights, recent, relative, run, sgd, upper_gradient
from torch.nn import functional as F

import bilevel as bl
from bilevel.integrations import betty

OPTIMIZERS = {
    "SGD": (sgd(0.1), bl.SGD(0.1)),
    "momentum": (sgd(0.05, momentum=0.9), bl.SGD(0.05, momentum=0.9)),
    "nesterov and decay": (
        sgd(0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
        bl.SGD(0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
    "dampening": (sgd(0.05, momentum=0.9, dampening=0.3), bl.SGD(0.05, momentum=0.9, dampening=0.3)),
    "Adam": (lambda p: torch.optim.Adam(p, lr=0.05), bl.Adam(0.05)),
    "Adam, decay": (lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1), bl.Adam(0.05, weight_decay=0.1)),
    "AdamW": (
        lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1, decoupled_weight_decay=True),
        bl.AdamW(0.05, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("keep", ["tape", "iterates", "segments"])
@pytest.mark.parametrize("label", OPTIMIZERS)
def test_unrolled_differentiates_the_steps_that_betty_made(label, keep):
    quadratic, (theirs, ours) = Quadratic(), OPTIMIZERS[label]
    upper, lower, dependencies = quadratic.problems(6, theirs)
    estimator = bl.Unrolled() if keep == "tape" else bl.Unrolled(keep=keep)
    betty.use(lower, estimator)
    run([upper, lower], dependencies, 6)
    wanted = bl.hypergradient(
        bl.Problem(
            lambda y, x, b: 0.5 * y @ quadratic.H @ y - y @ (quadratic.B @ x),
            lambda y, x, b: 0.5 * ((y - quadratic.c) ** 2).sum(),
        ),
        quadratic.x,
        torch.zeros_like(quadratic.x),
        bl.Batches(None, None),
        solver=bl.Descent(ours, 6),
        estimator=bl.Unrolled(),
    )
    assert relative(lower.module.value.detach(), wanted.inner) < 1e-12
    assert relative(upper_gradient(upper), wanted.grad) < 1e-12


def by_hand(case, steps=3, momentum=0.5, rates=None):
    """The same program with autograd alone: truncated at each outer step, momentum going on."""
    torch.manual_seed(5)
    net, weights = Net().double(), Weights().double()
    names = [name for name, _ in net.named_parameters()]
    y = [p.detach().clone() for p in net.parameters()]
    buffers = [None] * len(y)
    gradients, count = [], 0
    torch.manual_seed(6)
    for window in range(3):
        y = [leaf.detach().requires_grad_() for leaf in y]
        buffers = [None if b is None else b.detach() for b in buffers]
        for _ in range(steps):
            inputs, targets = case.train[count % 9]
            losses = (torch.func.functional_call(net, dict(zip(names, y, strict=True)), (inputs,)) - targets).square()
            loss = (weights(losses.detach()) * losses).mean()
            found = torch.autograd.grad(loss, y, create_graph=True)
            buffers = [g if b is None else momentum * b + g for g, b in zip(found, buffers, strict=True)]
            rate = 0.1 if rates is None else rates[count]
            y = [leaf - rate * b for leaf, b in zip(y, buffers, strict=True)]
            count += 1
        inputs, targets = case.valid[window]
        outer = F.mse_loss(torch.func.functional_call(net, dict(zip(names, y, strict=True)), (inputs,)), targets)
        found = torch.autograd.grad(outer, list(weights.parameters()))
        gradients.append(found)
        with torch.no_grad():
            for parameter, gradient in zip(weights.parameters(), found, strict=True):
                parameter -= 0.05 * gradient
    return gradients


@pytest.mark.parametrize("keep", ["graph", "iterates"])
def test_a_real_program_with_noise_batch_norm_and_minibatches_is_differentiated(keep):
    case = Reweighting(bl.Unrolled() if keep == "graph" else bl.Unrolled(keep="iterates"))
    found, wanted = case.run(), by_hand(case)
    assert len(found) == 3
    for ours, theirs in zip(found, wanted, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)


def test_a_schedule_of_step_sizes_is_followed():
    case = Reweighting(
        bl.Unrolled(), scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.8)
    )
    found, wanted = case.run(), by_hand(case, rates=[0.1 * 0.8**k for k in range(9)])
    for ours, theirs in zip(found, wanted, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)


@recent
def test_a_replay_leaves_the_program_as_it_is():
    """Parameters, running statistics, modes and random numbers, as after the program without any hypergradient."""
    ends = []
    for asked in (False, True):
        case = Reweighting(bl.Unrolled())
        case.outer.optimizer_step = lambda: None
        if not asked:  # no path: the upper problem takes its own gradient alone
            case.dependencies["u2l"] = {}
        case.run()
        ends.append((case.net.state_dict(), torch.rand(3), [layer.training for layer in case.net.modules()]))
    (without, drawn, modes), (with_it, again, after) = ends
    for key, value in with_it.items():
        torch.testing.assert_close(value, without[key], rtol=0, atol=0)
    assert torch.equal(drawn, again)
    assert modes == after
    assert int(with_it["norm.num_batches_tracked"]) == 12  # of nine inner steps and three outer losses
