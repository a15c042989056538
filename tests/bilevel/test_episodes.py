"""Episodes: few-shot tasks as a loader, a pure function of seed and position, resumable."""

import copy
import itertools
import json
import pickle
import random

import pytest
import torch
from torch.utils._pytree import tree_leaves

import bilevel as bl
from bilevel.data import ClassSet, DatasetClasses, Episodes, ImageSet, RandomNets, Sinusoids, TaskStream
from bilevel.data.stream import Drawn


def numbered(counts, dtype=torch.float32, shape=(2,)):
    """Example i has the value i everywhere."""
    values = torch.arange(sum(counts)).to(dtype).reshape(-1, *[1] * len(shape)).expand(-1, *shape).clone()
    return ClassSet(values, tuple(counts), tuple(f"class {index}" for index in range(len(counts))))


def images(counts):
    return ImageSet(
        torch.randint(256, (sum(counts), 1, 4, 4), dtype=torch.uint8),
        tuple(counts),
        tuple(map(str, range(len(counts)))),
    )


STREAMS = {
    "episodes": lambda **given: Episodes(numbered([6] * 8), tasks=3, way=4, shot=2, query=3, **given),
    "sinusoids": lambda **given: Sinusoids(tasks=3, support=4, query=5, **given),
    "random nets": lambda **given: RandomNets(tasks=3, support=4, query=5, hidden=3, **given),
}
each_stream = pytest.mark.parametrize("make", STREAMS.values(), ids=STREAMS)


