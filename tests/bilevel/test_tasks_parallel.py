"""TaskMean(group=): the tasks of all ranks are one mean, whatever the estimator and the split."""

import dataclasses
import functools
import warnings
from typing import Any

import catalogue
import pytest
import torch
from tasks_of_ranks import D, Found, T, outcome, posed, same, stacked
from torch import Tensor
from torch.utils import _pytree as pytree

import bilevel as bl
from bilevel.distributed import Ranks
from bilevel.testing.catalogue import ENTRIES

DRAWN = [entry.label for entry in ENTRIES if entry.variance is not None]
CHEAP = {"implicit neumann": bl.Implicit(bl.Neumann(steps=30, step_size=0.5))}  # in the place of 2,500 products
SETTLED = [
    dataclasses.replace(entry, estimator=CHEAP.get(entry.label, entry.estimator))
    for entry in ENTRIES
    if entry.variance is None
]


def run(entries: Any, ranks: Ranks | None, chunk: int | None) -> dict[str, Found]:
    answers = {}
    for entry in entries:
        arguments, state = posed(ranks), None
        for call in range(2):
            if call and state is None:
                break
            hg = bl.hypergradient(**arguments, estimator=bl.TaskMean(entry.estimator, chunk, group=ranks), state=state)
            state, arguments["inner"] = hg.state, hg.inner if hg.next_inner is None else hg.next_inner
        answers[entry.label] = Found.of(hg)
    return answers


def of_ranks(ranks: Ranks, chunk: int | None, labels: set[str]) -> dict[str, Found]:
    return run([entry for entry in SETTLED if entry.label in labels], ranks, chunk)


@functools.cache
def of_one() -> dict[str, Found]:
    return run(SETTLED, None, None)


@pytest.mark.parametrize(("count", "chunk"), [(1, 2), (2, None), (4, None)])
def test_many_ranks_are_one_for_every_estimator(ranks: Any, count: int, chunk: int | None) -> None:
    """And for four ranks, every one that does not share its code with another."""
    entries = {1: SETTLED[:1], 2: SETTLED, 4: [entry for entry in SETTLED if entry.label not in catalogue.ALIKE]}[count]
    whole = of_one() if chunk is None else run(entries, None, chunk)
    answers = ranks.run(count, of_ranks, chunk, {entry.label for entry in entries})
    for entry in entries:
        one, each = whole[entry.label], [answer[entry.label] for answer in answers]
        # (A finite difference amplifies rounding.)
        close = {"rtol": 1e-6, "atol": 1e-8} if entry.bias is not None else {"rtol": 1e-10, "atol": 1e-12}
        close["msg"] = lambda text, label=entry.label: f"{label}: {text}"
        assert all(same(other.agreed, each[0].agreed) for other in each), entry.label
        torch.testing.assert_close(each[0].grad, one.grad, **close)
        torch.testing.assert_close(each[0].losses, one.losses, **close)
        assert each[0].status == one.status, entry.label
        assert each[0].stats["tasks"] == T
        for name, value in one.stats.items():
            if isinstance(value, Tensor) and value.shape == (T,):
                torch.testing.assert_close(each[0].stats[name], value, **close)
            elif isinstance(value, Tensor):  # one for each part of the tasks
                assert each[0].stats[name].numel() == (count if chunk is None else value.numel()), (entry.label, name)
        torch.testing.assert_close(stacked([other.inner for other in each]), one.inner, **close)
        if one.next_inner is not None:
            torch.testing.assert_close(stacked([other.next_inner for other in each]), one.next_inner, **close)
        for field in () if one.state is None else dataclasses.fields(one.state):
            values = [getattr(other.state, field.name) for other in each]
            wanted = getattr(one.state, field.name)
            if field.metadata.get("per_task"):
                # (What single loops average in x is kept in equal parts for the tasks of a chunk: their sums are one.)
                summed = [pytree.tree_map(lambda leaf: leaf.sum(0), value) for value in (stacked(values), wanted)]
                torch.testing.assert_close(*summed, **close)
            else:
                assert all(value == wanted for value in values), (entry.label, field.name)


# --- a mesh of tasks and examples


