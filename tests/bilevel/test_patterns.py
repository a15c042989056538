"""Which layers adapt: methods.md A2."""

import dataclasses
import itertools

import pytest
import torch
from bilevel_profiling.meters.tensors import Tensors
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import bilevel as bl
from bilevel.meta import Learner, Pattern, patterns

D = torch.float64
mse = nn.functional.mse_loss


def net(*sizes, dtype=D, bias=True, nonlinear=nn.Tanh):
    torch.manual_seed(0)
    layers = [nn.Linear(a, b, bias=bias, dtype=dtype) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*[each for layer in layers for each in (layer, nonlinear())][:-1])


def tasks(count=3, rows=6, inputs=3, outputs=1, *, seed=0, dtype=D):
    g = torch.Generator().manual_seed(seed)

    def part():
        return (torch.randn(count, rows, size, generator=g, dtype=dtype) for size in (inputs, outputs))

    return bl.Batches(inner=tuple(part()), outer=tuple(part()))


def adapted(learner, x, batches):
    chunk = learner.chunk
    return bl.adapt(learner.problem, x, None, batches, solver=learner.inner_solver, tasks=True, chunk=chunk).inner


# --- known answers


@pytest.mark.parametrize("reuse_features", [False, True])
def test_a2_the_head_moves_as_it_does_when_everything_adapts_bitwise(reuse_features):
    """methods.md A2: two linear layers, m = (0, 1), K = 1: bitwise the same head update, task after task.

    (All tasks at once, torch multiplies a body of each task's own in another order than a shared one: 1e-15.)
    """
    module, batches = net(3, 4, 1, bias=False, nonlinear=nn.Identity), tasks()
    maml = Learner(module, mse, solver=bl.Descent(bl.SGD(0.1), 1), reuse_features=reuse_features, chunk=1)
    x, layers = maml.outer(), patterns.groups(module)
    full = adapted(maml, x, batches)
    head = adapted(Pattern(layers, "01").applied(maml), x, batches)
    assert list(layers) == ["0", "2"]
    assert list(head) == ["2.weight"]
    assert torch.equal(head["2.weight"], full["2.weight"])
    assert not torch.equal(full["0.weight"][0], x["parameters"]["0.weight"])
    full, head = (
        adapted(dataclasses.replace(each, chunk=None), x, batches)
        for each in (maml, Pattern(layers, "01").applied(maml))
    )
    torch.testing.assert_close(head["2.weight"], full["2.weight"], rtol=1e-13, atol=1e-13)


class Watched(torch.autograd.Function):
    """The identity; counts the gradients that come back to it."""

    seen = 0

    @staticmethod
    def forward(value):
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        Watched.seen += 1
        return gradient

    generate_vmap_rule = True


class Tap(nn.Module):
    def forward(self, value):
        return Watched.apply(value)


@pytest.mark.parametrize(("mask", "comes"), [("01", False), ("10", True), ("11", True)])
@pytest.mark.parametrize("chunk", [1, None])
def test_a2_no_gradient_comes_to_the_body_below_what_adapts(mask, comes, chunk):
    """methods.md A2: body gradient tensors are None: the backward does not reach the body's output."""
    module = nn.Sequential(nn.Linear(3, 4, dtype=D), Tap(), nn.Tanh(), nn.Linear(4, 1, dtype=D))
    learner = Pattern(patterns.groups(module), mask).applied(Learner(module, mse, chunk=chunk, reuse_features=False))
    Watched.seen = 0
    bl.adapt(learner.problem, learner.outer(), None, tasks(), solver=learner.inner_solver, tasks=True, chunk=chunk)
    assert (Watched.seen > 0) == comes


@pytest.mark.parametrize("estimator", [bl.Unrolled(), bl.Unrolled("iterates"), bl.FirstOrder()], ids=repr)
def test_a2_all_ones_is_maml(estimator):
    """methods.md A2: the mask of ones equals MAML, in the adapted parameters and in the hypergradient, bit for bit."""
    module, batches = net(3, 4, 1), tasks()
    maml = Learner(module, mse, estimator=estimator)
    ones = Pattern(patterns.groups(module), (1, True)).applied(maml)
    x = maml.outer()
    one, other = (learner.hypergradient(x, batches) for learner in (maml, ones))
    for name in x["parameters"]:
        assert torch.equal(one.grad["parameters"][name], other.grad["parameters"][name])
        assert torch.equal(one.inner[name], other.inner[name])


