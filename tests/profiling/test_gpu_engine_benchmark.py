"""benchmarks/gpu_engine.py on a CPU: every variant at tiny sizes, and what becomes of cells that fail."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = ("gpu", "tables", "plain_reference", "gpu_engine", "gpu_engine_work", "engine_meters")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in SCRIPTS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    threads = torch.get_num_threads()
    yield importlib.import_module("gpu")
    torch.set_num_threads(threads)


@pytest.fixture
def section(gpu):
    return importlib.import_module("gpu_engine")


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_rehearsal_runs_every_variant_to_the_same_hypergradient(gpu, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert gpu.main(["--section", "engine", "--smoke", "--dtypes", "bfloat16", "--out", str(out)]) == 0
    where, *rows = read(out)
    assert where["kind"] == "environment"
    assert where["smoke"]
    assert where["device"] == "cpu"
    assert "torch" in where["environment"]
    assert [(row["setting"], row["variant"]) for row in rows] == [
        *(("few-shot", each) for each in ("torch by hand, task after task", "eager, graph", "eager", "compiled")),
        ("few-shot", "captured"),
        *(("weighting", f"double backward, {each}") for each in ("step by step", "kept tape")),
        *(("weighting", each) for each in ("eager", "rematerialized", "compiled", "compiled, rematerialized")),
    ]
    for row in rows:
        assert row["status"] == "OK", row
        assert row["difference"] < (1e-3 if row["dtype"] == "float32" else 0.5), row
        assert row["seconds"] > 0
        assert row["dynamic_bytes"] > 0
        assert row["parameters"] > 0
    assert next(row for row in rows if row["variant"] == "compiled")["trace_seconds"] > 0
    assert "| weighting, tiny | 0.0M | 2 | bfloat16 | compiled, rematerialized |" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--section", "engine"]) == 2
    assert "--smoke runs the same code" in capsys.readouterr().err


def test_the_section_comes_first(gpu, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--section", "engine"])
    assert "comes before its own options" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"), [(torch.OutOfMemoryError("no room"), "OUT_OF_MEMORY"), (ValueError("no"), "ERROR")]
)
def test_a_variant_that_fails_is_a_row_and_the_others_run(section, monkeypatch, error, status):
    def failing():
        raise error

    def fine():
        return [torch.ones(3)]

    monkeypatch.setattr(section, "few_shot", lambda *_: ({"first": fine, "bad": failing, "last": fine}, 3))
    rows = []
    section.cell("few-shot", 2, 1, "float32", "cpu", section.TINY, rows.append, smoke=True)
    assert [row["status"] for row in rows] == ["OK", status, "OK"]
    assert str(error) in rows[1]["reason"]
    assert f"{status}: " in section.table(rows)
    assert rows[2]["difference"] == 0


def test_what_did_not_fit_is_not_tried_at_larger_sizes(section, monkeypatch):
    asked = []

    def cell(setting, name, steps, dtype, device, spec, write, *, smoke, skip):
        asked.append((name, steps, dtype, list(skip)))
        fails = name == "b" and dtype == "float32" and "double" not in skip
        said = {"kind": "engine", "setting": setting, "name": name, "inner_steps": steps, "dtype": dtype}
        write(said | {"variant": "double", "status": "OUT_OF_MEMORY" if fails else "OK"})

    monkeypatch.setattr(section, "cell", cell)
    spec = {"tasks": (), "sizes": {"a": 0, "b": 0, "c": 0}, "dtypes": ("float32", "bfloat16"), "steps": (2, 4)}
    section.run("cpu", spec | {"few_shot_steps": 1}, 60, lambda row: None, smoke=True)
    skipped = {(name, steps) for name, steps, dtype, skip in asked if skip and dtype == "float32"}
    assert skipped == {("b", 4), ("c", 2), ("c", 4)}
    assert not any(skip for *_, dtype, skip in asked if dtype == "bfloat16")


def test_cells_without_time_are_left_out_and_named(section):
    rows = section.run("cpu", section.TINY, 0, lambda row: None, smoke=True)
    assert [row["status"] for row in rows[1:]] == ["LEFT_OUT"] * 3
    assert section.table(rows).count("LEFT_OUT: no time left") == 3


def test_a_process_that_is_stopped_leaves_its_rows_and_says_why(section, monkeypatch):
    row = {"kind": "engine", "variant": "first", "status": "OK"}

    def run(command, *, timeout, **_):
        assert command[2:6] == ["--cell", "weighting", "44M", "2"]
        raise subprocess.TimeoutExpired(command, timeout, output=(json.dumps(row) + "\n").encode())

    monkeypatch.setattr(section.subprocess, "run", run)
    first, last = section._apart(("weighting", "44M", 2, "float32"), "cuda", 30, ["eager"])
    assert first == row
    assert last["status"] == "TIMEOUT"
    assert last["reason"] == "after 30 s"
