"""Comparisons end to end: fresh processes, failures as rows, two references that are never mixed up, and the
command."""

import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from bilevel_profiling import Case, compare, measure
from bilevel_profiling.cases import builtin
from bilevel_profiling.cli import main
from bilevel_profiling.meters.storages import storage_bytes
from bilevel_profiling.records import record, records_file

import bilevel as bl
from bilevel.problems import quadratic

SOLVER = bl.Descent(bl.SGD(lr=1.0), steps=5)


def test_measuring_a_case_fills_every_figure():
    found = measure(
        Case(
            quadratic.setup,
            solver=SOLVER,
            estimator=bl.Unrolled("iterates"),
            solution=bl.Converge(bl.SGD(1.0), 1e-12, 5000),
        ),
        repeats=3,
    )
    assert found.status == "OK"
    assert found.calls == {"inner_gradient": 10, "outer_gradient": 1, "hvp": 5, "mixed": 0}
    assert found.peak_tensor_bytes > 0
    assert found.kept_tensor_bytes == 0
    _, outer, inner, batches = quadratic.setup()
    assert (found.inner_size, found.outer_size) == (6, 4)
    moments = 2 * outer.numel() * 8 + 4  # of the outer optimizer, Adam, and its step count
    assert found.base_tensor_bytes == storage_bytes((outer, inner, batches.inner, batches.outer)) + moments
    assert found.repeats == 3
    assert {"inner", "hypergradient", "outer"} <= set(found.phases)
    assert max(phase.peak_tensor_bytes for phase in found.phases.values()) == found.peak_tensor_bytes
    assert found.timeline
    assert found.environment["torch"] == torch.__version__
    assert record.Record.from_json(found.to_json()) == found


def test_the_two_references_are_the_closed_forms_and_are_not_mixed_up():
    exact = quadratic.random()
    _, outer, inner, _ = quadratic.setup()
    outer, inner = outer.detach(), inner.detach()
    program, solution = exact.unrolled_hypergradient(outer, inner, 1.0, 5), exact.hypergradient(outer)
    for estimator in (bl.Unrolled(), bl.Implicit(bl.Dense()), bl.Unrolled(last=2)):
        case = Case(quadratic.setup, solver=SOLVER, estimator=estimator, solution=bl.Converge(bl.SGD(1.0), 1e-12, 5000))
        found = measure(case, repeats=1)
        mine = bl.hypergradient(*quadratic.setup(), solver=SOLVER, estimator=estimator).grad
        for reference, error, cosine in (
            (program, found.program_relative_error, found.program_cosine),
            (solution, found.solution_relative_error, found.solution_cosine),
        ):
            assert error == pytest.approx(((mine - reference).norm() / reference.norm()).item(), abs=1e-9)
            assert cosine == pytest.approx(torch.cosine_similarity(mine, reference, dim=0).item(), abs=1e-9)


def test_measuring_any_callable():
    layer = torch.nn.Linear(256, 256)
    x = torch.ones(64, 256)
    found = measure(lambda: layer(x).sum())
    assert found.status == "OK"
    assert found.peak_tensor_bytes >= 64 * 256 * 4
    assert found.matmul_flops == 2 * 64 * 256 * 256


CASES = '''
"""A case of one's own."""
import torch
import bilevel as bl

def setup(device):
    x, y = torch.ones(3, device=device), torch.zeros(3, device=device)
    return bl.Problem(lambda y, x, b: ((y - x) ** 2).sum(), lambda y, x, b: (y ** 2).sum()), x, y,\
 bl.Batches(None, None)

OPTIMIZER = bl.SGD(lr=0.25)
INNER_STEPS = [2, 4]
ESTIMATORS = {"unrolled": bl.Unrolled(), "corrected": bl.FirstOrderCorrected(), "blind": bl.FirstOrder()}
OUTER_STEPS = 3
def outer_optimizer(tensors): return torch.optim.SGD(tensors, lr=0.1)
def evaluate(outer, device):
    return {"size": float(sum(x.norm() for x in ([outer] if torch.is_tensor(outer) else outer.values())))}
'''


@pytest.fixture
def cases(tmp_path):
    path = tmp_path / "my_cases.py"
    path.write_text(CASES)
    return path


