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
def test_the_place_in_the_data_is_reached_again(tmp_path, kind):
    at = 3 if kind == "workers" else random.Random(kind).randrange(6)
    again, whole = stopped_and_whole(tmp_path, lambda: made(ESTIMATOR, LOADERS[kind]()), at)
    assert again == whole


@pytest.mark.parametrize("at", [5, 6, 9])
@pytest.mark.parametrize(
    "kind", ["shuffled", "shuffled, seeded", "shuffled, noisy", "a generator of its own", "a stream"]
)
def test_also_in_a_second_pass_and_between_two(tmp_path, kind, at):
    again, whole = stopped_and_whole(tmp_path, lambda: made(ESTIMATOR, LOADERS[kind](), epochs=2), at)
    assert again == whole
    assert whole["data"]["epoch"] == "2"
    assert whole["index"] == "12"


def test_a_loader_that_says_where_it_is_is_asked():
    loop = made(ESTIMATOR, LOADERS["a stream, ahead"]())
    for _ in range(3):
        next(loop)
    assert loop.state_dict()["data"]["loader"]["position"] == 3


def test_a_generator_that_is_handed_over_goes_on(tmp_path):
    def make():
        own = torch.Generator().manual_seed(4), random.Random(5), numpy.random.RandomState(6)
        draw = lambda: torch.rand(4, generator=own[0]) + own[1].random() + float(own[2].rand())  # noqa: E731
        return made(ESTIMATOR, generated(draw), generators=own)

    again, whole = stopped_and_whole(tmp_path, make, 3)
    assert again == whole


def loaded(saved, loader, **options):
    seeded(9)
    made(ESTIMATOR, loader, **options).load_state_dict(saved)


def saved_after(steps, loader, **options):
    seeded(1)
    loop = made(ESTIMATOR, loader, **options)
    for _ in range(steps):
        next(loop)
    return loop.state_dict()


def unseeded():
    own = numpy.random.default_rng()
    return generated(lambda: torch.from_numpy(own.normal(size=4)).float())


def of_passes():
    """Two passes in one generator: the order of the second depends on what the steps of the first drew."""
    return (batches for _ in range(2) for batches in shuffled())


REFUSED = {
    "drawn from a generator that nobody knows": (unseeded, 4, unseeded, r"does not give the batches .* hand that over"),
    "an order that depends on earlier steps": (of_passes, 8, of_passes, "does not give the batches that it gave"),
    "other data": (LOADERS["a list"], 3, lambda: [BATCH] * 6, "number 2 of this pass is another one"),
    "shorter": (LOADERS["a list"], 5, lambda: LOADERS["a list"]()[:3], "saved after 5 batches .* a list, now gives 3"),
    "no state any more": (
        LOADERS["a stream"],
        3,
        LOADERS["a list"],
        r"says where it is \(state_dict\).* a list, which",
    ),
    "other settings": (
        LOADERS["a stream"],
        3,
        lambda: Flat(Sinusoids(tasks=1, steps=6, seed=5)),
        "state of another Sinusoids: seed was 4 and is 5",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
@pytest.mark.filterwarnings("ignore:OuterLoop was saved with other settings")
def test_a_place_that_cannot_be_reached_is_refused(why):
    before, steps, now, message = REFUSED[why]
    saved = saved_after(steps, before())
    seeded(9)
    loop = made(ESTIMATOR, now())
    fresh = bits(loop.state_dict())
    with pytest.raises(ValueError, match=f"(?s){message}"):
        loop.load_state_dict(saved)
    if why != "drawn from a generator that nobody knows" and why != "an order that depends on earlier steps":
        assert bits(loop.state_dict()) == fresh
        assert next(loop).index == 0  # as if nobody had tried
    else:
        with pytest.raises(RuntimeError, match="can be read only once, so the loop cannot go on with it"):
            next(loop)


def test_a_loader_that_can_be_read_only_once_goes_on_but_never_back():
    saved = saved_after(3, LOADERS["repeat"]())
    loop = made(ESTIMATOR, LOADERS["repeat"]())
    next(loop)
    loop.load_state_dict(saved)
    assert [step.index for step in loop] == [3, 4, 5]
    with pytest.raises(ValueError, match=r"has read 6 batches of a repeat.* go back to batch 3\. Make the loop anew"):
        loop.load_state_dict(saved)


def test_a_loop_that_has_run_goes_back():
    loop = made(ESTIMATOR, shuffled(Noisy(ROWS)))
    seeded(1)
    for step in loop:
        if step.index == 1:
            saved = loop.state_dict()
    first = bits(loop.state_dict())
    loop.load_state_dict(saved)
    assert [step.index for step in loop] == [2, 3, 4, 5]
    assert bits(loop.state_dict()) == first


def test_a_finished_loop_stays_finished(tmp_path):
    """A script that is started again after its end makes no further pass."""
    seeded(1)
    loop = made(ESTIMATOR, LOADERS["shuffled"](), epochs=2)
    assert len(list(loop)) == 12
    assert list(loop) == []
    loop.save(tmp_path)
    again = made(ESTIMATOR, LOADERS["shuffled"](), epochs=2)
    again.load(tmp_path)
    assert (list(again), again.index, again.epoch) == ([], 12, 2)
    further = made(ESTIMATOR, LOADERS["shuffled"](), epochs=3)
    further.load(tmp_path)
    assert [step.index for step in further] == list(range(12, 18))


def test_a_loader_without_batches():
    assert list(made(ESTIMATOR, [])) == []
    with pytest.raises(ValueError, match="gave no batch in pass 0; passes without steps would have no end"):
        next(made(ESTIMATOR, [], epochs=None))

    class Once:
        def __init__(self):
            self.batches = iter([BATCH])

        def __iter__(self):
            return self.batches

    loop = made(ESTIMATOR, Once(), epochs=None)
    next(loop)
    with pytest.raises(ValueError, match="gave no batch in pass 1"):
        next(loop)
    with pytest.raises(ValueError, match=r"epochs=2 and a repeat, which can be read only once"):
        made(ESTIMATOR, LOADERS["repeat"](), epochs=2)


def test_a_pass_without_end():
    loop = made(ESTIMATOR, [BATCH] * 2, epochs=None)
    assert [next(loop).index for _ in range(7)] == list(range(7))
    assert loop.epoch == 3


def test_fewer_passes_than_were_made_are_refused():
    saved = saved_after(9, LOADERS["shuffled"](), epochs=None)
    with pytest.raises(ValueError, match=r"saved in pass 1 of its data, .* Give it epochs=2 or more, or None"):
        loaded(saved, LOADERS["shuffled"]())
    loaded(saved, LOADERS["shuffled"](), epochs=2)


def test_workers_that_go_on_drawing_in_a_second_pass_are_refused():
    def make():
        return shuffled(Noisy(ROWS), num_workers=1, persistent_workers=True)

    with pytest.raises(ValueError, match="does not give the batches that it gave"):
        loaded(saved_after(8, make(), epochs=2), make(), epochs=2)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_torchdatas_loader_says_where_it_is(tmp_path):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def make():
        loader = stateful.StatefulDataLoader(TensorDataset(ROWS), 2, shuffle=True, collate_fn=pairs)
        return made(ESTIMATOR, loader, epochs=2)

    again, whole = stopped_and_whole(tmp_path, make, 8)
    assert again == whole
