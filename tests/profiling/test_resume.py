"""Continuing a comparison: finished rows stay, what is missing is measured, and what does not belong together is
refused by name."""

import importlib
import json
import linecache
import os
import subprocess
import sys
import time

import pytest
from bilevel_profiling import compare
from bilevel_profiling.cases.case_file import given
from bilevel_profiling.cli import main
from bilevel_profiling.comparison.code import fingerprint
from bilevel_profiling.comparison.folder import Folder, filename
from bilevel_profiling.comparison.plan import Plan, Settled
from bilevel_profiling.records.note import NoteKind
from bilevel_profiling.records.records_file import read, scan

import bilevel as bl
from bilevel.problems import quadratic

CASE = '''
"""A small case."""
import os
import torch
import bilevel as bl

def setup(device):
    x, y = torch.ones(3, device=device), torch.zeros(3, device=device)
    return bl.Problem(lambda y, x, b: ((y - x) ** 2).sum(), lambda y, x, b: outer(y)), x, y, bl.Batches(None, None)

def outer(y):
    if os.path.exists(__file__ + ".broken"): raise ValueError("broken for now")
    return (y ** 2).sum()

def evaluate(outer, device):
    if os.path.exists(__file__ + ".blind"): raise ValueError("cannot see")
    return {"size": float(outer.norm())}

OPTIMIZER = bl.SGD(lr=0.25)
INNER_STEPS = [1, 2]
ESTIMATORS = {"unrolled": bl.Unrolled(), "corrected": bl.FirstOrderCorrected()}
OUTER_STEPS = 2
'''
QUICK = ["--repeats", "1", "--device", "cpu"]


