"""Recorder: what it writes, when, and what is left of it when a loop ends badly."""

import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import types

import pytest
import torch
from bilevel_profiling.measurement.recorder import Recorder
from bilevel_profiling.meters.tensors import Tensors
from bilevel_profiling.records.record import Iteration, Phase, Record
from bilevel_profiling.records.records_file import scan
from bilevel_profiling.report.tensorboard import to_tensorboard

import bilevel as bl

KIB = 256  # float32 numbers


def recorded(path, items, body=lambda item: None, **options):
    with Recorder(path, **options) as recorder:
        for item in recorder.watch(items):
            body(item)
    return recorder


def logged(path, **metrics):
    """A run of one iteration that logs."""
    with Recorder(path) as recorder:
        for _ in recorder.watch(range(1)):
            recorder.log(**metrics)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.jsonl"


# What is written


def test_the_file_is_a_record_and_a_line_for_each_iteration(path):
    recorder = recorded(path, range(3), name="digits", label="mlp")
    head, *rest = lines(path)
    assert (head["case"], head["estimator"], head["device"]) == ("digits", "mlp", "cpu")
    assert head["environment"]["torch"] == torch.__version__
    assert [line["iteration"]["index"] for line in rest] == [0, 1, 2]
    (found,) = scan(path).records
    assert found == recorder.record
    assert all(
        step.wall_seconds > 0 and step.status == "OK" and step.calls == {} and step.phases == {}
        for step in found.iterations
    )


def test_each_line_is_there_before_the_next_iteration_begins(path):
    def body(item):
        assert [step.index for step in scan(path).records[0].iterations] == list(range(item))

    recorded(path, range(4), body)


def test_an_iteration_is_making_the_item_and_the_body(path):
    def items():
        for _ in range(2):
            time.sleep(0.05)
            yield
            time.sleep(0.01)  # belongs to the next

    steps = recorded(path, items(), lambda item: time.sleep(0.03)).record.iterations
    assert len(steps) == 2
    assert all(0.08 <= step.wall_seconds < 0.2 for step in steps)
    assert steps[1].wall_seconds >= 0.09


def test_live_bytes_are_those_of_the_item_and_the_body(path):
    def items():
        for _ in range(2):
            yield torch.ones(2 * KIB)

    def body(item):
        item + 1

    peaks = [step.peak_tensor_bytes for step in recorded(path, items(), body).record.iterations]
    assert peaks == [4096, 4096]


def test_the_recorder_does_not_keep_an_item_alive(path):
    with Recorder(path) as recorder:
        for item in recorder.watch(torch.ones(KIB) for _ in range(2)):
            del item
            other = torch.ones(KIB)
            del other
    assert [step.peak_tensor_bytes for step in recorder.record.iterations] == [1024, 1024]


def test_a_data_loader_can_be_watched(path):
    dataset = torch.utils.data.TensorDataset(torch.arange(10.0), torch.arange(10))
    seen = []
    recorded(path, torch.utils.data.DataLoader(dataset, batch_size=4), lambda batch: seen.extend(batch[1].tolist()))
    assert seen == list(range(10))
    assert len(scan(path).records[0].iterations) == 3


@pytest.mark.parametrize(("every", "counted"), [(0, []), (1, [0, 1, 2, 3, 4, 5]), (3, [0, 1, 3]), (100, [0, 1])])
def test_live_bytes_are_counted_now_and_then(path, every, counted):
    found = recorded(path, range(6), lambda item: torch.ones(4), tensors_every=every).record
    assert [step.index for step in found.iterations if step.peak_tensor_bytes is not None] == counted
    assert any("not comparable" in note for note in found.notes) == (every > 0)


def test_the_highest_peak_is_told_by_origin(path):
    def body(item):
        torch.ones(KIB * (5 if item == 1 else 1)).exp()

    recorder = recorded(path, range(5), body, tensors_every=2)
    peaks = [step.peak_tensor_bytes for step in recorder.record.iterations]
    assert peaks == [2048, 10240, 2048, None, 2048]
    assert sum(entry.bytes for entry in recorder.alive) == 10240
    assert {entry.operator for entry in recorder.alive} == {"aten.ones", "aten.exp"}


