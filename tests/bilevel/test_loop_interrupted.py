"""A loop that is cut off loses nothing: it goes on where it was, and its bits are those of a run that was not."""

import os
import random
import signal

import pytest
import torch
from loop_runs import PROBLEM, Draws, bits, made, outer_loss, seeded

import bilevel as bl

ESTIMATOR = bl.MemoryReduced(steps=3, warm_inner=True, warm_adjoint=True)
STEPS = 5


def whole_run(**options):
    seeded(1)
    loop = made(ESTIMATOR, Draws(STEPS), **options)
    assert len(list(loop)) == -(-STEPS // options.get("accumulate", 1))
    return bits(loop.state_dict())


class Cut:
    """An outer loss that raises at its n-th call."""

    def __init__(self, call, error):
        self.call, self.error, self.calls = call, error, 0

    def __call__(self, y, x, batch):
        value = outer_loss(y, x, batch)  # (which draws)
        self.calls += 1
        if self.calls == self.call:
            raise self.error
        return value


def test_left_with_break_and_by_an_exception_in_the_body():
    seeded(1)
    loop = made(ESTIMATOR, Draws(STEPS))
    for step in loop:
        if step.index == 1:
            break
    with pytest.raises(ZeroDivisionError):
        [step.index / 0 for step in loop]
    assert [step.index for step in loop] == [3, 4]
    assert bits(loop.state_dict()) == whole_run()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("call", [1, 2, 4, 5])
def test_cut_off_in_a_hypergradient(tmp_path, error, call, accumulate):
    whole = whole_run(accumulate=accumulate)
    seeded(1)
    cut = Cut(call, error("now"))
    loop = made(ESTIMATOR, Draws(STEPS), problem=bl.Problem(PROBLEM.inner_loss, cut), accumulate=accumulate)
    with pytest.raises(error):
        list(loop)
    made_so_far = loop.index
    loop.save(tmp_path)
    assert [step.index for step in loop] == list(range(made_so_far, -(-STEPS // accumulate)))
    assert strip(bits(loop.state_dict())) == strip(whole)
    again = made(ESTIMATOR, Draws(STEPS), accumulate=accumulate)
    with pytest.warns(UserWarning, match="problem.outer_loss was Cut and is loop_runs.outer_loss"):
        again.load(tmp_path)
    assert len(list(again)) == -(-STEPS // accumulate) - made_so_far
    assert strip(bits(again.state_dict())) == strip(whole)


def strip(state):
    """Without what the losses are called."""
    return {name: value for name, value in state.items() if name != "settings"}


class Fails(Draws):
    """A loader that raises once, before its third batch."""

    failed = False

    def __iter__(self):
        for number, batches in enumerate(super().__iter__()):
            if number == 2 and not self.failed:
                self.failed = True
                raise ConnectionError("the disk is away")
            yield batches


@pytest.mark.parametrize("accumulate", [1, 3])
def test_cut_off_in_the_loader(accumulate):
    whole = whole_run(accumulate=accumulate)
    seeded(1)
    loop = made(ESTIMATOR, Fails(STEPS), accumulate=accumulate)
    with pytest.raises(ConnectionError):
        list(loop)
    list(loop)
    assert strip(bits(loop.state_dict())) == strip(whole)


def test_a_generator_that_raised_is_not_taken_for_one_that_ended():
    loop = made(ESTIMATOR, iter(Fails(STEPS)))
    with pytest.raises(ConnectionError):
        list(loop)
    with pytest.raises(RuntimeError, match="can be read only once, so the loop cannot go on"):
        next(loop)
    assert loop.index == 2
    assert loop.state_dict()["data"]["count"] == 2  # saved it can be


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_at_which_a_hypergradient_fails_comes_again_until_it_is_skipped(accumulate):
    numbers = [1.0, 1.0, 1.0, torch.nan, 1.0, 1.0]
    loader = [bl.Batches(torch.full((4,), value), torch.full((4,), value)) for value in numbers]
    loop = made(ESTIMATOR, loader, accumulate=accumulate)
    for _ in range(2):
        with pytest.raises(bl.BilevelError, match=f"outer step {3 // accumulate}: .*was not moved"):
            list(loop)
        assert loop.index == 3 // accumulate
    x = bits(loop.outer)
    loop.skip()
    assert bits(loop.outer) == x
    assert [step.index for step in loop] == ([3, 4] if accumulate == 1 else [1])
    loop.skip()  # beyond the end there is nothing
    assert list(loop) == []


class Pressed(torch.optim.SGD):
    """Somebody presses Ctrl-C while one of two tensors has been moved."""

    def step(self, closure=None):
        x, *others = self.param_groups[0]["params"]
        with torch.no_grad():
            x -= 0.1 * x.grad
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(100):
                pass  # where Python looks for signals
            for other in others:
                other -= 0.1 * other.grad


@pytest.fixture
def keyboard():
    """Ctrl-C interrupts, as on a terminal: what runs in the background of a shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("keyboard")
def test_an_interrupt_waits_until_x_is_moved():
    handler = signal.getsignal(signal.SIGINT)
    seeded(1)
    loop = made(ESTIMATOR, Draws(STEPS), optimizer=Pressed)
    before = bits(loop.outer)
    for index in range(1, STEPS + 1):
        with pytest.raises(KeyboardInterrupt):
            next(loop)
        assert loop.index == index
    assert signal.getsignal(signal.SIGINT) is handler
    assert bits(loop.outer)["u"] != before["u"]
    assert bits(loop.outer)["v"] != before["v"]
    assert list(loop) == []


@pytest.mark.usefixtures("keyboard")
def test_interrupts_at_random_moments():
    """Wherever they come, in the midst of a hypergradient, of the loader or between two lines of the loop."""
    steps, times, count = 30, random.Random(1), 0
    seeded(1)
    whole = made(ESTIMATOR, Draws(steps))
    assert len(list(whole)) == steps
    seeded(1)
    loop = made(ESTIMATOR, Draws(steps))
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        while True:
            try:
                signal.setitimer(signal.ITIMER_REAL, times.uniform(0.0002, 0.004) if count < 100 else 0)
                list(loop)
                break
            except KeyboardInterrupt:
                count += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert count > 10
    assert loop.index == steps
    assert strip(bits(loop.state_dict())) == strip(bits(whole.state_dict()))


class Breaks(torch.optim.SGD):
    """Runs out of memory while it moves, once."""

    broken = False

    def step(self, closure=None):
        if not self.broken:
            self.broken = True
            with torch.no_grad():
                self.param_groups[0]["params"][0].zero_()
            raise torch.OutOfMemoryError("in the midst")
        super().step()


def test_a_loop_whose_x_was_left_half_moved_is_not_saved_but_loaded(tmp_path):
    loop = made(ESTIMATOR, Draws(STEPS), optimizer=Breaks)
    saved = loop.state_dict()
    with pytest.raises(torch.OutOfMemoryError):
        next(loop)
    for call in (loop.state_dict, lambda: loop.save(tmp_path), lambda: next(loop), loop.skip):
        with pytest.raises(
            RuntimeError, match=r"outer step 0 was cut off while x was being moved.* Load the last file"
        ):
            call()
    assert list(tmp_path.iterdir()) == []
    loop.load_state_dict(saved)
    assert [step.index for step in loop] == list(range(STEPS))


def test_saving_in_the_midst_of_a_step_is_refused(tmp_path):
    loops = []

    def loss(y, x, batch):
        loops[0].save(tmp_path)

    class Saves(Draws):
        def __iter__(self):
            loops[0].state_dict()
            return super().__iter__()

    for options in (
        {"problem": bl.Problem(PROBLEM.inner_loss, loss)},
        {"loader": Saves(2)},
        {"clip": lambda xs: next(loops[0])},
    ):
        loops[:] = [made(ESTIMATOR, options.pop("loader", Draws(2)), **options)]
        with pytest.raises(
            RuntimeError, match=r"OuterLoop cannot .*: a step is being made, or its state is read\. Do it"
        ):
            next(loops[0])
