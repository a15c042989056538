"""Engines in the profiler: what is measured of code whose operators nobody sees, and what the record says of it."""

import dataclasses
import json
import sys

import pytest
import torch
from bilevel_profiling import Case, Recorder, forecast, largest_fit, measure
from bilevel_profiling.cases.case_file import Definition
from bilevel_profiling.measurement import engines, passes
from bilevel_profiling.measurement.loop import outer_loop
from bilevel_profiling.meters import Allocator, Tensors
from bilevel_profiling.records.record import Record
from bilevel_profiling.testing.pytest_plugin import PeakMemory

import bilevel as bl
from bilevel.engine.compiled import functions, inductor

STEPS = 4
GRAPH = bl.Compiled(backend="graph")
RANDOM_STATE = 5056
"""Bytes that torch's generator on the CPU takes to remember where it is."""


def setup(device, *, batch=2000):
    """Softmax regression with noise on its inputs, each row weighted; small, but its batch weighs more than all else.

    The noise has its own numbers in each call, so that two engines agree only if they draw the same.
    """
    data = torch.randn(batch, 32, device=device), torch.randint(8, (batch,), device=device)

    def scores(w, inputs):
        return (inputs + 0.1 * torch.randn_like(inputs)).tanh() @ w

    def inner(w, weights, rows):
        errors = torch.nn.functional.cross_entropy(scores(w, rows[0]), rows[1], reduction="none")
        return (weights.sigmoid() * errors).mean()

    def outer(w, weights, rows):
        return torch.nn.functional.cross_entropy(rows[0] @ w, rows[1])

    x, y = torch.zeros(batch, device=device), torch.zeros(32, 8, device=device)
    return bl.Problem(inner, outer), x, y, bl.Batches(data, data)


def case(engine=None, estimator=None, **more):
    solver = bl.Descent(bl.SGD(lr=0.5), STEPS)
    return Case(setup, solver=solver, estimator=estimator or bl.Unrolled("iterates"), engine=engine, **more)


def plain_setup(device):
    """Weighted least squares without noise: few operators, so that it is soon compiled."""
    data = torch.randn(2000, 32, device=device)

    def inner(w, weights, rows):
        return (weights * (rows @ w).sin().square()).mean()

    x, y = torch.ones(2000, device=device), torch.ones(32, device=device)
    return bl.Problem(inner, lambda w, weights, rows: w.square().sum()), x, y, bl.Batches(data, data)


