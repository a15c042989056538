"""benchmarks/beside_betty.py at small sizes: the numbers that its tables stand on, and what it writes."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytest.importorskip("betty.engine", reason='betty-ml is not installed: pip install "bilevel[betty]"')
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("beside_betty")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def ran(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    script.main(["--quick", "--out", str(folder)])
    return folder


def rows(folder, kind):
    lines = (folder / "beside_betty.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def test_only_bettys_cg_gets_worse_with_more_products(ran):
    found = {(row["method"], row["n"]): row["error"] for row in rows(ran, "error")}
    assert found["Implicit(CG(n))", 20] < 1e-10
    assert found["MemoryReduced(n)", 20] < 1e-10
    assert found["betty cg", 1] == pytest.approx(found["Implicit(CG(n))", 1], rel=1e-9), "the first step is sound"
    assert found["betty cg", 20] > found["betty cg", 1]
    for ours, theirs in (("Implicit(Neumann(n))", "betty neumann"), ("Unrolled()", "betty unrolled")):
        assert found[ours, 20] == pytest.approx(found[theirs, 20], rel=1e-6)
    assert found["betty darts", 1] == pytest.approx(found["betty darts", 20], rel=1e-6)


def test_equal_work_is_equal(ran, script):
    found = rows(ran, "cost")
    assert {row["K"] for row in found} == {script.QUICK.inner_steps, 1}
    for row in found:
        assert row["status_betty"] == "OK"
        assert row["time_ratio"] > 0
        assert row["peak_tensor_bytes"] > 0
        if row["ours"] in script.SAME:
            assert row["difference"] < 1e-4
    ten = [row for row in found if row["work"] == script.TEN]
    assert all(9 <= row["calls"]["hvp"] <= 10 for row in ten)
    last = next(row for row in found if row["ours"] == "Unrolled(last=1)")
    assert last["cosine"] > 0.99, "the same direction as darts, times the step size"


def test_an_iterative_problem_keeps_memory_unless_mended(ran):
    (row,) = rows(ran, "left")
    assert row["released"] >= row["inner_bytes"]
    assert row["mended"] == 0


def test_tables_and_figure_name_the_command_and_the_machine(ran):
    for name in ("error", "cost", "left"):
        text = (ran / f"betty_{name}.md").read_text()
        assert "python benchmarks/beside_betty.py" in text
        assert "betty-ml 0." in text
        assert "torch" in text
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert len(lines) > 2
        assert len({line.count("|") for line in lines}) == 1
    assert (ran / "betty_error.png").read_bytes().startswith(b"\x89PNG")


def test_the_committed_tables_are_those_of_the_committed_results(script, tmp_path, capsys):
    records = [json.loads(line) for line in script.RESULTS.read_text().splitlines()]
    for name, table in (("error", script.error_table), ("cost", script.cost_table), ("left", script.left_table)):
        assert (script.MADE / f"betty_{name}.md").read_text() == table(records)
    assert (script.MADE / "betty_error.png").exists()
