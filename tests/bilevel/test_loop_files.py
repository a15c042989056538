"""Files of a loop: sealed, whole or not there; and what does not fit is refused before anything is changed."""

import collections
import dataclasses
import json
import random
import shutil
import zipfile

import pytest
import torch
from catalogue import ENTRIES
from loop_runs import FROM_X, PROBLEM, Draws, H, bits, inner_loss, made, outer_loss, seeded

import bilevel as bl
from bilevel.loop import DamagedFileError, plain
from bilevel.space import tree

ESTIMATOR = bl.MemoryReduced(steps=3, warm_inner=True, warm_adjoint=True)
STEPS = 6


def loop(**options):
    return made(options.pop("estimator", ESTIMATOR), options.pop("loader", Draws(STEPS)), **options)


@pytest.fixture
def saved(tmp_path):
    """A folder with three files, and the bits of each."""
    seeded(1)
    run, found = loop(), {}
    for _ in run:
        path = run.save(tmp_path / "run")
        found[path] = bits(run.state_dict())
    return tmp_path / "run", {path: state for path, state in found.items() if path.exists()}


def test_the_last_few_are_kept_by_the_order_of_saving(saved):
    folder, _ = saved
    assert sorted(path.name for path in folder.iterdir()) == [f"{n:06d}-step-{n}.pt" for n in (4, 5, 6)]
    run = loop()
    assert run.load(folder / "000004-step-4.pt").name == "000004-step-4.pt"
    next(run)
    assert run.save(folder, keep=2).name == "000007-step-5.pt"  # of another future: not taken for older than step 6
    assert sorted(path.name for path in folder.iterdir()) == ["000006-step-6.pt", "000007-step-5.pt"]
    assert run.load(folder).name == "000007-step-5.pt"
    for _ in range(3):
        run.save(folder, keep=None)
    assert len(list(folder.iterdir())) == 5


def test_a_file_is_read_as_weights_by_anybody(saved):
    folder, states = saved
    for path, state in states.items():
        assert bits(torch.load(path, weights_only=True)) == state
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
    run = loop()
    run.load(folder)
    assert bits(run.state_dict()) == state


def places(size):
    return [
        0,
        1,
        30,
        size // 3,
        size // 2,
        size - 200,
        size - 100,
        size - 70,
        size - 1,
        *random.Random(1).sample(range(size), 40),
    ]


def test_a_flipped_byte_or_a_cut_anywhere_is_seen_and_the_one_before_offered(saved):
    folder, states = saved
    newest, before = folder / "000006-step-6.pt", folder / "000005-step-5.pt"
    whole, run = newest.read_bytes(), loop()
    fresh = bits(run.state_dict())
    broken = [(place, whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :]) for place in places(len(whole))]
    broken += [(place, whole[:place]) for place in places(len(whole))] + [(-1, whole + b"x")]
    for place, contents in broken:
        newest.write_bytes(contents)
        with pytest.raises(DamagedFileError) as caught:
            run.load(folder)
        assert (caught.value.path, caught.value.sound) == (newest, before), place
        assert "Nothing was loaded. The newest whole one before it is" in str(caught.value)
        assert f"load({str(folder)!r}, older=True)" in str(caught.value)
    assert bits(run.state_dict()) == fresh
    with pytest.warns(UserWarning, match=r"000006-step-6.pt is damaged.*; OuterLoop goes on with .*000005-step-5"):
        assert run.load(folder, older=True) == before
    assert bits(run.state_dict()) == states[before]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_text("a,b\n" * 100), r"was not written by OuterLoop\.save"),
        (lambda path: torch.save({"weights": torch.ones(3)}, path), r"was not written by OuterLoop\.save"),
        (lambda path: path.write_bytes(path.read_bytes()[:-60]), "is damaged: it was cut short"),
        (lambda path: path.write_bytes(path.read_bytes()[:90]), "is damaged: it was cut short"),
    ],
)
def test_empty_foreign_and_cut_files(saved, contents, message):
    folder, states = saved
    paths = sorted(states)
    for path in paths[1:]:
        contents(path)
    with pytest.raises(DamagedFileError, match=message) as caught:
        loop().load(paths[2])
    assert caught.value.sound == paths[0]
    contents(paths[0])
    with pytest.raises(DamagedFileError, match="There is no whole one before it"):
        loop().load(folder, older=True)


