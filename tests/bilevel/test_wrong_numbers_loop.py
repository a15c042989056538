"""Wrong numbers, refusals and raw errors that an outsider found in the outer loop; each of these failed once."""

import functools
import os
import resource

import pytest
import torch
from loop_runs import C, Draws, bits, inner_loss, made, outer_loss, seeded
from test_outer_loop import stopped_and_whole
from torch.utils.data import DataLoader, TensorDataset

import bilevel as bl
from bilevel.data import Sinusoids

ESTIMATOR = bl.FirstOrder()
ROWS = torch.linspace(-1, 1, 32).reshape(8, 4)


def both(rows):
    batch = torch.stack([row for (row,) in rows]).mean(0)
    return bl.Batches(batch, -batch)


class FailsOnce(TensorDataset):
    """Reading its n-th row fails, once."""

    def __init__(self, at):
        super().__init__(ROWS)
        self.at = at

    def __getitem__(self, row):
        self.at -= 1
        if self.at == 0:
            raise OSError("the disk was away")
        return super().__getitem__(row)


def read_by_two(at, **options):
    return DataLoader(FailsOnce(at), 2, shuffle=True, collate_fn=both, **options)


class Interrupted:
    """Rows in a random order; its first batch of the second pass is cut off, once."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        torch.rand(1)
        if self.passes == 2:
            raise KeyboardInterrupt
        return iter([bl.Batches(row, row) for row in ROWS[torch.randperm(8)[:4]]])


def after_all(loop):
    """The bits at the end of a loop that is gone on with after each error."""
    while True:
        try:
            for _ in loop:
                pass
        except (OSError, KeyboardInterrupt):
            continue
        return bits(loop.state_dict())


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("at", [1, 3, 9, 10])
def test_a_pass_whose_first_batch_could_not_be_read_is_the_one_that_it_would_have_been(at, accumulate):
    ends = []
    for fails in (0, at):
        seeded(1)
        loop = made(ESTIMATOR, read_by_two(fails), epochs=3, accumulate=accumulate)
        ends.append(after_all(loop))
    assert ends[0] == ends[1]


def test_a_pass_that_was_interrupted_while_it_was_opened_draws_again():
    ends = []
    for begun in (5, 0):
        seeded(1)
        loader = Interrupted()
        loader.passes = begun
        ends.append(after_all(made(ESTIMATOR, loader, epochs=3)))
    assert ends[0] == ends[1]


def test_a_state_of_a_pass_in_which_no_step_was_made_yet_goes_on_to_the_bit(tmp_path):
    ends = []
    for fails in (False, True):
        seeded(1)
        loop = made(ESTIMATOR, read_by_two(0), epochs=2, clip=lambda xs: None)
        for _ in range(4):
            next(loop)
        if fails:
            loop._parts.stepping.clip = lambda xs: 1 / 0
            with pytest.raises(ZeroDivisionError):
                next(loop)
            loop.save(tmp_path)
            seeded(2)
            loop = made(ESTIMATOR, read_by_two(0), epochs=2, clip=lambda xs: None)
            loop.load(tmp_path)
        ends.append(after_all(loop)["outer"])
    assert ends[0] == ends[1]


def test_a_stream_goes_on_where_it_was_put_also_if_its_first_step_failed(tmp_path):
    class First(Sinusoids):
        def __iter__(self):
            return (bl.Batches(b.inner[0][0, :4, 0], b.outer[1][0, :4, 0]) for b in super().__iter__())

    stream = First(tasks=1, steps=6)
    stream.seek(4)
    loop = made(ESTIMATOR, stream, clip=lambda xs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(loop)
    loop.save(tmp_path)
    again = made(ESTIMATOR, First(tasks=1, steps=6), clip=lambda xs: None)
    again.load(tmp_path)
    assert [step.index for step in again] == [0, 1]


class Two:
    """A loader of two DataLoaders with generators of their own, as most bilevel problems have them."""

    def __init__(self):
        one, other = torch.Generator().manual_seed(3), torch.Generator().manual_seed(4)
        self.train = DataLoader(TensorDataset(ROWS), 2, shuffle=True, generator=one)
        self.rest = {"valid": DataLoader(TensorDataset(ROWS), 2, shuffle=True, generator=other)}

    def __iter__(self):
        for (a,), (b,) in zip(self.train, self.rest["valid"], strict=True):
            yield bl.Batches(a.mean(0), b.mean(0))


KEPT = functools.partial(read_by_two, 0, num_workers=1, persistent_workers=True)
LOADERS = {
    "two loaders": Two,
    "kept workers": KEPT,
    "kept workers, seeded": lambda: KEPT(generator=torch.Generator().manual_seed(3)),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_the_second_pass_is_reached_again(tmp_path, kind):
    again, whole = stopped_and_whole(tmp_path, lambda: made(ESTIMATOR, LOADERS[kind](), epochs=3), 6)
    assert again == whole


class Weighted:
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, y, x, batch):
        return self.weight * inner_loss(y, x, batch)

    def method(self, y, x, batch):
        return self(y, x, batch)


def closed_over(value):
    def loss(y, x, batch):
        return (0 if value is None else 1) * inner_loss(y, x, batch)

    return bl.Problem(loss, outer_loss)


def moved_by(optimizer, projection):
    return lambda xs, lr: bl.outer.Projected(optimizer([*xs], lr=lr), projection)


def in_two_groups(rate):
    def optimizer(xs, lr):
        first, second = xs
        return torch.optim.SGD([{"params": [first]}, {"params": [second], "lr": rate}], lr=lr)

    return optimizer


def frozen(seed):
    torch.manual_seed(seed)
    return torch.nn.Linear(2, 2).requires_grad_(False)


def learned(net, loss):
    return bl.Learner(net, loss).problem


TANH, RELU = (torch.nn.Sequential(torch.nn.Linear(4, 2), each) for each in (torch.nn.Tanh(), torch.nn.ReLU()))
L1, MSE = torch.nn.functional.l1_loss, torch.nn.functional.mse_loss
SETTINGS = {
    "a number": (
        {"problem": closed_over(1.5)},
        {"problem": closed_over(2.5)},
        r"inner_loss\.value was 1\.5 and is 2\.5",
    ),
    "data": ({"problem": closed_over(C)}, {"problem": closed_over(C + 1)}, r"inner_loss\.value was a tensor"),
    "many data": ({"problem": closed_over([C] * 200)}, {"problem": closed_over([C + 1] * 200)}, "was list of 200"),
    "a layer": ({"problem": closed_over(TANH)}, {"problem": closed_over(RELU)}, r"Tanh\(\).* and is .*ReLU\(\)"),
    "a frozen net": (
        {"problem": closed_over(frozen(0))},
        {"problem": closed_over(frozen(1))},
        r"value\.weight was a te",
    ),
    "an object": (
        {"problem": bl.Problem(Weighted(1.0), outer_loss)},
        {"problem": bl.Problem(Weighted(2.0), outer_loss)},
        r"inner_loss\.weight was 1\.0 and is 2\.0",
    ),
    "a method": (
        {"problem": bl.Problem(Weighted(1.0).method, outer_loss)},
        {"problem": bl.Problem(Weighted(2.0).method, outer_loss)},
        r"inner_loss\.__self__\.weight was 1\.0 and is 2\.0",
    ),
    "a partial": (
        {"clip": functools.partial(torch.nn.utils.clip_grad_value_, clip_value=1.0)},
        {"clip": functools.partial(torch.nn.utils.clip_grad_value_, clip_value=2.0)},
        r"clip\.keywords\['clip_value'\] was 1\.0 and is 2\.0",
    ),
    "a set": (
        {"optimizer": moved_by(torch.optim.Adam, bl.outer.Box(-1, 1))},
        {"optimizer": moved_by(torch.optim.Adam, bl.outer.Box(-2, 1))},
        r"optimizer\.projections\.low was -1",
    ),
    "a group": (
        {"optimizer": in_two_groups(0.1)},
        {"optimizer": in_two_groups(0.2)},
        r"param_groups\[1\]\['lr'\] was 0\.1 and is 0\.2",
    ),
}


def loaded_into(before, now):
    made(ESTIMATOR, Draws(2), **now).load_state_dict(made(ESTIMATOR, Draws(2), **before).state_dict())


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.filterwarnings("error")
def test_other_settings_are_said(kind):
    before, now, message = SETTINGS[kind]
    loaded_into(before, before)
    with pytest.warns(UserWarning, match=message):
        loaded_into(before, now)


def test_a_learner_of_another_loss_or_net_is_said():
    before = {"problem": learned(TANH, MSE), "inner": None}
    for now, message in (
        (learned(TANH, L1), "mse_loss and is .*l1_loss"),
        (learned(RELU, MSE), "Tanh.* and is .*ReLU"),
    ):
        with pytest.warns(UserWarning, match=message):
            loaded_into(before, before | {"problem": now})


def test_a_projected_optimizer_of_another_kind_is_refused():
    box = bl.outer.Box(-2, 2)
    with pytest.raises(ValueError, match="Projected of RMSprop, and has Projected of Adam"):
        loaded_into({"optimizer": moved_by(torch.optim.RMSprop, box)}, {"optimizer": moved_by(torch.optim.Adam, box)})


def test_tasks_of_another_dtype_are_said():
    loops = [made(ESTIMATOR, Sinusoids(tasks=1, steps=2, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    with pytest.warns(UserWarning, match="loader.dtype was torch.float32 and is torch.float64"):
        loops[1].load_state_dict(loops[0].state_dict())


def test_a_full_disk_is_said_and_the_loop_goes_on(tmp_path):
    loop = made(ESTIMATOR, Draws(2))
    loop.save(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        with pytest.raises(OSError, match="Is the disk full"):
            loop.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == ["000001-step-0.pt"]
    next(loop)
    assert loop.save(tmp_path).name == "000002-step-1.pt"


def test_what_cannot_be_read_is_passed_over(tmp_path):
    loop = made(ESTIMATOR, Draws(2))
    sound = loop.save(tmp_path)
    (tmp_path / "000009-step-3.pt").symlink_to("nowhere")
    (tmp_path / "000012-step-3.pt").mkdir()
    with pytest.raises(bl.loop.DamagedFileError, match="a link to a file that is not there"):
        loop.load(tmp_path)
    with pytest.warns(UserWarning, match="is a link to a file"):
        assert loop.load(tmp_path, older=True) == sound
    loop.save(tmp_path, keep=1)
    assert sorted(os.listdir(tmp_path)) == ["000010-step-0.pt", "000012-step-3.pt"]


def test_messages_say_what_works(tmp_path):
    loop = made(ESTIMATOR, Draws(2))
    with pytest.raises(FileNotFoundError, match="missing_ok=True begins anew"):
        loop.load(tmp_path / "none")
    (tmp_path / "run").touch()
    with pytest.raises(ValueError, match="run-steps'"):
        loop.save(tmp_path / "run")
