"""Two sets of records: what is worse is found, and noise is not."""

import dataclasses
import json
import subprocess
import sys

import pytest
from bilevel_profiling.cli import main
from bilevel_profiling.comparison.diff import Tolerances, Verdict, as_dict, compare_records
from bilevel_profiling.records.record import Iteration, Record
from bilevel_profiling.records.records_file import write

MACHINE = {"cpu": "a processor", "threads": "1 on 2 processors", "torch": "2.6"}
ROW = Record(
    case="case",
    estimator="one",
    settings="Unrolled()",
    inner_steps=5,
    inner_size=3,
    outer_size=3,
    base_tensor_bytes=100,
    peak_tensor_bytes=1_000_000,
    kept_tensor_bytes=0,
    wall_seconds=1.0,
    wall_seconds_low=0.95,
    wall_seconds_high=1.05,
    repeats=5,
    matmul_flops=10**9,
    calls={"inner_gradient": 10, "hvp": 5},
    program_relative_error=1e-4,
    solution_relative_error=0.1,
    iterations=(Iteration(index=0, outer_loss=1.0),),
    environment=MACHINE,
)
FAILED = Record(
    case="case", estimator="one", settings="Unrolled()", inner_steps=5, status="TIMEOUT", environment=MACHINE
)


def verdicts(change, row=ROW, **tolerances):
    new = dataclasses.replace(row, **change) if isinstance(change, dict) else change
    return {
        each.figure: each.verdict.value for each in compare_records([row], [new], Tolerances(**tolerances)).differences
    }


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, {}),
        ({"peak_tensor_bytes": 1_000_900}, {}),
        ({"peak_tensor_bytes": 1_001_100}, {"peak_tensor_bytes": "worse"}),
        ({"peak_tensor_bytes": 990_000}, {"peak_tensor_bytes": "better"}),
        ({"kept_tensor_bytes": 8}, {"kept_tensor_bytes": "worse"}),
        ({"matmul_flops": 10**9 + 1}, {"matmul_flops": "worse"}),
        ({"calls": {"inner_gradient": 11, "hvp": 4}}, {"calls inner_gradient": "worse", "calls hvp": "better"}),
        ({"calls": {"inner_gradient": 10, "hvp": 5, "mixed": 1}}, {"calls mixed": "worse"}),
        ({"program_relative_error": 1.9e-4}, {}),
        ({"program_relative_error": 2.1e-4}, {"program_relative_error": "worse"}),
        ({"program_relative_error": 1e-9}, {"program_relative_error": "better"}),
        ({"program_relative_error": float("nan")}, {"program_relative_error": "worse"}),
        ({"solution_relative_error": None}, {"solution_relative_error": "changed"}),
        ({"status": "DIVERGED"}, {"status": "worse"}),
        ({"status": "MAX_STEPS"}, {"status": "worse"}),
        ({"iterations": (Iteration(index=0, status="TIMEOUT"),)}, {"outer loop": "worse"}),
        ({"iterations": ()}, {"outer loop": "changed"}),
        (FAILED, {"status": "worse"}),
        # another problem, or another estimator, under the same name: its figures are not judged
        ({"inner_size": 4, "peak_tensor_bytes": 2_000_000}, {"inner_size": "changed"}),
        ({"settings": "Unrolled(keep='iterates')", "peak_tensor_bytes": 9}, {"settings": "changed"}),
        # not compared: it is for a person to say
        ({"resident_bytes": 10**9, "metrics": {"accuracy": 0.1}, "notes": ("new",)}, {}),
    ],
    ids=str,
)
def test_figures(change, found):
    assert verdicts(change) == found


def test_severity_of_status():
    worst = [dataclasses.replace(ROW, status=status) for status in ("OK", "MAX_STEPS", "DIVERGED")]
    for old in range(3):
        for new in range(3):
            found = verdicts(worst[new], worst[old]).get("status")
            assert found == ("worse" if new > old else "better" if new < old else None)
    assert verdicts({"status": "DIVERGED"}, dataclasses.replace(ROW, status="NONFINITE")) == {"status": "changed"}
    assert verdicts(ROW, FAILED) == {"status": "better"}


