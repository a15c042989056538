"""compare(processes=): rows of several ranks, in the file, in a report, and beside others."""

import dataclasses
import io
import json
import os

import pytest
import torch
import torch.distributed as dist
from bilevel_profiling import DATA, Parallel, Record, compare
from bilevel_profiling.cases.case_file import CaseError
from bilevel_profiling.cli import main
from bilevel_profiling.comparison.diff import compare_records
from bilevel_profiling.comparison.resume import ResumeError
from bilevel_profiling.records import records_file
from bilevel_profiling.records.ranks import joined
from bilevel_profiling.report import markdown, print_table, write
from bilevel_profiling.report.content.groups import group
from rich.console import Console

import bilevel as bl

HOW = {"optimizer": bl.SGD(lr=0.1), "inner_steps": [2], "repeats": 2, "parallel": DATA, "time_limit": 60}


def rows(device):
    """A mean over rows."""
    points, answers = torch.arange(12.0).reshape(6, 2) / 6, torch.ones(6)

    def off(w, x, batch):
        return (batch[0] @ w - batch[1]).square().mean()

    problem = bl.Problem(lambda w, x, b: off(w, x, b) + x["decay"].exp() * w.square().sum(), off)
    batch = points, answers
    return problem, {"decay": torch.tensor(-1.0)}, torch.zeros(2), bl.Batches(batch, batch)


def dies(problem, ranks):
    """Rank 1 is killed in the first loss."""

    def loss(w, x, batch):
        if dist.is_initialized() and dist.get_rank() == 1:
            os.kill(os.getpid(), 9)
        return problem.inner_loss(w, x, batch)

    return dataclasses.replace(problem, inner_loss=loss)


DIES = Parallel("rows of the dead", problem=dies)


def test_a_comparison_has_a_row_for_each_number_of_processes(tmp_path):
    estimators = {"unrolled": bl.Unrolled()}
    records = compare(rows, estimators, out=tmp_path, processes=(2, 1), outer_steps=2, memory_limit="2GiB", **HOW)
    one, two = records
    assert [each.processes for each in records] == [1, 2]
    assert [len(each.ranks) for each in records] == [1, 2]
    assert {each.status for each in records} == {"OK"}
    assert {each.split for each in records} == {"data"}
    assert max(each.program_relative_error for each in records) < 1e-5  # against one process with all rows
    assert (one.sent_bytes, two.sent_bytes > 0) == (0, True)
    for rank in two.ranks:
        assert rank.sent_bytes == two.sent_bytes
        assert 0 < rank.collective_seconds <= two.collective_seconds
        assert rank.resident_bytes is not None
    assert [len(each.iterations) for each in records] == [2, 2]
    losses = [[step.outer_loss for step in each.iterations] for each in records]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert records_file.read(tmp_path / "records.jsonl") == records
    text = (tmp_path / "report.md").read_text()
    assert "unrolled (2 processes)" in text
    assert "By rank" in text
    # Continued, there is nothing to do; another number is a row more.
    again = compare(rows, estimators, out=tmp_path, processes=2, outer_steps=2, resume=True, **HOW)
    assert again == records
    with pytest.raises(ResumeError, match="code"):
        compare(rows, estimators, out=tmp_path, processes=2, resume=True, **{**HOW, "parallel": DIES})


def test_a_rank_that_dies_is_a_row_with_its_reason(tmp_path):
    (row,) = compare(rows, {"unrolled": bl.Unrolled()}, out=tmp_path, processes=2, **{**HOW, "parallel": DIES})
    assert (row.status, row.processes, row.split) == ("CRASHED", 2, "rows of the dead")
    assert row.reason.startswith("Rank 1 of 2: The process was killed by signal 9")


def test_what_cannot_be_split_is_said_before_any_work(tmp_path):
    with pytest.raises(CaseError, match="PARALLEL = DATA"):
        compare(rows, out=tmp_path, processes=2, **{**HOW, "parallel": None})
    with pytest.raises(CaseError, match="positive integer"):
        compare(rows, out=tmp_path, processes=[0], **HOW)
    with pytest.raises(CaseError, match="a Parallel"):
        compare(rows, out=tmp_path, **{**HOW, "parallel": "data"})
    assert not (tmp_path / "records.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compare", "quadratic", "--processes", "2"], "PARALLEL = DATA"),
        (["forecast", "quadratic", "--ranks", "2"], "PARALLEL = DATA"),
        (["forecast", "hypercleaning", "--ranks", "2", "--budget", "1GiB"], "--ranks alone"),
    ],
)
def test_the_command_says_so_too(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_the_command_forecasts_ranks(capsys):
    words = "forecast ridge --estimators unrolled --inner-steps 2 --ranks 8 64 --json"
    assert main(words.split()) == 0
    found = [Record.from_json(line) for line in capsys.readouterr().out.splitlines()]
    assert [each.processes for each in found] == [8, 64]
    assert 0 < found[0].sent_bytes < found[1].sent_bytes


def of_ranks(**more):
    ranks = [
        Record(
            case="c",
            estimator="e",
            inner_steps=3,
            peak_tensor_bytes=size,
            wall_seconds=seconds,
            sent_bytes=2**20,
            collective_seconds=seconds / 2,
            program_relative_error=seconds,
            program_cosine=1 - seconds,
        )
        for size, seconds in ((3 * 2**20, 0.1), (2**20, 0.4))
    ]
    return dataclasses.replace(joined(ranks), **more)


def test_ranks_are_one_record_of_the_worst_of_each():
    found = of_ranks()
    assert (found.peak_tensor_bytes, found.wall_seconds, found.collective_seconds) == (3 * 2**20, 0.4, 0.2)
    assert (found.program_relative_error, found.program_cosine) == (0.4, 0.6)
    assert [(each.rank, each.peak_tensor_bytes) for each in found.ranks] == [(0, 3 * 2**20), (1, 2**20)]
    assert Record.from_json(found.to_json()) == found


def test_a_record_of_before_is_one_of_a_single_process():
    old = json.loads(Record(case="c", estimator="e").to_json())
    for name in ("processes", "split", "sent_bytes", "collective_seconds", "collectives", "ranks"):
        del old[name]
    found = Record.from_json(json.dumps(old))
    assert (found.processes, found.sent_bytes, found.ranks) == (None, None, ())


def test_a_report_shows_each_rank(tmp_path):
    records = [of_ranks(), Record(case="c", estimator="e", inner_steps=3, peak_tensor_bytes=4 * 2**20)]
    (each,) = group(records)
    assert each.estimators == ("e (2 processes)", "e")
    text = markdown.render(records)
    assert "| e (2 processes) | 0 | 3.00 | 1.00 | 50.0 | 100 |" in text
    assert "| e (2 processes) | 1 | 1.00 | 1.00 | 200 | 400 |" in text
    assert "1.00-3.00" in text
    assert "50.0-200" in text
    page = write(records, tmp_path).read_text()
    assert "By rank" in page
    console = Console(width=160, record=True, file=io.StringIO())
    print_table(records, console)
    shown = console.export_text()
    assert "1.00-3.00" in shown
    assert "waited ms" in shown
    alone = markdown.render([of_ranks()])
    assert "N = 2 processes" in alone
    assert "By rank" not in markdown.render(records[1:])


def test_another_number_of_processes_is_another_row():
    found = compare_records([of_ranks()], [of_ranks(processes=4)])
    assert (found.matched, len(found.differences)) == (0, 2)