def test_a_compiled_function_is_compiled_once_its_bytes_are_not_counted(path):
    """torch gives up on a function for good whose first call is under a dispatch mode, unless it is told to run it as
    it is."""
    compiled, at = [], []

    def backend(graph, inputs):
        compiled.append(at[-1])
        return graph.forward

    step = torch.compile(lambda x: (x.sin() + 1).cos(), backend=backend)

    def body(item):
        at.append(item)
        assert torch.equal(step(torch.zeros(4)), torch.ones(4).cos())

    peaks = [
        it.peak_tensor_bytes is not None for it in recorded(path, range(5), body, tensors_every=4).record.iterations
    ]
    assert peaks == [True, True, False, False, True]
    assert compiled == [2]


# bilevel.iterate


def loop(steps, lr=0.25, estimator=None):
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    problem = bl.Problem(lambda y, x, b: ((y - x) ** 2).sum(), lambda y, x, b: ((y - 3) ** 2).sum())
    batches = itertools.repeat(bl.Batches(None, None), steps)
    solver, optimizer = bl.Descent(bl.SGD(lr=lr), steps=5), torch.optim.SGD([x], lr=0.25)
    return bl.iterate(
        problem, x, torch.zeros(2), batches, solver=solver, estimator=estimator or bl.Unrolled(), optimizer=optimizer
    )


def test_a_step_of_iterate_says_more(path):
    plain = list(loop(3))
    with Recorder(path) as recorder:
        seen = list(recorder.watch(loop(3)))
    assert [step.index for step in seen] == [0, 1, 2]
    for mine, step in zip(recorder.record.iterations, plain, strict=True):
        assert mine.outer_loss == step.outer_loss.item()
        assert mine.inner_loss == step.hypergradient.inner_loss.item()
        assert mine.gradient_norm == pytest.approx(step.hypergradient.grad.double().norm().item(), rel=1e-12)
        assert mine.calls == step.hypergradient.stats["calls"]
        assert set(mine.phases) == {"inner", "hypergradient", "outer"}
        assert sum(phase.wall_seconds for phase in mine.phases.values()) <= mine.wall_seconds
    assert recorder.record.iterations[0].phases["inner"].peak_tensor_bytes > 0
    assert recorder.record.iterations[2].phases["inner"].peak_tensor_bytes is None


def test_the_bytes_of_a_step_are_those_that_the_meter_counts_around_it(path):
    plain = loop(2)
    with Tensors() as meter:
        next(plain)
    with Recorder(path) as recorder:
        for _ in recorder.watch(loop(2)):
            pass
    first = recorder.record.iterations[0]
    assert first.peak_tensor_bytes == meter.peak_bytes
    assert {name: phase.peak_tensor_bytes for name, phase in first.phases.items()} == {
        name: found["peak_tensor_bytes"] for name, found in meter.phases().items()
    }


def test_watching_does_not_change_the_loop(path):
    plain = [step.hypergradient.grad for step in loop(4)]
    with Recorder(path) as recorder:
        watched = [step.hypergradient.grad for step in recorder.watch(loop(4))]
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_a_step_that_fails_is_an_iteration_with_that_status(path):
    with Recorder(path) as recorder, pytest.raises(bl.BilevelError) as caught:
        list(recorder.watch(loop(3, lr=1e30)))
    (step,) = recorder.record.iterations
    assert step.status == caught.value.status.name
    assert bl.Status[step.status].failed
    assert step.outer_loss is None
    assert step.wall_seconds > 0


# What the user logs


def test_logged_numbers_are_in_their_iteration(path):
    def body(item):
        if item != 1:
            recorder.log(loss=torch.tensor([float(item)], requires_grad=True), accuracy=7)
            recorder.log(accuracy=item / 4, worst=float("nan"))

    with Recorder(path) as recorder:
        for item in recorder.watch(range(3)):
            body(item)
    first, second, third = (step.metrics for step in recorder.record.iterations)
    assert {**first, "worst": None} == {"loss": 0.0, "accuracy": 0.0, "worst": None}
    assert first["worst"] != first["worst"]
    assert second == {}
    assert third["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("value", "given"),
    [(torch.ones(3), "a tensor of shape (3,)"), ("0.5", "a str"), (None, "a NoneType"), ([1], "a list")],
)
def test_what_is_no_number_is_refused(path, value, given):
    with pytest.raises(TypeError) as caught:
        logged(path, loss=value)
    assert f"log() was given {given} as loss" in str(caught.value)


def test_there_is_nothing_to_log_outside_of_an_iteration(path):
    with Recorder(path) as recorder:
        for _ in recorder.watch(range(1)):
            pass
        with pytest.raises(RuntimeError, match="outside of an iteration"):
            recorder.log(loss=1.0)