def test_the_last_layer_alone_is_anil_also_in_meta_training():
    module, batches = net(3, 4, 4, 1), tasks()
    maml = Learner(module, mse)
    pattern, anil = Pattern(patterns.groups(module), "001"), dataclasses.replace(maml, adapts="4")
    x = maml.outer()
    one, other = (learner.hypergradient(x, batches) for learner in (pattern.applied(maml), anil))
    torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0)
    assert all(leaf.abs().max() > 0 for leaf in one.grad["parameters"].values())  # the body is still meta-learned


DEPTH, WIDTH, ROWS, STEPS = 6, 16, 8, 3


@pytest.mark.parametrize("mask", ["111111", "000001", "000111", "100000", "100001", "010101"])
def test_a2_the_work_is_that_of_the_layers_above_the_shallowest(mask):
    """methods.md A2, cost of a step: inputs' gradients down to the shallowest layer, weights' where m = 1."""
    module = net(*[WIDTH] * (DEPTH + 1), bias=False)
    learner = Learner(module, mse, solver=bl.Descent(bl.SGD(0.01), STEPS), reuse_features=False)
    learner = Pattern(patterns.groups(module), mask).applied(learner)
    x, batches = learner.outer(), tasks(1, ROWS, WIDTH, WIDTH)
    with FlopCounterMode(display=False) as counted:
        bl.adapt(learner.problem, x, None, batches, solver=learner.inner_solver, tasks=True, evaluate=False)
    shallowest, adapting = mask.index("1"), mask.count("1")
    products = STEPS * (DEPTH + (DEPTH - shallowest - 1) + adapting) + DEPTH  # the last: the inner loss at the end
    assert counted.get_total_flops() == products * 2 * ROWS * WIDTH**2


@pytest.mark.parametrize("chunk", [1, None])
def test_a2_kept_activations_fall_with_the_layers_that_do_not_adapt(chunk):
    """methods.md A2: peak memory of a suffix of j layers falls by about (L - j) / L; activations outweigh the rest."""
    rows, width, depth = 4000, 8, 8
    module = net(*[width] * (depth + 1), dtype=torch.float32)
    maml = Learner(module, mse, solver=bl.Descent(bl.SGD(0.01), 2), reuse_features=False, chunk=chunk)
    x, batches, peaks = maml.outer(), tasks(2, rows, width, width, dtype=torch.float32), {}
    for pattern in patterns.suffixes(patterns.groups(module)):
        learner = pattern.applied(maml)
        with Tensors() as meter:
            bl.adapt(
                learner.problem, x, None, batches, solver=learner.inner_solver, tasks=True, chunk=chunk, evaluate=False
            )
        peaks[sum(pattern.mask)] = meter.peak_bytes
    one = rows * width * 4 * (1 if chunk == 1 else 2)  # the activations of one layer
    # A layer more, one activation more, its input; that of the first layer is the batch. A few are always there.
    for j in range(1, depth - 1):
        assert peaks[j + 1] - peaks[j] == pytest.approx(one, rel=0.02)
    assert peaks[depth] == pytest.approx(peaks[depth - 1], rel=0.02)
    assert peaks[1] < 7 * one


# --- candidates


LAYERS = {"a": ("a.weight", "a.bias"), "b": ("b",), "c": ("c",)}


def test_candidates_are_all_there_once():
    assert [str(each) for each in patterns.suffixes(LAYERS)] == ["001", "011", "111"]
    runs = [str(each) for each in patterns.contiguous(LAYERS)]
    assert sorted(runs) == ["001", "010", "011", "100", "110", "111"]
    everything = [str(each) for each in patterns.every(LAYERS)]
    assert sorted(everything) == sorted({f"{number:03b}" for number in range(1, 8)})
    assert Pattern(LAYERS, [True, False, 1]).parameters == ("a.weight", "a.bias", "c")
    one = {"only": ("weight",)}
    assert [[str(p) for p in make(one)] for make in (patterns.suffixes, patterns.contiguous, patterns.every)] == [
        ["1"]
    ] * 3


