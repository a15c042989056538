"""Where a loop is in its data: reached again to the bit, or refused in words."""

import itertools
import random

import numpy
import pytest
import torch
from loop_runs import Draws, bits, made, seeded
from test_outer_loop import stopped_and_whole
from torch.utils.data import DataLoader, RandomSampler, TensorDataset, WeightedRandomSampler

import bilevel as bl
from bilevel.data import Prefetched, Sinusoids

ESTIMATOR = bl.FirstOrder()
ROWS = torch.linspace(-1, 1, 48).reshape(12, 4)


class Noisy(TensorDataset):
    """Rows with noise from the global generators of the process that reads."""

    def __getitem__(self, row):
        return self.tensors[0][row] + 0.1 * torch.randn(4) + 0.1 * random.random()


def pairs(rows):
    """A collate function: the batch is that of both losses."""
    rows = [row[0] if isinstance(row, (list, tuple)) else row for row in rows]
    batch = torch.stack(rows).mean(0)
    return bl.Batches(batch, -batch)


class OwnNoise:
    """A loader with a generator as an attribute."""

    def __init__(self):
        self.numbers = numpy.random.default_rng(3)

    def __iter__(self):
        for _ in range(6):
            batch = torch.from_numpy(self.numbers.normal(size=4)).float()
            yield bl.Batches(batch, batch)


def generated(draw):
    """Read only once."""
    return (bl.Batches(batch, batch) for batch in (draw() for _ in range(6)))


def of_two():
    train, valid = (DataLoader(TensorDataset(ROWS), 2, shuffle=True) for _ in range(2))
    return (bl.Batches(a.mean(0), b.mean(0)) for (a,), (b,) in zip(train, valid, strict=True))


def shuffled(data=None, **options):
    data = TensorDataset(ROWS) if data is None else data
    options = {"batch_size": 2, "shuffle": True} | options
    return DataLoader(data, collate_fn=pairs, **options)


class Flat:
    """Batches of a stream of sinusoids, for a problem of one task."""

    def __init__(self, stream):
        self.stream = stream
        self.state_dict, self.load_state_dict = stream.state_dict, stream.load_state_dict

    def __iter__(self):
        return (bl.Batches(b.inner[0][0, :4, 0], b.outer[1][0, :4].reshape(4)) for b in self.stream)


BATCH = bl.Batches(ROWS[0], ROWS[1])
LOADERS = {
    "a list": lambda: [bl.Batches(row, row) for row in ROWS[:6]],
    "repeat": lambda: itertools.repeat(BATCH, 6),
    "global generators": lambda: Draws(6),
    "a generator that draws": lambda: generated(lambda: torch.randn(4)),
    "two loaders, zipped": of_two,
    "shuffled": shuffled,
    "shuffled, seeded": lambda: shuffled(generator=torch.Generator().manual_seed(5)),
    "shuffled, noisy": lambda: shuffled(Noisy(ROWS)),
    "with replacement": lambda: shuffled(
        shuffle=False, sampler=RandomSampler(ROWS, True, 12, torch.Generator().manual_seed(2))
    ),
    "weighted": lambda: shuffled(Noisy(ROWS), shuffle=False, sampler=WeightedRandomSampler([1.0] * 6 + [2.0] * 6, 12)),
    "workers": lambda: shuffled(Noisy(ROWS), num_workers=2),
    "a generator of its own": OwnNoise,
    "a stream": lambda: Flat(Sinusoids(tasks=1, steps=6, seed=4)),
    "a stream, ahead": lambda: Prefetched(Flat(Sinusoids(tasks=1, steps=6, seed=4))),
    "a list, ahead": lambda: Prefetched([bl.Batches(row, row) for row in ROWS[:6]]),
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("at", [0, 3, 5])
def test_the_place_in_the_data_is_reached_again(tmp_path, kind, at):
    if kind in ("workers",) and at != 3:
        pytest.skip("processes are slow to start")
    again, whole = stopped_and_whole(tmp_path, lambda: made(ESTIMATOR, LOADERS[kind]()), at)
    assert again == whole


@pytest.mark.parametrize("at", [3, 5, 6, 11])
@pytest.mark.parametrize("kind", ["shuffled", "shuffled, seeded", "shuffled, noisy", "a generator of its own", "a stream"])
def test_also_in_a_second_pass_and_between_two(tmp_path, kind, at):
    again, whole = stopped_and_whole(tmp_path, lambda: made(ESTIMATOR, LOADERS[kind](), epochs=2), at)
    assert again == whole
    assert whole["data"]["epoch"] == "2"
    assert whole["index"] == "12"
