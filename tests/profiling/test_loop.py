"""The outer loop, iteration by iteration; the timeline; and what a plan refuses."""

import pytest
import torch
from bilevel_profiling import Case
from bilevel_profiling.cases.case_file import CaseError, Definition, load
from bilevel_profiling.comparison.plan import Plan, settle
from bilevel_profiling.comparison.progress import Lines, Task
from bilevel_profiling.measurement.loop import outer_loop
from bilevel_profiling.meters.timeline import Timeline

import bilevel as bl
from bilevel.problems import quadratic


def definition(**overrides):
    return Definition(
        name="quadratic", setup=quadratic.setup, optimizer=bl.SGD(lr=1.0), outer_optimizer=sgd, **overrides
    )


def sgd(tensors):
    return torch.optim.SGD(tensors, lr=1e-3)


def run(case_of=None, steps=4, estimator=None, lr=1.0, **overrides):
    defined = definition(**overrides)
    solver = bl.Descent(bl.SGD(lr=lr), 5)
    return outer_loop(
        Case(quadratic.setup, solver=solver, estimator=estimator or bl.Unrolled(), outer_optimizer=sgd, seed=3),
        defined,
        steps,
    )


def test_each_iteration_is_recorded_and_is_that_of_iterate():
    found = run()
    problem, outer, inner, batches = quadratic.setup(seed=3)
    loop = bl.iterate(
        problem,
        outer,
        inner,
        [batches] * 4,
        solver=bl.Descent(bl.SGD(lr=1.0), 5),
        estimator=bl.Unrolled(),
        optimizer=torch.optim.SGD([outer], lr=1e-3),
    )
    assert [step.index for step in found.iterations] == [0, 1, 2, 3]
    for mine, step in zip(found.iterations, loop, strict=True):
        assert mine.outer_loss == pytest.approx(step.outer_loss.item(), rel=1e-12)
        assert mine.gradient_norm == pytest.approx(step.hypergradient.grad.norm().item(), rel=1e-12)
        assert mine.status == "OK"
        assert mine.calls["inner_gradient"] == 5
        assert set(mine.phases) == {"inner", "hypergradient", "outer"}
        assert sum(phase.wall_seconds for phase in mine.phases.values()) <= mine.wall_seconds


def test_live_bytes_are_counted_in_the_first_two_iterations_only():
    peaks = [step.peak_tensor_bytes for step in run().iterations]
    assert all(peak > 0 for peak in peaks[:2])
    assert peaks[2:] == [None, None]


def test_batches_and_metrics_are_asked_for_in_order_and_with_the_seed():
    asked = []

    def batches(step, device, seed):
        asked.append((step, device, seed))
        return quadratic.setup(seed=3)[3]

    def evaluate(outer, device):
        return {"objective": quadratic.random(seed=3).value(outer)}

    found = run(batches=batches, evaluate=evaluate)
    # the two metered iterations come first, in a loop of their own
    assert asked == [(0, "cpu", 3), (1, "cpu", 3), *((step, "cpu", 3) for step in range(4))]
    assert found.metrics_before["objective"] == pytest.approx(
        quadratic.random(seed=3).value(quadratic.setup(seed=3)[1]).item()
    )
    assert found.metrics["objective"] < found.metrics_before["objective"]


def test_metrics_that_are_known_are_not_asked_for_again():
    asked = []

    def evaluate(outer, device):
        asked.append(outer)
        return {"objective": 1.0}

    case = Case(quadratic.setup, solver=bl.Descent(bl.SGD(lr=1.0), 2), estimator=bl.Unrolled(), outer_optimizer=sgd)
    found = outer_loop(case, definition(evaluate=evaluate), 1, {"objective": 3.0})
    assert (found.metrics_before, found.metrics, len(asked)) == ({"objective": 3.0}, {"objective": 1.0}, 1)


def test_a_failed_hypergradient_ends_the_loop_and_says_so():
    found = run(lr=1e200)
    (only,) = found.iterations
    assert only.status in ("DIVERGED", "NONFINITE")
    assert only.outer_loss is None


def test_a_short_timeline_is_kept_whole():
    line = Timeline()
    for live in (0, 8, 4):
        line.add(live, ("inner", "hvp", "aten.mul"))
    assert line.points() == tuple((place, live, "inner", "hvp", "aten.mul") for place, live in enumerate((0, 8, 4)))
    assert Timeline().points() == ()


