"""benchmarks/engine.py: its meters on work of known size, its table, and that a stopped run goes on where it was.

(The cells themselves need ../shared/bench.)"""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name):
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


def step():
    """2 MB at the peak: a and b; a is gone before c."""
    a = torch.ones(250_000)
    b = a + 1
    del a
    c = b[:10] * 2
    return [c]


def test_the_allocators_peak_is_that_of_live_tensors(script):
    meters = script("engine_meters")
    assert meters.allocated(step) == pytest.approx(2_000_000, rel=0.01)
    assert meters.allocated(lambda: [torch.ones(500_000)]) == pytest.approx(2_000_000, rel=0.01)


def test_what_lives_at_the_peak_is_named(script):
    peak, found = script("engine_meters").live_at_peak(step)
    assert peak == pytest.approx(2_000_000, rel=0.01)
    assert {each["bytes"] * each["count"] for each in found[:2]} == {1_000_000}
    assert any("aten::add" in each["made by"] for each in found[:2])


def test_groups_tell_products_from_sums_and_add_up(script):
    meters = script("engine_meters")
    a = torch.ones(300, 300)
    products, sums = meters.groups(lambda: a @ a), meters.groups(lambda: a + a)
    assert products["matrix products"] > 0 == products["sums and products"]
    assert sums["sums and products"] > 0 == sums["matrix products"]
    assert all(value >= 0 for value in (*products.values(), *sums.values()))


def test_compiled_functions_have_names_in_a_profile_and_only_there(script):
    from bilevel.engine.compiled.piece import Piece

    before = Piece.__call__
    script("engine_meters").groups(step)
    assert Piece.__call__ is before


def row(variant, seconds, peak, work="P2", size=50, **more):
    return {
        "work": work,
        "size": size,
        "variant": variant,
        "kind": "ours",
        "seconds": seconds,
        "time_ratio": seconds / 2.0,
        "peak_bytes": peak,
        "memory_ratio": peak / 40e6,
        "difference": 1e-6,
        "error_float64": None,
        "rounds": 3,
        "environment": {"torch": "2", "date": "2026-01-01 00:00 UTC"},
        **more,
    }


def test_wanted_numbers(script):
    table = script("engine_table")
    assert table.reached(row("hand-written tape", 2.0, 40e6)) is None
    assert table.reached(row("compiled, segments", 2.2, 9e6)) is True
    assert table.reached(row("compiled, segments", 2.4, 9e6)) is False
    assert table.reached(row("compiled, segments", 2.2, 11e6)) is False
    assert table.reached(row("compiled", 1.4, 6.1e6, "cg", 50)) is False
    assert table.reached(row("compiled", 1.4, 5.9e6, "cg", 50)) is True
    assert table.wanted("P3", 8, "compiled, rematerialized, segments") == (None, 0.1, None)
    assert table.wanted("P3", 8, "compiled, segments") == (1.1, 0.15, None)


def test_the_table(script):
    table = script("engine_table")
    rows = [
        row("hand-written tape", 2.0, 40e6, peak_bytes_dispatched=40_000_001),
        row("compiled, segments", 2.4, 9e6, profile_milliseconds={"matrix products": 7.0}),
        {"work": "P2", "size": 50, "variant": "betty, unroll", "error": "KeyError: 'a|b'", "environment": {"date": ""}},
    ]
    seconds = {"trace_seconds": 1.0, "compile_seconds": 12.0}
    costs = {"P2": {"cold": {"compiled, segments": seconds}, "warm": {"compiled, segments": {"compile_seconds": 3.0}}}}
    lines = table.table(rows, costs).splitlines()
    assert lines[2].startswith("| P2, K = 50 | hand-written tape | 2,000 | 1.00 | 40.0 (40.0) | 1.000 |  |")
    assert lines[3].startswith("| P2, K = 50 | compiled, segments | 2,400 | 1.20 | 9.0 | 0.225 | 1 + 12 (3) |")
    assert lines[3].endswith("| 1.15 t, 0.25 m: no |")
    assert "| fails |" in lines[4]
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert "| P2, K = 50 | compiled, segments | 7 |" in "\n".join(lines[5:])


def test_a_stopped_run_goes_on_and_another_commit_begins_anew(script, tmp_path, monkeypatch):
    engine = script("engine")
    asked, at = [], ["one"]
    monkeypatch.setattr(engine, "commit", lambda: at[0])

    def inside(self, kind, work, size, *, folder):
        asked.append((kind, work, size))
        folder.mkdir(parents=True, exist_ok=True)
        if kind == "first":
            return {"compiled, segments": {"compile_seconds": 1.0, "trace_seconds": 1.0, "not_in_cache": 0}}
        return [row("hand-written tape", 2.0, 40e6, work, size), row("compiled, segments", 2.0, 9e6, work, size)]

    monkeypatch.setattr(engine.Run, "inside", inside)
    out, shared = tmp_path / "engine.jsonl", tmp_path / "bench"
    shared.mkdir()
    (shared / "plain_ref.py").touch()

    def run(*more):
        asked.clear()
        given = ["engine.py", "--state", str(tmp_path / "state"), "--out", str(out), "--bench", str(shared), *more]
        monkeypatch.setattr(sys, "argv", given)
        engine.main()
        return list(asked)

    first = [("first", "P2", 50), ("first", "P2", 50), ("measure", "P2", 50)]
    assert run("--cell", "P2", "50") == first
    assert run("--cell", "P2", "50") == []
    assert run("--cell", "P2", "200") == [("measure", "P2", 200)]  # K is no reason to compile
    assert run("--cell", "P2", "50", "--again") == [("measure", "P2", 50)]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(each["size"], each["variant"]) for each in rows] == [
        (size, variant) for size in (50, 200) for variant in ("hand-written tape", "compiled, segments")
    ]
    assert rows[1]["costs"]["cold"]["compile_seconds"] == 1.0
    assert "P2, K = 200" in out.with_suffix(".md").read_text()
    at[0] = "another"
    assert run("--cell", "P2", "50") == [("first", "P2", 50), ("measure", "P2", 50)]
    before = out.read_text()
    run("--cell", "P2", "50", "--quick")
    assert out.read_text() == before
