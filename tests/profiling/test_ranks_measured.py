"""Cases whose work is split over ranks: what each rank measures, and what a forecast for so many says."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bilevel_profiling import DATA, TASKS, Case, Parallel, Record, forecast, measure

import bilevel as bl
from bilevel.distributed import Ranks

ROWS, TASKS_AT_ONCE = 22, 6


def rows(device: str) -> Any:
    """A weight for each of 22 rows, on which a small net is trained; judged by 10 others."""
    generator = torch.Generator().manual_seed(0)
    features, answers = torch.randn(ROWS + 10, 5, generator=generator), torch.randn(ROWS + 10, generator=generator)

    def errors(net: Any, batch: Any) -> torch.Tensor:
        return ((batch[0] @ net["first"]).tanh() @ net["second"] - batch[1]).square()

    def inner(net: Any, x: Any, batch: Any) -> torch.Tensor:
        decay = sum(leaf.square().sum() for leaf in net.values())
        return (x["weights"][batch[2]].sigmoid() * errors(net, batch)).mean() + 0.1 * decay

    net = {"first": torch.randn(5, 8, generator=generator), "second": torch.randn(8, generator=generator)}
    train = features[:ROWS], answers[:ROWS], torch.arange(ROWS)
    problem = bl.Problem(inner, lambda net, x, batch: errors(net, batch).mean())
    return problem, {"weights": torch.zeros(ROWS)}, net, bl.Batches(train, (features[ROWS:], answers[ROWS:]))


def lines(device: str) -> Any:
    """A start for six tasks, each a line through its own points."""
    generator = torch.Generator().manual_seed(0)
    points = [torch.randn(TASKS_AT_ONCE, 4, 3, generator=generator) for _ in range(2)]

    def off(w: Any, x: Any, points: torch.Tensor) -> torch.Tensor:
        return (points @ w - 1).square().mean()

    start = torch.full((3,), 0.1)
    problem = bl.Problem(lambda w, x, b: off(w, x, b) + (w - x).square().sum(), off)
    return problem, start, start.expand(TASKS_AT_ONCE, 3), bl.Batches(*points)


SOLVER = bl.Descent(bl.SGD(lr=0.1), 3)
# (CG leaves a product out where it is sure of its residual, which a forecast cannot be.)
INNER = {
    "graph": bl.Unrolled(),
    "segments": bl.Unrolled(keep="segments"),
    "Neumann": bl.Implicit(bl.Neumann(steps=2, step_size=0.1)),
    "corrected": bl.FirstOrderCorrected(),
}
CASES = {
    **{label: Case(rows, SOLVER, each, name="rows", label=label, parallel=DATA) for label, each in INNER.items()},
    "tasks": Case(lines, SOLVER, bl.TaskMean(bl.Unrolled(), chunk=1), name="lines", label="tasks", parallel=TASKS),
}


def measured(ranks: Ranks, labels: list[str], repeats: int = 1) -> dict[str, Record]:
    return {
        label: measure(dataclasses.replace(CASES[label], ranks=ranks), repeats=repeats, errors=False)
        for label in labels
    }


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_forecast_for_ranks_is_what_each_of_them_measures(ranks: Any, count: int) -> None:
    """To the byte: memory, and what is sent. (What tasks say of themselves is as long as their values are written.)"""
    found = ranks.run(count, measured, list(CASES))
    assert all(isinstance(each, dict) for each in found), found
    for label, case in CASES.items():
        wanted = forecast(case, ranks=count)
        assert (wanted.processes, wanted.split, wanted.source) == (count, case.parallel.name, "forecast")
        real = [each[label] for each in found]
        first = real[0]
        assert {(each.processes, each.split) for each in real} == {(count, case.parallel.name)}
        assert len({each.status for each in real}) == 1
        assert first.collectives == wanted.collectives, label
        assert first.base_tensor_bytes == wanted.base_tensor_bytes, label
        if case.parallel is TASKS:
            said = (count - 1) * 64
            assert first.sent_bytes == pytest.approx(wanted.sent_bytes, abs=said), label
            assert first.peak_tensor_bytes == pytest.approx(wanted.peak_tensor_bytes, abs=64 * count), label
            continue
        assert first.sent_bytes == wanted.sent_bytes, label
        assert (first.sent_bytes > 0) == (count > 1), label
        assert first.peak_tensor_bytes == wanted.peak_tensor_bytes, label
        assert {name: each.peak_tensor_bytes for name, each in first.phases.items()} == {
            name: each.peak_tensor_bytes for name, each in wanted.phases.items()
        }, label
        # The first ranks have the most rows, and all send the same.
        assert first.peak_tensor_bytes == max(each.peak_tensor_bytes for each in real), label
        assert {each.sent_bytes for each in real} == {first.sent_bytes}, label


def test_ranks_have_less_and_find_the_same(ranks: Any) -> None:
    def first(count: int) -> Record:
        return ranks.run(count, with_errors)[0]

    one, two = first(1), first(2)
    # (Of the whole, the largest is the look at the random generators, which is the same for all.)
    peaks = [each.phases["hypergradient"].peak_tensor_bytes for each in (one, two)]
    assert peaks[1] < 0.8 * peaks[0]
    assert one.program_relative_error < 1e-5 > two.program_relative_error
    assert one.calls == two.calls
    assert two.collective_seconds > 0
    assert 0 < sum(phase.sent_bytes or 0 for phase in two.phases.values()) < two.sent_bytes  # checks are in none
    assert two.repeats == 3  # of the clock: as many on each rank, however slow


def with_errors(ranks: Ranks) -> Record:
    return measure(dataclasses.replace(CASES["graph"], ranks=ranks), repeats=3)


def test_a_forecast_for_many_ranks_needs_none() -> None:
    found = {count: forecast(CASES["graph"], ranks=count) for count in (8, 512)}
    assert found[512].phases["inner"].peak_tensor_bytes < found[8].phases["inner"].peak_tensor_bytes
    # An all-reduce sends 2 (N - 1) / N times its bytes, rounded up: each of its parts is one byte more at most.
    calls = sum(found[8].collectives.values())
    assert found[8].collectives == found[512].collectives
    assert found[512].sent_bytes == pytest.approx(found[8].sent_bytes / 7 * 8 * 511 / 512, abs=2 * calls)
    assert not dist.is_initialized()
    assert forecast(CASES["graph"]).processes is None


def test_a_function_can_be_forecast_as_one_of_many() -> None:
    def gathers() -> list[torch.Tensor]:
        found = [torch.empty(100) for _ in range(dist.get_world_size())]
        dist.all_gather(found, torch.ones(100))
        return found

    found = forecast(gathers, ranks=64)
    assert (found.sent_bytes, found.peak_tensor_bytes, found.collectives) == (63 * 400, 65 * 400, {"all_gather": 1})


def says_no(ranks: Ranks) -> str:
    with pytest.raises(RuntimeError, match="in another process") as raised:
        forecast(CASES["graph"], ranks=2)
    assert dist.is_initialized()
    return str(raised.value)


def test_a_group_that_is_there_is_not_disturbed(ranks: Any) -> None:
    (said,) = ranks.run(1, says_no)
    assert "init_process_group" in said
    assert len(ranks.run(4, measured, [])) == 4  # it is still there


def test_what_is_needed_is_said() -> None:
    for wrong in (0, True, 2.0):
        with pytest.raises(ValueError, match="positive integer"):
            forecast(CASES["graph"], ranks=wrong)
    with pytest.raises(ValueError, match="parallel=DATA"):
        forecast(Case(rows, SOLVER, bl.Unrolled()), ranks=2)
    with pytest.raises(TypeError, match="Ranks"):
        Case(rows, SOLVER, bl.Unrolled(), parallel=DATA, ranks=2)
    with pytest.raises(TypeError, match="DATA"):
        Case(rows, SOLVER, bl.Unrolled(), parallel="data")


def test_what_a_case_splits_is_its_own_to_say() -> None:
    def fewer(problem: bl.Problem, ranks: Ranks) -> bl.Problem:
        return bl.Problem(lambda y, x, b: problem.inner_loss(y, x, b) / ranks.size, problem.outer_loss)

    found = forecast(dataclasses.replace(CASES["graph"], parallel=Parallel("mine", problem=fewer)), ranks=3)
    assert (found.split, found.sent_bytes, found.collectives) == ("mine", 0, {})
