"""Processes of their own: fresh, silent, watched, and ended with whatever they did as data."""

import glob
import os
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import torch
from bilevel_profiling.measurement import cell, isolate
from bilevel_profiling.measurement.isolate import run
from bilevel_profiling.meters.resident import Resident
from bilevel_profiling.records import records_file
from bilevel_profiling.records.failure import of_error, of_exit

import bilevel as bl

MIB = 2**20


def test_a_value_comes_back_from_another_process():
    assert run(os.getpid, time_limit=60).value != os.getpid()
    assert run(torch.get_num_threads, time_limit=60).failure is None


def test_a_process_is_fresh_each_time():
    """What one does to torch or to the interpreter, the next does not see."""
    before = run(torch.get_default_dtype, time_limit=60).value
    run(torch.set_default_dtype, torch.float64, time_limit=60)
    assert run(torch.get_default_dtype, time_limit=60).value == before
    first, second = (run(os.getpid, time_limit=60).value for _ in range(2))
    assert first != second


@pytest.mark.parametrize(
    ("function", "arguments", "status", "reason"),
    [
        (int, ("x",), "ERROR", "ValueError: invalid literal"),
        (sys.exit, (3,), "ERROR", "SystemExit: 3"),
        (os._exit, (3,), "CRASHED", "exited with status 3"),
        (os.abort, (), "CRASHED", "signal 6 (SIGABRT)"),
        (time.sleep, (60,), "TIMEOUT", "time limit of 1 s"),
        (bytearray, (10**15,), "OUT_OF_MEMORY", "MemoryError"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_every_end_is_a_failure_with_a_reason(function, arguments, status, reason):
    started = time.monotonic()
    failure = run(function, *arguments, time_limit=1 if status == "TIMEOUT" else 60).failure
    assert failure.status == status
    assert reason in failure.reason
    assert time.monotonic() - started < 30


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux")
def test_a_process_can_be_given_so_much_memory_and_no_more():
    assert run(bytearray, 2**20, time_limit=60, memory_limit=256 * MIB).failure is None
    failure = run(bytearray, 2**30, time_limit=60, memory_limit=256 * MIB).failure
    assert failure.status == "OUT_OF_MEMORY"
    assert (
        failure.reason
        == "The run was given 256 MiB beyond what torch itself had taken, and asked for more: MemoryError"
    )
    failure = run(torch.ones, 2**28, time_limit=60, memory_limit=256 * MIB).failure
    assert failure.status == "OUT_OF_MEMORY"
    assert "you tried to allocate 1073741824 bytes" in failure.reason
    assert run(eval, "len(bytearray(2**30))", time_limit=60).value == 2**30  # the limit went with its process


def test_a_kill_by_the_kernel_is_out_of_memory(monkeypatch):
    """The kernel counts the processes that it kills for want of memory; such a kill looks like any other to us."""
    kills = iter([7, 8])
    monkeypatch.setattr(isolate, "_kernel_kills", lambda: next(kills))
    failure = run(signal.raise_signal, signal.SIGKILL, time_limit=60).failure
    assert (failure.status, "kernel killed" in failure.reason) == ("OUT_OF_MEMORY", True)
    monkeypatch.setattr(isolate, "_kernel_kills", lambda: 8)
    assert run(signal.raise_signal, signal.SIGKILL, time_limit=60).failure.status == "CRASHED"


class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no words")


def test_no_temporary_file_outlives_a_run():
    logs = f"{tempfile.gettempdir()}/bilevel-*.log"
    before = set(glob.glob(logs))
    during = set(run(glob.glob, logs, time_limit=60).value)
    assert during - before == set()  # gone while it runs, so that whoever is killed leaves none
    assert run(os.abort, time_limit=60).failure.status == "CRASHED"


def test_what_it_prints_is_kept_and_does_not_reach_our_output(capfd):
    outcome = run(print, "from the other side", time_limit=60)
    assert outcome.log == "from the other side\n"
    assert "other side" not in "".join(capfd.readouterr())
    assert "ValueError" in run(int, "x", time_limit=60).log


def test_what_cannot_be_sent_is_refused_here():
    with pytest.raises((AttributeError, TypeError, ValueError)):  # pickle's own, which differ between versions
        run(lambda: 1, time_limit=60)
    assert run(iter, [1], time_limit=60).value is not None
    failure = run(memoryview, b"x", time_limit=60).failure
    assert failure.status == "ERROR"
    assert "pickle" in failure.reason


CASE = """
import torch
import bilevel as bl

def setup(device):
    def outer_loss(y, x, batch):
        return (y ** 2).sum() + 0 * torch.ones({size}).sum()
    return bl.Problem(lambda y, x, b: ((y - x) ** 2).sum(), outer_loss), torch.ones(3), torch.zeros(3),\
 bl.Batches(None, None)
"""


@pytest.mark.parametrize("mib", [0, 64])
def test_resident_memory_grows_by_what_a_call_takes(tmp_path, mib):
    path = tmp_path / "hungry.py"
    path.write_text(CASE.format(size=max(mib * MIB // 4, 1)))
    meters = []

    def around(pid):
        meters.append(Resident(pid))
        return meters[-1]

    job = cell.Job(
        str(path), {"estimators": {"corrected": bl.FirstOrderCorrected()}}, "corrected", bl.Descent(bl.SGD(0.1), 1)
    )
    outcome = run(cell.resident, job, time_limit=60, around=around)
    assert outcome.failure is None, outcome.log
    grown = meters[0].figures()["resident_bytes"]
    assert 0.9 * mib * MIB <= grown <= (2.5 * mib + 16) * MIB


def test_a_watch_survives_the_end_of_the_watched():
    done = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.3)"])
    with Resident(done.pid) as meter:
        done.wait()
        time.sleep(0.1)
    assert meter.figures()["resident_bytes"] >= 0


UNGUARDED = """
import bilevel as bl
from bilevel.problems import quadratic
from bilevel_profiling import compare
compare(quadratic.setup, {{"unrolled": bl.Unrolled()}}, inner_steps=[1], out={out!r}, time_limit=60)
"""


def test_a_script_without_a_guard_is_told_to_have_one(tmp_path):
    """Each new process imports the script; it must not start processes of its own in turn."""
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(UNGUARDED.format(out=str(out)))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert "if __name__ == '__main__'" in done.stderr
    rows = records_file.read(out / "records.jsonl")
    assert {row.status for row in rows} == {"ERROR"}
    assert all("__main__" in row.reason for row in rows)


def test_words_for_exceptions_and_exits():
    assert of_error(KeyError("a\nb")).reason == "KeyError: 'a\\nb'"
    assert len(of_error(ValueError("x" * 10_000)).reason) <= 600
    assert of_error(Mute()).reason == "Mute: its text raised RuntimeError"
    assert of_error(ValueError("\udce4")).reason == "ValueError: \\udce4"
    assert of_error(OSError(12, "Cannot allocate memory")).status == "OUT_OF_MEMORY"
    assert of_error(RuntimeError("std::bad_alloc")).status == "OUT_OF_MEMORY"
    assert of_error(ValueError("out of memory")).status == "ERROR"
    assert of_exit(-6, "terminate called after throwing an instance of 'std::bad_alloc'").status == "OUT_OF_MEMORY"
    assert of_error(torch.OutOfMemoryError("CUDA out of memory. Tried ...")).status == "OUT_OF_MEMORY"
    assert "out of memory" in of_exit(-9).reason
    assert "last wrote: oh" in of_exit(1, "oh").reason
    assert isolate.Outcome().failure is None