def test_a_file_that_is_renamed_or_alone(saved, tmp_path):
    folder, _ = saved
    shutil.copy(folder / "000005-step-5.pt", tmp_path / "best.pt")
    run = loop()
    run.load(tmp_path / "best.pt")
    assert run.index == 5
    shutil.rmtree(folder)
    for path in (folder, tmp_path / "other"):
        with pytest.raises(FileNotFoundError):
            run.load(path)
        assert run.load(path, missing_ok=True) is None
        path.mkdir()
    with pytest.raises(FileNotFoundError, match="found no file of its save"):
        run.load(folder)
    assert run.load(folder, missing_ok=True) is None
    assert run.index == 5


def test_what_fails_while_it_is_written_leaves_what_was_there(saved, monkeypatch):
    folder, states = saved
    run = loop()
    (folder / "bilevel-outer-loop-1.tmp").write_bytes(b"of a process that was killed")

    def full(contents, path):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        run.save(folder)
    assert set(folder.iterdir()) == set(states)


@pytest.mark.parametrize("keep", [0, -1, 1.5, True])
def test_arguments_of_save(tmp_path, keep):
    with pytest.raises(ValueError, match=r"keep=.*at least 1, or None"):
        loop().save(tmp_path, keep=keep)
    with pytest.raises(ValueError, match=r"a folder was needed, .* write save\('run'\)"):
        loop().save("run.pt")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="a folder was needed"):
        loop().save(tmp_path / "file")


def test_a_state_is_a_copy():
    """Neither later steps nor what others do to it reach from one to the other."""
    seeded(1)
    run = loop()
    next(run)
    state = run.state_dict()
    before = bits(state)
    next(run)
    assert bits(state) == before
    run.load_state_dict(state)
    now = bits(run.state_dict())
    assert now == before
    scribble(state)
    assert bits(run.state_dict()) == now
    next(run)


def scribble(value):
    if isinstance(value, torch.Tensor):
        value.zero_()
    elif isinstance(value, dict):
        for part in value.values():
            scribble(part)
        value.clear()
    elif isinstance(value, (list, tuple)):
        for part in value:
            scribble(part)


# What does not fit


def after_two(**options):
    seeded(1)
    run = loop(**options)
    next(run), next(run)
    return run.state_dict()


def with_outer(x, **options):
    moved = options.pop("optimizer", torch.optim.Adam)(options.pop("held", x.values()), lr=0.05)
    y = {"a": torch.tensor([0.1, 0.2]), "b": torch.tensor([-0.1, 0.3])}
    return bl.OuterLoop(
        PROBLEM,
        x,
        y,
        Draws(STEPS),
        solver=bl.Descent(bl.SGD(lr=0.3), steps=4),
        estimator=ESTIMATOR,
        optimizer=moved,
        tolerate=set(bl.Status),
        **options,
    )


def leaves(**shapes):
    return {name: torch.zeros(shape, dtype=dtype).requires_grad_() for name, (shape, dtype) in shapes.items()}


F, DOUBLE = torch.float32, torch.float64
NOT_FITTING = {
    "another shape": (lambda: with_outer(leaves(u=(4, F), v=(1, F))), r"\['u'\] was \(3,\) .* and is \(4,\)"),
    "another name": (lambda: with_outer(leaves(u=(3, F), w=(1, F))), r"\['v'\] was .* and is not there"),
    "another dtype": (
        lambda: with_outer(leaves(u=(3, DOUBLE), v=(1, DOUBLE))),
        r"was \(3,\) torch.float32 and is \(3,\) torch.float64",
    ),
    "another order": (lambda: with_outer(leaves(v=(1, F), u=(3, F))), r"in this order.* \[\[.*'u'.*'v'.*\]\], and has"),
    "another optimizer": (lambda: loop(optimizer=torch.optim.SGD), "optimizer Adam, and has SGD"),
    "another inner variable": (
        lambda: loop(problem=FROM_X, inner=None),
        "saved with one as inner variable and has none",
    ),
    "another estimator": (lambda: loop(estimator=bl.estimators.SOBA(0.5)), "estimator MemoryReduced, and has SOBA"),
    "no scheduler": (lambda: loop(scheduler=[]), r"schedulers \['StepLR'\], and has \[\]"),
    "a generator": (
        lambda: loop(generators=[torch.Generator()]),
        r"generators \[\], and has \['torch.Generator on cpu'",
    ),
    "more to save": (lambda: loop(also={"more": torch.nn.Linear(1, 1)}), r"names in also \[\], and has \['more'\]"),
}


