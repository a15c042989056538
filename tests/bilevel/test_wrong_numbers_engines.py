"""A stranger's attempts to get wrong numbers out of the compiled engine: each is right, or refused in words."""

import itertools
import random
import threading
import types
import weakref

import numpy as np
import pytest
import torch
from engine_pairs import GRAPH, call, equal, same, traced
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import bilevel as bl

D = torch.float64
G = torch.Generator().manual_seed(0)
X = torch.randn(6, 4, generator=G, dtype=D)
Y = torch.randn(4, 3, generator=G, dtype=D)
OUTER = torch.ones(3, dtype=D)
BOTH = bl.Batches(X, X)
MANY = bl.Descent(bl.SGD(0.05), 12)
CG = bl.Implicit(bl.CG(6, 1e-12))
SOME = pytest.mark.parametrize("estimator", [bl.Unrolled("iterates"), CG], ids=["iterates", "cg"])


def base(y, x, b):
    return (b @ y - x).square().mean() + 0.1 * y.square().sum()


def f(y, x, b):
    return (b @ y).square().mean() + x.square().sum()


def problem(loss):
    return bl.Problem(loss, f)


def refused(loss, match, batches=BOTH, error=bl.NotTraceableError, solver=MANY):
    for check in (True, False):
        with pytest.raises(error, match=match):
            call(bl.Compiled(backend="graph", check=check), problem(loss), OUTER, Y, batches, solver=solver)


# --- what changes between calls and steps


def test_what_a_loss_names_is_found_wherever_it_stands():
    class Slots:
        __slots__ = ("v",)

    class Trainer:
        def __init__(self):
            self._strength, self.epoch = 1.0, 0

        def penalty(self, y):
            return self._strength * y.square().sum()

        def loss(self, y, x, b):
            return base(y, x, b) + self.penalty(y)

    class Settings:
        scale = 1.0

    slots, trainer, module, array = Slots(), Trainer(), types.ModuleType("settings"), np.ones(3)
    slots.v, module.scale = 1.0, 1.0
    losses = {
        "slots": (lambda y, x, b: base(y, x, b) * slots.v, lambda: setattr(slots, "v", 2.0)),
        "module": (lambda y, x, b: base(y, x, b) * module.scale, lambda: setattr(module, "scale", 2.0)),
        "class": (lambda y, x, b: base(y, x, b) * Settings.scale, lambda: setattr(Settings, "scale", 2.0)),
        "method": (trainer.loss, lambda: setattr(trainer, "_strength", 2.0)),
        "array": (lambda y, x, b: base(y, x, b) * torch.tensor(array).sum(), lambda: array.__iadd__(1)),
    }
    for loss, change in losses.values():
        p = problem(loss)
        before = same(p, OUTER, Y, BOTH).grad
        change()
        assert not torch.allclose(same(p, OUTER, Y, BOTH).grad, before)


def test_an_attribute_that_the_loss_does_not_name_is_no_reason_to_trace():
    class Trainer:
        epoch = 0

        def loss(self, y, x, b):
            return base(y, x, b)

    trainer = Trainer()
    p = problem(trainer.loss)
    same(p, OUTER, Y, BOTH)
    for _ in range(10):
        trainer.epoch += 1
        assert traced(same(p, OUTER, Y, BOTH)) == []


class Reverse(torch.autograd.Function):
    strength = 1.0

    @staticmethod
    def forward(ctx, y):
        return y.view_as(y)

    @staticmethod
    def backward(ctx, w):
        return -w * Reverse.strength


def test_a_number_that_only_the_gradient_reads(monkeypatch):
    """The loss stays what it is, so that looking at the loss shows nothing."""
    p = problem(lambda y, x, b: base(Reverse.apply(y), x, b) + y.square().sum())
    before = same(p, OUTER, Y, BOTH, estimator=bl.FirstOrderCorrected()).grad
    monkeypatch.setattr(Reverse, "strength", 3.0)
    assert not torch.allclose(same(p, OUTER, Y, BOTH, estimator=bl.FirstOrderCorrected()).grad, before)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self._gain = 2.0
        self.norm, self.drop = nn.BatchNorm1d(4, dtype=D), nn.Dropout(0.3)
        self.register_buffer("scale", torch.ones(4, dtype=D))

    def forward(self, inputs):
        return self.drop(self.norm(inputs)) * self._gain * self.scale


