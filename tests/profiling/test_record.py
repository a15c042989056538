"""Files of records: what is written comes back, what is damaged is said, and a process that is killed loses nothing it
had finished."""

import dataclasses
import http
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bilevel_profiling.records import records_file
from bilevel_profiling.records.failure import _LESS_ACCURATE, FAILURES, Severity, failed, noted, of_error, severity
from bilevel_profiling.records.note import NoteKind
from bilevel_profiling.records.record import SCHEMA, Alive, Iteration, Phase, Record, Target, from_line, iteration_json
from bilevel_profiling.records.records_file import RecordsFile, append_iteration, read, scan, write

import bilevel as bl

FULL = Record(
    case="a 'case'\nof two lines",
    estimator='quotes " and \\ and ünïcode \udce4',
    inner_steps=5,
    wall_seconds=float("nan"),
    program_relative_error=float("inf"),
    calls={"hvp": 3},
    phases={"inner": Phase(peak_tensor_bytes=7, calls={"hvp": 1})},
    timeline=((0, 1, "inner", "hvp", "aten.mm"),),
    alive=(Alive(bytes=4, count=1, line="model.py:3"),),
    notes=("one", "two"),
    iterations=(Iteration(index=0, outer_loss=float("-inf"), phases={"outer": Phase()}, metrics={"accuracy": 0.5}),),
    metrics={"accuracy": 0.5},
    environment={"torch": "2"},
)


def same(a: Record, b: Record) -> bool:
    return a.to_json() == b.to_json()  # a nan is not equal to itself


def test_a_record_comes_back_as_it_was(tmp_path):
    assert "\n" not in FULL.to_json()
    assert same(Record.from_json(FULL.to_json()), FULL)
    write([FULL, Record(case="c", estimator="e")], tmp_path / "r.jsonl")
    found = read(tmp_path / "r.jsonl")
    assert same(found[0], FULL)
    assert found[1] == Record(case="c", estimator="e")
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]


def test_records_of_schema_1_are_read():
    old = {**json.loads(FULL.to_json()), "schema": 1, "timeline": [[0, 1, "inner"]]}
    for new in ("alive", "notes", "source", "memory_growth", "target"):
        old.pop(new)
    found = Record.from_json(json.dumps(old))
    assert found.timeline == ((0, 1, "inner", "", ""),)
    assert (found.schema, found.source, found.target) == (SCHEMA, "measured", None)


@pytest.mark.parametrize(
    ("settings", "target"),
    [
        ("Unrolled(keep='graph', segment=None, last=None)", Target.PROGRAM),
        ("TaskMean(estimator=Unrolled(keep='iterates'), chunk=None)", Target.PROGRAM),
        ("Unrolled(keep='graph', segment=None, last=5)", None),
        ("Implicit(linear=CG(max_steps=10))", None),
    ],
)
def test_records_of_schema_2_are_read(settings, target):
    said = ["wall_seconds spreads by 30% of the median", "The outer loop ended with ERROR: x", "compiled"]
    old = {**json.loads(FULL.to_json()), "schema": 2, "settings": settings, "notes": said}
    del old["target"]
    found = Record.from_json(json.dumps(old))
    assert [str(note) for note in found.notes] == said
    assert [note.kind for note in found.notes] == [NoteKind.SPREAD, NoteKind.OUTER_LOOP, NoteKind.GENERAL]
    assert (found.target, found.schema) == (target, SCHEMA)


def test_what_a_newer_version_added_is_left_out():
    """Fields that this version does not know do not keep it from reading a file whose schema it does."""
    data = json.loads(FULL.to_json())
    data["unheard_of"], data["phases"]["inner"]["peek"], data["notes"][0]["kind"] = 1, 2, "unheard of"
    assert same(Record.from_json(json.dumps(data)), FULL)