@pytest.mark.parametrize("why", NOT_FITTING)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(why):
    make, message = NOT_FITTING[why]
    state, run = after_two(), make()
    before = bits(run.state_dict())
    with pytest.raises(ValueError, match=message):
        run.load_state_dict(state)
    assert bits(run.state_dict()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": dataclasses.replace(ESTIMATOR, tol=1e-3)}, r"estimator\.tol was .* and is 0\.001"),
        ({"solver": bl.Descent(bl.SGD(lr=0.2), steps=4)}, r"lr was 0\.3 and is 0\.2"),
        ({"carry": False}, "carry was True and is False"),
        ({"accumulate": 2}, "accumulate was 1 and is 2"),
        ({"clip": 1.0}, r"clip was None and is 1\.0"),
        ({"loader": [bl.Batches(H[0], H[1])] * 6}, "loader was Draws and is list"),
        ({"optimizer": lambda xs, lr: torch.optim.Adam(xs, lr=0.01)}, r"optimizer\.lr was 0\.05 and is 0\.01"),
        (
            {"problem": bl.Problem(inner_loss, lambda y, x, b: outer_loss(y, x, b))},
            r"problem\.outer_loss was loop_runs",
        ),
    ],
)
def test_other_settings_are_told(options, message):
    first = loop()
    state, run = first.state_dict(), loop(**options)
    with pytest.warns(UserWarning, match=f"other settings than it is loaded with.*{message}"):
        run.load_state_dict(state)
    same = loop()
    same.load_state_dict(state)  # without a word


def test_another_step_size_of_a_scheduler_is_told():
    def make(size):
        x = torch.zeros(3, requires_grad=True), torch.zeros(1, requires_grad=True)
        moved = torch.optim.SGD(x, lr=0.1)
        steps = torch.optim.lr_scheduler.StepLR(moved, size)
        return bl.OuterLoop(
            PROBLEM,
            {"u": x[0], "v": x[1]},
            None,
            [],
            solver=bl.Descent(bl.SGD(lr=0.1), 1),
            estimator=ESTIMATOR,
            optimizer=moved,
            scheduler=[steps],
        )

    with pytest.warns(UserWarning, match=r"scheduler\[0\]\.state_dict\(\)\['step_size'\] was 2 and is 3"):
        make(3).load_state_dict(make(2).state_dict())


@pytest.mark.parametrize("state", [None, {}, {"model": 1}, [1], json.loads("{}")])
def test_foreign_states(state):
    with pytest.raises(TypeError, match="a state that is none of its own"):
        loop().load_state_dict(state)


def test_a_state_of_a_later_version():
    state = loop().state_dict() | {"version": 2}
    with pytest.raises(ValueError, match="of version 2; this library reads version 1"):
        loop().load_state_dict(state)


# What else a step depends on


def test_objects_are_saved_along():
    average = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 1))
    run = loop(also={"average": average})
    state = run.state_dict()
    with torch.no_grad():
        average.module.weight.zero_()
    run.load_state_dict(state)
    assert not torch.equal(average.module.weight, torch.zeros(1, 2))

    class Odd:
        def state_dict(self):
            return {"what": object()}

        def load_state_dict(self, state):
            pass

    with pytest.raises(TypeError, match=r"was to save also\['odd'\]\['what'\], a object; a file holds tensors"):
        loop(also={"odd": Odd()}).state_dict()
    with pytest.raises(TypeError, match="objects with state_dict and load_state_dict were needed"):
        loop(also={"odd": 3})


