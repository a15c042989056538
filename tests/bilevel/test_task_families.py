"""Task families without images: sinusoids (papers.md 2.8), random networks (methods.md A3), MNIST-1D."""

import math
import random

import pytest
import torch

from bilevel.data import Episodes, RandomNets, Sinusoids, disjoint, mnist1d

# --- sinusoids


def test_sinusoids_have_the_settings_of_the_literature():
    """papers.md 2.8: amplitude U[0.1, 5], phase U[0, pi], x in [-5, 5], 10 support and 10 query, 25 tasks."""
    loader = Sinusoids(dtype=torch.float64)
    batches = loader[0]
    for x, y in (batches.inner, batches.outer):
        assert x.shape == y.shape == (25, 10, 1)
    drawn = torch.tensor([loader.parameters(number) for number in range(4000)], dtype=torch.float64)
    for values, low, high in ((drawn[:, 0], 0.1, 5.0), (drawn[:, 1], 0.0, math.pi)):
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
        # Mean of a uniform variable, within four of its deviations.
        assert abs(values.mean() - (low + high) / 2) < 4 * (high - low) / math.sqrt(12 * 4000)
    x = torch.cat([loader[i].inner[0].flatten() for i in range(20)])
    assert -5 <= x.min() < -4.9
    assert 4.9 < x.max() <= 5
    assert abs(x.mean()) < 4 * 10 / math.sqrt(12 * len(x))


def test_sinusoids_are_the_sinusoids_of_their_parameters():
    loader = Sinusoids(tasks=4, support=3, query=6, dtype=torch.float64, seed=2)
    batches = loader[5]
    for task, number in enumerate(loader.numbers(5)):
        amplitude, phase = loader.parameters(number)
        for x, y in (batches.inner, batches.outer):
            torch.testing.assert_close(y[task], amplitude * torch.sin(x[task] - phase), rtol=1e-14, atol=1e-14)
    assert batches.inner[0].shape == (4, 3, 1)
    assert batches.outer[0].shape == (4, 6, 1)
    narrow = Sinusoids(tasks=4, support=3, query=6, seed=2)[5]
    assert narrow.inner[1].dtype == torch.float32
    torch.testing.assert_close(narrow.inner[1].double(), batches.inner[1], rtol=1e-6, atol=1e-6)


def test_sinusoids_bad_input():
    for name in ("tasks", "support", "query"):
        with pytest.raises(ValueError, match=f"Sinusoids was given {name}=0; at least 1"):
            Sinusoids(**{name: 0})
    with pytest.raises(ValueError, match=r"dtype=torch\.int64; a floating one"):
        Sinusoids(dtype=torch.int64)
    with pytest.raises(TypeError, match=r"dtype='float32'; a torch\.dtype"):
        Sinusoids(dtype="float32")
    with pytest.raises(ValueError, match="seed=-3"):
        Sinusoids(seed=-3)


# --- random networks (methods.md A3)


def forward(layers, x, activation):
    for weight, bias in layers[:-1]:
        x = activation(x @ weight.T + bias)
    weight, bias = layers[-1]
    return x @ weight.T + bias


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_random_nets_are_what_the_generator_says(activation):
    """methods.md A3: 1 -> H -> H -> H -> 1, x ~ U(-1, 1), y = net(x) + noise; targets are not doubled."""
    loader = RandomNets(tasks=3, support=20, query=400, activation=activation, noise=0.0, dtype=torch.float64, seed=1)
    batches = loader[2]
    for task, number in enumerate(loader.numbers(2)):
        layers = loader.weights(number)
        assert [tuple(weight.shape) for weight, _ in layers] == [(15, 1), (15, 15), (15, 15), (1, 15)]
        assert [tuple(bias.shape) for _, bias in layers] == [(15,), (15,), (15,), (1,)]
        for x, y in (batches.inner, batches.outer):
            expected = forward(layers, x[task], getattr(torch, activation))
            torch.testing.assert_close(y[task], expected, rtol=1e-12, atol=1e-12)
    x = batches.outer[0]
    assert -1 <= x.min() < -0.98
    assert 0.98 < x.max() <= 1


def test_noise_has_its_deviation_and_is_added_once():
    given = {"tasks": 1, "support": 1, "query": 20000, "dtype": torch.float64, "hidden": 2}
    (_, clean), (x, noisy) = RandomNets(**given, noise=0.0)[0].outer, RandomNets(**given, noise=0.3)[0].outer
    error = noisy - clean
    assert torch.equal(x, RandomNets(**given, noise=0.0)[0].outer[0])
    assert error.std().item() == pytest.approx(0.3, rel=4 / math.sqrt(2 * 20000))
    assert abs(error.mean()) < 4 * 0.3 / math.sqrt(20000)
    assert RandomNets().noise == 0.1


@pytest.mark.parametrize(("body", "head"), [(0.1, 1.0), (2.0, 1.0), (4.0, 0.5), (0.0, 0.0)])
def test_deviations_are_deviations_and_not_variances(body, head):
    """methods.md A3: the code of the study passes std as a covariance; ours is the spread itself, over tasks."""
    loader = RandomNets(body_std=body, head_std=head, hidden=6)
    centre = loader.centre()
    spread = [[], []]
    for number in range(200):
        for layer, ((weight, bias), (mean, offset)) in enumerate(zip(loader.weights(number), centre, strict=True)):
            spread[layer == 3] += [(weight - mean).flatten(), (bias - offset).flatten()]
    for values, wanted in zip(map(torch.cat, spread), (body, head), strict=True):
        if wanted == 0:
            assert not values.any()
        else:
            assert values.std().item() == pytest.approx(wanted, rel=4 / math.sqrt(2 * len(values)))
            assert abs(values.mean()) < 4 * wanted / math.sqrt(len(values))


