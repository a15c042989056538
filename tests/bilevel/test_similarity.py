"""Feature re-use: methods.md A3."""

import dataclasses
import functools

import pytest
import torch
from torch import nn

import bilevel as bl
from bilevel.meta import Learner, similarity
from bilevel.meta.patterns import Pattern, contiguous, groups, search, suffixes
from bilevel.meta.similarity import cka, cosine, euclidean, procrustes, pwcca, reuse, svcca

D = torch.float64
mse = nn.functional.mse_loss
ALL = [cka, procrustes, svcca, pwcca, euclidean, cosine]
BASELESS = [cka, procrustes, svcca, pwcca]
"""Those that do not see a change of basis."""


def randn(*shape, seed=0, dtype=D):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotation(size, seed=5):
    return torch.linalg.qr(randn(size, size, seed=seed))[0]


def mixed(rows=200, size=6, seed=0):
    """Correlated features of different sizes, off center."""
    return randn(rows, size, seed=seed) @ randn(size, size, seed=seed + 1) * torch.logspace(-2, 2, size, dtype=D) + 3.0


# --- known answers of the distances


@pytest.mark.parametrize("distance", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_nothing_is_at_distance_zero_from_itself_but_nothing_less(distance, dtype):
    x = mixed().to(dtype)
    assert float(distance(x, x)) == pytest.approx(0, abs=1e-12)
    assert distance(x, x).dtype == D
    assert float(distance(x, mixed(seed=7).to(dtype))) > 0.1


@pytest.mark.parametrize("distance", BASELESS)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_a3_a_rotation_of_the_features_is_no_change(distance, scale):
    """methods.md A3: an orthogonal matrix keeps CCA, CKA and Procrustes at 0; they see no scale either."""
    x = mixed()
    assert float(distance(x, scale * x @ rotation(6))) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("distance", [euclidean, cosine])
def test_a3_a_rotation_of_the_features_is_one_for_distances_by_feature(distance):
    """methods.md A3: Euclidean does not stay 0."""
    x = mixed()
    assert float(distance(x, x @ rotation(6))) > 0.1


@pytest.mark.parametrize("distance", [svcca, pwcca])
def test_an_invertible_map_is_no_change_for_cca(distance):
    x = randn(200, 6)
    y = x @ (randn(6, 6, seed=3) + 3 * torch.eye(6, dtype=D))
    assert float(pwcca(x, y)) == pytest.approx(0, abs=1e-10)
    assert float(svcca(x, y)) == pytest.approx(0, abs=1e-10)
    assert float(cka(x, y)) > 0.01


@pytest.mark.parametrize("distance", [svcca, pwcca])
def test_a3_independent_gaussians_are_unlike_with_enough_examples_and_alike_with_few(distance):
    """methods.md A3, the trap: with N = 20 D the similarity is small, with N < D it is 1."""
    size = 30
    x, y = randn(20 * size, size), randn(20 * size, size, seed=1)
    assert 0.7 < float(distance(x, y)) < 0.95
    x, y = randn(size - 5, size), randn(size - 5, size, seed=1)
    # (svcca leaves out the last of their 24 directions, and with it a little of the likeness.)
    assert float(distance(x, y, few=True)) == pytest.approx(0, abs=0.05 if distance is svcca else 1e-10)
    assert float(procrustes(x, y)) > 0.1


@pytest.mark.parametrize("distance", [svcca, pwcca])
def test_a3_the_rule_of_ten_examples_per_feature(distance):
    """methods.md A3: N >= 10 D, or it refuses."""
    x = randn(100, 10)
    assert float(distance(x[:100], x[:100])) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="99 examples of 10 features; at least 10 examples per feature, 100,"):
        distance(x[:99], x[:99])
    with pytest.raises(ValueError, match="99 examples of 10 features"):
        distance(x[:99, :3], x[:99])