def same(one, other):
    """Bit for bit, identities too."""
    assert (one.index, one.task_ids) == (other.index, other.task_ids)
    leaves = [tree_leaves((batches.inner, batches.outer)) for batches in (one, other)]
    assert len(leaves[0]) == len(leaves[1]) == 4
    for a, b in zip(*leaves, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    return True


def different(one, other):
    return not torch.equal(one.inner[0], other.inner[0])


# --- what a batch is


@pytest.mark.parametrize("shot", [1, 5])
def test_support_and_query_are_disjoint_and_labels_are_classes(shot):
    data = numbered([20] * 10)
    batches = Episodes(data, tasks=6, way=5, shot=shot, query=7, seed=3)[0]
    (x, y), (query_x, query_y) = batches.inner, batches.outer
    assert (x.shape, query_x.shape) == ((6, 5 * shot, 2), (6, 35, 2))
    assert (y.shape, query_y.shape, y.dtype) == ((6, 5 * shot), (6, 35), torch.long)
    for task in range(6):
        rows = torch.cat([x[task, :, 0], query_x[task, :, 0]]).long()
        assert len(set(rows.tolist())) == len(rows)
        labels = torch.cat([y[task], query_y[task]])
        behind = [{int(row) // 20 for row in rows[labels == label]} for label in range(5)]
        assert [len(classes) for classes in behind] == [1] * 5
        assert len(set.union(*behind)) == 5
    assert y[0].tolist() == sorted(y[0].tolist())


def test_every_class_and_example_is_drawn_equally_often():
    """2000 tasks: each class is in way/N of them, each example in (shot + query)/count of those: four deviations."""
    data = numbered([5] * 6)
    seen = torch.zeros(30)
    loader = Episodes(data, tasks=100, way=3, shot=1, query=1, steps=20)
    for batches in loader:
        for x in (batches.inner[0], batches.outer[0]):
            seen += torch.bincount(x[..., 0].long().flatten(), minlength=30)
    share = seen / 2000
    expected = 3 / 6 * 2 / 5
    assert (share - expected).abs().max() < 4 * (expected * (1 - expected) / 2000) ** 0.5
    assert share.sum().item() == pytest.approx(6)


def test_unequal_counts_and_a_class_of_just_enough():
    data = numbered([3, 10, 3, 4])
    batches = Episodes(data, tasks=2, way=4, shot=1, query=2)[5]
    rows = torch.cat([batches.inner[0], batches.outer[0]], 1)[..., 0].long()
    owner = data.labels[rows]
    assert torch.equal(owner.sort(1).values, torch.arange(4).repeat_interleave(3).expand(2, -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_examples_keep_their_dtype_and_shape(dtype):
    data = ClassSet.of(torch.ones(8, 2, 3).to(dtype), [0, 1] * 4)
    x, _ = Episodes(data, tasks=1, way=2, shot=1, query=1)[0].inner
    assert (x.dtype, x.shape) == (dtype, (1, 2, 2, 3))


def test_dtypes_asked_for():
    scalars = ClassSet.of(torch.arange(8), [0, 1] * 4)
    x, _ = Episodes(scalars, tasks=2, way=2, shot=1, query=1, dtype=torch.float64)[0].inner
    assert (x.dtype, x.shape) == (torch.float64, (2, 2))
    x, _ = Episodes(images([4, 4]), tasks=2, way=2, shot=1, query=1)[0].inner
    assert (x.dtype, x.shape) == (torch.float32, (2, 2, 1, 4, 4))
    assert 0 <= x.min() <= x.max() <= 1
    assert x.max() > 0.5
    x, _ = Episodes(images([4, 4]), tasks=2, way=2, shot=1, query=1, dtype=torch.float64)[0].inner
    assert x.dtype == torch.float64


def test_members_say_what_a_task_has():
    data = numbered([6] * 8)
    loader = Episodes(data, tasks=2, way=3, shot=2, query=1, seed=4)
    batches = loader[7]
    assert loader.numbers(7) == [14, 15]
    for task, number in enumerate(loader.numbers(7)):
        members = loader.members(number)
        rows = [6 * int(each.name.split()[1]) + row for each in members for row in each.support]
        assert batches.inner[0][task, :, 0].tolist() == rows
        rows = [6 * int(each.name.split()[1]) + row for each in members for row in each.query]
        assert batches.outer[0][task, :, 0].tolist() == rows


def test_identities_are_of_classes_and_examples_not_of_where_they_stand():
    data = numbered([4] * 6)
    a = Episodes(data, tasks=50, way=6, shot=1, query=1, steps=4)
    ids = [each for batches in a for each in batches.task_ids]
    assert len(set(ids)) == 200
    assert all(isinstance(each, str) for each in ids)
    # The same classes and examples from a larger data set with another order are the same tasks.
    larger = numbered([4] * 9).select([8, 5, 4, 3, 2, 1, 0])
    chosen = larger.select([6, 5, 4, 3, 2, 1])
    assert chosen.names == data.names
    assert Episodes(chosen, tasks=50, way=6, shot=1, query=1)[0].task_ids == ids[:50]


# --- a pure function of seed and position


@each_stream
def test_a_batch_depends_on_seed_and_position_alone(make):
    state, python = torch.get_rng_state(), random.getstate()
    loader = make(seed=5, steps=4)
    loop = list(loader)
    assert [batches.index for batches in loop] == [0, 1, 2, 3]
    for index in (3, 0, 2):
        same(loop[index], make(seed=5)[index])
    assert different(loop[0], loop[1])
    assert different(loop[0], make(seed=6)[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python


@each_stream
def test_seeds_share_no_tasks(make):
    """1000 tasks of three seeds: random streams that overlapped by a shift would share some."""
    seen = [set(itertools.chain.from_iterable(make(seed=seed)[i].task_ids for i in range(111))) for seed in (0, 1, 333)]
    assert len(set.union(*seen)) == 3 * 333


@each_stream
def test_tasks_are_the_same_however_many_come_at_once(make):
    loader = make()
    one = copy.copy(loader)
    one.tasks = 1
    whole = loader[2]
    for task in range(3):
        single = one[6 + task]
        assert single.task_ids == [whole.task_ids[task]]
        assert torch.equal(single.outer[0][0], whole.outer[0][task])


def test_first_values_stay_as_they_are():
    """Pinned: a change of these changes every run that is resumed."""
    loader = Episodes(numbered([6] * 8), tasks=1, way=4, shot=2, query=3, seed=0)
    assert loader[0].inner[0][0, :, 0].tolist() == PINNED["rows"]
    assert loader[0].task_ids == PINNED["id"]
    amplitude, phase = Sinusoids(seed=0).parameters(0)
    assert (amplitude, phase) == pytest.approx(PINNED["sinusoid"], rel=1e-12)
    x, y = RandomNets(seed=0)[0].inner
    assert (x[0, 0].item(), y[0, 0].item()) == pytest.approx(PINNED["net"], rel=1e-5)


PINNED = {
    "rows": [20, 19, 25, 26, 41, 39, 47, 43],
    "id": ["19858da8ec2cee53"],
    "sinusoid": (3.806471621181589, 1.503865764961979),
    "net": (0.6912693977355957, -5.610606670379639),
}


@each_stream
def test_a_dataloader_reads_it_without_shuffling(make):
    loader = make(steps=5)
    read = torch.utils.data.DataLoader(loader, batch_size=None, shuffle=False)
    assert len(read) == 5
    assert all(same(a, b) for a, b in zip(read, make(steps=5), strict=True))
    shuffled = torch.utils.data.DataLoader(
        loader, batch_size=None, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    order = [batches.index for batches in shuffled]
    assert sorted(order) == [0, 1, 2, 3, 4]
    assert order != sorted(order)


@each_stream
def test_it_can_be_pickled_for_workers(make):
    loader = make(steps=3)
    same(pickle.loads(pickle.dumps(loader))[1], loader[1])


# --- resuming


@each_stream
def test_a_resumed_loop_gives_the_batches_of_an_unbroken_one(make):
    whole = list(make(steps=7))
    for cut in range(8):
        first = make(steps=7)
        begun = list(itertools.islice(first, cut))
        state = json.loads(json.dumps(first.state_dict()))  # as it comes back from a file
        assert state["position"] == cut
        second = make(steps=7)
        second.load_state_dict(state)
        assert second.position == cut
        rest = list(second)
        assert len(begun) + len(rest) == 7
        assert all(same(a, b) for a, b in zip([*begun, *rest], whole, strict=True))
        # A loop after that begins at the start, as every loop does.
        same(next(iter(second)), whole[0])


def test_the_state_is_of_what_was_handed_out():
    loader = Sinusoids(tasks=2, steps=3)
    assert loader.state_dict()["position"] == 0
    for count, _ in enumerate(loader):
        assert loader.position == count + 1
    assert loader.state_dict()["position"] == 3
    done = Sinusoids(tasks=2, steps=3)
    done.load_state_dict(loader.state_dict())
    assert list(done) == []
    longer = Sinusoids(tasks=2, steps=5)
    longer.load_state_dict(loader.state_dict())
    assert [batches.index for batches in longer] == [3, 4]


def test_seek_and_lengths():
    loader = Sinusoids(tasks=1, steps=4)
    assert len(loader) == 4
    loader.seek(3)
    assert [batches.index for batches in loader] == [3]
    assert [batches.index for batches in loader] == [0, 1, 2, 3]
    endless = Sinusoids(tasks=1)
    assert bool(endless)
    with pytest.raises(TypeError, match="no end, and so no length; give it steps"):
        len(endless)
    assert [batches.index for batches in itertools.islice(endless, 2)] == [0, 1]
    assert list(Sinusoids(tasks=1, steps=0)) == []
    assert not Sinusoids(tasks=1, steps=0)
    with pytest.raises(IndexError, match=r"no batch 4; Sinusoids has 4, from 0"):
        loader[4]


def test_one_iterator_goes_on_and_a_new_loop_begins_anew():
    loader = Sinusoids(tasks=1)
    stream = iter(loader)
    assert [batches.index for batches in itertools.islice(stream, 2)] == [0, 1]
    assert [batches.index for batches in itertools.islice(stream, 2)] == [2, 3]
    assert next(iter(loader)).index == 0


def test_a_run_with_iterate_resumes_to_the_same_numbers():
    data = ClassSet.of(torch.randn(60, 4, dtype=torch.float64), torch.arange(60) % 6)

    def make():
        return Episodes(data, tasks=3, way=3, shot=2, query=3, steps=8, seed=1)

    def loss(y, x, batch):
        return torch.nn.functional.cross_entropy(batch[0] @ y, batch[1])

    def run(x, loader):
        optimizer = torch.optim.SGD([x], lr=0.5)
        return bl.iterate(
            bl.Problem(loss, loss, init=lambda x, batch: x),
            x,
            None,
            loader,
            solver=bl.Descent(bl.SGD(lr=0.1), steps=2),
            estimator=bl.TaskMean(bl.Unrolled()),
            optimizer=optimizer,
        )

    whole = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    for _ in run(whole, make()):
        pass
    part, loader = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True), make()
    for step in run(part, loader):
        if step.index == 4:
            break
    state = loader.state_dict()
    assert state["position"] == 5
    second = make()
    second.load_state_dict(state)
    resumed = part.detach().clone().requires_grad_()
    for _ in run(resumed, second):
        pass
    assert torch.equal(resumed, whole)


# --- pools


@each_stream
@pytest.mark.parametrize(("pool", "tasks"), [(7, 3), (3, 3), (12, 4), (5, 1)])
def test_a_pool_comes_in_passes_without_repeats(make, pool, tasks):
    loader = make(pool=pool)
    loader.tasks = tasks
    per_pass = pool // tasks
    seen = set()
    for turn in range(4):
        ids = [each for i in range(per_pass) for each in loader[turn * per_pass + i].task_ids]
        assert len(set(ids)) == len(ids) == per_pass * tasks
        seen |= set(ids)
    assert len(seen) <= pool
    many = {each for i in range(40 * per_pass) for each in loader[i].task_ids}
    assert len(many) == pool


def test_the_same_task_of_a_pool_has_the_same_examples():
    loader = Episodes(numbered([6] * 8), tasks=2, way=4, shot=2, query=3, pool=4)
    found = {}
    for i in range(12):
        batches = loader[i]
        for task, name in enumerate(batches.task_ids):
            x = batches.inner[0][task]
            assert torch.equal(found.setdefault(name, x), x)
    assert len(found) == 4


def test_states_of_estimators_follow_the_tasks_of_a_pool():
    """All tasks of a pool in each batch, in a new order: TaskMean gives each its own state back."""
    loader = Sinusoids(tasks=4, pool=4, steps=3, dtype=torch.float64)
    orders = [tuple(batches.task_ids) for batches in loader]
    assert len(set(orders)) > 1
    problem = bl.Problem(
        lambda y, x, batch: ((batch[0] * y[0] + y[1] - batch[1]) ** 2).mean() + ((y - x) ** 2).sum(),
        lambda y, x, batch: ((batch[0] * y[0] + y[1] - batch[1]) ** 2).mean(),
        init=lambda x, batch: x,
    )
    state = None
    for batches in loader:
        hg = bl.hypergradient(
            problem,
            torch.zeros(2, dtype=torch.float64),
            None,
            batches,
            solver=bl.Descent(bl.SGD(lr=0.02), steps=200),
            estimator=bl.TaskMean(bl.Implicit(bl.CG(max_steps=5))),
            state=state,
        )
        state = hg.state
        assert not hg.status.failed


# --- bad input


def test_episodes_say_what_is_lacking():
    data = numbered([20, 20, 4])
    with pytest.raises(ValueError, match="Episodes was given way=5, but the data have 3 classes"):
        Episodes(data, way=5)
    with pytest.raises(ValueError, match=r"shot=1 and query=4, 5 examples of each class, but class 'class 2' has 4"):
        Episodes(data, way=2, shot=1, query=4)
    Episodes(data, way=2, shot=1, query=3)
    for name in ("tasks", "way", "shot", "query"):
        with pytest.raises(ValueError, match=f"Episodes was given {name}=0; at least 1 was needed"):
            Episodes(data, **{"way": 2, "shot": 1, "query": 1, name: 0})
        for value in (1.5, "2", True):
            with pytest.raises(TypeError, match=f"{name}={value!r}; a whole number"):
                Episodes(data, **{"way": 2, "shot": 1, "query": 1, name: value})
    with pytest.raises(ValueError, match="have 0 classes"):
        Episodes(data.select([]), way=1)
    with pytest.raises(ValueError, match="seed=-1; at least 0"):
        Episodes(data, way=2, shot=1, query=1, seed=-1)
    with pytest.raises(ValueError, match="steps=-1; at least 0"):
        Episodes(data, way=2, shot=1, query=1, steps=-1)
    with pytest.raises(ValueError, match="pool=3 and tasks=4; a batch needs 4 different tasks"):
        Episodes(data, way=2, shot=1, query=1, pool=3)
    with pytest.raises(ValueError, match="images in "):
        Episodes(images([4, 4]), way=2, shot=1, query=1, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"dtype='float32'; a torch\.dtype was needed"):
        Episodes(data, way=2, shot=1, query=1, dtype="float32")
    twins = ImageSet(images([4, 4]).images, (4, 4), ("a", "a"))
    with pytest.raises(ValueError, match="'a' stands more than once; a task could have the same class under two"):
        Episodes(twins, way=2, shot=1, query=1)


@pytest.mark.parametrize(
    "given",
    [
        torch.utils.data.TensorDataset(torch.zeros(3), torch.zeros(3)),
        (torch.zeros(3, 2), torch.zeros(3)),
        torch.zeros(3, 2),
        iter([]),
        {"a": torch.zeros(2)},
        None,
    ],
)
def test_data_that_are_not_by_class_are_refused(given):
    with pytest.raises(TypeError, match=r"examples by class were needed: ClassSet\.of\(x, y\).*of_dataset"):
        Episodes(given)


@each_stream
def test_positions_and_states_that_are_none(make):
    loader = make(steps=3)
    with pytest.raises(ValueError, match=r"position=-1; at least 0"):
        loader[-1]
    with pytest.raises(ValueError, match=r"position=-2; at least 0"):
        loader.seek(-2)
    with pytest.raises(ValueError, match=r"position=4; there are 3 batches"):
        loader.seek(4)
    with pytest.raises(TypeError, match=r"position=1\.5; a whole number"):
        loader.seek(1.5)
    with pytest.raises(TypeError, match=r"position=slice"):
        loader[1:2]
    for state in (None, 3, {"position": 2}, [1, 2]):
        with pytest.raises(TypeError, match=r"what its state_dict\(\) gave was needed"):
            loader.load_state_dict(state)
    state = loader.state_dict()
    for position, kind in ((-1, ValueError), (9, ValueError), ("1", TypeError), (None, TypeError)):
        with pytest.raises(kind, match="position="):
            loader.load_state_dict({**state, "position": position})
    with pytest.raises(ValueError, match=r"the state of another .*seed was 1 and is 0"):
        loader.load_state_dict(make(seed=1, steps=3).state_dict())
    with pytest.raises(ValueError, match=r"pool was 9 and is None"):
        loader.load_state_dict(make(pool=9).state_dict())
    assert loader.position == 0


def test_the_state_of_another_is_refused():
    data = numbered([6] * 8)
    state = Episodes(data, way=4, shot=2, query=3).state_dict()
    others = {
        "way was 4 and is 3": Episodes(data, way=3, shot=2, query=3),
        "shot was 2 and is 1": Episodes(data, way=4, shot=1, query=3),
        "query was 3 and is 2": Episodes(data, way=4, shot=2, query=2),
        "tasks was 4 and is 5": Episodes(data, tasks=5, way=4, shot=2, query=3),
        "data was ": Episodes(data.select(range(1, 8)), way=4, shot=2, query=3),
        "a state of Episodes; a state of its own": Sinusoids(),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="split was 'train' and is 'test'"):
        RandomNets(split="test").load_state_dict(RandomNets().state_dict())
    with pytest.raises(ValueError, match=r"body_std was 1\.0 and is 0\.5"):
        RandomNets(body_std=0.5).load_state_dict(RandomNets().state_dict())
    # What does not change the tasks may change.
    Episodes(data, way=4, shot=2, query=3, steps=9, dtype=torch.float64).load_state_dict(state)


def test_a_family_of_ones_own():
    class Lines(TaskStream):
        def __init__(self, *, tasks=2, seed=0, steps=None, pool=None, device="cpu"):
            super().__init__(tasks=tasks, seed=seed, steps=steps, pool=pool, device=device)

        def settings(self):
            return {}

        def draw(self, numbers):
            slopes = torch.tensor([self.generator("slope", number).gauss(0, 1) for number in numbers])
            x = torch.linspace(0, 1, 4).expand(len(numbers), 4)
            pair = x, x * slopes[:, None]
            return Drawn(pair, pair, [self._identity(number) for number in numbers])

    loader = Lines(steps=2)
    assert [batches.inner[1].shape for batches in loader] == [(2, 4)] * 2
    with pytest.raises(TypeError, match="abstract"):
        TaskStream(tasks=1, seed=0, steps=None, pool=None, device="cpu")


def test_shapes_are_known_under_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        data = ImageSet(torch.zeros(12, 1, 4, 4, dtype=torch.uint8), (6, 6), ("a", "b"))
        batches = Episodes(data, tasks=2, way=2, shot=1, query=3)[0]
        assert batches.outer[0].shape == (2, 6, 1, 4, 4)
        assert Sinusoids(tasks=2)[0].inner[0].shape == (2, 10, 1)
        assert RandomNets(tasks=2)[0].inner[0].shape == (2, 10, 1)


def test_default_devices_do_not_leak_in():
    data = numbered([6] * 8)
    here = Episodes(data, way=4, shot=2, query=3)[0]
    with torch.device("meta"):
        same(Episodes(data, way=4, shot=2, query=3)[0], here)
        same(Sinusoids()[0], Sinusoids()[0])
        assert Sinusoids()[0].inner[0].device.type == "cpu"
        assert RandomNets()[0].inner[0].device.type == "cpu"
    assert Sinusoids(device="meta")[0].inner[0].device.type == "meta"


def test_a_dataset_is_read_when_drawn():
    class Counting(torch.utils.data.Dataset):
        reads = 0

        def __len__(self):
            return 40

        def __getitem__(self, row):
            Counting.reads += 1
            return torch.full((3,), float(row)), row % 4

    data = DatasetClasses.of(Counting(), labels=[row % 4 for row in range(40)])
    assert Counting.reads == 0
    batches = Episodes(data, tasks=2, way=3, shot=1, query=2)[0]
    assert Counting.reads == 2 * 3 * 3
    whole = ClassSet.of_dataset(Counting())
    same(batches, Episodes(whole, tasks=2, way=3, shot=1, query=2)[0])