@pytest.mark.parametrize("stretches", [3, 1000])
def test_a_thinned_timeline_keeps_the_ends_and_the_peak_of_every_phase(stretches):
    line, count = Timeline(), 30_000
    names = ["", "inner", "hypergradient"]
    for place in range(count):
        spike = {17_123: 10**6, 4_321: 9 * 10**5, 25_000: 8 * 10**5}.get(place, 0)
        line.add(place % 977 + spike, (names[place * stretches // count % 3], "", "aten.add"))
    points = line.points()
    assert len(points) <= 400
    assert [point[0] for point in points] == sorted({point[0] for point in points})
    assert points[0][0] == 0
    assert points[-1][0] == count - 1
    assert {4_321, 17_123, 25_000} <= {point[0] for point in points}
    assert {point[2] for point in points} == set(names)


@pytest.mark.parametrize(
    ("plans", "error", "message"),
    [
        ([Plan("quadratic", labels=["nobody"])], CaseError, "there is no estimator 'nobody': quadratic has unrolled"),
        (
            [Plan("quadratic", labels=["first-order"]), Plan("ridge", labels=["first-order"])],
            CaseError,
            "case ridge has none",
        ),
        ([Plan("quadratic"), Plan("quadratic")], CaseError, "two cases are called quadratic"),
        ([Plan("quadratic", {"inner_steps": (-1,)})], CaseError, "integers of at least 0"),
        ([Plan("quadratic", {"estimators": {}})], CaseError, "at least one entry"),
        ([Plan("quadratic", {"estimators": {"a": bl.CG(3)}})], CaseError, "'a' to a CG"),
        ([Plan("quadratic", {"optimizer": torch.optim.SGD})], CaseError, "bl.SGD"),
        ([Plan("quadratic", {"outer_steps": -1})], CaseError, "OUTER_STEPS"),
        ([Plan("quadratic", {"evaluate": 3})], CaseError, "evaluate is a int"),
        ([Plan(lambda device: None)], TypeError, "lambdas"),
        ([Plan("quadratic", {"optimizer": bl.SGD(lr=lambda outer: outer)})], TypeError, "write the case as a file"),
        ([Plan("no/such.py")], CaseError, "no file of that path"),
    ],
)
def test_what_a_plan_refuses(plans, error, message):
    with pytest.raises(error, match=message):
        settle(plans)


def test_a_label_may_belong_to_one_of_several_cases():
    found = settle(
        [Plan("quadratic", labels=["implicit CG", "first-order"]), Plan("ridge", labels=["implicit CG", "first-order"])]
    )
    assert [each.labels for each in found] == [("implicit CG", "first-order"), ("implicit CG",)]


FILES = {
    "setup = 3": "defines no function setup",
    "def setup(device) return 1": "SyntaxError",
    "import sys\nsys.exit(4)": r"SystemExit: 4 \(line 2\)",
    "def setup(device): ...\n\n1 / 0": r"ZeroDivisionError: division by zero \(line 3\)",
    "def setup(device): ...\nINNER_STEPS = 'many'": "INNER_STEPS",
    "def setup(device): ...\nSOLUTION = 1e-3": "bl.Converge",
    "def setup(device): ...\nPRELOAD = 'torch'": "PRELOAD",
}


@pytest.mark.parametrize("text", FILES)
def test_a_case_file_that_cannot_be_used_is_told_why(text, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(CaseError, match=FILES[text]):
        load(str(path))


def test_a_case_file_may_import_its_neighbors_and_leave_nearly_everything_out(tmp_path):
    (tmp_path / "neighbor_of_mine.py").write_text("LR = 0.25")
    (tmp_path / "mine.py").write_text(
        '"""Mine.\n\nMore."""\nimport neighbor_of_mine\ndef setup(device): ...\nINNER_STEPS = range(1, 4)'
    )
    found = load(str(tmp_path / "mine.py"))
    assert (found.name, found.title, found.inner_steps, found.outer_steps) == ("mine", "Mine.", (1, 2, 3), 0)
    assert "unrolled" in found.estimators


def test_lines_of_progress_say_how_far_and_how_long(capsys):
    tasks = [Task("toy", f"K = {k}", 1.0) for k in range(3)]
    progress = Lines()
    progress.start(tasks)
    for task in tasks[:2]:
        progress.begin(task)
        progress.finish(task, "1.0 MiB")
    progress.stop()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "[1/3, 0:00, about 0:00 left]  toy: K = 0: 1.0 MiB",
        "[2/3, 0:00, about 0:00 left]  toy: K = 1: 1.0 MiB",
    ]