def test_errors_below_what_the_dtype_resolves_are_rounding():
    exact = dataclasses.replace(ROW, program_relative_error=1e-8)
    assert verdicts({"program_relative_error": 9e-7}, exact) == {}
    assert verdicts({"program_relative_error": 3e-5}, exact) == {"program_relative_error": "worse"}
    double = dataclasses.replace(exact, dtype="float64")
    assert verdicts({"program_relative_error": 9e-7}, double) == {"program_relative_error": "worse"}
    rough = dataclasses.replace(exact, dtype="bfloat16")
    assert verdicts({"program_relative_error": 0.02}, rough) == {}


def timed(median, low, high, **others):
    return dataclasses.replace(ROW, wall_seconds=median, wall_seconds_low=low, wall_seconds_high=high, **others)


@pytest.mark.parametrize(
    ("new", "found"),
    [
        (timed(1.08, 1.06, 1.09), None),  # apart, but by less than what counts
        (timed(1.5, 1.0, 1.6), "within noise"),
        (timed(1.5, 1.4, 1.6), "worse"),
        (timed(0.5, 0.45, 0.6), "better"),
        (timed(0.5, 0.45, 0.96), "within noise"),
        (timed(1.5, 1.5, 1.5, repeats=1), "within noise"),
        (timed(1.5, None, None), "within noise"),
        (timed(None, None, None), None),
        (timed(9.0, 8.0, 10.0, environment={**MACHINE, "cpu": "another"}), None),
        (timed(9.0, 8.0, 10.0, environment={**MACHINE, "threads": "2 on 2 processors"}), None),
        (timed(9.0, 8.0, 10.0, environment={**MACHINE, "torch": "2.13"}), "worse"),
    ],
)
def test_times_differ_only_beyond_their_noise(new, found):
    assert compare_records([ROW], [new]).rows(Verdict.WORSE) == (found == "worse")
    assert verdicts(new).get("wall_seconds") == found


def test_another_machine_is_said():
    (note,) = compare_records([ROW], [timed(9.0, 8.0, 10.0, environment={**MACHINE, "cpu": "another"})]).notes
    assert note == "the times of 1 row are not compared: cpu a processor and another"


def test_tolerances():
    assert verdicts({"peak_tensor_bytes": 1_040_000}, memory=0.05) == {}
    assert verdicts({"peak_tensor_bytes": 1_000_001}, memory=0.0) == {"peak_tensor_bytes": "worse"}
    assert verdicts(timed(1.4, 1.3, 1.5), time=0.5) == {}


def test_rows_are_matched_by_what_they_are():
    old = [
        ROW,
        dataclasses.replace(ROW, seed=1),
        dataclasses.replace(ROW, device="cuda"),
        dataclasses.replace(ROW, source="forecast"),
    ]
    assert compare_records(old, old[::-1]).differences == ()
    found = compare_records(old, [*old[1:], dataclasses.replace(ROW, inner_steps=6)])
    assert [(each.verdict.value, each.key.inner_steps) for each in found.differences] == [("missing", 5), ("new", 6)]
    assert found.sentence() == "3 rows in both: 3 the same; 1 only in the old; 1 only in the new."
    # two rows of the same kind in a file
    assert (
        compare_records([ROW, ROW], [ROW, dataclasses.replace(ROW, status="ERROR")]).sentence()
        == "2 rows in both: 1 worse, 1 the same."
    )
    # a run that failed before it knew its dtype
    double = dataclasses.replace(ROW, dtype="float64")
    assert verdicts(FAILED, double) == {"status": "worse"}
    assert verdicts(double, FAILED) == {"status": "better"}
    assert set(verdicts(double)) == {"row"}


