"""Prefetched: the batches of the loader behind it, in its order, from a thread that ends."""

import gc
import itertools
import threading
import time

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

import bilevel as bl
from bilevel.data import Episodes, Prefetched, Sinusoids
from bilevel.testing.storages import Storages

NAME = "bilevel prefetch"


def threads():
    return [thread for thread in threading.enumerate() if thread.name == NAME]


@pytest.fixture(autouse=True)
def none_left():
    """Every test leaves no thread behind."""
    assert threads() == []
    yield
    if threads():
        gc.collect()
    assert threads() == []


class Counted:
    """Counts what was asked of it; item i is i."""

    def __init__(self, count, pause=0.0, fails_at=None):
        self.count, self.pause, self.fails_at, self.asked = count, pause, fails_at, 0

    def __iter__(self):
        for i in range(self.count):
            self.asked = i + 1
            time.sleep(self.pause)
            if i == self.fails_at:
                raise ZeroDivisionError(f"item {i}")
            yield i


def wait_until(true):
    for _ in range(2000):
        if true():
            return
        time.sleep(0.002)
    raise AssertionError("it did not come about in 4 seconds")


@pytest.mark.parametrize("ahead", [1, 2, 7, 100])
def test_order_and_values_are_those_of_the_loader(ahead):
    def make():
        return Sinusoids(tasks=3, steps=20, seed=2)

    found = list(Prefetched(make(), ahead=ahead))
    assert len(found) == 20
    for a, b in zip(found, make(), strict=True):
        assert (a.index, a.task_ids) == (b.index, b.task_ids)
        assert all(
            torch.equal(c, d)
            for c, d in zip(tree_leaves((a.inner, a.outer)), tree_leaves((b.inner, b.outer)), strict=True)
        )


def test_a_loop_can_be_repeated():
    loader = Prefetched(Counted(5))
    assert list(loader) == list(loader) == [0, 1, 2, 3, 4]
    assert list(Prefetched([])) == []
    assert list(Prefetched([None, None])) == [None, None]


@pytest.mark.parametrize("ahead", [1, 3])
def test_it_runs_ahead_by_so_much_and_no_more(ahead):
    source = Counted(50)
    loop = iter(Prefetched(source, ahead=ahead))
    assert source.asked == 0  # nothing before the first batch is asked for
    assert next(loop) == 0
    wait_until(lambda: source.asked == 1 + ahead)
    time.sleep(0.02)
    assert source.asked == 1 + ahead
    assert next(loop) == 1
    wait_until(lambda: source.asked == 2 + ahead)
    loop.close()


def test_it_works_beside_the_loop():
    """Two sides that each wait 20 times: at the same time, so that the source is ahead whenever the loop comes back."""
    source = Counted(20)
    for item in Prefetched(source, ahead=2):
        wait_until(lambda item=item: source.asked >= min(item + 2, 20))


# --- errors and ends


def test_errors_come_after_the_batches_before_them():
    seen = []
    with pytest.raises(ZeroDivisionError, match="item 3") as caught:
        seen.extend(Prefetched(Counted(9, fails_at=3), ahead=9))  # extend keeps what came before an error
    assert seen == [0, 1, 2]
    assert "self.fails_at:" in str(caught.getrepr())  # the traceback reaches into the loader
    assert threads() == []


def test_errors_of_any_kind_come():
    class Broken:
        def __iter__(self):
            raise KeyError("no iterator")

    class Leaves:
        def __iter__(self):
            yield 1
            raise SystemExit(3)

    class Stateful(Counted):
        def state_dict(self):
            raise StopIteration  # must not look like the end

    with pytest.raises(KeyError):
        list(Prefetched(Broken()))
    with pytest.raises(SystemExit):
        list(Prefetched(Leaves()))
    with pytest.raises(RuntimeError):
        list(Prefetched(Stateful(3)))


def leave_by_break(loader):
    for _ in loader:
        break


def leave_by_error(loader):
    def loop():
        for _ in loader:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()


def leave_by_close(loader):
    loop = iter(loader)
    next(loop)
    loader.close()


def leave_by_with(loader):
    with loader:
        loop = iter(loader)
        next(loop)


def leave_before_the_first(loader):
    iter(loader)


def leave_at_the_end(loader):
    list(itertools.islice(loader, 9))


def leave_by_next(loader):
    next(iter(loader))


LEAVE = [
    leave_by_break,
    leave_by_error,
    leave_by_close,
    leave_by_with,
    leave_before_the_first,
    leave_at_the_end,
    leave_by_next,
]


@pytest.mark.parametrize("leave", LEAVE)
@pytest.mark.parametrize("ahead", [1, 5])
def test_no_thread_is_left_however_a_loop_ends(leave, ahead):
    loader = Prefetched(Counted(9), ahead=ahead)
    for _ in range(3):
        leave(loader)
        assert threads() == []
    assert list(loader) == list(range(9))


def test_a_loop_that_goes_on_after_close_says_so():
    for close in (Prefetched.close, lambda loader: next(iter(loader))):
        loader = Prefetched(Counted(30))
        loop = iter(loader)
        next(loop)
        close(loader)
        with pytest.raises(RuntimeError, match="one loop at a time"):
            next(loop)


