"""Where the numbers of a run go. TensorBoard, wandb and mlflow are used where they are installed, and stood in for by
what has their signatures everywhere."""

import glob
import json
import math
import sys
import types
from typing import ClassVar

import pytest
import torch

import bilevel as bl
from bilevel.loop import JSONLines, MLflow, Sink, TensorBoard, WandB, values


def run_through(make, checkpoints=True):
    """Steps 0 to 6, killed; then from the checkpoint after step 3 on to step 8: steps 4, 5, 6 come twice."""
    first = make(False)
    for step in range(7):
        first.log(step, {"loss": 10.0 - step})
    second = make(True)
    for step in range(4, 9):
        second.log(step, {"loss": 10.0 - step})
    second.close()
    first.close()  # (killed, it would not be)
    return [(step, 10.0 - step) for step in range(9)]


# --------------------------------------------------------------------------------------------------- JSON lines


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines_keep_no_step_twice(tmp_path):
    path = tmp_path / "deep" / "run.jsonl"
    expected = run_through(lambda resume: JSONLines(path, resume=resume))
    assert [(line["step"], line["loss"]) for line in read(path)] == expected


@pytest.mark.parametrize("cut", [1, 3, 10, 20])
def test_half_a_line_is_cut_off(tmp_path, cut):
    path = tmp_path / "run.jsonl"
    with JSONLines(path) as sink:
        for step in range(3):
            sink.log(step, {"loss": 1.0})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 3, "loss": 1.0}'[:cut])
    with JSONLines(path, resume=True) as sink:
        sink.log(3, {"loss": 1.0})
    assert path.read_bytes() == whole + b'{"step": 3, "loss": 1.0}\n'


def test_json_lines_go_back_with_the_loop_and_take_a_step_in_two_calls(tmp_path):
    path = tmp_path / "run.jsonl"
    with JSONLines(path) as sink:
        for step in (0, 1, 2):
            sink.log(step, {"loss": step})
            sink.log(step, {"accuracy": 0.5})
        sink.log(1, {"loss": 7})
    assert read(path) == [
        {"step": 0, "loss": 0.0},
        {"step": 0, "accuracy": 0.5},
        {"step": 1, "loss": 7.0},
    ]


def test_json_lines_touch_no_file_of_another(tmp_path):
    path = tmp_path / "notes.txt"
    for text in (
        "my notes\n",
        "[1, 2]\n",
        '{"step": "one"}\n',
        '{"step": 0}\nmine',
        '{"step": 0}\nmine\n{"step": 1}\n',
    ):
        path.write_text(text)
        with pytest.raises(FileExistsError, match="resume=True"):
            JSONLines(path)
        with pytest.raises(ValueError, match="none of JSONLines"):
            JSONLines(path, resume=True).log(0, {"loss": 1.0})
        assert path.read_text() == text


def test_json_has_no_word_for_nan(tmp_path):
    with JSONLines(tmp_path / "a.jsonl") as sink:
        sink.log(0, {"a": math.nan, "b": math.inf, "c": torch.tensor([2.5])})
    assert read(tmp_path / "a.jsonl") == [{"step": 0, "a": None, "b": None, "c": 2.5}]


# -------------------------------------------------------------------------------------------------- TensorBoard


class Writer:
    """torch.utils.tensorboard's SummaryWriter, its signatures, and what TensorBoard makes of the files."""

    folders: ClassVar[dict] = {}

    def __init__(self, log_dir=None, comment="", purge_step=None, max_queue=10, flush_secs=120, filename_suffix=""):
        self.kept = self.folders.setdefault(log_dir, [])
        if purge_step is not None:
            self.kept[:] = [each for each in self.kept if each[1] < purge_step]
        self.open = True

    def add_scalar(self, tag, scalar_value, global_step=None, walltime=None, new_style=False, double_precision=False):
        assert self.open
        self.kept.append((tag, global_step, scalar_value))

    def flush(self):
        pass

    def close(self):
        self.open = False