def test_trees_that_a_file_cannot_hold_are_refused_when_it_is_saved(tmp_path):
    pair = collections.namedtuple("pair", "a b")
    problem = bl.Problem(
        lambda y, x, b: inner_loss({"a": y.a, "b": y.b}, x, b), lambda y, x, b: outer_loss({"a": y.a, "b": y.b}, x, b)
    )
    run = loop(problem=problem, inner=pair(torch.zeros(2), torch.zeros(2)))
    next(run)
    with pytest.raises(TypeError, match=r"was to save state\['inner'\], a pair; a file holds tensors, numbers"):
        run.save(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run = loop(problem=problem, inner=pair(torch.zeros(2), torch.zeros(2)), estimator=bl.FirstOrder())
    next(run)
    run.save(tmp_path / "run")  # y itself is no difficulty
    run.load(tmp_path / "run")
    assert isinstance(run.inner, pair)


@pytest.mark.filterwarnings("ignore:outer variable")
def test_tensors_that_are_shared_or_only_in_the_optimizer(tmp_path):
    def make():
        shared, other = torch.tensor([0.4]).requires_grad_(), torch.tensor([3.0]).requires_grad_()
        x = {"u": torch.tensor([0.5, -0.4, 0.3]).requires_grad_(), "v": shared, "again": shared}
        return with_outer(x, held=[x["u"], shared, other]), other

    seeded(1)
    (whole, other), saved = make(), None
    for step in whole:
        other.grad = torch.ones(1)  # moved by the next step's optimizer, which belongs to the user
        if step.index == 2:
            saved = whole.save(tmp_path)
    again, other = make()
    again.load(saved)
    for _ in again:
        other.grad = torch.ones(1)
    left, right = bits(again.state_dict()), bits(whole.state_dict())
    assert left["outer"] == right["outer"]
    assert again.outer["v"] is again.outer["again"]


def test_memories_of_a_wider_dtype_stay_so():
    """torch casts an optimizer's state to the dtype of its tensors when it loads."""

    class Wide(torch.optim.SGD):
        def step(self, closure=None):
            for x in self.param_groups[0]["params"]:
                sum_ = self.state[x].setdefault("sum", torch.zeros(x.shape, dtype=torch.float64))
                sum_ += x.grad.double() / 3
                x.data -= (0.1 * sum_).to(x)

    seeded(1)
    run = loop(optimizer=Wide)
    next(run), next(run)
    state = run.state_dict()
    again = loop(optimizer=Wide)
    again.load_state_dict(state)
    assert bits(again.state_dict()) == bits(state)
    assert state["optimizer"]["state"][0]["sum"].dtype is torch.float64


@pytest.mark.parametrize("label", ["soba", "saba", "meha", "lv-hba", "f2sa"])
@pytest.mark.filterwarnings("ignore:OuterLoop\\(\\) stepped through", "ignore:.*other settings.*device was cpu")
def test_counters_stay_on_the_host_wherever_a_state_goes(label):
    run = loop(estimator=bl.TaskMean(ENTRIES[label].estimator), loader=Draws(2, 2), tasks=2)
    next(run)
    state = run.state_dict()
    there = plain.placed(state["state"], torch.device("meta"), state["on_host"])["state"]
    devices = {name: {leaf.device.type for leaf in tree.tensors(part)} for name, part in there.items()}
    host = {name for name, found in devices.items() if found == {"cpu"}}
    assert host == {"rounds", "calls", "inner_seen", "outer_seen"} & set(there)
    assert {name for name, found in devices.items() if found == {"meta"}} == set(there) - host - {"owner"}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("label", ["soba", "saba", "lv-hba", "memory reduced"])
@pytest.mark.filterwarnings("ignore:OuterLoop\\(\\) stepped through")
def test_a_run_on_a_gpu_goes_on_to_the_bit_and_moves_to_and_from_the_cpu(tmp_path, label):
    def on(device):
        return made(ENTRIES[label].estimator, [bl.Batches(H[0].to(device), H[1].to(device))] * STEPS, device=device)

    seeded(1)
    whole = on("cuda")
    for step in whole:
        if step.index == 2:
            file = whole.save(tmp_path)
    seeded(2)
    again = on("cuda")
    again.load(file)
    list(again)
    assert bits(again.state_dict()) == bits(whole.state_dict())
    for here, there in (("cuda", "cpu"), ("cpu", "cuda")):
        state, other = on(here), on(there)
        next(state)
        with pytest.warns(UserWarning, match=f"device was '?{here}'? and is '?{there}'?"):
            other.load_state_dict(state.state_dict())
        next(other)


def test_saved_before_the_first_step_and_saved_again_as_it_was_loaded(tmp_path):
    seeded(1)
    whole = loop()
    whole.save(tmp_path)
    list(whole)
    for seed in range(4):
        seeded(seed + 2)
        run = loop()
        run.load(tmp_path)
        run.save(tmp_path)  # no step since
        next(run)
        if seed % 2:
            run.save(tmp_path)
    run = loop()
    run.load(tmp_path)
    assert run.index == 2
    list(run)
    assert bits(run.state_dict()) == bits(whole.state_dict())