# How loops end


def test_a_break_ends_an_iteration_like_any_other(path):
    with Recorder(path) as recorder:
        for item in recorder.watch(range(5)):
            recorder.log(item=item)
            if item == 2:
                break
        time.sleep(0.2)  # belongs to no iteration
        assert len(recorder.record.iterations) == 3
        for item in recorder.watch("ab"):
            recorder.log(item=ord(item))
    steps = recorder.record.iterations
    assert [(step.index, step.metrics["item"]) for step in steps] == [
        (0, 0),
        (1, 1),
        (2, 2),
        (3, ord("a")),
        (4, ord("b")),
    ]
    assert {step.status for step in steps} == {"OK"}
    assert steps[2].wall_seconds < 0.1
    assert torch.utils._python_dispatch._len_torch_dispatch_stack() == 0


class Stop(BaseException):
    """Like KeyboardInterrupt, which pytest would take for itself."""


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyError("x"), "ERROR"), (torch.OutOfMemoryError("CUDA"), "OUT_OF_MEMORY"), (Stop(), "INTERRUPTED")],
)
@pytest.mark.parametrize("inside", ["the body", "a function", "making the item"])
def test_an_exception_is_passed_on_and_ends_its_iteration_with_a_status(path, error, status, inside):
    def fail(item):
        if item == 1:
            raise error

    def items():
        for item in range(3):
            fail(item)
            yield item

    def train(recorder):
        for item in recorder.watch(range(3)):
            fail(item)

    def run(recorder):
        if inside == "making the item":
            for _ in recorder.watch(items()):
                pass
        elif inside == "a function":
            train(recorder)
        else:
            for item in recorder.watch(range(3)):
                if item == 1:
                    raise error

    def whole():
        with Recorder(path) as recorder:
            run(recorder)

    with pytest.raises(type(error)):
        whole()
    assert [(step.index, step.status) for step in scan(path).records[0].iterations] == [(0, "OK"), (1, status)]
    assert torch.utils._python_dispatch._len_torch_dispatch_stack() == 0


def test_an_exception_that_is_being_handled_is_seen(path):
    with Recorder(path) as recorder:
        try:
            for item in recorder.watch(range(3)):
                if item == 1:
                    raise MemoryError
        except MemoryError:
            assert [step.status for step in recorder.record.iterations] == ["OK", "OUT_OF_MEMORY"]
            for _ in recorder.watch(range(1)):
                pass
    assert [step.status for step in recorder.record.iterations] == ["OK", "OUT_OF_MEMORY", "OK"]


def test_an_exception_after_the_loop_is_not_blamed_on_its_last_iteration(path):
    def train(recorder):
        for item in recorder.watch(range(5)):
            if item == 2:
                break

    def whole(call):
        with Recorder(path, append=True) as recorder:
            if call:
                train(recorder)
            else:
                for item in recorder.watch(range(5)):
                    if item == 2:
                        break
            raise KeyError("evaluation")

    for call in (True, False):
        with pytest.raises(KeyError):
            whole(call)
    for record in scan(path).records:
        assert [step.status for step in record.iterations] == ["OK"] * 3


def test_a_loop_whose_iterator_is_still_held_is_finished_with_the_recorder(path):
    with Recorder(path) as recorder:
        held = recorder.watch(range(5))
        for _ in held:
            break
        with pytest.raises(RuntimeError, match="inside a loop that is watched already"):
            recorder.watch(range(2))
    assert [step.status for step in recorder.record.iterations] == ["OK"]
    with pytest.raises(RuntimeError, match="was closed while its loop went on"):
        next(held)
    assert torch.utils._python_dispatch._len_torch_dispatch_stack() == 0


@pytest.mark.parametrize("how", ["in the body", "side by side"])
def test_loops_that_are_watched_do_not_nest(path, how):
    def run():
        with Recorder(path) as recorder:
            if how == "side by side":
                list(zip(recorder.watch(range(2)), recorder.watch(range(2)), strict=True))
            for _ in recorder.watch(range(2)):
                recorder.watch(range(2))

    with pytest.raises(RuntimeError, match="watch one of the two"):
        run()


def test_an_empty_loop_is_a_record_without_iterations(path):
    assert recorded(path, []).record.iterations == ()
    with Recorder(path, append=True):
        pass
    assert [len(record.iterations) for record in scan(path).records] == [0, 0]