def test_tensorboard_is_told_to_drop_what_comes_again(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    expected = run_through(lambda resume: TensorBoard(tmp_path))
    assert Writer.folders[str(tmp_path)] == [("loss", step, value) for step, value in expected]


def test_a_writer_of_ones_own_is_left_open_and_gets_no_step_twice():
    writer = Writer("own")
    with TensorBoard(writer) as sink:
        for step in (0, 1, 2, 1, 2, 3):  # the last one may come in two calls
            sink.log(step, {"loss": step})
    assert writer.open
    assert [step for _, step, _ in writer.kept] == [0, 1, 2, 2, 3], "below the last one there is none"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_each_step_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected = run_through(lambda resume: TensorBoard(tmp_path))
    assert len(glob.glob(f"{tmp_path}/events*")) == 2
    found = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(each.step, each.value) for each in found] == expected


# -------------------------------------------------------------------------------------------------------- wandb


class WandBRun:
    """wandb's Run: log(data, step=, commit=) warns and drops steps below the present one; step goes up with them."""

    def __init__(self, history=()):
        self.rows = dict(history)
        self.step = max(self.rows, default=-1) + 1 if self.rows else 0

    def log(self, data, step=None, commit=None):
        assert step >= self.step, "Tried to log to step less than the current step. Steps must be monotonic"
        self.step = step
        self.rows.setdefault(step, {}).update(data)


def test_wandb_gets_steps_in_order_and_once():
    runs = [WandBRun()]

    def make(resume):
        if resume:  # as wandb.init(id=..., resume="must") does
            runs.append(WandBRun(runs[0].rows))
        return WandB(runs[-1])

    expected = run_through(make)
    assert [(step, row["loss"]) for step, row in sorted(runs[-1].rows.items())] == expected
    sink = WandB(runs[-1])
    sink.log(8, {"accuracy": 0.5})
    assert runs[-1].rows[8] == {"loss": 2.0, "accuracy": 0.5}, "a step may be logged in two calls"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::UserWarning")
