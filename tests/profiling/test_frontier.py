"""benchmarks/frontier.py: who is on a frontier, and what the committed records say."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def frontier(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("frontier")


def row(estimator, error, memory, time):
    return {
        "estimator": estimator,
        "program_cosine": 1 - error,
        "peak_tensor_bytes": memory,
        "wall_seconds": time,
        "status": "OK",
        "reason": "",
        "inner_steps": 5,
        "environment": {"torch": "any"},
    }


def test_a_frontier_and_who_lies_outside(frontier):
    rows = [row("unrolled", 0, 100, 1.0), row("lean", 0.1, 50, 2.0), row("worse", 0.2, 60, 3.0)]
    assert [each["estimator"] for each in frontier.frontier(rows, "memory")] == ["unrolled", "lean"]
    assert [each["estimator"] for each in frontier.frontier(rows, "time")] == ["unrolled"]
    inside, lighter, faster = (
        row("betty a", 0.1, 50, 2.0),
        row("higher b", 0.1, 49, 2.0),
        row("torchopt c", 0.0, 100, 0.8),
    )
    assert frontier.outside([*rows, inside], "memory") == []
    assert frontier.outside([*rows, inside, lighter], "memory") == [lighter]
    assert frontier.outside([*rows, inside, faster], "time") == [faster]
    assert frontier.outside([*rows, row("torchopt d", 0.0, 100, 0.95)], "time") == [], "within what times differ by"


def test_the_committed_page_is_that_of_the_committed_records(frontier):
    rows = frontier.read(frontier.KEPT)
    assert frontier.TABLE.read_text() == frontier.written(rows)
    numbers = frontier.measured(rows)
    assert {"higher", "torchopt", "betty"} <= {each["estimator"].split()[0] for each in numbers}
    assert frontier.outside(numbers, "memory") == []
    assert frontier.outside(numbers, "time") == []
    for each in rows:
        if each not in numbers:
            assert each["reason"], each["estimator"]
