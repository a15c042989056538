"""Baselines through a whole comparison: rows of a case file's own functions and of installed libraries, failures as
rows, the report, and going on."""

import importlib.metadata
import json

import pytest
from bilevel_profiling import compare
from bilevel_profiling.cli import main
from bilevel_profiling.comparison.plan import Plan, settle
from bilevel_profiling.records.note import NoteKind
from bilevel_profiling.records.records_file import read

import bilevel as bl
from bilevel.problems import quadratic

CASE = '''
"""A small case with baselines of its own."""
import torch
import bilevel as bl
from bilevel_profiling import Baseline
from bilevel.problems.quadratic import setup as setup

OPTIMIZER = bl.SGD(lr=1.0)
INNER_STEPS = [2]
OUTER_STEPS = 2
ESTIMATORS = {"unrolled": bl.Unrolled()}

def by_hand(problem, outer, inner, batches, solver):
    y = inner.clone().requires_grad_()
    for step in range(solver.max_steps):
        g, = torch.autograd.grad(problem.inner(y, outer, batches.inner_at(step)), y, create_graph=True)
        y = y - solver.optimizer.lr * g
    loss = problem.outer(y, outer, batches.outer)
    last = problem.inner(y, outer, batches.inner)
    return bl.Hypergradient(torch.autograd.grad(loss, outer)[0], y, loss, last)

def alone(*given):
    return by_hand(*given).grad

def broken(*given):
    raise ArithmeticError("no luck today")

def greedy(*given):
    torch.empty(2**50)

def spoiling(problem, outer, *given):
    with torch.no_grad():
        outer.add_(1)

BASELINES = {
    "by hand": by_hand,
    "alone": Baseline(alone, "handmade", "0.9", target="program", notes=("It was written on a Sunday.",)),
    "broken": broken,
    "greedy": greedy,
    "spoiling": spoiling,
}
'''
QUICK = ["--repeats", "1", "--device", "cpu"]


def module_level(problem, outer, inner, batches, solver):
    return bl.hypergradient(problem, outer.detach(), inner, batches, solver=solver, estimator=bl.Unrolled()).grad