def test_close_wakes_a_consumer_that_waits():
    gate = threading.Event()

    def slow():
        yield 0
        gate.wait(5)
        yield 1

    loader = Prefetched(slow())
    loop = iter(loader)
    assert next(loop) == 0
    timer = threading.Timer(0.05, lambda: (threading.Timer(0.05, gate.set).start(), loader.close()))
    timer.start()
    with pytest.raises(RuntimeError, match="one loop at a time"):
        next(loop)
    timer.join()


def test_the_interpreter_exits_with_a_loop_open():
    import subprocess
    import sys

    script = (
        "import itertools, torch, bilevel.data as d\n"
        "loop = iter(d.Prefetched(d.Sinusoids(tasks=4)))\n"
        "next(loop)\n"
        "keep = [loop]; keep.append(keep)\n"
        "print('done')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_a_generator_loses_nothing_to_an_early_end():
    loader = Prefetched((i for i in range(20)), ahead=4)
    assert list(itertools.islice(loader, 3)) == [0, 1, 2]
    assert list(itertools.islice(loader, 5)) == [3, 4, 5, 6, 7]
    leave_by_break(loader)
    assert list(loader) == list(range(9, 20))
    assert list(loader) == []


# --- states


def test_the_state_counts_what_was_received():
    loader = Prefetched(Sinusoids(tasks=2, steps=20), ahead=6)
    assert loader.state_dict()["position"] == 0
    for count, batches in enumerate(loader):
        assert batches.index == count
        wait_until(lambda count=count: loader.loader.position >= min(count + 4, 20))  # the loader itself is ahead
        assert loader.state_dict()["position"] == count + 1
        if count == 8:
            break
    state = loader.state_dict()
    assert state["position"] == 9
    for fresh in (Prefetched(Sinusoids(tasks=2, steps=20)), Sinusoids(tasks=2, steps=20), loader):
        fresh.load_state_dict(state)
        assert [batches.index for batches in fresh] == list(range(9, 20))
        assert fresh.state_dict()["position"] == 20
        assert [batches.index for batches in fresh] == list(range(20))


def test_every_cut_resumes_to_the_same_batches():
    whole = [batches.inner[0] for batches in Sinusoids(tasks=2, steps=6)]
    for cut in range(7):
        first = Prefetched(Sinusoids(tasks=2, steps=6), ahead=3)
        begun = [batches.inner[0] for batches in itertools.islice(first, cut)]
        second = Prefetched(Sinusoids(tasks=2, steps=6), ahead=3)
        second.load_state_dict(first.state_dict())
        found = begun + [batches.inner[0] for batches in second]
        assert len(found) == 6
        assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))


def test_a_state_loaded_in_the_middle_of_a_loop():
    loader = Prefetched(Sinusoids(tasks=2, steps=8))
    loop = iter(loader)
    assert next(loop).index == 0
    state = loader.state_dict()
    assert [next(loop).index, next(loop).index] == [1, 2]
    loader.load_state_dict(state)
    with pytest.raises(RuntimeError, match="one loop at a time"):
        next(loop)
    assert [batches.index for batches in loader] == [1, 2, 3, 4, 5, 6, 7]


def test_loaders_without_a_state():
    loader = Prefetched(Counted(3))
    for call in (loader.state_dict, lambda: loader.load_state_dict({})):
        with pytest.raises(TypeError, match="a Counted, has no"):
            call()


def test_iterate_takes_it():
    problem = bl.Problem(
        lambda y, x, batch: ((batch[0] * y[0] + y[1] - batch[1]) ** 2).mean(),
        lambda y, x, batch: ((batch[0] * y[0] + y[1] - batch[1]) ** 2).mean(),
        init=lambda x, batch: x,
    )
    found = []
    for wrap in (lambda loader: loader, Prefetched):
        x = torch.zeros(2, requires_grad=True)
        loop = bl.iterate(
            problem,
            x,
            None,
            wrap(Sinusoids(tasks=3, steps=6)),
            solver=bl.Descent(bl.SGD(lr=0.01), steps=2),
            estimator=bl.TaskMean(bl.Unrolled()),
            optimizer=torch.optim.SGD([x], lr=0.1),
        )
        for _ in loop:
            pass
        found.append(x.detach().clone())
    assert torch.equal(*found)


# --- what a thread does not inherit


def test_modes_of_the_consumer_reach_the_loader():
    class Looks:
        def __iter__(self):
            yield torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.zeros(1).device.type
            yield (torch.ones(2, 2) @ torch.ones(2, 2)).dtype

    assert list(Prefetched(Looks())) == [(True, False, "cpu"), torch.float32]
    with torch.no_grad():
        assert list(Prefetched(Looks())) == [(False, False, "cpu"), torch.float32]
    with torch.inference_mode():
        assert list(Prefetched(Looks())) == [(False, True, "cpu"), torch.float32]
    with torch.device("meta"):
        assert list(Prefetched(Looks())) == [(True, False, "meta"), torch.float32]

    with torch.autocast("cpu", torch.bfloat16):
        assert list(Prefetched(Looks())) == [(True, False, "cpu"), torch.bfloat16]


