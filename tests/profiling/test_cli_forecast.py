"""`bilevel forecast` and `bilevel fit`, as a user types them."""

import json

import pytest
from bilevel_profiling.cli import main
from bilevel_profiling.records import records_file
from bilevel_profiling.records.record import Record

FORECAST = ["forecast", "hypercleaning", "--inner-steps", "5", "--estimators", "unrolled,implicit CG"]
FILE = """
import torch
import bilevel as bl

ESTIMATORS = {"unrolled": bl.Unrolled(), "first-order": bl.FirstOrder()}
INNER_STEPS = [3]

def setup(device, *, size: int = 1000):
    inner = lambda y, x, b: ((y - x) ** 2).sum()%s
    return bl.Problem(inner, lambda y, x, b: (y**2).sum()), torch.zeros(size, device=device),\
 torch.ones(size, device=device), bl.Batches(None, None)
"""


@pytest.fixture
def case_file(tmp_path):
    def write(loss: str = "") -> str:
        path = tmp_path / "mine.py"
        path.write_text(FILE % loss)
        return str(path)

    return write


def test_a_budget_gives_fits_the_largest_k_and_advice(capsys):
    assert main([*FORECAST, "--budget", "3MiB", "--on", "a100", "--at-most", "64"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "hypercleaning: forecast" in out
    assert "A100 80 GB" in out
    assert "fits, what holds" not in out
    assert "relu, bilevel/problems/hypercleaning.py" in out
    assert "implicit CG 64 or more" in out
    assert "inner_steps = 1 fits" in out
    assert "1 implicit CG Fits" in out
    assert "2 unrolled Does not fit" in out


def test_json_is_all_that_is_printed(capsys):
    assert main([*FORECAST, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["estimator"], row["source"], row["wall_seconds"]) for row in rows] == [
        ("unrolled", "forecast", None),
        ("implicit CG", "forecast", None),
    ]


def test_a_report_and_what_is_alive(capsys, tmp_path):
    assert main([*FORECAST, "--alive", "--out", str(tmp_path / "there")]) == 0
    assert "aten.relu" in capsys.readouterr().out
    assert [record.source for record in records_file.read(tmp_path / "there" / "records.jsonl")] == ["forecast"] * 2
    assert "forecast" in (tmp_path / "there" / "index.html").read_text()


def test_earlier_rows_in_the_folder_are_kept_aside(capsys, tmp_path):
    (tmp_path / "records.jsonl").write_text(Record(case="mine", estimator="measured").to_json() + "\n")
    assert main([*FORECAST, "--out", str(tmp_path)]) == 0
    assert "the 1 row of an earlier comparison" in capsys.readouterr().err
    (kept,) = tmp_path.glob("records-*.jsonl")
    assert records_file.read(kept)[0].estimator == "measured"


def test_parameters_of_setup(capsys, case_file):
    path = case_file()
    assert main(["forecast", path, "--set", "size=1000000", "--estimators", "unrolled", "--json"]) == 0
    (row,) = capsys.readouterr().out.splitlines()
    assert json.loads(row)["outer_size"] == 10**6
    assert (
        main(["fit", path, "--over", "size", "--budget", "100kB", "--estimators", "unrolled", "--at-most", "100000"])
        == 0
    )
    captured = capsys.readouterr()
    assert "would need" in captured.out or "too many" in captured.out
    assert "unrolled, size = 1: " in captured.err


def test_an_estimator_that_refuses_is_a_row(capsys, case_file):
    assert main(["forecast", case_file()]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "FirstOrder cannot see how the outer variable acts here" in out


def test_a_loss_that_reads_values_is_told_so(capsys, case_file):
    path = case_file(" * (2 if y.sum().item() > 0 else 1)")
    assert main(["forecast", path, "--estimators", "unrolled"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "mine.py:9" in out
    assert "Keep it a tensor" in out
    assert main(["fit", path, "--budget", "1MiB", "--estimators", "unrolled"]) == 2
    assert "mine.py:9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["forecast", "nothing"], "there is no case 'nothing'"),
        (["forecast", "fewshot", "--set", "wdth=3"], "its setup() takes tasks, shot, query, width"),
        (["forecast", "quadratic", "--on", "a1000"], "write one of t4"),
        (["forecast", "quadratic", "--estimators", "magic"], "there is no estimator 'magic'"),
        (
            ["fit", "fewshot", "--over", "wdth", "--budget", "1GiB"],
            "it can be over inner_steps, chunk, tasks, shot, query, width",
        ),
    ],
)
def test_bad_input_is_told_in_one_line(arguments, said, capsys):
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fit", "quadratic"], "--budget"),
        (["fit", "quadratic", "--budget", "12 apples"], "is no size"),
        (["forecast", "quadratic", "--set", "width"], "width=2048"),
    ],
)
def test_bad_options(arguments, said, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert said in capsys.readouterr().err


def test_nothing_fits(capsys):
    assert main(["fit", "hypercleaning", "--budget", "1KiB", "--estimators", "unrolled"]) == 1
    assert "does not fit" in capsys.readouterr().out