def test_splits_have_centres_of_their_own():
    centres = {}
    for split in ("train", "validation", "test"):
        loader = RandomNets(split=split, seed=3, hidden=20)
        centres[split] = torch.cat([leaf.flatten() for layer in loader.centre() for leaf in layer])
        again = RandomNets(split=split, seed=3, hidden=20, body_std=5.0).centre()
        assert torch.equal(centres[split], torch.cat([leaf.flatten() for layer in again for leaf in layer]))
    count = len(centres["train"])
    for values in centres.values():
        assert values.std().item() == pytest.approx(1, rel=4 / math.sqrt(2 * count))
    for a, b in (("train", "test"), ("train", "validation"), ("validation", "test")):
        assert abs(torch.corrcoef(torch.stack([centres[a], centres[b]]))[0, 1]) < 4 / math.sqrt(count)
    ids = [set(RandomNets(split=split, seed=3)[0].task_ids) for split in centres]
    assert len(set.union(*ids)) == 12


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_body_std_controls_how_far_features_carry_over(seed):
    """Least squares on the features of the centre: exact for each task if body_std = 0, and worse the larger it is."""
    x = torch.linspace(-1, 1, 200, dtype=torch.float64).unsqueeze(1)
    left = []
    for body in (0.0, 0.1, 1.0):
        loader, hidden = RandomNets(body_std=body, seed=seed), x
        for weight, bias in loader.centre()[:-1]:
            hidden = torch.relu(hidden @ weight.T + bias)
        shared = torch.cat([hidden, torch.ones_like(x)], 1)
        y = torch.cat([loader.target(number, x) for number in range(30)], 1)
        rest = (y - shared @ (torch.linalg.pinv(shared) @ y)).square().sum(0) / (y - y.mean(0)).square().sum(0)
        left.append(rest.median().item())
    assert left[0] < 1e-20
    assert 1e-5 < left[1] < left[2]


def test_random_nets_bad_input():
    for given, message in (
        ({"body_std": -1.0}, r"body_std=-1\.0; a standard deviation from 0"),
        ({"head_std": math.nan}, "head_std=nan"),
        ({"noise": math.inf}, "noise=inf"),
        ({"split": "val"}, "split='val'; one of train, validation, test"),
        ({"activation": "tanh"}, "activation='tanh'; one of relu, sigmoid"),
        ({"hidden": 0}, "hidden=0; at least 1"),
        ({"dtype": torch.int32}, r"dtype=torch\.int32"),
        ({"support": 0}, "support=0"),
        ({"query": -1}, "query=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            RandomNets(**given)


# --- MNIST-1D


@pytest.fixture(scope="module")
def signals():
    pytest.importorskip("mnist1d")
    return mnist1d.load(200)


def test_mnist1d_is_ten_digits_of_forty_points(signals):
    assert signals.names == tuple("0123456789")
    assert signals.counts == (20,) * 10
    assert signals.examples.shape == (200, 1, 40)
    assert signals.examples.dtype == torch.float32
    assert signals.examples.mean().item() == pytest.approx(0, abs=1e-6)
    assert signals.examples.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    parts = signals.split((0.6, 0.0, 0.4))
    disjoint(parts)
    batches = Episodes(parts["train"], tasks=2, way=5, shot=1, query=15)[0]
    assert batches.outer[0].shape == (2, 75, 1, 40)


def test_mnist1d_is_what_the_package_makes(signals):
    data = pytest.importorskip("mnist1d.data")
    numpy = pytest.importorskip("numpy")
    arguments = data.get_dataset_args()
    arguments.num_samples = 200
    made = data.make_dataset(arguments)
    for digit in range(10):
        theirs = numpy.concatenate([made["x"][made["y"] == digit], made["x_test"][made["y_test"] == digit]])
        ours = signals.examples[20 * digit : 20 * (digit + 1), 0]
        assert torch.equal(ours, torch.tensor(theirs, dtype=torch.float32))


def test_mnist1d_leaves_global_generators_alone(signals):
    numpy = pytest.importorskip("numpy")
    python, theirs = random.getstate(), numpy.random.get_state()
    again, other = mnist1d.load(200), mnist1d.load(20, seed=1)
    assert random.getstate() == python
    assert all(numpy.array_equal(a, b) for a, b in zip(theirs, numpy.random.get_state(), strict=True))
    assert torch.equal(again.examples, signals.examples)
    assert not torch.equal(other.examples, mnist1d.load(20, seed=2).examples)


def test_mnist1d_bad_input(monkeypatch):
    for given, error, message in (
        ({"samples": 55}, ValueError, "samples=55; a multiple of 10"),
        ({"samples": 0}, ValueError, "samples=0; at least 10"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"dtype": torch.int64}, ValueError, "a floating one"),
        ({"samples": 10.0}, TypeError, r"samples=10\.0"),
    ):
        with pytest.raises(error, match=message):
            mnist1d.load(**given)
    import sys

    monkeypatch.setitem(sys.modules, "mnist1d.data", None)
    with pytest.raises(ImportError, match=r'need mnist1d\.data.*pip install "bilevel\[meta\]"'):
        mnist1d.load()