def fitted(y: Tensor, x: dict[str, Tensor], rows: tuple[Tensor, Tensor]) -> Tensor:
    return (rows[0] @ y - rows[1]).square().mean() + x["decay"].exp() * y.square().sum()


def lines() -> tuple[dict[str, Tensor], bl.Batches]:
    g = torch.Generator().manual_seed(0)
    rows = [(torch.randn(T, n, 3, generator=g, dtype=D), torch.randn(T, n, generator=g, dtype=D)) for n in (7, 6)]
    return {"start": torch.ones(3, dtype=D), "decay": torch.tensor(-2.0, dtype=D)}, bl.Batches(*rows)


def meshed(ranks: Ranks) -> tuple[Found, tuple[str, str]]:
    """Two by two: tasks over ranks (0, 2) and (1, 3), examples over (0, 1) and (2, 3)."""
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("tasks", "examples"))
    over_tasks, examples = (Ranks(mesh.get_group(name)) for name in ("tasks", "examples"))
    x, batches = lines()
    problem = bl.distributed.data_parallel(bl.Problem(fitted, fitted, init=lambda x, b: x["start"]), examples)
    mine = bl.distributed.split(bl.distributed.split(batches, over_tasks), examples, dim=1)
    estimator = bl.TaskMean(bl.Unrolled(), group=over_tasks)

    def call(x: dict[str, Tensor]) -> bl.Hypergradient:
        return bl.hypergradient(problem, x, None, mine, solver=bl.Descent(bl.SGD(0.1), 3), estimator=estimator)

    other = {**x, "decay": x["decay"] + (ranks.rank == 0)}
    return Found.of(call(x)), outcome(lambda: call(other))


def test_tasks_and_examples_are_split_at_once(ranks: Any) -> None:
    x, batches = lines()
    problem, solver = bl.Problem(fitted, fitted, init=lambda x, b: x["start"]), bl.Descent(bl.SGD(0.1), 3)
    plain = Found.of(bl.hypergradient(problem, x, None, batches, solver=solver, estimator=bl.TaskMean(bl.Unrolled())))
    answers, refused = zip(*ranks.run(4, meshed), strict=True)
    assert [kind for kind, _ in refused] == ["ValueError", "ValueError", "RankError", "RankError"]
    for found in answers:
        assert same(found.agreed, answers[0].agreed)
        torch.testing.assert_close(found.grad, plain.grad, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(found.losses, plain.losses, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(stacked([answers[0].inner, answers[2].inner]), plain.inner)


# --- what is drawn


def drawing(ranks: Ranks, alike: bool) -> tuple[dict[str, Found], dict[str, Any], int]:
    """Of each estimator that draws: the mean over all ranks, and this rank's own tasks by a plain TaskMean."""
    together, alone, warned = {}, {}, 0
    for entry in ENTRIES:
        if entry.variance is None:
            continue
        arguments = posed(ranks)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.manual_seed(1 if alike else 1 + ranks.rank)
            hg = bl.hypergradient(**arguments, estimator=bl.TaskMean(entry.estimator, group=ranks))
        warned += sum("manual_seed(seed + rank)" in str(each.message) for each in caught)
        together[entry.label] = Found.of(hg)
        torch.manual_seed(1 if alike else 1 + ranks.rank)
        plain = bl.hypergradient(**arguments, estimator=bl.TaskMean(entry.estimator))
        alone[entry.label] = pytree.tree_map(lambda leaf, count=plain.stats["tasks"]: leaf * count / T, plain.grad)
    return together, alone, warned


def test_each_rank_draws_as_one_process_with_its_tasks_would(ranks: Any) -> None:
    answers = ranks.run(2, drawing, False)
    assert len(answers[0][0]) > 4
    for label, found in answers[0][0].items():
        assert same(found.agreed, answers[1][0][label].agreed), label
        summed = pytree.tree_map(lambda *leaves: sum(leaves), *(alone[label] for _, alone, _ in answers))
        torch.testing.assert_close(found.grad, summed, rtol=1e-10, atol=1e-12)
    assert [warned for *_, warned in answers] == [0, 0]


def test_ranks_that_draw_the_same_numbers_are_warned_of(ranks: Any) -> None:
    answers = ranks.run(2, drawing, True)
    assert [warned for *_, warned in answers] == [len(DRAWN)] * 2
