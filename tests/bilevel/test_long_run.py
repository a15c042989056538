"""Memory over outer steps: benchmarks/long_run.py, shortened; and what its 10,000 steps found.

Python's blocks settle over some thousand steps (they hold what the interpreter learns of its own code), so a short run
looks at objects and storages alone.
"""

import itertools
import json
import pathlib
import warnings

import pytest
import torch

from bilevel import testing

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"
STEPS, WARM, WINDOW = 45, 12, 8


@pytest.fixture
def long_run(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import long_run

    return long_run


def committed():
    text = (BENCHMARKS / "results" / "long_run.jsonl").read_text()
    return {row["estimator"]: row for row in map(json.loads, text.splitlines())}


@pytest.mark.parametrize("label", committed())
def test_memory_is_flat_over_outer_steps(label, long_run):
    estimator = long_run.by_label(label)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = long_run.grown(long_run.made(label, estimator), WARM, STEPS, WINDOW)
    assert found.tensor_bytes == 0
    assert found.objects < (STEPS - WARM) / 2


class Leaking:
    """A loop that keeps something of each step."""

    def __init__(self, kind):
        self.kind, self.kept = kind, []
        self.x = torch.ones(3, requires_grad=True)

    def __iter__(self):
        for step in itertools.count():
            if self.kind == "tensors":
                self.kept.append(torch.zeros(100))
            elif self.kind == "objects":
                self.kept.append([step, []])
            elif self.kind == "a graph":  # which the garbage collector does not see
                self.x = self.x.sin()
            elif self.kind == "numbers":
                self.kept.append(step + 0.5)
            yield step


@pytest.mark.parametrize("kind", ["tensors", "objects", "a graph", "numbers", "nothing"])
def test_a_leak_is_seen(kind, long_run):
    found = long_run.grown(iter(Leaking(kind)), 1000, 3000)
    assert (found.tensor_bytes > 0) == (kind in ("tensors", "a graph"))
    if kind != "a graph":
        assert (found.objects > 1000) == (kind in ("tensors", "objects"))
        assert (found.blocks > 1000) == (kind != "nothing")


def test_ten_thousand_steps_of_every_estimator_with_a_state_were_flat(long_run):
    rows = committed()
    assert set(rows) == set(long_run.stateful())
    for row in rows.values():
        assert (row["steps"], row["warm"], row["finite"]) == (10_000, 1_000, True)
        assert row["tensor_bytes"] == 0
        assert row["objects"] < 100
        assert row["blocks"] < 0.1 * 9_000
        assert row["resident_kib"] < 1024


def test_the_catalogue_is_where_they_come_from():
    assert {label.removeprefix("tasks of ") for label in committed()} <= {entry.label for entry in testing.ENTRIES}