@pytest.fixture(autouse=True)
def nothing_was_compiled_before():
    """Another test's torch.compile in this process would leave a loss with random numbers without a reference."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is not None:
        dynamo.counters.clear()


@pytest.fixture(scope="module")
def compiled():
    """A measurement of compiled code, the forecast of it, and the measurement of eager code."""
    solver = bl.Descent(bl.SGD(lr=0.5), STEPS)
    plain = Case(plain_setup, solver=solver, estimator=bl.Unrolled("iterates"))
    case = dataclasses.replace(plain, engine=bl.Compiled())
    return measure(case, repeats=3), forecast(case), measure(plain, repeats=1)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch._inductor imports it
def test_compiled_code_is_measured_and_stays_below_its_forecast(compiled):
    measured, forecasted, eager = compiled
    assert measured.status == "OK"
    assert measured.program_relative_error < 1e-5
    assert measured.calls == eager.calls
    assert measured.kept_tensor_bytes == 0
    assert measured.compile_seconds > 0.5
    assert measured.warm_up_seconds > measured.trace_seconds + measured.compile_seconds
    assert measured.wall_seconds < measured.compile_seconds / 5
    # Fused code holds less than its operators one by one, which is what a forecast follows.
    assert 0.2 * forecasted.peak_tensor_bytes < measured.peak_tensor_bytes <= forecasted.peak_tensor_bytes
    assert measured.peak_tensor_bytes < eager.peak_tensor_bytes


def test_the_record_says_what_the_engine_made_and_what_it_cost():
    record, eager = measure(case(GRAPH), repeats=1), measure(case(), repeats=1)
    assert (record.engine, record.engine_settings) == ("compiled", repr(GRAPH))
    assert (record.peak_meter, eager.peak_meter) == ("allocator", "tensors")
    assert any("allocator" in note for note in record.notes)
    by_name = {found.name: found for found in record.functions}
    assert by_name["gradient of inner_loss"].calls == by_name["products of inner_loss"].calls == STEPS
    assert by_name["gradients of outer_loss"].calls == 1
    assert record.trace_seconds == sum(found.trace_seconds for found in record.functions) > 0
    assert record.warm_up_seconds > record.trace_seconds + record.compile_seconds
    assert by_name["gradient of inner_loss"].matmul_flops == 2 * 2 * 2000 * 32 * 8
    assert record.matmul_flops == sum(found.matmul_flops * found.calls for found in record.functions)
    assert record.program_relative_error < 1e-5
    assert record.phases.keys() == eager.phases.keys()
    assert {name: phase.calls for name, phase in record.phases.items()} == {
        name: phase.calls for name, phase in eager.phases.items()
    }
    assert max(phase.peak_tensor_bytes for phase in record.phases.values()) == record.peak_tensor_bytes
    assert record.alive
    assert record.timeline
    for field in ("engine", "engine_settings", "functions", "trace_seconds", "compile_seconds", "warm_up_seconds"):
        assert not getattr(eager, field), field


def test_records_are_read_back_and_old_ones_know_no_engines():
    record = measure(case(GRAPH), repeats=1)
    assert Record.from_json(record.to_json()) == record
    data = json.loads(record.to_json())
    fields = {field.name for field in dataclasses.fields(Record)}
    for name in ("engine", "engine_settings", "peak_meter", "functions", "trace_seconds", "compile_seconds"):
        assert name in fields
        del data[name]
    old = Record.from_json(json.dumps(data))
    assert (old.engine, old.functions, old.trace_seconds) == ("", (), None)


def test_tracing_and_whole_checks_are_over_before_anything_is_measured(monkeypatch):
    said = []
    trace, compare = functions.trace, functions.compare

    def traced(*arguments):
        said.append("traced")
        return trace(*arguments)

    def compared(owner, piece, found, *rest):
        said.append("whole" if piece.calls <= functions.FULL_CHECKS else "loss")
        return compare(owner, piece, found, *rest)

    class Marked(passes.Clock):
        def __enter__(self):
            said.append("clock")
            return super().__enter__()

    monkeypatch.setattr(functions, "trace", traced)
    monkeypatch.setattr(functions, "compare", compared)
    monkeypatch.setattr(passes, "Clock", Marked)
    measure(case(GRAPH), repeats=2)
    first = said.index("clock")
    assert said.count("traced") == 3
    assert "traced" not in said[first:]
    assert "whole" in said[:first]
    assert "whole" not in said[first:]


def test_a_leak_of_an_estimator_is_seen_under_an_engine_too():
    record = measure(case(GRAPH, estimator=Leaking()), repeats=1, errors=False)
    assert record.kept_tensor_bytes == 1000 * 4
    assert measure(case(GRAPH, estimator=bl.Unrolled("iterates")), repeats=1, errors=False).kept_tensor_bytes == 0


@dataclasses.dataclass(frozen=True)
class Leaking(bl.Estimator):
    sees = frozenset(bl.Path)

    def estimate(self, instance, state):
        HELD.append(torch.ones(1000))
        return bl.Unrolled("iterates").estimate(instance, state)


HELD = []


def test_an_engine_of_another_kind_is_refused():
    with pytest.raises(TypeError, match=r"str as engine; None or bl\.Compiled\(\) was needed"):
        case("compiled")
    assert case(bl.Eager()).engine_name == "eager"
    assert case().engine_name == ""
    assert case(GRAPH, engine_name="traced").title == "Unrolled (traced)"


def test_a_forecast_compiles_nothing_and_leaves_random_numbers_alone(monkeypatch):
    def never(*arguments):
        raise AssertionError("compiled")

    monkeypatch.setattr(inductor, "inductor", never)
    before = torch.get_rng_state()
    found = forecast(case(bl.Compiled()))
    assert torch.equal(torch.get_rng_state(), before)
    assert engines.ABOVE in map(str, found.notes)
    assert (found.source, found.peak_meter, found.engine) == ("forecast", "tensors", "compiled")
    assert found.trace_seconds is found.compile_seconds is found.warm_up_seconds is None
    assert {made.name: made.calls for made in found.functions} == {
        "gradient of inner_loss": STEPS,
        "products of inner_loss": STEPS,
        "gradients of outer_loss": 1,
    }
    assert all(made.trace_seconds is None for made in found.functions)


@pytest.mark.parametrize("estimator", [bl.Unrolled(), bl.Unrolled("iterates"), bl.Implicit(bl.CG(3))], ids=repr)
def test_a_traced_graph_weighs_what_its_forecast_says(estimator):
    # Without checks, and but for random states, of which one is kept for each step whose product is still to come.
    engine = bl.Compiled(backend="graph", check=False)
    found, measured = forecast(case(engine, estimator)), measure(case(engine, estimator), repeats=1, errors=False)
    assert -64 <= measured.peak_tensor_bytes - found.peak_tensor_bytes <= (STEPS + 4) * RANDOM_STATE
    assert found.peak_tensor_bytes > 5 * (STEPS + 4) * RANDOM_STATE


def test_an_eager_forecast_is_the_same_with_an_engine_named():
    plain, named = forecast(case()), forecast(case(bl.Eager()))
    assert dataclasses.replace(named, engine="", engine_settings="", environment={}) == dataclasses.replace(
        plain, environment={}
    )
    assert named.engine_settings == "Eager()"
    assert plain.peak_tensor_bytes == measure(case(), repeats=1).peak_tensor_bytes


def test_the_largest_fit_is_that_of_the_engine():
    budget = 2 * 2**20
    steps = {engine: largest_fit(case(engine, bl.Unrolled()), budget, at_most=5) for engine in (None, GRAPH)}
    assert 0 < steps[None] < steps[GRAPH]  # a compiled gradient keeps its inputs alone


def test_an_outer_loop_is_that_of_eager_and_traces_nothing(monkeypatch):
    defined = Definition(name="noisy", setup=setup)
    eager = outer_loop(case(), defined, 3)
    seen, begin = [], functions.trace
    monkeypatch.setattr(functions, "trace", lambda *given: seen.append(1) or begin(*given))
    found = outer_loop(case(GRAPH), defined, 3)
    assert len(seen) == 3, "once for each function, for all loops"
    for mine, other in zip(found.iterations, eager.iterations, strict=True):
        assert mine.outer_loss == pytest.approx(other.outer_loss, rel=1e-5)
        assert mine.calls == other.calls
    peaks = [step.peak_tensor_bytes for step in found.iterations]
    assert all(peaks[:2])
    assert peaks[2] is None
    assert peaks[1] == pytest.approx(measure(case(GRAPH), repeats=1).peak_tensor_bytes, rel=0.2)


def test_a_recorder_does_not_say_what_it_cannot_see(tmp_path):
    problem, outer, inner, batches = setup("cpu")
    outer.requires_grad_()

    def steps(engine):
        loop = bl.iterate(
            problem,
            outer,
            inner,
            [batches] * 2,
            solver=bl.Descent(bl.SGD(lr=0.5), 2),
            estimator=bl.Unrolled(),
            optimizer=torch.optim.SGD([outer], lr=0.1),
            engine=engine,
        )
        with Recorder(tmp_path / f"{engine is None}.jsonl") as recorder:
            for _ in recorder.watch(loop):
                pass
        return recorder.record.iterations

    assert all(step.peak_tensor_bytes for step in steps(None))
    hidden = steps(GRAPH)
    assert [step.peak_tensor_bytes for step in hidden] == [None, None]
    assert all(phase.peak_tensor_bytes is None for step in hidden for phase in step.phases.values())
    assert all(step.wall_seconds and step.calls for step in hidden)


def test_a_function_that_compiles_says_that_its_bytes_are_not_whole():
    problem, outer, inner, batches = setup("cpu")

    def call(engine):
        solver = bl.Descent(bl.SGD(lr=0.5), 2)
        return bl.hypergradient(problem, outer, inner, batches, solver=solver, estimator=bl.Unrolled(), engine=engine)

    assert engines.HIDDEN in map(str, measure(lambda: call(GRAPH), repeats=1).notes)
    assert engines.HIDDEN not in map(str, measure(lambda: call(None), repeats=1).notes)
    assert engines.HIDDEN not in map(str, measure(lambda: call(bl.Eager()), repeats=1).notes)
    assert PeakMemory().of(lambda: call(bl.Eager())) > 0
    with pytest.raises(pytest.fail.Exception, match=r"the peak is not known: an engine that compiles"):
        PeakMemory().of(lambda: call(GRAPH))


def test_meters_for_each_engine():
    assert engines.sees_operators(None)
    assert engines.sees_operators(bl.Eager())
    assert not engines.sees_operators(GRAPH)
    assert engines.may_lose_workspaces(GRAPH)
    assert {Allocator().figures()["peak_meter"], Tensors().figures()["peak_meter"]} == {"allocator", "tensors"}


def test_engine_notes_reach_the_record():
    found = engines.notes({"engine": {"name": "compiled", "notes": ["f is new at every call: ran eagerly"]}})
    assert [str(note) for note in found] == ["Engine compiled: f is new at every call: ran eagerly."]
    assert "matmul_flops" not in engines.facts(
        case(GRAPH), [{"engine": {"name": "compiled", "notes": ["x"], "functions": []}}], 1.0
    )