# The file


def test_a_file_that_exists_is_refused_or_added_to(path):
    recorded(path, range(2), name="first")
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"append=True\) to add a run to it"):
        recorded(path, range(2))
    assert path.read_bytes() == before
    recorder = recorded(path, range(3), name="second", append=True)
    assert path.read_bytes().startswith(before)
    assert [(record.case, len(record.iterations)) for record in scan(path).records] == [("first", 2), ("second", 3)]
    assert recorder.record.case == "second"


@pytest.mark.parametrize("torn", ['{"iteration":{"index":2,"out', '{"it', '{"case":"run","estim'])
def test_half_a_line_is_cut_off_before_a_run_is_added(path, torn):
    recorded(path, range(2))
    whole = path.read_bytes()
    path.write_bytes(whole + torn.encode())
    recorded(path, range(1), append=True)
    assert path.read_bytes().startswith(whole + b'{"case"')
    assert scan(path).damage == ()


def test_a_last_line_without_its_end_gets_one(path):
    recorded(path, range(2))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    recorded(path, range(1), append=True)
    assert [len(record.iterations) for record in scan(path).records] == [2, 1]


@pytest.mark.parametrize("text", ["my notes", "my notes\n", '{"a": 1}\n'])
def test_a_file_of_something_else_is_left_alone(path, text):
    path.write_text(text)
    with pytest.raises(ValueError, match=r"run\.jsonl, line 1: .* to no other"):
        recorded(path, range(1), append=True)
    assert path.read_text() == text


def test_the_folder_is_made(tmp_path):
    recorded(tmp_path / "a" / "b" / "run.jsonl", range(1))
    recorded(str(tmp_path / "c" / "run.jsonl"), range(1))
    assert (tmp_path / "a" / "b" / "run.jsonl").exists()


def test_a_recorder_is_used_once_and_inside_its_block(path):
    recorder = Recorder(path)
    assert not path.exists()
    with pytest.raises(RuntimeError, match="write `with Recorder"):
        recorder.watch(range(2))
    with recorder, pytest.raises(RuntimeError, match="the record begins with the first iteration"):
        _ = recorder.record
    with pytest.raises(RuntimeError, match="was used before"), recorder:
        pass


@pytest.mark.parametrize("every", [-1, True, 1.5, None])
def test_a_wrong_interval_is_refused(path, every):
    with pytest.raises(ValueError, match="tensors_every="):
        Recorder(path, tensors_every=every)


ENDLESS = """
    import itertools, sys, torch
    from bilevel_profiling.measurement.recorder import Recorder

    with Recorder(sys.argv[1], tensors_every=7) as recorder:
        for step in recorder.watch(itertools.count()):
            x = torch.ones(100) + step
            recorder.log(loss=x.sum())
"""


