"""batch_statistics: BatchNorm by the batch at hand, per task under vmap."""

import copy
import warnings

import pytest
import torch
from torch import nn

import bilevel as bl
from bilevel.data import ClassSet, Episodes
from bilevel.meta.batch_statistics import batch_statistics

T = 4


def convolutional(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, dtype=torch.float64),
        norm(3, dtype=torch.float64),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(48, 3, dtype=torch.float64),
    )


def flat(norm=nn.BatchNorm1d):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(16, 5, dtype=torch.float64),
        norm(5, dtype=torch.float64),
        nn.Tanh(),
        nn.Linear(5, 3, dtype=torch.float64),
    )


class Signals(nn.Module):
    """BatchNorm1d over [n, channels, length], used twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.norm = nn.BatchNorm1d(4, dtype=torch.float64)
        self.head = nn.Linear(16, 3, dtype=torch.float64)

    def forward(self, x):
        return self.head(self.norm(self.norm(x).square()).flatten(1))


class Volumes(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.norm = nn.BatchNorm3d(2, affine=False, dtype=torch.float64)
        self.head = nn.Linear(16, 3, dtype=torch.float64)

    def forward(self, x):
        return self.head(self.norm(x).flatten(1))


NETS = {
    "BatchNorm2d": (convolutional, (1, 4, 4)),
    "BatchNorm1d": (flat, (16,)),
    "BatchNorm1d of signals": (Signals, (4, 4)),
    "BatchNorm3d": (Volumes, (2, 2, 2, 2)),
    "InstanceNorm2d": (
        lambda: convolutional(
            lambda n, dtype: nn.InstanceNorm2d(n, affine=True, track_running_stats=True, dtype=dtype)
        ),
        (1, 4, 4),
    ),
    "cumulative": (lambda: flat(lambda n, dtype: nn.BatchNorm1d(n, momentum=None, dtype=dtype)), (16,)),
}
each_net = pytest.mark.parametrize(("make", "shape"), NETS.values(), ids=NETS)


def tasks(shape, seed=0):
    """T tasks whose inputs have very different means and scales, so that shared statistics would show."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([1.0, 10.0, 0.1, 3.0], dtype=torch.float64).reshape(T, *[1] * (len(shape) + 1))
    support = torch.randn(T, 6, *shape, generator=generator, dtype=torch.float64) * scale + 2 * scale
    query = torch.randn(T, 9, *shape, generator=generator, dtype=torch.float64) * scale - scale
    y = torch.arange(6).remainder(3).expand(T, 6)
    return bl.Batches((support, y), (query, torch.arange(9).remainder(3).expand(T, 9)))


def by_hand(net, batches, steps, lr):
    """MAML as a plain loop: torch's own batch_norm in training mode on a module without running statistics."""
    params = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    total, losses = dict.fromkeys(params, 0), []
    for task in range(T):
        y = dict(params)
        x, labels = (leaf[task] for leaf in batches.inner)
        for _ in range(steps):
            loss = nn.functional.cross_entropy(torch.func.functional_call(net, y, (x,)), labels)
            grads = torch.autograd.grad(loss, list(y.values()), create_graph=True)
            y = {name: leaf - lr * grad for (name, leaf), grad in zip(y.items(), grads, strict=True)}
        x, labels = (leaf[task] for leaf in batches.outer)
        loss = nn.functional.cross_entropy(torch.func.functional_call(net, y, (x,)), labels)
        losses.append(loss.item())
        for name, grad in zip(params, torch.autograd.grad(loss, list(params.values())), strict=True):
            total[name] = total[name] + grad / T
    return total, sum(losses) / T


def maml(net, batches, chunk, estimator=None, steps=3):
    call, params = bl.functional(net)
    outer = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}

    def loss(y, x, batch):
        return nn.functional.cross_entropy(call(y, batch[0]), batch[1])

    return bl.hypergradient(
        bl.Problem(loss, loss, init=lambda x, batch: x),
        outer,
        None,
        batches,
        solver=bl.Descent(bl.SGD(lr=0.3), steps=steps),
        estimator=bl.TaskMean(estimator or bl.Unrolled(), chunk=chunk),
    )