@pytest.fixture
def case(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(CASE)
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "report"


def rows(out):
    return {(record.estimator, record.inner_steps): record for record in read(out / "records.jsonl")}


def test_only_what_is_missing_is_measured(case, out, capsys):
    command = ["compare", str(case), "--out", str(out), *QUICK]
    assert main([*command, "--resume"]) == 0  # nothing there: like a new one
    lines = (out / "records.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    capsys.readouterr()

    # finished: nothing is measured, nothing changes, the report is written
    (out / "index.html").unlink()
    assert main([*command, "--resume"]) == 0
    assert (out / "records.jsonl").read_bytes() == b"".join(lines)
    assert (out / "index.html").exists()
    said = capsys.readouterr().err
    assert "continuing with 4 finished rows" in said
    assert "[1/" not in said

    # a row, the loop of a row, and half of a row are missing
    unlooped = {**json.loads(lines[3]), "iterations": [], "metrics": {}, "metrics_before": {}}
    assert unlooped["estimator"] == "corrected"
    (out / "records.jsonl").write_bytes(lines[0] + json.dumps(unlooped).encode() + b"\n" + lines[1][:100])
    assert main([*command, "--resume"]) == 0
    said = capsys.readouterr().err
    assert "its 100 bytes are in" in said
    assert (out / "records.jsonl.damaged").read_bytes() == lines[1][:100] + b"\n"
    assert [line.split("  ")[1].split(": ")[1] for line in said.splitlines() if line.startswith("[")] == [
        "float64 reference, K = 1",
        "float64 reference, K = 2",
        "corrected, K = 1",
        "unrolled, K = 2",
        "unrolled, outer loop of 2",
        "corrected, outer loop of 2",
    ]
    assert (out / "records.jsonl").read_bytes().startswith(lines[0])
    found = rows(out)
    assert len(found) == 4
    assert [len(found[label, 2].iterations) for label in ("unrolled", "corrected")] == [2, 2]
    assert found["corrected", 2].wall_seconds == unlooped["wall_seconds"]  # only its loop was run
    assert found["unrolled", 2].metrics["size"] < found["unrolled", 2].metrics_before["size"]

    # more labels, more K, another case: the old rows stay, byte for byte
    before = (out / "records.jsonl").read_bytes()
    assert (
        main(
            [
                "compare",
                str(case),
                "--out",
                str(out),
                *QUICK,
                "--resume",
                "--estimators",
                "unrolled",
                "--inner-steps",
                "3",
                "--outer-steps",
                "0",
            ]
        )
        == 0
    )
    assert (out / "records.jsonl").read_bytes().startswith(before)
    assert sorted(rows(out)) == sorted([*found, ("unrolled", 3)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--seed", "3"], "seed 0, and this is 3"),
        (["--repeats", "2"], "number of repeats 1, and this is 2"),
        (["--threads", "2"], "number of threads 1, and this is 2"),
        (["--outer-steps", "5"], "number of outer steps 2, and this is 5"),
        (("lr=0.25", "lr=0.5"), "inner optimizer SGD(lr=0.25"),
        (("(y ** 2).sum()", "(y ** 4).sum()"), "other code than it has now"),
        (
            ('"unrolled": bl.Unrolled()', '"unrolled": bl.Unrolled(keep="iterates")'),
            "unrolled, K = 1 has estimator Unrolled(keep='graph'",
        ),
        (("# nothing", ""), None),
    ],
    ids=str,
)
def test_what_was_measured_otherwise_is_refused_by_name(case, out, capsys, change, message):
    _finished(case, out)
    before = (out / "records.jsonl").read_bytes()
    command = ["compare", str(case), "--out", str(out), *QUICK, "--resume"]
    if isinstance(change, list):
        command += change
    else:
        case.write_text(
            case.read_text().replace(*change) + "\n# a comment\nLABELS = None\n".replace("LABELS = None", "")
        )
    status = main(command)
    said = capsys.readouterr().err
    assert (out / "records.jsonl").read_bytes() == before
    if message is None:  # comments change nothing
        assert status == 0, said
    else:
        assert status == 2
        assert message in said
        assert "cannot be continued" in said


HELPED = CASE.replace("import torch\n", "import torch\nfrom helping import shift\n").replace(
    "sum()\n\ndef eval", "sum() + shift()\n\ndef eval"
)


def test_a_changed_module_that_the_case_imports_is_other_code(tmp_path, capsys):
    """A13: edited between two runs, and imported by a module of a package that the case imports; in a fresh process."""
    case, helper, out = tmp_path / "helped.py", tmp_path / "helping" / "deep.py", tmp_path / "report"
    helper.parent.mkdir()
    (tmp_path / "helping" / "__init__.py").write_text("def shift():\n    from .deep import amount\n    return amount\n")
    helper.write_text("amount = 1.0\n")
    (tmp_path / "unrelated.py").write_text("x = 1\n")
    case.write_text(HELPED)
    assert "shift()\n" in HELPED
    command = [sys.executable, "-m", "bilevel_profiling.cli", "compare", str(case), "--out", str(out), *QUICK]
    quick = [*command, "--inner-steps", "1", "--outer-steps", "0", "--estimators", "corrected"]
    subprocess.run(quick, check=True, capture_output=True)
    before = (out / "records.jsonl").read_bytes()
    assert len(read(out / "records.jsonl")) == 1
    helper.write_text("# a comment\namount = 1.0\n")
    (tmp_path / "unrelated.py").write_text("x = 2\n")
    assert subprocess.run([*quick, "--resume"], capture_output=True).returncode == 0
    helper.write_text("amount = 2.0\n")
    refused = subprocess.run([*quick, "--resume"], capture_output=True, text=True)
    assert (refused.returncode, "other code than it has now" in refused.stderr) == (2, True), refused.stderr
    assert (out / "records.jsonl").read_bytes() == before


def test_the_code_of_functions_is_followed_too(tmp_path, monkeypatch):
    """What `setup` uses of its module, and what that module imports; not what it has nothing to do with."""
    monkeypatch.syspath_prepend(tmp_path)
    text = "import local_helper\nWIDTH = 3\ndef size(): return WIDTH\ndef setup(device): return size()\n"
    text += "def other(): return 1\n"

    def mark(text, helper="y = 1\n"):
        (tmp_path / "local_case.py").write_text(text)
        (tmp_path / "local_helper.py").write_text(helper)
        importlib.invalidate_caches()
        linecache.clearcache()
        for name in ("local_case", "local_helper"):
            sys.modules.pop(name, None)
        sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
        try:
            setup = importlib.import_module("local_case").setup
        finally:
            sys.dont_write_bytecode = before
        definition = given(setup, estimators={"e": bl.Unrolled()})
        return fingerprint(Settled(Plan(setup), definition, ("e",)))

    first = mark(text)
    assert mark(text.replace("return 1", "return 2")) == first
    assert mark(text.replace("= 3", "= 4")) != first
    assert mark(text.replace("return WIDTH", "return WIDTH + 1")) != first
    assert mark(text, "y = 2\n") != first


_REPORT = {}


def _finished(case, out):
    """A finished comparison, measured once."""
    if not _REPORT:
        assert main(["compare", str(case), "--out", str(out), *QUICK]) == 0
        _REPORT.update({name: (out / name).read_bytes() for name in ("records.jsonl", "records.plan.json")})
    out.mkdir(exist_ok=True)
    for name, data in _REPORT.items():
        (out / name).write_bytes(data)


def test_without_its_plan_a_file_is_checked_by_what_the_rows_say(case, out, capsys):
    _finished(case, out)
    (out / "records.plan.json").unlink()
    assert main(["compare", str(case), "--out", str(out), *QUICK, "--resume", "--seed", "1"]) == 2
    assert "has seed 0, and this comparison has 1" in capsys.readouterr().err
    assert main(["compare", str(case), "--out", str(out), *QUICK, "--resume"]) == 0
    assert "records.plan.json is missing" in capsys.readouterr().err
    (out / "records.plan.json").write_text("{")
    assert main(["compare", str(case), "--out", str(out), *QUICK, "--resume"]) == 2
    assert "records.plan.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [(b"{oh no}\n", "line 2: not a record: invalid JSON"), (b'{"case":"c","estimator":"e","schema":9}\n', "schema 9")],
)
def test_a_file_that_is_damaged_within_is_left_alone(case, out, capsys, line, message):
    _finished(case, out)
    first, *others = (out / "records.jsonl").read_bytes().splitlines(keepends=True)
    damaged = b"".join([first, line, *others])
    (out / "records.jsonl").write_bytes(damaged)
    assert main(["compare", str(case), "--out", str(out), *QUICK, "--resume"]) == 2
    assert message in capsys.readouterr().err
    assert (out / "records.jsonl").read_bytes() == damaged


def test_rows_that_are_not_continued_are_kept_aside(case, out, capsys):
    _finished(case, out)
    (out / "records.jsonl").write_bytes(old := (out / "records.jsonl").read_bytes() + b"and some damage")
    command = [
        "compare",
        str(case),
        "--out",
        str(out),
        *QUICK,
        "--estimators",
        "unrolled",
        "--inner-steps",
        "1",
        "--outer-steps",
        "0",
        "--seed",
        "7",
    ]
    for count in (1, 2):
        assert main(command) == 0
        assert len(read(out / "records.jsonl")) == 1
        kept = sorted(out.glob("records-*.jsonl"))
        assert len(kept) == len(sorted(out.glob("records-*.plan.json"))) == count
        assert old in [path.read_bytes() for path in kept]
    said = capsys.readouterr().err
    assert "the 4 rows of an earlier comparison are kept in" in said
    assert "--resume continues" in said


def test_failures_stay_until_they_are_to_be_tried_again(case, out, capsys):
    broken, blind = case.with_name("small.py.broken"), case.with_name("small.py.blind")
    command = ["compare", str(case), "--out", str(out), *QUICK, "--inner-steps", "2"]
    broken.touch()
    assert main(command) == 1
    assert {(r.status, r.reason) for r in rows(out).values()} == {("ERROR", "ValueError: broken for now")}
    assert (out / "index.html").exists()
    broken.unlink()
    before = (out / "records.jsonl").read_bytes()
    assert main([*command, "--resume"]) == 1
    assert (out / "records.jsonl").read_bytes() == before

    blind.touch()
    assert main([*command, "--retry-failed"]) == 0
    found = rows(out)
    assert [(r.status, [i.status for i in r.iterations]) for r in found.values()] == [("OK", ["ERROR"])] * 2
    assert all(str(r.notes[-1]) == "The outer loop ended with ERROR: ValueError: cannot see" for r in found.values())
    blind.unlink()
    assert main([*command, "--retry-failed"]) == 0
    again = rows(out)
    assert [len(r.iterations) for r in again.values()] == [2] * 2
    assert not any(note.kind is NoteKind.OUTER_LOOP for r in again.values() for note in r.notes)
    assert [r.wall_seconds for r in again.values()] == [
        r.wall_seconds for r in found.values()
    ]  # only the loops were run
    assert list(again) == list(found)


def test_compare_resumes_with_functions(tmp_path):
    """In a process of its own, as a script would."""
    known = {"optimizer": bl.SGD(lr=1.0), "inner_steps": [2], "repeats": 1, "outer_steps": 0, "out": tmp_path / "r"}
    (first,) = compare(quadratic.setup, {"unrolled": bl.Unrolled()}, **known)
    found = compare(
        quadratic.setup, {"unrolled": bl.Unrolled(), "implicit": bl.Implicit(bl.CG(2))}, resume=True, **known
    )
    assert found[0] == first
    assert [record.estimator for record in found] == ["unrolled", "implicit"]
    with pytest.raises(ValueError, match="has estimator Unrolled"):
        compare(quadratic.setup, {"unrolled": bl.Unrolled("iterates")}, resume=True, **known)
    assert read(tmp_path / "r" / "records.jsonl") == found


def test_one_comparison_at_a_time(case, out, capsys):
    first = Folder(out)
    assert main(["compare", str(case), "--out", str(out), *QUICK]) == 2
    assert "another comparison is writing there" in capsys.readouterr().err
    first.release()
    Folder(out).release()
    code = "import sys, time; from bilevel_profiling.comparison.folder import Folder; f = Folder(sys.argv[1]); "
    code += "print('mine', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"mine\n"
    with pytest.raises(OSError, match="another comparison"):
        Folder(out)
    other.kill()  # the lock ends with its owner
    other.wait()
    other.stdout.close()
    Folder(out).release()


def test_what_a_killed_comparison_leaves_is_cleared_away_and_nothing_else(out):
    (out / "references").mkdir(parents=True)
    theirs = [out / "mine.tmp", out / "references" / "notes.tmp"]
    ours = [out / "records.jsonl.tmp", out / "references" / "quadratic-program-5-cpu-0.1234.tmp"]
    for path in (*theirs, *ours):
        path.touch()
    Folder(out).release()
    assert [path.exists() for path in (*theirs, *ours)] == [True, True, False, False]


def test_names_of_files():
    names = ["a/b", "a b", "a\nb", 'a"b', "../b", "..", "", ".", "ä", "\udce4", "x" * 300, "x" * 301, "a-b", "CON:"]
    made = [filename(name) for name in names]
    assert len(set(made)) == len(names)
    assert all(
        name and "/" not in name and not name.startswith(".") and len(name) < 130 and name.isascii() for name in made
    )


def test_labels_may_hold_anything(tmp_path, capsys):
    labels = ["a/b", "a b", 'quote " and <b>', "line\nbreak", "../../up", "[red]rich"]
    case = tmp_path / "odd 'name'.py"
    case.write_text(
        CASE
        + f"ESTIMATORS = {{label: bl.Unrolled() for label in {labels!r}}}\nESTIMATORS['bad/one'] = bl.FirstOrder()\n"
    )
    out = tmp_path / "deep" / "report"
    assert main(["compare", str(case), "--out", str(out), *QUICK, "--inner-steps", "1"]) == 0
    assert [record.estimator for record in read(out / "records.jsonl")] == [*labels, "bad/one"]
    assert "\n\tbreak" not in capsys.readouterr().err
    made = sorted(path.relative_to(tmp_path).parts for path in tmp_path.rglob("*") if path.is_file())
    assert all(parts[:2] == ("deep", "report") for parts in made if parts[0] not in (case.name, "__pycache__"))
    assert len(list((out / "logs").iterdir())) >= 1
    assert scan(out / "records.jsonl").damage == ()
    before = (out / "records.jsonl").read_bytes()
    assert main(["compare", str(case), "--out", str(out), *QUICK, "--inner-steps", "1", "--resume"]) == 0
    assert (out / "records.jsonl").read_bytes() == before


def test_no_process_outlives_a_command_that_was_killed(case, out):
    """The command alone is killed, not its group: the server and the cell notice."""
    case.write_text(CASE.replace("def outer(y):", "def outer(y):\n    import time; time.sleep(100)"))
    command = [sys.executable, "-m", "bilevel_profiling.cli", "compare", str(case), "--out", str(out), *QUICK]
    running = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(_group(running.pid)) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(_group(running.pid)) >= 3
    running.kill()
    running.wait()
    deadline = time.monotonic() + 20
    while _group(running.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _group(running.pid) == []


def _group(leader):
    """The living processes of a group."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as stream:
                state, _, group = stream.read().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(group) == leader and state not in "ZX":
            found.append(int(name))
    return found
