"""Tasks that are shared by ranks: what the tests of TaskMean(group=) have in common."""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import bilevel as bl
from bilevel.distributed import Ranks
from bilevel.testing.catalogue import Quadratic

T = 5
D = torch.float64
STEPS = 4


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


def square(y: Tensor, x: dict[str, Tensor], batch: Tensor) -> Tensor:
    return ((y - x["shift"]) ** 2).sum() / 2


def pull(y: Tensor, x: dict[str, Tensor], batch: Tensor) -> Tensor:
    return ((y - batch) ** 2).sum() / 2


SMALL = bl.Problem(square, pull, init=lambda x, batch: x["start"])
GOALS = torch.tensor([[0.0, 1.0], [2.0, 0.5], [-1.0, 3.0], [4.0, 4.0], [0.1, -2.0]], dtype=D)
STEPPING = bl.Descent(bl.SGD(0.5), 2)


def point() -> dict[str, Tensor]:
    return {"start": torch.tensor([0.3, -0.2], dtype=D), "shift": torch.tensor([1.0, 0.7], dtype=D)}


def goals(ranks: Ranks | None, goals: Tensor = GOALS, **more: Any) -> bl.Batches:
    return parted(bl.Batches(goals, goals, **more), ranks)


def ask(ranks: Any, batches: bl.Batches | None = None, **changed: Any) -> bl.Hypergradient:
    """A hypergradient of the small problem."""
    group = changed.pop("group", ranks)
    mean = {name: changed.pop(name) for name in ("weights", "chunk", "of") if name in changed}
    estimator = bl.TaskMean(mean.pop("of", bl.Unrolled()), **mean, group=group)
    batches = goals(ranks) if batches is None else batches
    given = {"problem": SMALL, "outer": point(), "inner": None, "solver": STEPPING, "estimator": estimator} | changed
    return bl.hypergradient(given.pop("problem"), given.pop("outer"), given.pop("inner"), batches, **given)


def outcome(function: Any) -> tuple[str, str]:
    """The kind and the words of what a call raises, or of its status."""
    try:
        hg = function()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", hg.status.name
