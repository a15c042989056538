"""trace(): a file that viewers open, with the library's spans inside each other, and a clock that says when it cannot
tell."""

import gzip
import json

import pytest
import torch
from bilevel_profiling.meters.clock import Clock
from bilevel_profiling.meters.trace import trace

import bilevel as bl

STEPS = 4


def hypergradient():
    problem = bl.Problem(lambda y, x, _: (y**2 - x * y).sum(), lambda y, x, _: (y**2).sum() / 2)
    y, x = torch.zeros(3), torch.ones(3)
    return bl.hypergradient(
        problem,
        x,
        y,
        bl.Batches(None, None),
        solver=bl.Descent(bl.SGD(0.25), STEPS),
        estimator=bl.Implicit(bl.Neumann(5, 0.2)),
    )


def spans(path):
    """(name, start, end) of the library's spans, in µs."""
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    events = json.loads(text)["traceEvents"]
    return [
        (e["name"], e["ts"], e["ts"] + e["dur"])
        for e in events
        if e.get("ph") == "X" and e["name"].startswith("bilevel.")
    ]


@pytest.mark.parametrize("name", ["trace.json", "deep/er/trace.json.gz"])
def test_the_spans_lie_inside_each_other(tmp_path, name):
    found = trace(hypergradient, tmp_path / name)
    assert found.status is bl.Status.OK
    written = spans(tmp_path / name)

    def inside(outer, inner):
        (around,) = [span for span in written if span[0] == outer]
        return [span for span in written if span[0] == inner and around[1] <= span[1] and span[2] <= around[2]]

    counts = {
        name: sum(span[0] == f"bilevel.{name}" for span in written) for name in ("inner_gradient", "hvp", "mixed")
    }
    assert counts == {name: found.stats["calls"][name] for name in counts}
    assert len(inside("bilevel.inner", "bilevel.inner_gradient")) == STEPS
    assert inside("bilevel.inner", "bilevel.hvp") == []
    assert len(inside("bilevel.hypergradient", "bilevel.hvp")) == counts["hvp"] == 5
    assert len(inside("bilevel.hypergradient", "bilevel.mixed")) == 1
    # No two spans cross: of any two that overlap, one holds the other.
    for a, start, end in written:
        for b, other_start, other_end in written:
            crossing = start < other_start < end < other_end
            assert not crossing, f"{a} and {b} cross"


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_memory_is_drawn_as_a_curve(tmp_path, name):
    path = tmp_path / name
    trace(lambda: torch.ones(1000) + 1, path, memory=True)
    text = gzip.decompress(path.read_bytes()).decode() if name.endswith(".gz") else path.read_text()
    curve = [
        event
        for event in json.loads(text)["traceEvents"]
        if event.get("ph") == "C" and event["name"] == "allocated on CPU"
    ]
    assert max(event["args"]["bytes"] for event in curve) >= 8000
    assert all({"pid", "ts"} <= set(event) for event in curve)


def test_a_call_that_raises_leaves_its_trace(tmp_path):
    def fail():
        torch.ones(3).cumsum(0)
        raise KeyError("oops")

    with pytest.raises(KeyError, match="oops"):
        trace(fail, tmp_path / "trace.json")
    assert "aten::cumsum" in (tmp_path / "trace.json").read_text()
    assert trace(lambda: 3, tmp_path / "trace.json") == 3  # and torch's profiler is free again


def test_what_cannot_be_called_is_refused(tmp_path):
    with pytest.raises(TypeError, match="a Tensor; a function without arguments was needed"):
        trace(torch.ones(3), tmp_path / "trace.json")
    assert list(tmp_path.iterdir()) == []


def clock(*seconds):
    made = Clock()
    made.seconds = list(seconds)
    return made


def test_a_wide_spread_is_said_with_the_difference_that_means_nothing():
    wide = clock(0.08, 0.10, 0.10, 0.10, 0.16)
    assert wide.spread == pytest.approx(0.48)  # quantiles between the order statistics: 0.088 and 0.136
    (note,) = wide.figures()["notes"]
    assert "48% of the median (5 repeats): time differences below 0.048 s mean nothing" in note
    assert clock(0.099, 0.10, 0.10, 0.101).figures()["notes"] == ()


@pytest.mark.parametrize(("seconds", "said"), [((1.0,), "1 repeat,"), ((1.0, 1.0), "2 repeats,")])
def test_few_repeats_are_said(seconds, said):
    (note,) = clock(*seconds).figures()["notes"]
    assert said in note


def test_a_clock_that_never_ran_knows_nothing():
    assert Clock().figures() == {"wall_seconds": None, "notes": ()}
    assert Clock().spread is None
    assert clock(1.0).spread is None
