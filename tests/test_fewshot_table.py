"""benchmarks/fewshot_table.py: stopped anywhere, the same command goes on, and ends where an unbroken run ends."""

import dataclasses
import json
import pathlib
import string
import sys

import pytest

import bilevel as bl
from bilevel.data import glyphs

BENCHMARKS = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    pytest.importorskip("matplotlib")
    return glyphs.load(string.ascii_letters, cache=tmp_path_factory.mktemp("glyphs")).split()


@pytest.fixture
def table(monkeypatch, parts):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("fewshot_table", "fewshot_methods"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import fewshot_table

    monkeypatch.setattr(fewshot_table.fewshot, "load", lambda split: parts[split])
    monkeypatch.setattr(fewshot_table, "CHECKPOINT_EVERY", 1)
    return fewshot_table


@pytest.mark.parametrize("method", ["MAML", "Meta-SGD", "RBF head (I-AMFS)"])
def test_a_cell_that_was_stopped_goes_on(table, method, tmp_path, monkeypatch):
    config = dataclasses.replace(table.CONFIGS["small"], steps=3)
    table.run(method, 1, config, tmp_path / "whole.jsonl")
    seen, train = [], bl.Learner.train

    def stopped(self, *arguments, **options):
        for step in train(self, *arguments, **options):
            yield step
            seen.append(step.index)
            if len(seen) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(bl.Learner, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        table.run(method, 1, config, tmp_path / "broken.jsonl")
    assert not (tmp_path / "broken.jsonl").exists()
    monkeypatch.setattr(bl.Learner, "train", train)
    table.run(method, 1, config, tmp_path / "broken.jsonl")
    whole, broken = (json.loads((tmp_path / f"{name}.jsonl").read_text()) for name in ("whole", "broken"))
    for field in ("accuracy", "interval", "statuses", "calls", "peak_tensor_bytes"):
        assert whole[field] == broken[field]
    assert sum(broken["statuses"].values()) == 3


def test_the_table_has_an_interval_and_a_row_for_each_method(table):
    text = table.table(BENCHMARKS / "results" / "fewshot.cpu.jsonl", table.CONFIGS["cpu"])
    for name in table.names():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
        assert row.count("±") == 2
    assert text == (BENCHMARKS / "results" / "fewshot.cpu.md").read_text(encoding="utf-8")


def test_another_setting_is_another_cell(table):
    small, cpu = table.CONFIGS["small"], table.CONFIGS["cpu"]
    names = [*table.names()]
    keys = {table.key(name, shot, config) for name in names for shot in (1, 5) for config in (small, cpu)}
    assert len(keys) == 4 * len(names)
    done = table.done(BENCHMARKS / "results" / "fewshot.cpu.jsonl")
    assert set(done) >= {table.key(name, shot, cpu) for name in names for shot in (1, 5)}