def test_groups_are_layers_or_single_parameters_that_require_grad():
    module = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)))
    module[0].bias.requires_grad_(False)
    assert patterns.groups(module) == {
        "0": ("0.weight",), "1.0": ("1.0.weight", "1.0.bias"), "1.1": ("1.1.weight", "1.1.bias")
    }  # fmt: skip
    assert list(patterns.groups(module, split=True)) == [
        "0.weight", "1.0.weight", "1.0.bias", "1.1.weight", "1.1.bias",
    ]  # fmt: skip
    assert patterns.groups(nn.Linear(2, 1)) == {"weight": ("weight",), "bias": ("bias",)}
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    assert patterns.groups(tied) == {"0": ("0.weight", "0.bias"), "1": ("1.bias",)}


def test_weight_and_bias_may_be_split():
    module, batches = net(3, 4, 1), tasks()
    maml = Learner(module, mse)
    groups = patterns.groups(module, split=True)
    moved = adapted(Pattern(groups, "0101").applied(maml), maml.outer(), batches)
    assert list(moved) == ["0.bias", "2.bias"]


def test_frozen_parameters_stay_out_of_the_full_pattern():
    module, batches = net(3, 4, 1), tasks()
    module[0].weight.requires_grad_(False)
    maml = Learner(module, mse)
    pattern = Pattern(patterns.groups(module), "11")
    assert list(adapted(pattern.applied(maml), maml.outer(), batches)) == ["0.bias", "2.weight", "2.bias"]


# --- the search


def scored(loss):
    return lambda prediction, target: -float(loss(prediction, target))


def needs_the_body():
    """Tasks whose first layer differs and whose head is shared: adapting the head alone cannot be enough."""
    g = torch.Generator().manual_seed(3)
    module = net(2, 6, 1)
    with torch.no_grad():
        directions = torch.randn(12, 6, 2, generator=g, dtype=D)
        inputs = torch.randn(12, 40, 2, generator=g, dtype=D)
        targets = torch.tanh(torch.einsum("tni,toi->tno", inputs, directions)) @ module[2].weight.T
    return module, bl.Batches((inputs[:, :25], targets[:, :25]), (inputs[:, 25:], targets[:, 25:]))


def test_the_cheapest_pattern_within_the_threshold_is_chosen():
    """methods.md A2: argmin of the cost subject to score >= score(all) - threshold; patterns fail where features must
    change."""
    module, batches = needs_the_body()
    maml = Learner(module, mse, solver=bl.Descent(bl.SGD(0.3), 30))
    candidates = patterns.every(patterns.groups(module))
    strict, lax = (
        patterns.search(maml, maml.outer(), [batches], threshold=t, candidates=candidates, score=scored(mse))
        for t in (0.0, 100.0)
    )
    by_mask = {str(each.pattern): each for each in strict.measured}
    assert set(by_mask) == {"01", "10", "11"}
    costs = [each.cost for each in strict.measured]
    assert costs == sorted(costs)
    assert str(lax.pattern) == "01"
    allowed = [m for m, each in by_mask.items() if each.evaluation.score >= by_mask["11"].evaluation.score]
    assert str(strict.pattern) == min(allowed, key=lambda mask: by_mask[mask].cost) != "01"
    head = by_mask["01"]
    assert head.difference + head.interval < 0
    assert head.difference == pytest.approx(head.evaluation.score - by_mask["11"].evaluation.score)
    assert by_mask["11"].difference == by_mask["11"].interval == 0
    # Just below and just above what the head alone loses.
    for threshold, expected in ((-head.difference * 1.001, "01"), (-head.difference * 0.999, str(strict.pattern))):
        found = patterns.search(
            maml, maml.outer(), [batches], threshold=threshold, candidates=candidates, score=scored(mse)
        )
        assert str(found.pattern) == expected
    assert str(strict).count("*") == 1