CHANGES = {
    "a private attribute": lambda net: setattr(net, "_gain", 3.0),
    "a buffer, in place": lambda net: net.scale.add_(1),
    "another buffer": lambda net: setattr(net, "scale", torch.rand(4, dtype=D)),
    "running statistics": lambda net: net.norm.running_var.add_(1),
    "dropout": lambda net: net.drop.train(),
    "a hook": lambda net: net.norm.register_forward_hook(lambda module, inputs, output: 2 * output),
    "a state dict": lambda net: net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()}),
    "an assigned state dict": lambda net: net.load_state_dict(
        {k: v + 1 for k, v in net.state_dict().items()}, assign=True
    ),
    "other data": lambda net: setattr(net.scale, "data", torch.rand(4, dtype=D)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_module_that_changes_between_calls(change):
    net = Net().eval()
    run, params = bl.functional(net, requires_grad=False)
    p = bl.Problem(lambda y, x, b: (run(y, b) @ Y - x).square().mean(), lambda y, x, b: run(y, b).square().mean())
    before = same(p, OUTER, params, BOTH).grad
    CHANGES[change](net)
    assert not torch.allclose(same(p, OUTER, params, BOTH).grad, before)


def test_what_changes_between_two_steps_of_one_call_is_found():
    box = {"scale": 1.0}

    class Steps:
        def __len__(self):
            return 8

        def __getitem__(self, step):
            box["scale"] = 1.0 if step < 5 else 2.0
            return X

    p = problem(lambda y, x, b: base(y, x, b) * box["scale"])
    with pytest.raises(bl.EngineMismatchError, match="changed"):
        call(GRAPH, p, OUTER, Y, bl.Batches(bl.PerStep(Steps()), X), solver=bl.Descent(bl.SGD(0.05), 8))


def test_a_cache_that_the_first_call_fills():
    class Cached:
        table = None

        def loss(self, y, x, b):
            if self.table is None:
                self.table = torch.ones(3, dtype=D)
            return base(y, x, b) * self.table.sum()

    p = problem(Cached().loss)
    same(p, OUTER, Y, BOTH)
    assert traced(same(p, OUTER, Y, BOTH)) == []


def test_states_of_a_loss_are_refused():
    count, average = [0], torch.zeros((), dtype=D)

    def late(y, x, b):
        count[0] += 1
        return base(y, x, b) * (2 if count[0] > 40 else 1)

    def moving(y, x, b):
        loss = base(y, x, b)
        with torch.no_grad():
            average.mul_(0.9).add_(0.1 * loss)
        return loss / (1 + average)

    refused(late, "changes what it reads from its surroundings")
    refused(moving, "writes into a tensor that it finds elsewhere")


def test_a_counter_that_cannot_be_seen_is_a_mismatch():
    count = itertools.count(1)
    with pytest.raises(bl.EngineMismatchError):
        call(GRAPH, problem(lambda y, x, b: base(y, x, b) * next(count)), OUTER, Y, BOTH)


# --- random numbers


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["Python", "numpy"])
def test_a_rare_event_by_another_generator_is_refused(draw):
    refused(lambda y, x, b: base(y, x, b) * (2 if draw() < 1e-6 else 1), "random numbers of Python or numpy")


def test_generators_that_no_graph_has():
    own = torch.Generator()

    def forked(y, x, b):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return base(y, x, F.dropout(b, 0.5))

    def seeded(y, x, b):
        torch.manual_seed(7)
        return base(y, x, F.dropout(b, 0.5))

    def checkpointed(y, x, b):
        return checkpoint(lambda u: base(F.dropout(u, 0.5), x, b), y, use_reentrant=False)

    for loss in (forked, seeded, checkpointed):
        refused(loss, "sets the state of torch's generator")
    refused(lambda y, x, b: base(y, x, b + torch.randn(b.shape, generator=own, dtype=D)), "a Generator of its own")
    refused(lambda y, x, b: base(y, x, torch.bernoulli(b.sigmoid())), "depends on its inputs")


@SOME
@pytest.mark.parametrize("place", ["batch", "inner"])
def test_dropout_of_what_lies_otherwise_in_memory(place, estimator):
    def loss(y, x, b):
        return base(F.dropout(y, 0.5), x, b) if place == "inner" else base(y, x, F.dropout(b, 0.5))

    batches = bl.Batches(X.T.contiguous().T, X[:1].expand(6, 4))
    same(problem(loss), OUTER, Y.T.contiguous().T, batches, estimator=estimator)
    same(problem(loss), OUTER, Y, bl.Batches(X[:1].expand(6, 4), X), estimator=estimator)


def test_channels_last_with_dropout():
    image = torch.randn(2, 3, 5, 5, generator=G, dtype=D).to(memory_format=torch.channels_last)
    kernel = 0.2 * torch.randn(4, 3, 3, 3, generator=G, dtype=D).to(memory_format=torch.channels_last)

    def loss(y, x, b):
        return F.dropout(F.conv2d(b, y), 0.3).square().mean() * x.exp()

    p = bl.Problem(loss, lambda y, x, b: y.sum() ** 2)
    same(p, torch.zeros((), dtype=D), kernel, bl.Batches(image, None))


