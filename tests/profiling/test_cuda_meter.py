"""The CUDA meter: against a small fake of torch's allocator where there is no GPU, and against the real one where there
is."""

import pytest
import torch
from bilevel_profiling.meters.cuda import Cuda
from bilevel_profiling.meters.tensors import Tensors

import bilevel as bl

MIB = 2**20


class Allocator:
    """What torch.cuda's memory functions report: current and peak bytes, counters, cuBLAS's workspace, the recording of
    a history."""

    def __init__(self):
        self.requested = self.rounded = self.workspace = 0
        self.peaks = {"allocated": 0, "requested": 0, "reserved": 0}
        self.retries = self.ooms = 0
        self.log = []

    def take(self, size):
        self.requested += size
        self.rounded += -(-size // 512) * 512
        self.note()

    def free(self, size):
        self.requested -= size
        self.rounded -= -(-size // 512) * 512

    def note(self):
        now = {
            "allocated": self.rounded,
            "requested": self.requested,
            "reserved": -(-self.rounded // (2 * MIB)) * 2 * MIB,
        }
        self.peaks = {name: max(self.peaks[name], now[name]) for name in now}

    def product(self):
        """The first one takes cuBLAS's workspace."""
        if not self.workspace:
            self.workspace = 8 * MIB
            self.take(self.workspace)

    def memory_stats(self, device=None):
        return {f"{name}_bytes.all.peak": peak for name, peak in self.peaks.items()} | {
            "requested_bytes.all.current": self.requested,
            "num_alloc_retries": self.retries,
            "num_ooms": self.ooms,
        }

    def reset_peak_memory_stats(self, device=None):
        self.peaks = dict.fromkeys(self.peaks, 0)
        self.note()

    def memory_allocated(self, device=None):
        return self.rounded

    def clear_workspaces(self):
        self.free(self.workspace)
        self.workspace = 0

    def record_history(self, enabled="all", **options):
        self.log.append("record" if enabled else "stop")

    def dump(self, path):
        self.log.append("dump")
        with open(path, "wb") as stream:
            stream.write(b"snapshot")


@pytest.fixture
def allocator(monkeypatch):
    fake = Allocator()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    for name in ("memory_stats", "reset_peak_memory_stats", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", fake.clear_workspaces, raising=False)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", fake.record_history)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", fake.dump)
    return fake


def test_peaks_hold_what_was_there_and_forget_earlier_peaks(allocator):
    allocator.take(100)
    allocator.take(5 * MIB)
    allocator.free(5 * MIB)
    with Cuda("cuda") as meter:
        allocator.take(1000)
        allocator.free(1000)
    found = meter.figures()
    assert found["cuda_requested_bytes"] == 1100
    assert found["cuda_allocated_bytes"] == 512 + 1024
    assert found["cuda_reserved_bytes"] == 2 * MIB
    assert found["cuda_workspace_bytes"] is None


def test_retries_and_failed_requests_are_those_of_the_block(allocator):
    allocator.retries, allocator.ooms = 7, 2
    meter = Cuda("cuda")
    with meter:
        allocator.retries += 3
        allocator.ooms += 1
    assert meter.figures()["cuda_retries"] == 3
    assert meter.figures()["cuda_out_of_memory_events"] == 1


@pytest.mark.parametrize("early", [True, False], ids=["taken before", "taken inside"])
def test_workspaces_are_told_from_tensors(allocator, early):
    if early:
        allocator.product()
    with Cuda("cuda", workspaces=True) as meter:
        allocator.product()
        allocator.take(MIB)
    found = meter.figures()
    assert found["cuda_workspace_bytes"] == 8 * MIB
    assert found["cuda_requested_bytes"] - found["cuda_workspace_bytes"] == MIB
    assert allocator.workspace == 0


def test_workspaces_stay_where_nobody_asked(allocator):
    with Cuda("cuda") as meter:
        allocator.product()
    assert allocator.workspace == 8 * MIB
    assert meter.figures()["cuda_workspace_bytes"] is None


def test_workspaces_are_unknown_to_a_torch_that_cannot_free_them(allocator, monkeypatch):
    monkeypatch.delattr(torch._C, "_cuda_clearCublasWorkspaces")
    with Cuda("cuda", workspaces=True) as meter:
        allocator.product()
    assert meter.figures()["cuda_workspace_bytes"] is None


@pytest.mark.parametrize("pool", [0, 3 * MIB], ids=["compiled", "captured"])
def test_what_is_asked_for_beyond_the_start_stands_for_tensors_that_nobody_sees(allocator, monkeypatch, pool):
    segments = [
        {"segment_pool_id": (0, 0), "total_size": 20 * MIB},
        {"segment_pool_id": (0, 1), "total_size": pool},  # of a CUDA graph
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    allocator.take(5 * MIB)
    with Cuda("cuda", tensors=True) as meter:
        allocator.take(1000)
        allocator.take(500)
        allocator.free(1000)
    found = meter.figures()
    assert (found["peak_tensor_bytes"], found["kept_tensor_bytes"]) == (1500 + pool, 500)
    assert found["peak_meter"] == "cuda"
    with Cuda("cuda") as plain:
        allocator.take(1000)
    assert "peak_tensor_bytes" not in plain.figures()


def test_phases_have_peaks_of_their_own(allocator):
    def inner_loss(y, x, batch):
        allocator.take(2 * MIB)
        allocator.free(2 * MIB)
        return (y - x) ** 2

    def outer_loss(y, x, batch):
        allocator.take(3 * MIB)
        allocator.free(3 * MIB)
        return y**2

    problem = bl.Problem(inner_loss, outer_loss)
    solver = bl.Descent(bl.SGD(0.1), 2)
    with Cuda("cuda") as meter:
        bl.hypergradient(
            problem,
            torch.tensor(1.0),
            torch.tensor(0.0),
            bl.Batches(None, None),
            solver=solver,
            estimator=bl.Unrolled(),
        )
    assert meter.phases()["inner"]["cuda_allocated_bytes"] == 2 * MIB
    assert meter.phases()["hypergradient"]["cuda_allocated_bytes"] == 3 * MIB
    assert meter.figures()["cuda_allocated_bytes"] == 3 * MIB


@pytest.mark.parametrize("fails", [False, True])
def test_a_snapshot_is_written_and_recording_ended(allocator, tmp_path, fails):
    path = tmp_path / "deep" / "snapshot.pickle"

    def run():
        with Cuda("cuda", snapshot=path):
            assert allocator.log == ["record"]
            if fails:
                raise torch.OutOfMemoryError("CUDA out of memory")

    if fails:
        with pytest.raises(torch.OutOfMemoryError):
            run()
    else:
        run()
    assert allocator.log == ["record", "dump", "stop"]
    assert path.read_bytes() == b"snapshot"


def test_recording_ends_also_where_the_snapshot_cannot_be_written(allocator, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError), Cuda("cuda", snapshot=tmp_path / "file" / "snapshot.pickle"):
        pass
    assert allocator.log == ["record", "stop"]


def test_a_snapshot_without_a_gpu_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"snapshot=.*the device is cpu"):
        Cuda("cpu", snapshot=tmp_path / "snapshot.pickle")


def test_the_fake_has_the_names_of_the_real_one():
    """Everything that the fake replaces is there in this torch, with the arguments that the meter passes."""
    import inspect

    assert {"max_entries", "device", "clear_history"} <= set(
        inspect.signature(torch.cuda.memory._record_memory_history).parameters
    )
    assert "filename" in inspect.signature(torch.cuda.memory._dump_snapshot).parameters
    assert callable(torch.cuda.memory_stats)
    assert callable(torch.cuda.reset_peak_memory_stats)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.cuda
@needs_cuda
def test_the_workspace_of_a_real_product_is_found():
    matrix = torch.ones(256, 256, device="cuda")
    with Cuda("cuda", workspaces=True) as meter, Tensors() as tensors:
        product = matrix @ matrix
    assert meter.figures()["cuda_workspace_bytes"] > 0
    assert meter.figures()["cuda_requested_bytes"] >= tensors.peak_bytes + meter.figures()["cuda_workspace_bytes"]
    with Cuda("cuda", workspaces=True) as again:
        matrix + 1
    assert again.figures()["cuda_workspace_bytes"] == 0
    del product


@pytest.mark.cuda
@needs_cuda
def test_a_real_request_that_fails_is_counted(tmp_path):
    torch.ones(1, device="cuda")
    meter = Cuda("cuda", snapshot=tmp_path / "snapshot.pickle")
    with pytest.raises(torch.OutOfMemoryError), meter:
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
    assert meter.figures()["cuda_out_of_memory_events"] == 1
    assert (tmp_path / "snapshot.pickle").stat().st_size > 0