def test_a_users_own_file_from_the_command_line(cases, tmp_path, capsys):
    out = tmp_path / "report"
    assert main(["compare", str(cases), "--out", str(out), "--repeats", "2", "--device", "cpu"]) == 0
    found = records_file.read(out / "records.jsonl")
    assert [(r.estimator, r.inner_steps) for r in found] == [
        (e, k) for k in (2, 4) for e in ("unrolled", "corrected", "blind")
    ]
    by = {(r.estimator, r.inner_steps): r for r in found}
    assert by["unrolled", 4].program_relative_error < 1e-6
    # FirstOrder cannot see this x: a row that says so, not zeros
    assert by["blind", 4].status == "ERROR"
    assert "cannot see" in by["blind", 4].reason
    assert len(by["unrolled", 4].iterations) == 3
    assert by["unrolled", 4].metrics["size"] < by["unrolled", 4].metrics_before["size"]
    assert by["unrolled", 4].environment["threads"].startswith("1 ")
    page = (out / "index.html").read_text()
    assert "corrected" in page
    assert str(out / "index.html") in capsys.readouterr().out


FATES = {
    "healthy": ("", "OK", ""),
    "memory": (
        "outer: torch.ones(2**28)",
        "OUT_OF_MEMORY",
        "The run was given 512 MiB beyond what torch itself had taken, and asked for more: RuntimeError",
    ),
    "python_memory": ("outer: bytearray(2**30)", "OUT_OF_MEMORY", "MemoryError"),
    "killed": ("outer: os.kill(os.getpid(), signal.SIGKILL)", "CRASHED", "signal 9 (SIGKILL)"),
    "segfault": (
        "inner: os.kill(os.getpid(), signal.SIGSEGV)",
        "CRASHED",
        "signal 11 (SIGSEGV). It last wrote: Fatal Python error: Segmentation fault; File",
    ),
    "abort": ("inner: os.abort()", "CRASHED", "signal 6 (SIGABRT)"),
    "leaves": ("inner: os._exit(0)", "CRASHED", "exited with status 0"),
    "raises": (
        'outer: oh = ValueError("no such <luck>\\n\\udce4"); raise oh',
        "ERROR",
        "ValueError: no such <luck> \\udce4",
    ),
    "raises_inner": ("inner: 1 / 0", "ERROR", "ZeroDivisionError"),
    "raises_setup": ("setup: import nothing_of_that_name", "ERROR", "ModuleNotFoundError"),
    "raises_optimizer": ("optimizer: raise KeyError('lr')", "ERROR", "KeyError: 'lr'"),
    "exits": ("setup: raise SystemExit(0)", "ERROR", "SystemExit: 0"),
    "diverges": ("rate: 1e30", "DIVERGED", "Lower the step size"),
    "raises_evaluate": ("evaluate: raise ValueError('blind')", "OK", ""),
    "raises_batches": ("batches: raise ValueError('hungry')", "OK", ""),
}
FATED = """
import os, signal, time
import torch
import bilevel as bl

def fate(place):
    if FATE.partition(": ")[0] == place: exec(FATE.partition(": ")[2], globals())

def setup(device):
    fate("setup")
    def inner(y, x, b):
        fate("inner")
        return ((y - x) ** 2).sum()
    def outer(y, x, b):
        fate("outer")
        return (y ** 2).sum()
    return bl.Problem(inner, outer), torch.ones(3, device=device), torch.zeros(3, device=device), bl.Batches(None, None)

OPTIMIZER = bl.SGD(lr=float(FATE.removeprefix("rate: ")) if FATE.startswith("rate") else 0.25)
INNER_STEPS = [8]
ESTIMATORS = {"unrolled": bl.Unrolled()}
OUTER_STEPS = 2

def outer_optimizer(tensors):
    fate("optimizer")
    return torch.optim.SGD(tensors, lr=0.1)

def evaluate(outer, device):
    fate("evaluate")
    return {"size": float(outer.norm())}

def batches(step, device):
    fate("batches")
    return bl.Batches(None, None)
"""