def test_every_status_of_the_library_has_failed_here_where_it_has_there():
    for status in bl.Status:
        assert failed(Record(case="c", estimator="e", status=status.name)) == status.failed, status
        assert noted(Iteration(index=0, status=status.name)) == (status is not bl.Status.OK)
    # a status of a later library, or of one that was, is a failure until it is told otherwise
    assert severity("UNHEARD_OF") is Severity.FAILED
    assert all(severity(status) is Severity.FAILED for status in FAILURES)
    assert {name for name in _LESS_ACCURATE if name in bl.Status.__members__} == {
        status.name for status in bl.Status if not status.failed and status is not bl.Status.OK
    }


def test_an_error_carries_its_status():
    error = ValueError("any text: NONFINITE: x")
    assert of_error(error).status == "ERROR"
    error.status = bl.Status.DIVERGED
    assert of_error(error).status == "DIVERGED"
    error.status = http.HTTPStatus.NOT_FOUND  # another library's status is none of ours
    assert of_error(error).status == "ERROR"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, r"schema 99; .* reads schemas 1 to 3\. .*measure again"),
        ({"schema": None}, "schema None"),
        ({"wall_seconds": "fast"}, r"'fast' was given, float was needed @ record\.wall_seconds"),
        ({"calls": {"hvp": "three"}}, r"'three' was given, int was needed @ record\.calls\['hvp'\]"),
        ({"phases": []}, r"object was needed @ record\.phases"),
        ({"phases": {"inner": {"calls": 3}}}, r"object was needed @ record\.phases\['inner'\]\.calls"),
        ({"timeline": [[1, 2]]}, r"record\.timeline\[0\]"),
        ({"iterations": [{}]}, r"index is missing @ record\.iterations\[0\]"),
        ({"case": 3}, r"'3' was given, str was needed @ record\.case"),
        ({"seed": True}, "seed"),
    ],
)
def test_what_is_no_record_is_refused_with_the_place(change, message):
    with pytest.raises(ValueError, match=message):
        Record.from_json(json.dumps({**json.loads(FULL.to_json()), **change}))


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        '{"case": "c"}',
        "[" * 100_000,
        '{"iteration": 3}',
        '{"iteration": {"index": "x"}}',
        "\0\0",
    ],
)
def test_what_is_no_line_of_a_record_is_a_value_error(line):
    with pytest.raises(ValueError):
        from_line(line)


def test_the_iterations_of_a_run_join_the_record_before_them(tmp_path):
    path = tmp_path / "run.jsonl"
    with path.open("w") as stream:
        for name in ("first", "second"):
            stream.write(Record(case="runs", estimator=name).to_json() + "\n")
            for index in range(3):
                append_iteration(
                    Iteration(index=index, outer_loss=1 / (index + 1), metrics={"name": float(index)}), stream
                )
    found = read(path)
    assert [(record.estimator, [each.index for each in record.iterations]) for record in found] == [
        ("first", [0, 1, 2]),
        ("second", [0, 1, 2]),
    ]
    assert found[0].iterations[1].metrics == {"name": 1.0}
    assert b"".join(row.text for row in scan(path).rows) == path.read_bytes()


def test_an_iteration_needs_its_record(tmp_path):
    path = tmp_path / "run.jsonl"
    line = iteration_json(Iteration(index=0))
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"run\.jsonl, line 1: an iteration without the record"):
        read(path)
    # those of a record that cannot be read do not join the one before it
    path.write_text("\n".join([FULL.to_json(), line, "{broken", line, ""]))
    found = scan(path)
    assert [damage.line for damage in found.damage] == [3, 4]
    assert [len(record.iterations) for record in found.records] == [2]