def close(one, other):
    for name, leaf in one.items():
        scale = max(leaf.abs().max().item(), 1.0)
        assert (leaf - other[name]).abs().max() <= 1e-12 * scale


@each_net
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_each_task_is_normalized_by_its_own_statistics(make, shape, mode):
    """All tasks at once, in pairs, one by one and by hand: the same gradient to 1e-12."""
    net = make()
    for layer in net.modules():
        if getattr(layer, "running_mean", None) is not None:
            layer.running_mean += 3  # would show if it were used
            layer.running_var *= 7
    batches = tasks(shape)
    pure = getattr(batch_statistics(net), mode)()
    reference = copy.deepcopy(net).train()
    for layer in reference.modules():
        if hasattr(layer, "track_running_stats"):
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = None
    expected, loss = by_hand(reference, batches, steps=3, lr=0.3)
    for chunk in (None, 1, 2, 3):
        found = maml(pure, batches, chunk)
        assert found.outer_loss.item() == pytest.approx(loss, rel=1e-12)
        close(found.grad, expected)
    assert max(leaf.abs().max() for leaf in expected.values()) > 1e-3


def test_statistics_of_all_tasks_together_would_be_another_number():
    net, batches = batch_statistics(flat()), tasks((16,))
    own = maml(net, batches, None).grad
    mixed = bl.Batches(
        tuple(leaf.flatten(0, 1).unsqueeze(0) for leaf in batches.inner),
        tuple(leaf.flatten(0, 1).unsqueeze(0) for leaf in batches.outer),
    )
    other = maml(net, mixed, None).grad
    assert (own["0.weight"] - other["0.weight"]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "estimator",
    [
        bl.Unrolled(keep="iterates"),
        bl.FirstOrder(),
        bl.Implicit(bl.CG(max_steps=80, tol=1e-14)),
        bl.FirstOrderCorrected(),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_other_estimators_agree_at_once_and_one_by_one(estimator):
    net, batches = batch_statistics(convolutional()), tasks((1, 4, 4))
    call, params = bl.functional(net)

    def f(y, x, batch):
        return nn.functional.cross_entropy(call(y, batch[0]), batch[1])

    def g(y, x, batch):
        return f(y, x, batch) + sum(((leaf - x[name]) ** 2).sum() for name, leaf in y.items())

    found = [
        bl.hypergradient(
            bl.Problem(g, f, init=lambda x, batch: x),
            {name: leaf.clone() for name, leaf in params.items()},
            None,
            batches,
            solver=bl.Descent(bl.SGD(lr=0.05), steps=30),
            estimator=bl.TaskMean(estimator, chunk=chunk),
        )
        for chunk in (None, 1)
    ]
    # The corrected one divides rounding errors by its small nu.
    tolerance = 1e-9 if isinstance(estimator, bl.FirstOrderCorrected) else 1e-12
    for name, leaf in found[0].grad.items():
        assert (leaf - found[1].grad[name]).abs().max() <= tolerance


def test_the_module_is_left_alone_and_the_copy_is_its_own():
    net = convolutional()
    before = {name: leaf.clone() for name, leaf in net.state_dict().items()}
    net[1].weight.requires_grad_(False)
    net.eval()
    pure = batch_statistics(net)
    assert not pure.training
    assert not pure[1].weight.requires_grad
    pure.train()
    x = torch.randn(8, 1, 4, 4, dtype=torch.float64)
    pure(x)
    with torch.no_grad():
        pure[1].weight.mul_(2)
    for name, leaf in net.state_dict().items():
        assert torch.equal(leaf, before[name])
    assert [name for name, _ in pure.named_parameters()] == [name for name, _ in net.named_parameters()]
    assert type(pure) is type(net)
    assert type(pure[1]) is nn.BatchNorm2d
    assert list(pure.buffers()) == []


def test_forward_is_that_of_training_mode_in_either_mode():
    net = convolutional()
    x = torch.randn(8, 1, 4, 4, dtype=torch.float64) * 4 + 2
    expected = copy.deepcopy(net).train()(x)
    pure = batch_statistics(net)
    assert torch.equal(pure.train()(x), expected)
    assert torch.equal(pure.eval()(x), expected)
    assert torch.equal(pure.eval()(x), expected)


def test_state_dicts_go_both_ways_without_the_statistics():
    net, pure = convolutional(), batch_statistics(convolutional())
    result = net.load_state_dict(pure.state_dict(), strict=False)
    assert sorted(result.missing_keys) == ["1.num_batches_tracked", "1.running_mean", "1.running_var"]
    assert result.unexpected_keys == []
    result = pure.load_state_dict(net.state_dict(), strict=False)
    assert sorted(result.unexpected_keys) == ["1.num_batches_tracked", "1.running_mean", "1.running_var"]
    assert pure.load_state_dict(pure.state_dict()).missing_keys == []


def test_layers_that_stand_twice_tied_weights_and_hooks_stay_so():
    norm = nn.BatchNorm1d(4)
    net = nn.Sequential(norm, nn.Linear(4, 4), norm)
    seen = []
    norm.register_forward_hook(lambda layer, inputs, output: seen.append(layer))
    pure = batch_statistics(net)
    assert pure[0] is pure[2]
    pure(torch.randn(5, 4))
    assert seen == [pure[0], pure[0]]
    call, params = bl.functional(pure)
    assert sorted(params) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert call(params, torch.randn(5, 4)).shape == (5, 4)


def test_float32_and_frozen_parts():
    net = batch_statistics(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)))
    data = ClassSet.of(torch.randn(40, 3), torch.arange(40) % 4)
    learner = bl.Learner(net, nn.functional.cross_entropy, adapts=["3", "1"], chunk=2)
    x = learner.outer()
    loader = Episodes(data, tasks=4, way=2, shot=3, query=4, steps=3)
    for step in learner.train(x, loader):
        assert not step.hypergradient.status.failed
    assert len(learner.adapt(x, tuple(leaf[0] for leaf in loader[0].inner))) == len(net.state_dict())
    assert not torch.equal(x["parameters"]["1.weight"], net[1].weight)