def test_a3_formulas_on_small_matrices():
    """methods.md A3: each against its formula, written with other operations."""
    x, y = randn(40, 3), randn(40, 4, seed=1) + randn(40, 1, seed=2)
    a, b = x - x.mean(0), y - y.mean(0)
    gram = [each @ each.T for each in (a, b)]  # CKA by Gram matrices
    expected = 1 - (gram[0] * gram[1]).sum() / (gram[0].norm() * gram[1].norm())
    assert float(cka(x, y)) == pytest.approx(float(expected), rel=1e-12)
    nuclear = torch.linalg.eigvalsh(a.T @ b @ b.T @ a).clamp_min(0).sqrt().sum()
    assert float(procrustes(x, y)) == pytest.approx(1 - float(nuclear / (a.norm() * b.norm())), rel=1e-10)
    # Canonical correlations: the square roots of eigenvalues of Saa^-1 Sab Sbb^-1 Sba.
    values, vectors = torch.linalg.eig(torch.linalg.solve(a.T @ a, a.T @ b) @ torch.linalg.solve(b.T @ b, b.T @ a))
    rho = values.real.sqrt()
    assert float(svcca(x, y)) == pytest.approx(1 - float(rho.mean()), rel=1e-9)
    variates = a @ vectors.real
    weights = ((variates / variates.norm(dim=0)).T @ a).abs().sum(1)
    assert float(pwcca(x, y)) == pytest.approx(1 - float((weights * rho).sum() / weights.sum()), rel=1e-9)
    b = b[:, :3]
    spread = [each.var(0).sum() for each in (a - b, a, b)]
    assert float(euclidean(x, y[:, :3])) == pytest.approx(float((spread[0] / 2 / (spread[1] + spread[2])).sqrt()))
    assert float(cosine(x, y[:, :3])) == pytest.approx(
        1 - float(nn.functional.cosine_similarity(a.ravel(), b.ravel(), 0))
    )


def test_svcca_leaves_out_directions_that_hold_little():
    """Of the sum of singular values 99 % are held by three directions; noise in the others does not count."""
    x = randn(400, 3) @ randn(3, 8, seed=1)
    y = x @ rotation(8) + 1e-4 * randn(400, 8, seed=2)
    x = x + 1e-4 * randn(400, 8, seed=3)
    assert float(svcca(x, y)) < 1e-6
    bases = [torch.linalg.svd(each - each.mean(0), full_matrices=False)[0] for each in (x, y)]
    assert 1 - float(torch.linalg.svdvals(bases[0].T @ bases[1]).mean()) > 0.3  # with all directions


@pytest.mark.parametrize("distance", BASELESS)
def test_features_that_are_constant_or_copies_count_for_nothing(distance):
    """Dead units and repeated ones: directions of rounding must not be taken for features."""
    x = mixed()
    dead = torch.cat([x, torch.full((200, 2), 0.1, dtype=D), x[:, :1]], 1)
    other = torch.cat([torch.full((200, 1), 1e8, dtype=D), x @ rotation(6), x[:, :1] * 2], 1)
    if distance in (svcca, pwcca):
        assert float(distance(dead, other)) == pytest.approx(0, abs=1e-8)
    assert float(distance(dead, torch.cat([dead, dead.mean().expand(200, 1)], 1))) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("distance", ALL)
def test_constant_activations(distance):
    x, dead = randn(50, 3), torch.full((50, 3), 0.3, dtype=D)
    assert float(distance(dead, dead)) == float(distance(dead, 2 * dead)) == 0
    if distance is not euclidean:
        assert float(distance(x, dead)) == float(distance(dead, x)) == 1
    else:
        assert float(distance(x, dead)) == pytest.approx(0.5**0.5)


@pytest.mark.parametrize("distance", ALL)
@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (randn(20), randn(20), r"\(20,\) and \(20,\); two matrices of shape \(N, D\)"),
        (randn(20, 2, 1), randn(20, 2, 1), "two matrices"),
        (randn(20, 2), randn(19, 2), "each of the same N >= 2 examples"),
        (randn(1, 2), randn(1, 2), "N >= 2"),
        (randn(20, 0), randn(20, 0), "two matrices"),
        (randn(20, 1) / 0, randn(20, 1), "not finite"),
        ([1.0], randn(20, 1), "list and"),
    ],
)
def test_what_are_no_activations(distance, x, y, words):
    with pytest.raises(ValueError, match=words):
        distance(x, y)


@pytest.mark.parametrize("distance", [euclidean, cosine])
def test_distances_by_feature_need_the_same_features(distance):
    with pytest.raises(ValueError, match="compare features one by one"):
        distance(randn(20, 2), randn(20, 3))


# --- reuse


def small(dtype=D):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)


def tasks(count=3, *, seed=0, inputs=2, queries=60, dtype=D):
    support = randn(count, 20, inputs, seed=seed, dtype=dtype), randn(count, 20, 1, seed=seed + 1, dtype=dtype)
    query = (
        randn(count, queries, inputs, seed=seed + 2, dtype=dtype),
        randn(count, queries, 1, seed=seed + 3, dtype=dtype),
    )
    return bl.Batches(inner=support, outer=query)


