"""Engines in comparisons: rows of estimator and engine, that resume tells apart, and reports that name them."""

import dataclasses

import pytest
from bilevel_profiling import compare, report
from bilevel_profiling.cases.case_file import CaseError, given, load
from bilevel_profiling.cases.engines import known, named
from bilevel_profiling.cli import main
from bilevel_profiling.comparison.diff import compare_records
from bilevel_profiling.comparison.plan import Plan, settle
from bilevel_profiling.comparison.tasks import key_of
from bilevel_profiling.records.record import Function, Record, Target
from bilevel_profiling.records.records_file import read
from bilevel_profiling.report import markdown
from bilevel_profiling.report.content import columns, groups

import bilevel as bl

CASE = '''
"""A small case."""
import torch
import bilevel as bl

def setup(device):
    x, y = torch.ones(3, device=device), torch.zeros(3, device=device)
    return bl.Problem(lambda y, x, b: ((y - x) ** 2).sum(), lambda y, x, b: (y**2).sum()), x, y, bl.Batches(None, None)

def own(problem, outer, inner, batches, solver):
    return torch.zeros_like(outer)

OPTIMIZER = bl.SGD(lr=0.25)
INNER_STEPS = [2]
OUTER_STEPS = 1
ESTIMATORS = {"unrolled": bl.Unrolled()}
BASELINES = {"own": own}
ENGINES = {"eager": bl.Eager(), "traced": bl.Compiled(backend="graph")}
'''
QUICK = ["--repeats", "1", "--device", "cpu"]
GRAPH = bl.Compiled(backend="graph")


