"""Every example script runs, small: what `make examples` does."""

import os
import pathlib
import runpy
import subprocess
import sys

import bilevel_profiling
import pytest
from bilevel_profiling.cases import case_file

import bilevel as bl

ROOT = pathlib.Path(__file__).resolve().parent.parent
MANY = sorted((ROOT / "examples" / "distributed").glob("*.py"))
EXAMPLES = sorted({path for path in (ROOT / "examples").rglob("*.py") if path.name != "publish.py"} - set(MANY))


def name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("script", EXAMPLES, ids=name)
def test_an_example_runs(script, tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BILEVEL_EXAMPLE_SMALL", "1")
    monkeypatch.setenv("BILEVEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.strip() or script.name == "my_cases.py"


@pytest.mark.parametrize("script", MANY, ids=name)
def test_an_example_of_many_processes_runs_on_two(script, tmp_path):
    pytest.importorskip("sklearn")
    here = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "profiling")]),
        "BILEVEL_CACHE": str(tmp_path / "cache"),
    }
    small = {"BILEVEL_EXAMPLE_SMALL": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **here, **small}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_example_case_file_is_usable(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setenv("BILEVEL_EXAMPLE_SMALL", "1")
    monkeypatch.setattr(sys, "path", list(sys.path))
    definition = case_file.load(str(ROOT / "examples" / "my_cases.py"))
    solver = bl.Descent(definition.optimizer, definition.inner_steps[0])
    estimator = definition.estimators["implicit CG"]
    record = bilevel_profiling.measure(
        bilevel_profiling.Case(definition.setup, solver=solver, estimator=estimator, solution=definition.solution),
        repeats=1,
    )
    assert not bl.Status[record.status].failed
    assert record.solution_relative_error is not None
    assert set(definition.evaluate(definition.setup("cpu")[1], "cpu")) == {"test_loss", "test_accuracy"}