@pytest.fixture
def case(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(CASE)
    return path


def rows(out):
    return {record.estimator: record for record in read(out / "records.jsonl")}


def test_a_case_file_with_baselines_of_its_own_from_end_to_end(case, tmp_path, capsys):
    out = tmp_path / "report"
    assert main(["compare", str(case), "--out", str(out), *QUICK]) == 0
    found = rows(out)
    assert list(found) == ["unrolled", "by hand", "alone", "broken", "greedy", "spoiling"]
    statuses = {label: record.status for label, record in found.items()}
    assert statuses == {
        "unrolled": "OK",
        "by hand": "OK",
        "alone": "OK",
        "broken": "ERROR",
        "greedy": "OUT_OF_MEMORY",
        "spoiling": "ERROR",
    }
    assert found["broken"].reason == "ArithmeticError: no luck today"
    assert "baseline bilevel_case_small.spoiling changed the outer variable in place" in found["spoiling"].reason
    for label in ("by hand", "alone"):
        assert found[label].calls == found["unrolled"].calls
        assert found[label].program_relative_error < 1e-14
        assert found[label].peak_tensor_bytes > 0
        assert found[label].resident_bytes is not None
    # one loop goes on from y_K, the other has none
    losses = [[each.outer_loss for each in found[label].iterations] for label in ("by hand", "unrolled")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert len(losses[0]) == 2
    assert found["alone"].iterations == ()
    assert NoteKind.WITHOUT_INNER in [note.kind for note in found["alone"].notes]
    assert found["greedy"].calls == {}
    page, text = (out / "index.html").read_text(), (out / "report.md").read_text()
    for said in ("by hand", "By handmade 0.9.", "It was written on a Sunday.", "no luck today", "no outer loop of it"):
        assert said in page, said
        assert said in text, said
    assert "left out: it returns no inner variable" in capsys.readouterr().err

    # going on: nothing is measured again, and what has another version is refused
    before = (out / "records.jsonl").read_bytes()
    assert main(["compare", str(case), "--out", str(out), "--resume", *QUICK]) == 0
    assert (out / "records.jsonl").read_bytes() == before
    case.write_text(CASE.replace('"0.9"', '"1.0"'))
    assert main(["compare", str(case), "--out", str(out), "--resume", *QUICK]) == 2
    assert "alone, K = 2 has estimator Baseline(bilevel_case_small.alone, handmade 0.9)" in capsys.readouterr().err
    case.write_text(CASE.replace("y = y - ", "y = y + "))
    assert main(["compare", str(case), "--out", str(out), "--resume", *QUICK]) == 2
    assert "was measured with other code than it has now" in capsys.readouterr().err


def test_labels_choose_among_the_baselines_of_a_case(case):
    (settled,) = settle([Plan(str(case), labels=["alone", "unrolled"])])
    assert settled.labels == ("unrolled", "alone")
    asked = {"baselines": {"mine": module_level}}
    (settled,) = settle([Plan(str(case), asked, labels=["unrolled"])])
    assert settled.labels == ("unrolled", "mine")
    (settled,) = settle([Plan(str(case), asked)])
    assert settled.labels == ("unrolled", "by hand", "alone", "broken", "greedy", "spoiling", "mine")
    assert [cell.label for cell in settled.cells] == list(settled.labels)


def test_compare_takes_functions_and_says_when_their_code_has_changed(tmp_path, capsys):
    given = {"ours": bl.Unrolled()}
    more = {"optimizer": bl.SGD(lr=1.0), "inner_steps": [2], "repeats": 1, "out": tmp_path}
    found = compare(quadratic.setup, given, baselines={"theirs": module_level}, **more)
    assert [(record.estimator, record.status) for record in found] == [("ours", "OK"), ("theirs", "OK")]
    assert found[0].calls == found[1].calls
    plan = tmp_path / "records.plan.json"
    written = json.loads(plan.read_text())
    mark = written["quadratic"]["code of theirs"]
    # without it, its mark stays; with it, and other code, it is refused
    compare(quadratic.setup, given, resume=True, **more)
    assert json.loads(plan.read_text()) == written
    plan.write_text(plan.read_text().replace(mark, "0" * 16))
    with pytest.raises(ValueError, match="was measured with other code, arguments or notes of theirs than it has now"):
        compare(quadratic.setup, given, baselines={"theirs": module_level}, resume=True, **more)


def test_a_function_that_cannot_be_sent_is_refused_before_any_work(tmp_path):
    with pytest.raises(TypeError, match="baselines cannot be sent to another process"):
        compare(quadratic.setup, baselines={"theirs": lambda *given: None}, out=tmp_path)


def test_an_unknown_library_gets_a_sentence(tmp_path, capsys):
    assert main(["compare", "quadratic", "--baselines", "highr", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said == (
        "bilevel: there are no baselines 'highr'; there are those of betty, higher, torchopt. Did you mean higher?\n"
    )
    with pytest.raises(ValueError, match="there are no baselines 'sgd'"):
        compare(quadratic.setup, baselines=["sgd"], out=tmp_path)


@pytest.mark.parametrize("name", ["higher", "torchopt"])
def test_a_library_that_is_missing_gets_a_sentence(name, tmp_path, capsys, monkeypatch):
    def missing(distribution):
        raise importlib.metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert main(["compare", "quadratic", "--baselines", name, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said == f'bilevel: the baselines of {name} need it installed: pip install "bilevel[peers]"\n'


def test_forecasts_leave_baselines_out_and_say_so(case, capsys):
    assert main(["forecast", str(case), "--json"]) == 0
    printed = capsys.readouterr()
    assert [json.loads(line)["estimator"] for line in printed.out.splitlines()] == ["unrolled"]
    assert "baselines are left out, because they need real numbers: by hand, alone" in printed.err


def test_list_names_the_libraries(capsys):
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    assert "baselines for --baselines:" in text
    assert "higher: its differentiable optimizers" in text
