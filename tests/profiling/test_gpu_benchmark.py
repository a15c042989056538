"""benchmarks/gpu.py on a CPU: the code that a GPU runs, at small sizes, and its arithmetic on records made up for the
purpose."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from bilevel_profiling import Record

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MIB = 2**20


@pytest.fixture
def gpu(monkeypatch):
    # The scripts import each other by name, as Python arranges for a script that is run.
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("gpu", "tables", "plain_reference"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("gpu")


@pytest.fixture
def quick(gpu, monkeypatch):
    """No measurement: records with the peaks of a leaking forecast."""

    def measured(case, **_):
        k = case.solver.max_steps
        cuda = {
            "cuda_requested_bytes": (9 + k) * MIB,
            "cuda_allocated_bytes": (10 + k) * MIB,
            "cuda_reserved_bytes": 22 * MIB,
        }
        return Record(
            case=case.name,
            estimator=case.label,
            wall_seconds=0.5,
            outer_size=256,
            base_tensor_bytes=0,
            peak_tensor_bytes=k * MIB,
            **cuda,
        )

    def forecast(case):
        k = case.solver.max_steps
        cuda = {"cuda_requested_bytes": k * MIB, "cuda_allocated_bytes": k * MIB + 512}
        return Record(
            case=case.name,
            estimator=case.label,
            source="forecast",
            base_tensor_bytes=0,
            peak_tensor_bytes=k * MIB,
            **cuda,
        )

    monkeypatch.setattr(gpu, "measure", measured)
    monkeypatch.setattr(gpu, "forecast", forecast)
    monkeypatch.setattr(gpu, "oracle_seconds", lambda case: {"inner_gradient": 0.1, "hvp": 0.25})
    return gpu


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_rehearsal_on_the_cpu_finds_forecasts_exact(gpu, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert (
        gpu.main(
            [
                "--device",
                "cpu",
                "--inner-steps",
                "1",
                "--estimators",
                "implicit CG",
                "--out",
                str(out),
                "--budget-seconds",
                "60",
            ]
        )
        == 0
    )
    rows = read(out)
    assert [row["kind"] for row in rows] == ["environment"] + ["cell"] * 3 + ["growth"] * 3 + ["left out"]
    for row in rows[1:4]:
        assert row["status"] in ("OK", "MAX_STEPS"), row
        # Without numbers a forecast cannot know that CG is sure of its residual, and counts a product more.
        assert -64 <= row["tensors_difference"] <= 0
        assert row["peak_tensor_bytes"] > 0
        assert row["oracle_seconds"]["inner_gradient"] > 0
        assert row["oracle_seconds"]["hvp"] > 0
    assert rows[-1]["cells"] == []
    said = capsys.readouterr().out
    assert "3/3 transformer, implicit CG, K = 1" in said
    assert "| conv net | implicit CG | 1 |" in said
    assert "| transformer | mixed | others |" in said


def test_the_sweep_of_a_kept_graph_is_timed_once_and_by_the_step(gpu):
    times = gpu.OracleTimes("cpu")
    times.mark = iter([1.0, 2.0, 10.0, 11.0, 31.0]).__next__
    times.enter("bilevel.hypergradient", 1)
    times.enter("bilevel.inner_gradient", 1)
    times.exit("bilevel.inner_gradient")
    times.enter("bilevel.outer_gradient", 1)
    times.enter("bilevel.hvp", 4)
    times.exit("bilevel.hvp")
    times.exit("bilevel.outer_gradient")
    assert times.seconds() == {"inner_gradient": 1.0, "hvp": 5.0}
    found = gpu.oracle_seconds(gpu.case_of("perceptron", "unrolled", 3, "cpu", gpu.SIZES["cpu"]["perceptron"]))
    assert sorted(found) == ["hvp", "inner_gradient", "outer_gradient"]


def test_nothing_is_started_without_time_and_what_was_left_out_is_said(gpu, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert (
        gpu.main(
            [
                "--device",
                "cpu",
                "--models",
                "perceptron",
                "--inner-steps",
                "1,2",
                "--out",
                str(out),
                "--budget-seconds",
                "0",
            ]
        )
        == 0
    )
    rows = read(out)
    assert [row["kind"] for row in rows] == ["environment", "left out"]
    assert rows[-1]["cells"][0] == ["perceptron", "unrolled", 1]
    assert len(rows[-1]["cells"]) == 12
    assert "12 of 12 cells did not fit the budget of 0 s" in capsys.readouterr().out


def test_a_cell_that_would_take_too_long_is_left_out(quick, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(quick.time, "perf_counter", lambda: now[0])

    def cell(case):
        now[0] += case.solver.max_steps
        return {
            "kind": "cell",
            "model": case.name,
            "estimator": case.label,
            "inner_steps": case.solver.max_steps,
            "status": "ERROR",
            "reason": "",
            "cell_seconds": case.solver.max_steps,
        }

    monkeypatch.setattr(quick, "cell", cell)
    rows = quick.run(
        "cpu", quick.SIZES["cpu"], ["perceptron"], ["unrolled", "implicit CG"], (1, 10), 15, lambda row: None
    )
    assert [(row["estimator"], row["inner_steps"]) for row in rows if row["kind"] == "cell"] == [
        ("unrolled", 1), ("implicit CG", 1), ("unrolled", 10),
    ]  # fmt: skip
    assert rows[-1]["cells"] == [["perceptron", "implicit CG", 10]]


@pytest.mark.parametrize(
    ("error", "status"),
    [(torch.OutOfMemoryError("CUDA out of memory"), "OUT_OF_MEMORY"), (RuntimeError("no kernel image"), "ERROR")],
)
def test_what_a_cell_raises_is_its_row(quick, monkeypatch, error, status, capsys):
    def fails(case, **_):
        if case.solver.max_steps == 2:
            raise error
        return real(case)

    real = quick.measure
    monkeypatch.setattr(quick, "measure", fails)
    rows = quick.run("cpu", quick.SIZES["cpu"], ["perceptron"], ["unrolled"], (1, 2, 3), 60, lambda row: None)
    assert [row["status"] for row in rows if row["kind"] == "cell"] == ["OK", status, "OK"]
    assert str(error) in capsys.readouterr().out
    assert f"| perceptron | unrolled | 2 | {status}: " in quick.tables.gpu(rows)


def test_differences_growth_and_margin(quick):
    rows = quick.run("cpu", quick.SIZES["cpu"], ["perceptron"], ["unrolled"], (2, 4, 8), 60, lambda row: None)
    cells = [row for row in rows if row["kind"] == "cell"]
    assert {row["requested_difference"] for row in cells} == {9 * MIB}
    assert {row["allocated_difference"] for row in cells} == {10 * MIB - 512}
    growth = next(row for row in rows if row["kind"] == "growth")
    assert (growth["measured"]["kind"], growth["measured"]["per_step"], growth["forecast"]["at_zero"]) == (
        "linear",
        MIB,
        0,
    )
    margin = next(row for row in rows if row["kind"] == "margin")
    assert margin["requested_difference"] == margin["requested_difference_least"] == 9 * MIB
    assert margin["reserved_ratio"] == pytest.approx(22 * MIB / (2 * MIB + 512))
    text = quick.tables.gpu(rows)
    assert (
        "| perceptron | unrolled | 8 | 17.0 | 8.0 | +9,437,184 | 18.0 | 8.0 | +10,485,248 | 2.75 | 1.00 MiB per inner "
        "step + 9.00 MiB | 500.0 | 5.0 |" in text
    )
    assert "| perceptron | hvp | unrolled, kept graph | 250.000 | 2.50 |" in text
    assert "Margin of a forecast, over 3 cells" in text
    workspaces = quick.compared(quick.forecast(quick.case_of("perceptron", "unrolled", 2, "cpu", {})), quick.measure(
        quick.case_of("perceptron", "unrolled", 2, "cpu", {})), 8 * MIB)  # fmt: skip
    assert workspaces["requested_difference"] == MIB


def test_without_forecasts_the_rest_is_measured(quick, monkeypatch):
    monkeypatch.setattr(quick, "forecast", None)
    rows = quick.run("cpu", quick.SIZES["cpu"], ["perceptron"], ["unrolled"], (2,), 60, lambda row: None)
    assert rows[1]["cuda_requested_bytes"] == 11 * MIB
    assert "margin" not in {row["kind"] for row in rows}
    assert "| perceptron | unrolled | 2 | 11.0 |" in quick.tables.gpu(rows)


@pytest.mark.parametrize("arguments", [["--models", "gpt"], ["--device", "meta"], ["--estimators", "unroled"]])
def test_what_it_does_not_know_is_refused(gpu, arguments, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", *arguments])
    assert arguments[1] in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without CUDA")
def test_without_cuda_it_says_what_to_do(gpu, capsys):
    assert gpu.main([]) == 2
    assert "--device cpu" in capsys.readouterr().err


def test_the_readme_says_whether_there_is_a_gpu_run(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.tables, "HERE", tmp_path)
    assert "Not yet measured on a GPU" in gpu.tables.gpu_runs()
    results = tmp_path / "results"
    results.mkdir()
    for name in ("gpu-a-2026-01-02", "gpu-b-2026-02-01"):
        row = {"kind": "environment", "environment": {"gpu": name}}
        (results / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    text = gpu.tables.gpu_runs()
    assert text.index("gpu-b") < text.index("gpu-a")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_small_run_on_cuda(gpu, tmp_path):
    rows = gpu.run("cuda", gpu.SIZES["cpu"], ["perceptron"], ["unrolled", "implicit CG"], (1, 2), 60, lambda row: None)
    for row in (row for row in rows if row["kind"] == "cell"):
        assert row["status"] in ("OK", "MAX_STEPS"), row
        assert row["requested_difference"] == 0