def test_wandb_itself(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(project="bilevel-test", mode="offline", dir=str(tmp_path))
    logged, kept = [], run.log
    monkeypatch.setattr(run, "log", lambda data, step=None: (logged.append(step), kept(data, step=step)))
    try:
        run_through(lambda resume: WandB(run))
        assert run.step == 8
        assert logged == [0, 1, 2, 3, 4, 5, 6, 6, 7, 8], "6 was still open"
        assert WandB().run is run, "the active one"
    finally:
        run.finish()
    assert glob.glob(f"{tmp_path}/wandb/offline-run-*/run-*.wandb")


# ------------------------------------------------------------------------------------------------------- mlflow


class MLflowClient:
    """mlflow's client: log_batch(run_id, metrics) appends, get_metric_history(run_id, key) gives all."""

    def __init__(self):
        self.metrics = []

    def log_batch(self, run_id, metrics=(), params=(), tags=(), synchronous=None):
        assert run_id == "run"
        self.metrics += metrics

    def get_metric_history(self, run_id, key):
        return [metric for metric in self.metrics if metric.key == key]


class Metric:
    def __init__(self, key, value, timestamp, step):
        self.key, self.value, self.timestamp, self.step = key, value, timestamp, step


def test_mlflow_keeps_no_step_twice(monkeypatch):
    fake = types.SimpleNamespace(entities=types.SimpleNamespace(Metric=Metric), active_run=lambda: None)
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    client = MLflowClient()
    expected = run_through(lambda resume: MLflow("run", client=client))
    assert [(metric.step, metric.value) for metric in client.metrics] == expected
    sink = MLflow("run", client=client)
    sink.log(8, {"loss": 0.0, "accuracy": 0.5})
    assert [(metric.key, metric.step) for metric in client.metrics[-1:]] == [("accuracy", 8)]
    with pytest.raises(RuntimeError, match="no active run"):
        MLflow()


@pytest.mark.filterwarnings("ignore")
def test_mlflow_itself(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = mlflow.MlflowClient(tracking_uri=tmp_path.as_uri())
    run = client.create_run(client.create_experiment("bilevel"))
    expected = run_through(lambda resume: MLflow(run.info.run_id, client=client))
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((metric.step, metric.value) for metric in history) == expected


# ---------------------------------------------------------------------------------------------------- all alike


@pytest.mark.parametrize(
    ("make", "module", "message"),
    [
        (lambda: TensorBoard("somewhere"), "torch.utils.tensorboard", "pip install tensorboard"),
        (WandB, "wandb", "pip install wandb"),
        (MLflow, "mlflow", "pip install mlflow"),
    ],
)
def test_what_is_not_installed_is_said(make, module, message, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=message):
        make()


def test_wandb_without_a_run_says_what_to_write(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(run=None))
    with pytest.raises(RuntimeError, match=r"wandb\.init"):
        WandB()
    with pytest.raises(TypeError, match=r"wandb\.init"):
        WandB("project")
    with pytest.raises(TypeError, match="SummaryWriter"):
        TensorBoard(3)


@pytest.mark.parametrize("value", ["0.5", None, torch.zeros(2), [1.0], 1j])
@pytest.mark.parametrize("kind", ["json", "tensorboard", "wandb"])
def test_what_is_no_number_is_refused(value, kind, tmp_path):
    sink = {
        "json": lambda: JSONLines(tmp_path / "a"),
        "tensorboard": lambda: TensorBoard(Writer()),
        "wandb": lambda: WandB(WandBRun()),
    }[kind]()
    with pytest.raises(TypeError, match="accuracy"):
        sink.log(0, {"accuracy": value})


def test_a_loop_and_a_sink_need_nothing_but_a_line_in_the_body(tmp_path):
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    problem = bl.Problem(lambda y, x, b: (y - x).square().sum(), lambda y, x, b: (y - 3).square().sum())
    loop = bl.loop.OuterLoop(
        problem,
        x,
        torch.zeros(2),
        [bl.Batches(None, None)] * 4,
        solver=bl.Descent(bl.SGD(0.25), 5),
        estimator=bl.Unrolled(),
        optimizer=torch.optim.SGD([{"params": [x]}], lr=0.25),
        check=bl.loop.PrecisionCheck(every=3, reference=problem),
    )
    with JSONLines(tmp_path / "run.jsonl") as sink:
        for step in loop:
            sink.log(step.index, values(step) | {"x": x.detach().mean()})
    lines = read(tmp_path / "run.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert {"outer_loss", "inner_loss", "hypergradient_norm", "status", "lr", "seconds", "skipped", "x"} < set(lines[0])
    assert (lines[0]["lr"], lines[0]["status"], lines[0]["precision_cosine"]) == (0.25, 0, 1.0)
    assert "precision_cosine" not in lines[1]
    assert lines[3]["outer_loss"] < lines[0]["outer_loss"]


def test_values_of_several_groups_and_of_a_status():
    found = bl.Hypergradient(
        {"a": torch.tensor(3.0), "b": torch.tensor([4.0])},
        torch.zeros(1),
        torch.tensor(2.0),
        torch.tensor(1.0),
        code=torch.tensor(bl.Status.MAX_STEPS.code),
    )
    numbers = values(bl.loop.Step(3, found, lr=(0.1, 0.2)))
    assert (numbers["lr/0"], numbers["lr/1"], numbers["hypergradient_norm"]) == (0.1, 0.2, 5.0)
    assert list(bl.Status)[numbers["status"]] is bl.Status.MAX_STEPS


def test_a_sink_of_ones_own_needs_log_alone():
    class Mine(Sink):
        def __init__(self):
            self.got = []

        def log(self, step, values):
            self.got.append((step, values))

    with Mine() as sink:
        sink.log(1, {"a": 2.0})
    assert sink.got == [(1, {"a": 2.0})]
