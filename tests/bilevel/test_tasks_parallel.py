"""TaskMean(group=): the tasks of all ranks are one mean, whatever the estimator and the split."""

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import bilevel as bl
from bilevel.distributed import Ranks
from bilevel.testing.catalogue import ENTRIES, Quadratic

T = 5
D = torch.float64
STEPS = 4
DRAWN = [entry.label for entry in ENTRIES if entry.variance is not None]
CHEAP = {"implicit neumann": bl.Implicit(bl.Neumann(steps=30, step_size=0.5))}  # in the place of 2,500 products
SETTLED = [
    dataclasses.replace(entry, estimator=CHEAP.get(entry.label, entry.estimator))
    for entry in ENTRIES
    if entry.variance is None
]


def own(value: Any, ranks: Ranks) -> Any:
    """This rank's rows of whole trees; of 5 tasks 2 ranks have 3 and 2, 4 ranks 2, 1, 1 and 1."""
    return pytree.tree_map(
        lambda leaf: leaf.tensor_split(ranks.size)[ranks.rank] if isinstance(leaf, Tensor) else leaf, value
    )


def parted(batches: bl.Batches, ranks: Ranks | None) -> bl.Batches:
    if ranks is None:
        return batches
    ids = batches.task_ids
    mine = None if ids is None else [ids[i] for i in torch.arange(len(ids)).tensor_split(ranks.size)[ranks.rank]]
    index = batches.index
    return bl.Batches(own(batches.inner, ranks), own(batches.outer, ranks), index=index, task_ids=mine)


def posed(ranks: Ranks | None, tasks: int = T, *, ids: bool = False) -> dict[str, Any]:
    """The quadratic of the catalogue with its tasks, or this rank's of them."""
    given = Quadratic.example(STEPS).posed(tasks=tasks)
    batches = dataclasses.replace(given["batches"], index=(0, 0))
    if ids:
        batches = dataclasses.replace(batches, task_ids=[f"task {i}" for i in range(tasks)])
    inner = given["inner"] if ranks is None else own(given["inner"], ranks)
    return given | {"batches": parted(batches, ranks), "inner": inner}


@dataclasses.dataclass
class Found:
    """A hypergradient, as a rank sends it."""

    grad: Any
    inner: Any
    next_inner: Any
    losses: Tensor
    status: str
    state: Any
    stats: dict[str, Any]

    @classmethod
    def of(cls, hg: bl.Hypergradient) -> "Found":
        stats = {name: value for name, value in hg.stats.items() if name != "calls"}
        losses = torch.stack([hg.outer_loss, hg.inner_loss])
        return cls(hg.grad, hg.inner, hg.next_inner, losses, hg.status.name, hg.state, stats)

    @property
    def agreed(self) -> tuple[Any, ...]:
        """What is everyone's."""
        return self.grad, self.losses, self.status, self.stats


def same(one: Any, other: Any) -> bool:
    """To the bit."""
    a, b = pytree.tree_flatten(one), pytree.tree_flatten(other)
    pairs = zip(a[0], b[0], strict=True)
    return a[1] == b[1] and all(
        torch.equal(p.nan_to_num(7.0), q.nan_to_num(7.0))
        if isinstance(p, Tensor) and p.is_floating_point()
        else torch.equal(p, q)
        if isinstance(p, Tensor)
        else p == q
        for p, q in pairs
    )


def stacked(trees: list[Any]) -> Any:
    return pytree.tree_map(lambda *leaves: torch.cat(leaves), *trees)


def run(entries: Any, ranks: Ranks | None, chunk: int | None, calls: int = 2, **options: Any) -> dict[str, Found]:
    answers = {}
    for entry in entries:
        arguments, state = posed(ranks, **options), None
        for _ in range(calls):
            hg = bl.hypergradient(**arguments, estimator=bl.TaskMean(entry.estimator, chunk, group=ranks), state=state)
            state, arguments["inner"] = hg.state, hg.inner if hg.next_inner is None else hg.next_inner
        answers[entry.label] = Found.of(hg)
    return answers


def of_ranks(ranks: Ranks, chunk: int | None) -> dict[str, Found]:
    return run(SETTLED, ranks, chunk)


@pytest.mark.parametrize(("count", "chunk"), [(1, None), (2, None), (4, 1)])
def test_many_ranks_are_one_for_every_estimator(ranks: Any, count: int, chunk: int | None) -> None:
    whole = run(SETTLED, None, chunk)
    answers = ranks.run(count, of_ranks, chunk)
    for entry in SETTLED:
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
                assert each[0].stats[name].numel() == count, (entry.label, name)
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