def test_what_goes_wrong_in_a_cell_is_a_row(tmp_path):
    """In a process of its own: pytest's would be forked from a server that has loaded more."""
    for name, (fate, _, _) in FATES.items():
        (tmp_path / f"{name}.py").write_text(f"FATE = {fate!r}\n{FATED}")
    out = tmp_path / "report"
    command = [
        sys.executable,
        "-m",
        "bilevel_profiling.cli",
        "compare",
        *(str(tmp_path / f"{name}.py") for name in FATES),
        "--out",
        str(out),
    ]
    command += ["--repeats", "1", "--device", "cpu", "--memory-limit", "512MiB", "--time-limit", "60"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    found = {row.case: row for row in records_file.read(out / "records.jsonl")}
    assert list(found) == list(FATES)
    for name, (_, status, reason) in FATES.items():
        assert (found[name].status, reason in found[name].reason) == (status, True), found[name].reason
        assert found[name].settings == repr(bl.Unrolled())
    # the outer loop's failures are in its row, which keeps its figures
    for name, said in (("raises_evaluate", "blind"), ("raises_batches", "hungry")):
        assert found[name].peak_tensor_bytes > 0
        assert [iteration.status for iteration in found[name].iterations] == ["ERROR"]
        assert str(found[name].notes[-1]) == f"The outer loop ended with ERROR: ValueError: {said}"
    assert found["diverges"].peak_tensor_bytes > 0
    assert len(found["healthy"].iterations) == 2
    page = (out / "index.html").read_text()
    assert "no such" in page
    assert "<luck>" not in page
    assert "no such <luck>" in (out / "logs" / "raises-unrolled-8.txt").read_text()


def test_a_hang_is_a_row_and_nothing_finished_is_exit_status_1(tmp_path):
    case, out = tmp_path / "hangs.py", tmp_path / "report"
    case.write_text(f"FATE = 'outer: time.sleep(100)'\n{FATED}")
    assert main(["compare", str(case), "--out", str(out), "--device", "cpu", "--time-limit", "2"]) == 1
    (row,) = records_file.read(out / "records.jsonl")
    assert (row.status, row.reason) == ("TIMEOUT", "The run was stopped after its time limit of 2 s.")
    assert "TIMEOUT" in (out / "index.html").read_text()


def test_ctrl_c_keeps_the_finished_rows(cases, tmp_path):
    out = tmp_path / "report"
    many = ",".join(str(k) for k in range(1, 60))
    command = [
        sys.executable,
        "-m",
        "bilevel_profiling.cli",
        "compare",
        str(cases),
        "--out",
        str(out),
        "--inner-steps",
        many,
    ]
    # A shell that runs the tests in the background lets its children ignore the interrupt.
    listening = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = subprocess.Popen(command, text=True, preexec_fn=listening, **pipes)
    deadline = time.monotonic() + 60
    records = out / "records.jsonl"
    while time.monotonic() < deadline and not (records.exists() and records.read_text().count("\n") >= 2):
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=30)
    assert running.returncode == 130
    kept = records_file.read(records)
    assert 2 <= len(kept) < 59 * 3
    assert "kept in" in errors
    assert (out / "index.html").exists()


def test_json_output_is_records_and_nothing_else(tmp_path, capsys):
    arguments = [
        "compare",
        "quadratic",
        "--estimators",
        "unrolled",
        "--inner-steps",
        "2",
        "--outer-steps",
        "0",
        "--repeats",
        "1",
        "--json",
    ]
    assert main([*arguments, "--out", str(tmp_path / "r")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["estimator"] for line in lines] == ["unrolled"]


@pytest.mark.parametrize("name", [path.stem for path in Path(builtin.__file__).parent.glob("[a-z]*.py")])
def test_every_built_in_case_is_usable(name):
    from bilevel_profiling.cases.case_file import load

    case = load(name)
    assert case.inner_steps
    assert case.title
    assert all(isinstance(estimator, bl.Estimator) for estimator in case.estimators.values())


def test_any_solver_is_compared_and_resumed(tmp_path):
    """Not only Descent with an optimizer and K: a solver by itself, and several by label."""
    known = {"out": tmp_path / "r", "repeats": 1, "outer_steps": 0}
    solvers = {
        "5 steps": bl.Descent(bl.SGD(lr=1.0), 5),
        "to 1e-9": bl.Converge(bl.SGD(lr=1.0), tol=1e-9, max_steps=400),
    }
    estimators = {"implicit": bl.Implicit(bl.CG(6))}
    found = compare(quadratic.setup, estimators, solvers=solvers, **known)
    assert [(r.estimator, r.inner_steps, r.status) for r in found] == [
        ("implicit, 5 steps", 5, "OK"),
        ("implicit, to 1e-9", 400, "OK"),
    ]
    assert [r.solver for r in found] == [repr(solver) for solver in solvers.values()]
    assert found[1].calls["inner_gradient"] > found[0].calls["inner_gradient"]
    assert found[1].program_relative_error is not None
    assert compare(quadratic.setup, estimators, solvers=solvers, resume=True, **known) == found
    other = {**solvers, "5 steps": bl.Descent(bl.SGD(lr=0.5), 5)}
    with pytest.raises(ValueError, match="has inner solver Descent"):
        compare(quadratic.setup, estimators, solvers=other, resume=True, **known)
    (alone,) = compare(quadratic.setup, estimators, solver=solvers["5 steps"], **{**known, "out": tmp_path / "s"})
    assert (alone.estimator, alone.inner_steps) == ("implicit", 5)
    with pytest.raises(TypeError, match="was given solver_, which it does not take; did you mean solver"):
        compare(quadratic.setup, estimators, solver_=solvers["5 steps"], **known)
    with pytest.raises(ValueError, match="SOLVERS"):
        compare(quadratic.setup, estimators, solvers={"a": bl.SGD(lr=0.1)}, **known)