def test_costs_are_the_same_on_every_run_and_may_be_the_callers_own():
    module, batches = needs_the_body()
    maml = Learner(module, mse, solver=bl.Descent(bl.SGD(0.3), 2))
    first, second = (patterns.search(maml, maml.outer(), [batches], threshold=1.0, score=scored(mse)) for _ in range(2))
    assert [each.cost for each in first.measured] == [each.cost for each in second.measured]
    prices = iter([5.0, 3.0])  # of 01, then of 11: a device on which the head alone is slower

    def priced(run):
        run()
        return next(prices)

    found = patterns.search(maml, maml.outer(), [batches], threshold=1.0, score=scored(mse), cost=priced)
    assert found.pattern.full


def test_the_full_pattern_is_always_tried_and_a_loader_is_read_once():
    module, batches = needs_the_body()
    maml = Learner(module, mse, solver=bl.Descent(bl.SGD(0.3), 2))
    only = [Pattern(patterns.groups(module), "10")]
    found = patterns.search(
        maml, maml.outer(), iter([batches, batches]), threshold=1.0, candidates=only, score=scored(mse)
    )
    assert sorted(str(each.pattern) for each in found.measured) == ["10", "11"]
    assert {each.evaluation.tasks for each in found.measured} == {24}
    assert len(only) == 1


def test_work_counts_products_and_numbers_written():
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    assert patterns.work(lambda: a @ b) == 2 * 3 * 4 * 5
    assert patterns.work(lambda: a.T.reshape(2, 6)[0] + 1) == 12 + 6  # the copy that reshape makes; views are free
    image, kernel = torch.ones(2, 3, 8, 8), torch.ones(5, 3, 3, 3)
    assert patterns.work(lambda: nn.functional.conv2d(image, kernel)) == 2 * 2 * 5 * 3 * 9 * 36
    assert patterns.work(lambda: None) == 0


# --- bad input


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ("000", "in which nothing adapts"),
        ((False, 0, "0"), "in which nothing adapts"),
        ("11", r"a 0 or 1 for each of the 3 groups \['a', 'b', 'c'\]"),
        ("1111", "a 0 or 1 for each"),
        ("1x0", "a 0 or 1 for each"),
        ((0.5, 1, 1), "a 0 or 1 for each"),
        ("", "a 0 or 1 for each"),
    ],
)
def test_masks_that_are_none(mask, words):
    with pytest.raises(ValueError, match=words):
        Pattern(LAYERS, mask)


def test_groups_of_nothing():
    for module in (nn.Tanh(), nn.Linear(2, 1).requires_grad_(False)):
        with pytest.raises(ValueError, match="nothing could adapt"):
            patterns.groups(module)
    with pytest.raises(ValueError, match="13 groups, which have 8191 patterns"):
        patterns.every({str(i): (str(i),) for i in range(13)})


def test_learners_that_have_no_patterns():
    module = net(3, 4, 1)
    pattern, other = Pattern(patterns.groups(module), "01"), Pattern(LAYERS, "011")
    learner = Learner(module, mse)
    with pytest.raises(ValueError, match=r"groups of the parameters \['a.bias'.*Write groups\(learner.module\)"):
        other.applied(learner)
    for changed in (
        {"rates": bl.meta.Rates(per="tensor")},
        {"start": bl.meta.Fixed(), "adapts": "2"},
    ):
        with pytest.raises(ValueError, match="x is the start of all parameters"):
            pattern.applied(dataclasses.replace(learner, **changed))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"threshold": -0.1}, "threshold=-0.1; a number of at least 0"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"threshold": None}, "threshold=None"),
        ({"candidates": []}, "no candidates"),
        ({"batches": []}, "no batches"),
        ({"batches": [tasks(1, inputs=2)]}, "two|2"),
        ({"score": lambda p, t: float("nan")}, "score nan where everything adapts"),
    ],
)
def test_searches_that_cannot_be(arguments, words):
    module, batches = needs_the_body()
    maml = Learner(module, mse, solver=bl.Descent(bl.SGD(0.1), 1))
    given = {"batches": [batches], "threshold": 0.1, "score": scored(mse), **arguments}
    with pytest.raises(ValueError, match=words):
        patterns.search(maml, maml.outer(), **given)