def test_a_file_is_the_same_as_itself_and_json_says_all():
    cases = [
        dataclasses.replace(ROW, estimator=label, inner_steps=k)
        for label in ("one", "two", "three")
        for k in (1, 5, 20)
    ]
    records = [*cases, dataclasses.replace(FAILED, case="other")]
    assert compare_records(records, records).sentence() == f"{len(records)} rows in both: {len(records)} the same."
    worse = [dataclasses.replace(record, program_relative_error=float("nan")) for record in records]
    found = json.loads(json.dumps(as_dict(compare_records(records, worse)), allow_nan=False))
    assert {entry["new"] for entry in found["differences"]} == {"nan"}
    assert found["matched"] == len(records)


@pytest.fixture
def files(tmp_path):
    write([ROW, dataclasses.replace(ROW, estimator="[red]two\nlines")], tmp_path / "old.jsonl")
    write(
        [ROW, dataclasses.replace(ROW, estimator="[red]two\nlines", peak_tensor_bytes=2_000_000)],
        tmp_path / "worse.jsonl",
    )
    write([ROW], tmp_path / "fewer.jsonl")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "torn.jsonl").write_bytes((tmp_path / "old.jsonl").read_bytes()[:-10])
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("old", "new", "more", "status", "said"),
    [
        ("old.jsonl", "old.jsonl", [], 0, "2 rows in both: 2 the same."),
        ("old.jsonl", "worse.jsonl", [], 1, "2 rows in both: 1 worse, 1 the same."),
        ("old.jsonl", "worse.jsonl", ["--memory-tolerance", "100%"], 0, "2 the same"),
        ("worse.jsonl", "old.jsonl", [], 0, "1 better"),
        ("old.jsonl", "fewer.jsonl", [], 1, "1 only in the old"),
        ("old.jsonl", "fewer.jsonl", ["--allow-missing"], 0, "1 only in the old"),
        ("fewer.jsonl", "old.jsonl", [], 0, "1 only in the new"),
        ("old.jsonl", "empty.jsonl", [], 2, "holds no records"),
        ("torn.jsonl", "old.jsonl", [], 2, "torn.jsonl is damaged"),
        ("old.jsonl", "folder", [], 2, "cannot read"),
        ("nowhere.jsonl", "old.jsonl", [], 2, "nowhere.jsonl: No such file"),
        ("old.jsonl", "old.jsonl", ["--time-tolerance", "much"], 2, "no percentage"),
    ],
)
def test_the_command_and_its_exit_status(files, capsys, old, new, more, status, said):
    try:
        ended = main(["diff", str(files / old), str(files / new), *more])
    except SystemExit as stop:  # argparse
        ended = stop.code
    assert ended == status
    printed = capsys.readouterr()
    assert said in (printed.err if status == 2 else printed.out)
    assert (status == 2) == bool(printed.err)


def test_the_table_shows_labels_as_they_are(files, capsys):
    main(["diff", str(files / "old.jsonl"), str(files / "worse.jsonl")])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "peak_tensor_bytes" in line]
    assert "[red]two\\nlines" in line
    assert line.startswith("worse")
    assert line.split()[-1] == "2.000x"


def test_json_and_nothing_else(files, capsys):
    assert main(["diff", str(files / "old.jsonl"), str(files / "worse.jsonl"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["worse"] is True
    assert [(entry["figure"], entry["verdict"], entry["old"], entry["new"]) for entry in found["differences"]] == [
        ("peak_tensor_bytes", "worse", 1_000_000, 2_000_000)
    ]


@pytest.mark.parametrize("missing", ["torch", "rich"])
def test_it_needs_neither_torch_nor_rich(files, missing):
    code = f"import sys; sys.modules[{missing!r}] = None; from bilevel_profiling.cli import main; "
    code += "sys.exit(main(['diff', *sys.argv[1:]]))"
    done = subprocess.run(
        [sys.executable, "-c", code, files / "old.jsonl", files / "worse.jsonl"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "2.000x" in done.stdout
    assert ("rich" in done.stderr) == (missing == "rich")