def test_a_run_can_be_read_while_it_runs_and_after_kill_9(path):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(ENDLESS), str(path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        seen = []
        deadline = time.monotonic() + 120
        while len(seen) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
            assert process.poll() is None
            now = [step for record in (scan(path).records if path.exists() else []) for step in record.iterations]
            if len(now) > (seen[-1] if seen else 20):
                seen.append(len(now))
        assert len(seen) == 3  # it grew while we looked
    finally:
        process.kill()
        ended = process.wait()
    assert ended == -signal.SIGKILL
    found = scan(path)
    assert all(damage.torn for damage in found.damage)
    (record,) = found.records
    assert len(record.iterations) >= seen[-1]
    assert [step.index for step in record.iterations] == list(range(len(record.iterations)))
    assert all(step.metrics["loss"] == 100 + 100 * step.index for step in record.iterations)
    recorded(path, range(2), append=True)
    assert [len(record.iterations) for record in scan(path).records] == [len(record.iterations), 2]


def test_many_iterations_cost_little_memory(path):
    """The recorder keeps no iteration: a long run does not grow."""
    import tracemalloc

    with Recorder(path, tensors_every=0) as recorder:
        watched = recorder.watch(range(1200))
        for _ in itertools.islice(watched, 200):
            pass
        tracemalloc.start()
        for _ in watched:
            pass
        gc.collect()  # meters are cycles
        grown = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    assert grown < 20_000
    assert len(recorder.record.iterations) == 1200


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_loop_on_a_gpu(path):
    weight = torch.ones(1000, device="cuda")
    found = recorded(path, range(3), lambda item: weight * 2).record
    assert found.device == "cuda"
    assert all(step.cuda_allocated_bytes >= 8000 for step in found.iterations)


# TensorBoard


def run_of(name="run", **fields):
    figures = {
        "wall_seconds": 0.5,
        "calls": {"hvp": 3},
        "phases": {"inner": Phase(wall_seconds=0.25)},
        "metrics": {"loss": 2.0},
    }
    steps = (
        Iteration(index=0, **figures),
        Iteration(index=1, outer_loss=float("nan"), status="NONFINITE", metrics={"loss": 1.0}),
    )
    return Record(
        case=name, estimator=fields.pop("estimator", ""), iterations=fields.pop("iterations", steps), **fields
    )


class Writer:
    """What torch.utils.tensorboard's SummaryWriter is told."""

    def __init__(self, log_dir):
        self.scalars, self.texts, self.closed = [], [], False
        made[log_dir] = self

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def add_text(self, name, text, step=None):
        self.texts.append((name, text, step))

    def close(self):
        self.closed = True


made = {}


@pytest.fixture
def board(monkeypatch):
    """A stand-in for torch.utils.tensorboard."""
    made.clear()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    return made


def test_iterations_become_scalars(board, tmp_path):
    assert to_tensorboard(run_of(), tmp_path) == [tmp_path / "run"]
    (writer,) = board.values()
    first = [("wall_seconds", 0.5, 0), ("inner/wall_seconds", 0.25, 0), ("calls/hvp", 3, 0), ("metrics/loss", 2.0, 0)]
    assert writer.scalars == [*first, ("metrics/loss", 1.0, 1)]
    assert writer.texts[-1] == ("status", "NONFINITE", 1)
    assert writer.closed


def test_every_record_is_a_run_with_a_folder_of_its_own(board, tmp_path):
    records = [
        run_of("a case", estimator="implicit CG", inner_steps=5),
        run_of("../x"),
        run_of("../x"),
        run_of("empty", iterations=()),
    ]
    assert [path.name for path in to_tensorboard(records, tmp_path)] == ["a_case-implicit_CG-K=5", "x", "x-2"]
    (tmp_path / "x").mkdir()
    with pytest.raises(FileExistsError, match="would draw the old run and the new one as one"):
        to_tensorboard(records, tmp_path)


def test_a_file_is_read_as_far_as_it_is_written(board, path, tmp_path):
    recorded(path, range(3))
    path.write_bytes(path.read_bytes() + b'{"iteration":{"ind')
    to_tensorboard(str(path), tmp_path / "board")
    (writer,) = board.values()
    assert [step for name, _, step in writer.scalars if name == "wall_seconds"] == [0, 1, 2]
    path.write_bytes(b"notes\n" + path.read_bytes())
    with pytest.raises(ValueError, match="line 1: "):
        to_tensorboard(path, tmp_path / "other")


def test_without_tensorboard_it_is_said_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        to_tensorboard(run_of(), tmp_path)


@pytest.mark.filterwarnings("default")
def test_tensorboard_itself_reads_what_is_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = to_tensorboard(run_of(), tmp_path)
    events = EventAccumulator(str(folder)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("metrics/loss")] == [(0, 2.0), (1, 1.0)]
    assert "outer_loss" not in events.Tags()["scalars"]


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("loop", ["zip", "by hand"])
def test_two_recorders_whose_loops_interleave_are_told_to_nest(tmp_path, loop, every):
    def run():
        with Recorder(tmp_path / "a", tensors_every=every) as a, Recorder(tmp_path / "b", tensors_every=every) as b:
            first, second = a.watch(range(3)), b.watch(range(3))
            if loop == "zip":
                for _ in zip(first, second, strict=True):
                    torch.ones(10)
            else:
                next(first), next(second), next(first)

    with pytest.raises(RuntimeError, match="one loop wholly into the body of the other"):
        run()
    with Tensors() as meter:  # nothing of theirs is left open
        torch.ones(10)
    assert meter.peak_bytes == 40
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_two_recorders_may_be_nested(tmp_path):
    with Recorder(tmp_path / "a", tensors_every=1) as a, Recorder(tmp_path / "b", tensors_every=1) as b:
        for _ in a.watch(range(2)):
            for _ in b.watch(range(2)):
                torch.ones(10)
    assert [step.peak_tensor_bytes for step in a.record.iterations] == [40, 40]
    assert [step.peak_tensor_bytes for step in b.record.iterations] == [40] * 4