@pytest.mark.parametrize("distance", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_a3_without_a_step_all_distances_are_zero(distance, dtype):
    """methods.md A3: K = 0."""
    learner = Learner(small(dtype), mse, solver=bl.Descent(bl.SGD(0.5), 0))
    found = reuse(learner, learner.outer(), [tasks(dtype=dtype)], distance=distance)
    assert list(found.layers) == ["0", "2", "output"]
    for each in found.layers.values():
        assert each.scores == pytest.approx([0, 0, 0], abs=1e-12)
    assert found.body.score == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("chunk", [1, None])
def test_distances_are_those_between_activations_by_hand(chunk):
    module, batches = small(), tasks()
    learner = Learner(module, mse, solver=bl.Descent(bl.SGD(0.5), 4), chunk=chunk)
    x = learner.outer()
    with torch.no_grad():
        x["parameters"]["0.weight"].mul_(1.5)  # x is not the module's own
    found = reuse(learner, x, [batches], distance=procrustes, layers=["1", "2"])
    assert list(found.layers) == ["1", "2", "output"]
    before = {name: leaf.clone() for name, leaf in module.state_dict().items()}
    for task in range(3):
        after = learner.adapt(x, tuple(leaf[task] for leaf in batches.inner))
        ends = []
        for values in (x["parameters"], after):
            each = small()
            each.load_state_dict(values)
            with torch.no_grad():
                ends.append([each[:depth](batches.outer[0][task]) for depth in (2, 3, 5)])
        for name, a, b in zip(found.layers, *ends, strict=True):
            assert found.layers[name].scores[task] == pytest.approx(float(procrustes(a, b)), rel=1e-6, abs=1e-12)
        inside = [found.layers[name].scores[task] for name in ("1", "2")]
        assert found.body.scores[task] == pytest.approx(sum(inside) / 2)
        assert found.layers["1"].scores[task] > 0
    scores = torch.tensor(found.layers["1"].scores)
    assert found.layers["1"].interval == pytest.approx(1.96 * float(scores.std()) / 3**0.5)
    assert all(torch.equal(before[name], leaf) for name, leaf in module.state_dict().items())
    assert not any(layer._forward_hooks for layer in module.modules())


def test_layers_below_what_adapts_stay_where_they_are():
    learner = Learner(small(), mse, solver=bl.Descent(bl.SGD(0.5), 4), adapts=["2"])
    found = reuse(learner, learner.outer(), [tasks()], distance=euclidean)
    assert found.layers["0"].scores == (0, 0, 0)
    assert min(found.layers["2"].scores) > 0
    assert min(found.layers["output"].scores) > 0


def test_more_steps_more_batches_and_a_limit_on_tasks():
    learner = Learner(small(), mse, solver=bl.Descent(bl.SGD(0.1), 1))
    x, batches = learner.outer(), [tasks(), tasks(seed=9)]
    one = reuse(learner, x, batches, distance=euclidean)
    many = reuse(learner, x, batches, distance=euclidean, solver=bl.Descent(bl.SGD(0.1), 30))
    assert one.body.tasks == 6
    assert many.body.score > 2 * one.body.score
    assert reuse(learner, x, batches, distance=euclidean, tasks=2).body.scores == one.body.scores[:2]
    assert str(one).splitlines()[-1].startswith("output  ")


def test_images_have_a_row_for_every_position():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU(), nn.Flatten(),
        nn.Linear(3 * 16, 2),
    )  # fmt: skip
    learner = Learner(module, nn.functional.cross_entropy, solver=bl.Descent(bl.SGD(0.5), 3))
    images, labels = randn(2, 8, 1, 4, 4, dtype=torch.float32), torch.arange(8).remainder(2).expand(2, 8)
    batches = bl.Batches((images, labels), (images, labels))
    found = reuse(learner, learner.outer(), [batches], distance=functools.partial(svcca, few=True))
    assert found.layers["0"].score > 0
    with pytest.raises(ValueError, match=r"svcca was given 8 examples of 2 features; at least 10 .* 20, were needed"):
        reuse(learner, learner.outer(), [batches], distance=svcca)  # 128 positions of 3 channels are enough
    seen = []
    reuse(learner, learner.outer(), [batches], distance=lambda a, b: seen.append(tuple(a.shape)) or cka(a, b))
    assert seen[:3] == [(128, 3), (128, 3), (8, 2)]