def test_loaders_of_other_makes():
    """A DataLoader with a worker, one Prefetched in another, and an iterator."""
    wanted = [batches.inner[0] for batches in Sinusoids(tasks=2, steps=5)]
    read = torch.utils.data.DataLoader(Sinusoids(tasks=2, steps=5), batch_size=None, num_workers=1)
    nested = Prefetched(Prefetched(Sinusoids(tasks=2, steps=5)))
    mapped = Prefetched(itertools.islice(Sinusoids(tasks=2), 5))
    for loader in (Prefetched(read), nested, mapped):
        found = [batches.inner[0] for batches in loader]
        assert len(found) == 5
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    for batches in nested:
        assert nested.state_dict()["position"] == batches.index + 1


def test_dispatch_modes_see_what_the_loader_makes():
    class Makes:
        def __iter__(self):
            for _ in range(3):
                yield torch.zeros(1000)

    with FakeTensorMode():
        assert all(isinstance(made, FakeTensor) for made in Prefetched(Makes()))
    with Storages() as storages:
        for _ in Prefetched(Makes(), ahead=2):
            assert threads() == []
    assert storages.peak >= 4000


# --- devices


@pytest.mark.parametrize(
    "batch",
    [
        bl.Batches((torch.ones(2), torch.ones(3)), {"a": torch.ones(1)}, curvature=torch.ones(4), index=3),
        bl.Batches(bl.PerStep([torch.ones(2), torch.ones(2)]), None),
        [torch.ones(2), {"b": torch.ones(2), "c": "text"}],
        torch.ones(2),
    ],
)
def test_tensors_go_to_the_device_and_the_rest_stays(batch):
    (found,) = Prefetched([batch], device="meta")
    given, moved = (
        [(b.inner_at(0), b.outer, b.curvature) if isinstance(b, bl.Batches) else b for b in [each]]
        for each in (batch, found)
    )
    for a, b in zip(tree_leaves(given), tree_leaves(moved), strict=True):
        if isinstance(a, torch.Tensor):
            assert (b.device.type, b.shape) == ("meta", a.shape)
        else:
            assert a == b
    if isinstance(batch, bl.Batches):
        assert (found.index, found.task_ids) == (batch.index, batch.task_ids)
        assert isinstance(found.inner, bl.PerStep) == isinstance(batch.inner, bl.PerStep)
        assert not isinstance(batch.inner, bl.PerStep) or len(found.inner) == 2


def test_identities_stay_where_they_are():
    ids = torch.arange(2)
    (found,) = Prefetched([bl.Batches(torch.ones(2), torch.ones(2), index=ids, task_ids=ids)], device="meta")
    assert found.task_ids is ids
    assert found.index is ids
    (found,) = Prefetched([bl.Batches(ids, ids)])
    assert found.inner is ids


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("pin", [False, True])
def test_copies_to_cuda_are_whole(pin):
    def make():
        return Sinusoids(tasks=200, steps=30, support=500, query=500)

    for a, b in zip(Prefetched(make(), ahead=3, device="cuda", pin=pin), make(), strict=True):
        for here, there in zip(tree_leaves((a.inner, a.outer)), tree_leaves((b.inner, b.outer)), strict=True):
            assert here.is_cuda
            assert torch.equal((here * 1).cpu(), there)
        torch.randn(4000, 4000, device="cuda") @ torch.randn(4000, 4000, device="cuda")


# --- bad input


def test_bad_input():
    for ahead in (0, -1):
        with pytest.raises(ValueError, match=f"Prefetched was given ahead={ahead}"):
            Prefetched([], ahead=ahead)
    with pytest.raises(TypeError, match=r"ahead=1\.5; a whole number"):
        Prefetched([], ahead=1.5)
    with pytest.raises(TypeError, match="a int; an iterable of batches"):
        Prefetched(3)
    with pytest.raises(ValueError, match="page-locked memory is for a CUDA device"):
        Prefetched([], pin=True, device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device='cuda:1', and torch finds no CUDA device"):
            Prefetched([], device="cuda:1")
    assert len(Prefetched([1, 2])) == 2
    with pytest.raises(TypeError, match="no end"):
        len(Prefetched(Sinusoids()))
    with pytest.raises(ValueError, match="the state of another"):
        Prefetched(Sinusoids(seed=1)).load_state_dict(Sinusoids().state_dict())


def test_episodes_behind_it_are_read_in_the_thread():
    where = []

    class Dataset(torch.utils.data.Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, row):
            where.append(threading.current_thread().name)
            return torch.tensor([float(row)]), row % 2

    from bilevel.data import DatasetClasses

    data = DatasetClasses.of(Dataset(), labels=[row % 2 for row in range(20)])
    list(Prefetched(Episodes(data, tasks=2, way=2, shot=1, query=1, steps=2)))
    assert set(where) == {NAME}
