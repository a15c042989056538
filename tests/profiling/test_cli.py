"""The command: what it says, where it says it, and its exit status."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from bilevel_profiling import cli
from bilevel_profiling.cli import main
from bilevel_profiling.cli import options as types
from bilevel_profiling.records.record import Iteration, Record, iteration_json
from bilevel_profiling.records.records_file import read, scan, write

ROW = Record(
    case="case",
    estimator="unrolled",
    inner_steps=5,
    peak_tensor_bytes=2**20,
    wall_seconds=0.01,
    wall_seconds_low=0.009,
    wall_seconds_high=0.011,
    repeats=5,
    calls={"hvp": 5},
    program_relative_error=1e-6,
    environment={"command": "bilevel compare case", "torch": "2"},
)
OTHER = dataclasses.replace(ROW, estimator="implicit")


@pytest.fixture
def folder(tmp_path):
    write([ROW, OTHER], tmp_path / "records.jsonl")
    return tmp_path


def ended(*arguments):
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse
        return stop.code


BROKEN = {
    "broken.py": "import nothing_of_that_name\n",
    "empty.py": "x = 1\n",
    "syntax.py": "def setup(device:\n",
    "leaves.py": "raise SystemExit('bye')\n",
    "no_dict.py": "def setup(device): ...\nESTIMATORS = [1]\n",
    "no_label.py": "import bilevel as bl\ndef setup(device): ...\nESTIMATORS = {'': bl.Unrolled()}\n",
    "text.txt": "",
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "hypercleanin"], "Did you mean hypercleaning"),
        (["compare", "quadratic", "--estimators", "nobody"], "nobody"),
        (["compare", "quadratic", "--inner-steps", "1,x"], "1,x"),
        (["compare", "quadratic", "--memory-limit", "much"], "'much' is no size"),
        (["compare", "quadratic", "--out", "/proc/nowhere"], "cannot write to /proc/nowhere"),
        (["compare", "quadratic", "--out", "{tmp}/a_file"], "cannot write to {tmp}/a_file: File exists"),
        (["compare", "quadratic", "--out", "{tmp}/taken"], "cannot write to {tmp}/taken: Is a directory"),
        (["compare", "quadratic", "--out", "{tmp}/taken", "--resume"], "cannot write to {tmp}/taken: Is a directory"),
        (["compare", "{tmp}/broken.py"], "broken.py could not be imported: ModuleNotFoundError"),
        (["compare", "{tmp}/empty.py"], "defines no function setup"),
        (["compare", "{tmp}/syntax.py"], "syntax.py could not be imported: SyntaxError"),
        (["compare", "{tmp}/leaves.py"], "SystemExit: bye"),
        (["compare", "{tmp}/no_dict.py"], "ESTIMATORS is not a dict"),
        (["compare", "{tmp}/no_label.py"], "need a name"),
        (["compare", "{tmp}/text.txt"], "is not a Python file"),
        (["compare", "{tmp}"], "there is no case"),
        (["compare", "quadratic", "quadratic"], "two cases are called quadratic"),
        (["show", "{tmp}/nothing.jsonl"], "cannot read {tmp}/nothing.jsonl: No such file"),
        (["show", "{tmp}/taken"], "cannot read {tmp}/taken/records.jsonl: Is a directory"),
        (["show", "{tmp}/a_file"], "holds no records"),
        (["show", "{tmp}/corrupt.jsonl"], "line 1: not a record: invalid JSON"),
        (
            ["show", "{tmp}/future.jsonl"],
            "line 1: record of schema 99; this version of bilevel_profiling reads schemas 1 to 3",
        ),
        (["show", "{tmp}/binary.jsonl"], "not text in UTF-8"),
        (["show", "{tmp}/stray.jsonl"], "an iteration without the record"),
    ],
    ids=lambda value: " ".join(value).replace("{tmp}/", "") if isinstance(value, list) else "",
)
def test_what_the_user_can_put_right_gets_a_sentence_and_status_2(arguments, message, tmp_path, capsys):
    for name, text in BROKEN.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "a_file").touch()
    (tmp_path / "taken" / "records.jsonl").mkdir(parents=True)
    (tmp_path / "corrupt.jsonl").write_text("{not json\n")
    (tmp_path / "future.jsonl").write_text('{"case": "c", "estimator": "e", "schema": 99}\n')
    (tmp_path / "binary.jsonl").write_bytes(b"\x89PNG\r\n\x1a\n" * 100)
    (tmp_path / "stray.jsonl").write_text(iteration_json(Iteration(index=0)) + "\n")
    before = sorted(tmp_path.rglob("*"))
    assert ended(*(argument.replace("{tmp}", str(tmp_path)) for argument in arguments)) == 2
    printed = capsys.readouterr()
    assert message.replace("{tmp}", str(tmp_path)) in printed.err
    assert "Traceback" not in printed.err
    assert len(printed.err.splitlines()) < 20
    assert printed.out == ""
    # the lock of a folder stays, as an empty file
    found = [path for path in sorted(tmp_path.rglob("*")) if not {"__pycache__", ".lock"} & set(path.parts)]
    assert found == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write and read anything")
def test_a_folder_without_permissions(folder, capsys):
    (folder / "records.jsonl").chmod(0)
    assert ended("show", folder) == 2
    assert "Permission denied" in capsys.readouterr().err
    folder.chmod(0o555)
    assert ended("compare", "quadratic", "--out", folder / "sub") == 2
    assert "Permission denied" in capsys.readouterr().err
    folder.chmod(0o755)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (b"{oh no}", "line 3: not a record: invalid JSON"),
        (ROW.to_json().encode()[:100], "line 3: not a record: invalid JSON"),
        (b'{"case":"c","estimator":"e","schema":7}', "line 3: record of schema 7"),
        (b"\xff\xfe", "line 3: not text in UTF-8"),
        (b"\0\0\0\0", "line 3: not a record"),
        (
            ROW.to_json().replace('"repeats":5', '"repeats":"five"').encode(),
            "line 3: 'five' was given, int was needed @ record.repeats",
        ),
    ],
)
@pytest.mark.parametrize("end", [b"\n", b""], ids=["whole line", "cut off"])
def test_show_prints_the_good_rows_of_a_damaged_file(folder, capsys, damage, said, end):
    path = folder / "records.jsonl"
    before = path.read_bytes() + damage + end
    path.write_bytes(before)
    assert ended("show", folder) == 2
    printed = capsys.readouterr()
    assert "unrolled" in printed.out
    assert "implicit" in printed.out
    assert said.replace("line 3: ", "line 3: " if end else "line 3: cut off while it was written, ") in printed.err
    assert len(printed.err.splitlines()) == 1
    assert ended("show", path, "--json", "--html") == 2
    assert [json.loads(line)["estimator"] for line in capsys.readouterr().out.splitlines()] == ["unrolled", "implicit"]
    assert (folder / "index.html").exists()
    assert path.read_bytes() == before


def test_a_file_of_other_things_is_not_recited(folder, capsys):
    (folder / "records.jsonl").write_text("a\n" * 1000)
    assert ended("show", folder) == 2
    assert len(capsys.readouterr().err.splitlines()) == 7


def test_show_reads_a_run(folder, capsys):
    path = folder / "run.jsonl"
    path.write_text(
        "".join(
            line + "\n"
            for line in [
                Record(case="runs", estimator="mine").to_json(),
                iteration_json(Iteration(index=0, outer_loss=0.5)),
            ]
        )
    )
    assert ended("show", path, "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["iterations"][0]["outer_loss"] == 0.5


@pytest.mark.parametrize(
    "arguments",
    [["--help"], *([verb, "--help"] for verb in ("compare", "show", "diff", "list")), ["show", "{folder}"]],
    ids=str,
)
def test_what_needs_no_torch_does_without_it(folder, arguments):
    code = (
        "import sys; sys.modules['torch'] = None; from bilevel_profiling.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = [argument.replace("{folder}", str(folder)) for argument in arguments]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ("unrolled" if "show" in words and "--help" not in words else "usage: bilevel") in done.stdout


def test_every_verb_is_listed_with_a_line_of_help(capsys):
    assert ended("--help") == 0
    text = capsys.readouterr().out
    for verb in cli.VERBS:
        assert verb.__doc__.startswith("`bilevel ")
        assert f"    {verb.__doc__.split('`')[1].removeprefix('bilevel ')}" in text


def test_list_names_cases_and_estimators(capsys):
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    for name in ("hypercleaning", "fewshot", "ridge", "quadratic", "MemoryReduced", "Unrolled", "CG"):
        assert name in text


def test_a_memory_limit_is_for_the_cpu(tmp_path):
    from bilevel_profiling.cases.case_file import CaseError
    from bilevel_profiling.comparison.plan import Plan, Settings, settle

    with pytest.raises(CaseError, match="limits the address space, of which CUDA takes more than it uses"):
        settle([Plan("quadratic")], Settings(device="cuda", memory_limit=2**30))
    with pytest.raises(CaseError, match="positive number of bytes"):
        settle([Plan("quadratic")], Settings(memory_limit=0))


def test_options_say_what_was_needed():
    import argparse

    assert types.size("1.5GiB") == 3 * 2**29
    for parse, text in (
        (types.labels, " , "),
        (types.numbers, "-1"),
        (types.positive, "0"),
        (types.seconds, "nan"),
        (types.size, "-4GiB"),
        (types.share, "-1"),
    ):
        with pytest.raises(argparse.ArgumentTypeError):
            parse(text)


def test_a_report_that_cannot_be_written_loses_no_rows(tmp_path, capsys):
    out = tmp_path / "report"
    (out / "index.html").mkdir(parents=True)
    arguments = [
        "compare",
        "quadratic",
        "--estimators",
        "unrolled",
        "--inner-steps",
        "1",
        "--outer-steps",
        "0",
        "--repeats",
        "1",
        "--device",
        "cpu",
    ]
    assert ended(*arguments, "--out", out) == 2
    assert "cannot write to" in capsys.readouterr().err
    assert len(read(out / "records.jsonl")) == 1
    (out / "index.html").rmdir()
    before = (out / "records.jsonl").read_bytes()
    assert ended(*arguments, "--out", out, "--resume") == 0
    assert (out / "index.html").is_file()
    assert (out / "records.jsonl").read_bytes() == before
    assert scan(out / "records.jsonl").damage == ()