def test_sequences_have_their_features_last_and_behind_convolutions_second():
    seen = []

    def shapes(a, b):
        seen.append(tuple(a.shape))
        return cka(a, b)

    module = nn.Sequential(nn.Linear(3, 5), nn.Conv1d(7, 2, 1), nn.Flatten(), nn.Linear(10, 1)).to(D)
    learner = Learner(module, mse)
    batches = bl.Batches((randn(2, 4, 7, 3), randn(2, 4, 1)), (randn(2, 4, 7, 3), randn(2, 4, 1)))
    reuse(learner, learner.outer(), [batches], distance=shapes)
    assert seen[:3] == [(28, 5), (20, 2), (4, 1)]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.pair = nn.Linear(2, 2), nn.Identity()

    def forward(self, x):
        self.pair((x, x))
        return self.layer(self.layer(x))[:, :1]


class Pair(nn.Module):
    def forward(self, x):
        return x, x


def test_bad_input_of_reuse():
    learner = Learner(small(), mse, solver=bl.Descent(bl.SGD(0.5), 1))
    x = learner.outer()
    for layers in (["5"], ["0", ""], "0"):
        with pytest.raises(ValueError, match="names of submodules were needed"):
            reuse(learner, x, [tasks()], layers=layers)
    with pytest.raises(ValueError, match=r"two|2"):
        reuse(learner, x, [tasks(1)])
    with pytest.raises(ValueError, match=r"two|2"):
        reuse(learner, x, [])
    twice = Learner(Twice().to(D), mse)
    with pytest.raises(ValueError, match="'layer', which is called twice"):
        reuse(twice, twice.outer(), [tasks()], layers=["layer"])
    with pytest.raises(ValueError, match="'pair', which returns tuple"):
        reuse(twice, twice.outer(), [tasks()], layers=["pair"])
    assert not any(layer._forward_hooks for layer in twice.module.modules())
    wild = dataclasses.replace(learner, solver=bl.Descent(bl.SGD(1e200), 3))
    with pytest.raises(ValueError, match="did the adaptation diverge"):
        reuse(wild, x, [tasks()])


# --- companions


def families(std, *, count=40, seed=0):
    """Tasks y = head(tanh(W x)) with a shared head; the bodies W spread by `std` about a center."""
    g = torch.Generator().manual_seed(seed)
    center, head = torch.randn(8, 2, generator=g, dtype=D), torch.randn(8, 1, generator=g, dtype=D) / 3
    g.manual_seed(seed + 100)
    bodies = center + std * torch.randn(count, 8, 2, generator=g, dtype=D)
    inputs = 2 * torch.rand(count, 60, 2, generator=g, dtype=D) - 1
    targets = torch.tanh(inputs @ bodies.mT) @ head
    return bl.Batches((inputs[:, :30], targets[:, :30]), (inputs[:, 30:], targets[:, 30:]))


@functools.cache
def trained(std):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1)).to(D)
    learner = Learner(
        module, mse, solver=bl.Descent(bl.SGD(0.1), 5), optimizer=functools.partial(torch.optim.Adam, lr=1e-2)
    )
    x = learner.outer()
    for _ in learner.train(x, [families(std, count=8, seed=0)] * 60):
        pass
    return learner, x


def test_a3_more_spread_bodies_are_re_used_less():
    """methods.md A3: distances after adaptation grow with the spread of the tasks' bodies."""
    found = [reuse(*trained(std), [families(std)], distance=euclidean).body for std in (0.01, 3.0)]
    assert found[0].score + found[0].interval < found[1].score - found[1].interval


def test_a3_companions_the_gap_between_maml_and_anil_and_freezing_layers_at_test_time():
    """methods.md A3, companion tests: both are patterns at test time."""
    gaps = []
    for std in (0.01, 3.0):
        learner, x = trained(std)
        layers = groups(learner.module)
        found = search(
            learner, x, [families(std)], threshold=0.0, candidates=[*suffixes(layers), *contiguous(layers)],
            score=lambda prediction, target: -float(mse(prediction, target)),
        )  # fmt: skip
        by_mask = {str(each.pattern): each for each in found.measured}
        gaps.append(-by_mask["01"].difference)
        assert set(by_mask) == {"01", "10", "11"}
    assert gaps[1] > gaps[0]
    assert Pattern(layers, "01").applied(learner).adapts == ("2.weight", "2.bias")


def test_similarities_are_reached_from_the_package():
    assert bl.meta.similarity.cka is similarity.cka
    assert bl.meta.reuse is similarity.reuse