def test_every_cut_of_a_file_is_seen_and_costs_only_the_last_line(tmp_path):
    path = tmp_path / "r.jsonl"
    lines = [Record(case="c", estimator=name).to_json().encode() + b"\n" for name in ("one", "two", "drei ü")]
    whole = b"".join(lines)
    for size in sorted(
        {*range(0, len(whole), 17), *range(len(lines[0]) - 2, len(lines[0]) + 3), len(whole) - 1, len(whole)}
    ):
        path.write_bytes(whole[:size])
        found = scan(path)
        complete = whole[:size].count(b"\n")
        rest = whole[:size].rpartition(b"\n")[2]
        assert len(found.rows) in (complete, complete + 1)
        if len(found.rows) == complete:
            assert [(d.line, d.text, d.torn) for d in found.damage] == ([(complete + 1, rest, True)] if rest else [])
        else:  # all of a line is there but its end
            assert (rest + b"\n", found.damage) == (lines[complete], ())


def test_a_file_of_something_else_is_damage_from_end_to_end(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(bytes(random.Random(0).randrange(256) for _ in range(10_000)))
    found = scan(path)
    assert found.rows == ()
    assert found.damage
    path.write_bytes(b"")
    assert scan(path) == records_file.Contents((), ())


def test_a_row_that_grows_leaves_the_others_byte_for_byte(tmp_path):
    path = tmp_path / "r.jsonl"
    # a row as some other version might write it: the same record in other bytes
    odd = json.dumps(json.loads(Record(case="c", estimator="odd").to_json()), indent=None).encode() + b"\n"
    path.write_bytes(odd)
    rows = RecordsFile(path, scan(path).rows)
    rows.append(Record(case="c", estimator="two"))
    rows.replace(1, Record(case="c", estimator="two", iterations=(Iteration(index=0),)))
    assert path.read_bytes().startswith(odd)
    assert [len(record.iterations) for record in read(path)] == [0, 1]
    assert rows.records == read(path)


def test_a_disk_that_is_full_takes_no_half_line(tmp_path, monkeypatch):
    rows = RecordsFile(tmp_path / "r.jsonl")
    rows.append(FULL)
    before = rows.path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for change in (
        lambda: rows.append(FULL),
        lambda: rows.replace(0, dataclasses.replace(FULL, case="other")),
        lambda: write([], rows.path),
    ):
        with pytest.raises(OSError, match="No space left"):
            change()
        assert rows.path.read_bytes() == before
        assert len(rows.records) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]


WRITER = """
import os, sys
from pathlib import Path
from bilevel_profiling.records.record import Iteration, Record
from bilevel_profiling.records.records_file import RecordsFile, scan
path = Path(sys.argv[1])
rows = RecordsFile(path, scan(path).rows if path.exists() else ())
while True:
    number = len(rows.records)
    rows.append(Record(case="c" * 3000, estimator=str(number)))
    os.write(1, b"+")
    rows.replace(number, Record(case="c" * 3000, estimator=str(number), iterations=(Iteration(index=0),)))
    os.write(1, b"-")
"""


def test_whoever_is_killed_while_writing_has_lost_nothing_that_was_finished(tmp_path):
    """Rows are appended and replaced as fast as they can be, and the writer is killed in the middle of it."""
    path, rng = tmp_path / "r.jsonl", random.Random(0)
    finished = grown = 0
    for _ in range(8):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        assert writer.stdout.read(1) == b"+"
        time.sleep(rng.uniform(0, 0.05))
        writer.send_signal(signal.SIGKILL)
        said = b"+" + writer.stdout.read()
        writer.wait()
        writer.stdout.close()
        found = scan(path)
        assert all(damage.torn for damage in found.damage)
        assert finished + said.count(b"+") <= len(found.rows) <= finished + said.count(b"+") + 1
        iterations = sum(len(record.iterations) for record in found.records)
        assert grown + said.count(b"-") <= iterations <= grown + said.count(b"-") + 1
        assert [record.estimator for record in found.records] == [str(number) for number in range(len(found.rows))]
        finished, grown = len(found.rows), iterations
    assert finished >= 8
    assert {path.name for path in Path(tmp_path).iterdir()} <= {"r.jsonl", "r.jsonl.tmp"}