def test_attention_without_dropout_draws_nothing():
    """Its operator is marked as one that draws, whatever its dropout."""
    net = nn.TransformerEncoderLayer(4, 2, 8, dtype=D, batch_first=True).eval()
    run, params = bl.functional(net, requires_grad=False)
    p = bl.Problem(lambda y, x, b: (run(y, b) * x).square().mean(), lambda y, x, b: run(y, b).square().mean())
    batches = bl.Batches(X[None], X[None])
    same(p, torch.tensor(1.0, dtype=D), params, batches, estimator=bl.FirstOrderCorrected())


# --- shapes and numbers


def test_a_mask_as_index():
    """The count of what it chooses would be fixed in the gradient; the loss is right all the same."""
    refused(lambda y, x, b: (b[0] @ y - x)[b[1]].square().mean(), "boolean mask", bl.Batches((X, X[:, 0] > 0), X))

    def written(y, x, b):
        rows = b[0] @ y - x
        rows[b[1]] = 0.0
        return rows.square().mean()

    steps = bl.PerStep([(X, X[:, 0] > at) for at in (-9.0, 0.0, 0.5, 9.0)])
    same(problem(written), OUTER, Y, bl.Batches(steps, X))


def test_python_functions_that_read_numbers():
    for read in (lambda y: torch.equal(y, Y), lambda y: torch.allclose(y, Y), lambda y: torch.is_nonzero(y[0, 0])):
        refused(lambda y, x, b, read=read: base(y, x, b) * (2 if read(y) else 1), "looks at the numbers")
    refused(lambda y, x, b: max(base(y, x, b), y.sum()), "__bool__")


@SOME
def test_regions_without_autocast_inside_of_one_with_it(estimator):
    def loss(y, x, b):
        with torch.autocast("cpu", enabled=False):
            return base(y, x, b)

    p, args = problem(loss), [each.float() for each in (OUTER, Y)]
    batches = bl.Batches(X.float(), X.float())
    with torch.autocast("cpu", torch.bfloat16):
        same(p, *args, batches, estimator=estimator, rtol=1e-5)
    same(p, *args, batches, estimator=estimator, rtol=1e-5)


def test_huge_numbers_have_the_status_that_they_have_eagerly():
    for rate in (1e80, 1e200):
        for estimator in (bl.Unrolled("iterates"), bl.FirstOrderCorrected()):
            same(problem(base), OUTER, Y, BOTH, estimator=estimator, solver=bl.Descent(bl.SGD(rate), 8))


def test_what_a_batch_may_hold():
    class Opaque:
        def __init__(self, inputs):
            self.inputs = inputs

    box = Opaque(X)
    p = problem(lambda y, x, b: base(y, x, b.inputs))
    for _ in range(2):
        found = same(p, OUTER, Y, bl.Batches(box, X))
        assert any("Opaque" in note for note in found.stats["engine"]["notes"])
        box.inputs = X + 1
    p = problem(lambda y, x, b: base(y, x, b[0]) / b[1])
    for number in (2, 2.0, 4, True):
        same(p, OUTER, Y, bl.Batches((X, number), X))


# --- sharing


def test_problems_with_one_loss_threads_and_what_is_left():
    one, other = problem(base), bl.Problem(base, lambda y, x, b: 3 * f(y, x, b))
    for p in (one, other, one):
        same(p, OUTER, Y, BOTH)
    wanted, errors = call(None, one, OUTER, Y, BOTH)[0], []
    fresh = problem(base)

    def run():
        try:
            solver, estimator = bl.Descent(bl.SGD(0.1), 4), bl.Unrolled("iterates")
            for _ in range(2):
                equal(bl.hypergradient(fresh, OUTER, Y, BOTH, solver=solver, estimator=estimator, engine=GRAPH), wanted)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@pytest.mark.parametrize("estimator", [bl.Unrolled(), bl.Unrolled("iterates"), CG], ids=["graph", "iterates", "cg"])
def test_a_call_leaves_no_tensor_of_its_own(estimator):
    p = problem(lambda y, x, b: base(y, x, F.dropout(b, 0.2)))
    for _ in range(2):
        given = [OUTER.clone(), Y.clone(), X.clone()]
        found, _ = call(GRAPH, p, given[0], given[1], bl.Batches(given[2], given[2]), estimator=estimator)
        refs = [weakref.ref(each) for each in (*given, found.grad, found.inner)]
        del given, found
        assert [ref() for ref in refs] == [None] * 5