@pytest.fixture
def case(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(CASE)
    return path


def rows(out):
    return {(record.estimator, record.engine): record for record in read(out / "records.jsonl")}


def test_each_estimator_is_a_row_with_each_engine_and_resume_tells_them_apart(case, tmp_path, capsys):
    out = tmp_path / "report"
    command = ["compare", str(case), "--out", str(out), *QUICK]
    assert main([*command, "--engine", "eager"]) == 0
    assert list(rows(out)) == [("unrolled", "eager"), ("own", "")]
    before = (out / "records.jsonl").read_bytes().splitlines()
    assert main([*command, "--resume"]) == 0  # the case's own engines: one is missing
    found = rows(out)
    assert list(found) == [("unrolled", "eager"), ("unrolled", "traced"), ("own", "")]  # in the order of the plan
    after = (out / "records.jsonl").read_bytes().splitlines()
    assert [after[0], after[2]] == before
    eager, traced = found["unrolled", "eager"], found["unrolled", "traced"]
    assert (eager.status, traced.status) == ("OK", "OK")
    assert traced.engine_settings == repr(GRAPH)
    assert traced.trace_seconds > 0
    assert (eager.peak_meter, traced.peak_meter) == ("tensors", "allocator")
    assert eager.trace_seconds is None
    assert traced.iterations[0].outer_loss == pytest.approx(eager.iterations[0].outer_loss)
    page = (out / "report.md").read_text()
    assert "| unrolled (traced) | 2 |" in page
    assert f"engine traced: `{GRAPH!r}`" in page
    assert "unrolled (traced)" in (out / "index.html").read_text()
    capsys.readouterr()
    case.write_text(CASE.replace('backend="graph"', 'backend="graph", check=False'))
    assert main([*command, "--resume"]) == 2
    assert "has engine Compiled(backend='graph', check=True), and this comparison" in capsys.readouterr().err


def test_engines_are_given_by_names_or_by_label(case):
    def labels(**overrides):
        (settled,) = settle([Plan(str(case), overrides)])
        return [cell.title for cell in settled.cells]

    assert labels() == ["unrolled (eager)", "unrolled (traced)", "own"]
    assert labels(engines=["compiled"]) == ["unrolled (compiled)", "own"]
    assert labels(engines=["traced", "eager"]) == ["unrolled (traced)", "unrolled (eager)", "own"]
    assert labels(engines={"mine": GRAPH}) == ["unrolled (mine)", "own"]
    assert labels(engines={}) == ["unrolled", "own"]
    assert [cell.title for cell in settle([Plan("quadratic")])[0].cells][:2] == ["unrolled", "unrolled iterates"]
    assert given(str(case), engines=["compiled"]).engines == {"compiled": bl.Compiled()}


def test_what_is_no_engine_is_refused(case, capsys, tmp_path):
    assert main(["compare", str(case), "--engine", "compield", "--out", str(tmp_path / "none")]) == 2
    assert "there is no engine 'compield'; there are eager, compiled" in (said := capsys.readouterr().err)
    assert "Did you mean compiled?" in said
    assert main(["forecast", str(case), "--engine", "jit"]) == 2
    assert "traced" in capsys.readouterr().err
    case.write_text(CASE + '\nENGINES = {"traced": "graph"}\n')
    with pytest.raises(CaseError, match=r'a dict of engines was needed, such as \{"eager": bl.Eager\(\)'):
        load(str(case))
    with pytest.raises(TypeError, match=r"'compiled' as engines; names .*write engines=\['compiled'\]"):
        compare(str(case), engines="compiled", out=tmp_path / "none")
    with pytest.raises(TypeError, match=r'write engines=\{"mine": Eager\(\)\}'):
        compare(str(case), engines=bl.Eager(), out=tmp_path / "none")


def test_the_engines_known_by_name_are_those_that_there_are():
    assert {type(engine) for engine in known().values()} == {
        kind
        for kind in vars(bl).values()
        if isinstance(kind, type) and issubclass(kind, bl.Engine) and kind is not bl.Engine
    }
    assert named(["eager"], {"eager": GRAPH}) == {"eager": GRAPH}


def test_forecasts_and_fits_of_engines(case, capsys):
    assert main(["forecast", str(case), "--engine", "eager", "compiled", "--budget", "1KiB", "--at-most", "4"]) == 0
    out = capsys.readouterr().out
    assert "unrolled (compiled)" in out
    assert "unrolled (eager)" in out
    assert "in this order, for K = 2, engine compiled" in out
    assert main(["fit", str(case), "--budget", "1KiB", "--at-most", "4"]) == 0
    assert "unrolled (traced)" in capsys.readouterr().out


def record(engine="", **more):
    return Record(
        case="c",
        estimator="unrolled",
        engine=engine,
        engine_settings=f"{engine}()" if engine else "",
        target=Target.PROGRAM,
        inner_steps=3,
        peak_tensor_bytes=2**20,
        wall_seconds=0.1,
        **more,
    )


COMPILED = record(
    "compiled",
    trace_seconds=1.5,
    compile_seconds=40.0,
    warm_up_seconds=42.0,
    functions=(Function(name="gradient of loss", matmul_flops=10, calls=3),),
)


def test_reports_name_engines_where_there_are_several():
    (alone,) = groups.group([COMPILED])
    assert alone.estimators == ("unrolled",)
    (several,) = groups.group([record("eager"), COMPILED, dataclasses.replace(COMPILED, source="forecast")])
    assert several.estimators == ("unrolled (eager)", "unrolled (compiled)", "unrolled (compiled, forecast)")
    assert several.baseline == "unrolled (eager)"
    (resumed,) = groups.group([record(), COMPILED])
    assert resumed.estimators == ("unrolled", "unrolled (compiled)")
    once = {column.header: column for column in columns.columns(several)}["once s"]
    assert [once.cell(row) for row in several.rows] == ["-", "41.5", "41.5"]
    assert "once s" not in {column.header for column in columns.columns(groups.group([record("eager")])[0])}


def test_every_view_shows_them(tmp_path):
    page = report.write([record("eager"), COMPILED], tmp_path)
    assert "unrolled (compiled)" in page.read_text()
    assert "compiled()" in page.read_text()
    text = markdown.render([record("eager"), COMPILED])
    assert "time: ms" in text
    assert "once s" in text
    assert "spent once" in text
    assert "engine compiled" in text


def test_rows_of_two_engines_are_two_rows():
    assert key_of(record("eager")) != key_of(COMPILED) != key_of(record())
    slower = dataclasses.replace(COMPILED, peak_tensor_bytes=2**21)
    found = compare_records([record("eager"), COMPILED], [record("eager"), slower])
    assert [(each.key.engine, each.figure) for each in found.differences] == [("compiled", "peak_tensor_bytes")]
    other = dataclasses.replace(COMPILED, engine_settings="compiled(check=False)", peak_tensor_bytes=2**21)
    assert [each.figure for each in compare_records([COMPILED], [other]).differences] == ["engine_settings"]