def test_without_it_functional_refuses():
    with pytest.raises(ValueError, match="training mode with track_running_stats=True"):
        bl.functional(convolutional())


def test_one_example_has_no_variance():
    pure = batch_statistics(flat())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        pure(torch.randn(1, 16, dtype=torch.float64))


class Unusual(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


class Renamed(nn.BatchNorm2d):
    pass


def test_what_cannot_be_handled_is_refused():
    with pytest.raises(ValueError, match=r"SyncBatchNorm 1 takes its statistics over processes"):
        batch_statistics(nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazy = [nn.LazyBatchNorm1d(), nn.LazyLinear(3), nn.LazyInstanceNorm1d(track_running_stats=True)]
    for layer in lazy:
        with pytest.raises(ValueError, match="has no shape yet; run the module once"):
            batch_statistics(nn.Sequential(nn.Identity(), layer))
    with pytest.raises(
        ValueError, match=r"Unusual \(the module itself\) is a normalization layer with a forward of its"
    ):
        batch_statistics(Unusual(3))
    assert type(batch_statistics(Renamed(3))) is Renamed
    for wrong in (None, nn.BatchNorm1d, lambda x: x):
        with pytest.raises(TypeError, match=r"a torch\.nn\.Module was needed"):
            batch_statistics(wrong)


def test_other_normalizations_stay_as_they_are():
    net = nn.Sequential(
        nn.GroupNorm(1, 2), nn.LayerNorm(4), nn.InstanceNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False)
    )
    pure = batch_statistics(net)
    x = torch.randn(3, 2, 4)
    assert torch.equal(pure(x), net(x))
