"""The tasks of all ranks, as one mean.

    own tasks  ->  say what they came to (one gather of a few numbers a task)  ->  sum gradients (one all-reduce)

The gather goes first: a rank that failed says so in it, so that nobody waits in the all-reduce for one who never comes.
"""

import contextlib
import dataclasses
import hashlib
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from bilevel.engine.replay import State as Drawn
from bilevel.estimators.base import Instance
from bilevel.space import tree
from bilevel.space.bits import fingerprints, numbers
from bilevel.space.ranks import RankError, Ranks, without_data
from bilevel.space.tree import PartialLeaves, Tree
from bilevel.tasks.rows import Tasks, shared_fields

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Words:
    """What one rank says at a meeting: plain numbers and text. `rest` is a pickle, made where it can still fail alone.

    `place` says at which meeting; `shared` what tasks share in their state, before and after; `drew` from which state
    of the random generators, if from any.
    """

    place: str
    error: str | None = None
    described: str = ""
    outer: tuple[str, tuple[int, ...]] = ("", ())
    count: int = 0
    losses: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())
    dtype: torch.dtype | None = None
    code: int = 0
    reached: tuple[tuple[bool, ...], ...] = ()
    unused: frozenset[int] = frozenset()
    shared: tuple[str, str] = ("", "")
    drew: str = ""
    rest: bytes = b""


@dataclasses.dataclass(frozen=True)
class Together:
    """The ranks of a group, from one estimate to the next."""

    ranks: Ranks

    def __post_init__(self) -> None:
        if self.ranks.rank < 0:
            raise ValueError(f"this process is no member of the group {self.ranks}; make the call on its members alone")

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """A block whose exception all ranks raise: this one as it is, the others as a RankError when they meet."""
        try:
            yield
        except Exception as error:
            with contextlib.suppress(RankError):
                self.ranks.gathered(Words("", error=f"{type(error).__name__}: {error}"))
            raise

    def ended(self) -> None:
        """This rank's data have ended: raises on all ranks if others go on."""
        self._met(Words("the end of the data"))

    def gathered(self, value: Value, outer: Tree) -> list[Value]:
        """What all ranks have for a small picklable value, in their order.

        Raises:
            RankError: another rank failed.
            ValueError: `outer` is not the same for all.
        """
        with self.guarded():
            words = Words("an evaluation", outer=_outer(outer), rest=pickle.dumps(value))
        everyone = self._met(words)
        self._check_outer(everyone, outer)
        return [pickle.loads(each.rest) for each in everyone]

    def words(self, own: Tasks, instance: Instance, described: str, before: Any, drew: Drawn | None) -> Words:
        """What this rank will say of its tasks.

        Args:
            own: these.
            instance: of them.
            described: what all ranks must do alike.
            before: the state that they began with.
            drew: the random generators before, if the tasks drew.
        """
        stats = [{name: _plain(value) for name, value in part.items()} for part in own.stats]
        outer_losses, inner_losses = (tuple(numbers(each)) for each in (own.outer_loss, own.inner_loss))
        try:
            rest = pickle.dumps((stats, own.ids))
        except Exception as error:
            raise TypeError(
                f"TaskMean was given a group, and {own.ids} or a figure of {[*stats[0]]} cannot be sent to other "
                f"processes ({error}). Name tasks by integers or strings, and let stats be numbers and tensors"
            ) from error
        return Words(
            "tasks",
            described=described,
            outer=_outer(instance.outer),
            count=own.count,
            losses=(outer_losses, inner_losses),
            dtype=own.outer_loss.dtype if own.count else None,
            code=0 if without_data(own.code) else int(own.code),
            reached=tuple(tuple(leaf is not None for leaf in grad) for grad in own.grads),
            unused=own.unused,
            shared=(_shared(before), _shared(own.state)),
            drew="" if drew is None else _digest(*(bytes(number.numpy(force=True)) for number in drew.numbers)),
            rest=rest,
        )

    def whole(self, own: Tasks, words: Words, instance: Instance) -> Tasks:
        """The tasks of all ranks in the order of the ranks, the same bits on each; `inner` and `state` are its own.

        Raises:
            RankError: another rank failed.
            ValueError: the ranks do not compute one thing.
        """
        everyone, xs = self._met(words), tree.tensors(instance.outer)
        self._check(everyone, instance)
        rest = [pickle.loads(each.rest) for each in everyone]
        losses = [
            torch.tensor(
                [loss for each in everyone for loss in each.losses[i]],
                dtype=next(each.dtype for each in everyone if each.dtype is not None),
                device=xs[0].device,
            )
            for i in range(2)
        ]
        inner, next_inner = own.inner, own.next_inner
        if not all(each.count for each in everyone):
            inner, next_inner = self._as_elsewhere((inner, next_inner), own.count, xs[0].device)
        grads = (self._rows if own.each else self._sum)(own, everyone, xs)
        self._warn(everyone)  # (after the last collective: a filter may make it an error)
        return dataclasses.replace(
            own,
            count=sum(each.count for each in everyone),
            grads=grads,
            inner=inner,
            next_inner=next_inner,
            outer_loss=losses[0],
            inner_loss=losses[1],
            code=torch.tensor(max(each.code for each in everyone), device=xs[0].device),
            stats=[
                {name: _tensors(value, xs[0].device) for name, value in part.items()}
                for stats, _ in rest
                for part in stats
            ],
            unused=frozenset.intersection(*(each.unused for each in everyone if each.count)),
            ids=None if any(ids is None for _, ids in rest) else tuple(task for _, ids in rest for task in ids),
        )

    def first(self, make: Callable[[], Tensor]) -> Tensor:
        """What the first rank makes, on all of them. An exception of one is raised on all."""
        with self.guarded():
            made = make()
            words = Words("weights", rest=pickle.dumps(_plain(made)))
        numbers: Tensor = _tensors(pickle.loads(self._met(words)[0].rest), made.device)
        return numbers

    def _met(self, words: Words) -> list[Words]:
        """What all ranks say, if they are at one place and none has failed."""
        everyone = self.ranks.gathered(words)
        failed = [f"rank {rank} ({each.error})" for rank, each in enumerate(everyone) if each.error is not None]
        if failed:
            raise RankError(f"the tasks of all ranks are one mean, and {' and '.join(failed)} failed")
        places = [each.place for each in everyone]
        if len(set(places)) > 1:
            found = ", ".join(f"rank {rank} at {place}" for rank, place in enumerate(places))
            raise RankError(
                f"the ranks of one mean over tasks are at different places: {found}. Give every rank as many batches "
                f"(a rank without tasks tensors of the leading size 0), and let all of them make the same calls"
            )
        return everyone

    def _check(self, everyone: Sequence[Words], instance: Instance) -> None:
        """Raise unless the ranks compute one thing. What is raised depends on what all have said, and so do all."""
        found = [each.described for each in everyone]
        if len(set(found)) > 1:
            raise ValueError(
                f"the ranks of one mean over tasks do different things: "
                f"{', '.join(f'rank {rank} {text}' for rank, text in enumerate(found))}; the same estimator, weights "
                f"and solver were needed"
            )
        self._check_outer(everyone, instance.outer)
        if not sum(each.count for each in everyone):
            raise ValueError("TaskMean was given no tasks: the leading size is 0 on every rank, and one was needed")
        self._check_state(everyone)

    def _check_outer(self, everyone: Sequence[Words], outer: Tree) -> None:
        """Raise unless all have the same x."""
        outers = [each.outer for each in everyone]
        if len({structure for structure, _ in outers}) > 1:
            found = self.ranks.gathered(_structure(outer))
            raise ValueError(
                f"the ranks of one mean over tasks were given outer variables of different tensors: "
                f"{', '.join(f'rank {rank} {text}' for rank, text in enumerate(found))}; one x was needed"
            )
        if len(set(outers)) > 1:
            names = tree.names(outer)
            differ = [name for i, name in enumerate(names) if len({bits[i] for _, bits in outers}) > 1]
            raise ValueError(
                f"outer {', '.join(differ)} is not the same on all ranks, to the bit, and a mean of hypergradients at "
                f"several x is that of none. Make x with the same seed everywhere, or send it once (for leaf in "
                f"outer.values(): torch.distributed.broadcast(leaf.data, 0)), and let every rank make the same steps"
            )

    def _warn(self, everyone: Sequence[Words]) -> None:
        drew = [each.drew for each in everyone if each.drew]
        if len(set(drew)) < len(drew):
            warnings.warn(
                "several ranks drew the same random numbers for different tasks (dropout, directions), so that their "
                "noise does not average out; write torch.manual_seed(seed + rank) once x is made",
                stacklevel=2,
            )
        # (Tasks that are all alike, or one, say nothing.)
        found = [each.losses for each in everyone if len(set(each.losses[0])) > 1]
        if len(set(found)) < len(found):
            warnings.warn(
                "several ranks have the same losses of their tasks, to the bit: was each given all tasks? The mean is "
                "right, and its work is done several times. Take a rank's own with bilevel.distributed.split(batches, "
                "ranks), and so its own part of inner",
                stacklevel=2,
            )

    def _check_state(self, everyone: Sequence[Words]) -> None:
        """Raise unless what tasks share in their state stays as it is, and is the same on all ranks."""
        if self.ranks.size == 1:
            return
        after = {each.shared[1] for each in everyone if each.count}
        if len(after) > 1 or any(each.shared[0] and each.shared[0] not in after for each in everyone if each.count):
            raise ValueError(
                "TaskMean was given a group and an estimator whose state has fields that tasks share and that tasks "
                "change; on several ranks each would go its own way. Declare them as per_task(), or leave group out"
            )

    def _sum(self, own: Tasks, everyone: Sequence[Words], xs: Sequence[Tensor]) -> tuple[PartialLeaves, ...]:
        """The sum over ranks, in one all-reduce of the tensors that any has reached."""
        places = [i for i in range(len(xs)) if any(grad[i] for each in everyone for grad in each.reached)]
        mine = own.grads[0] if own.grads else (None,) * len(xs)
        summed = self.ranks.sum([_or_zeros(mine[i], xs[i]) for i in places])
        found: list[Tensor | None] = [None] * len(xs)
        for i, leaf in zip(places, summed, strict=True):
            found[i] = leaf
        return (tuple(found),)

    def _rows(self, own: Tasks, everyone: Sequence[Words], xs: Sequence[Tensor]) -> tuple[PartialLeaves, ...]:
        """The gradients of all tasks: each rank's in its own rows of a sum with zeros, in one all-reduce."""
        reached = [grad for each in everyone for grad in each.reached]
        places = [i for i in range(len(xs)) if any(grad[i] for grad in reached)]
        low = sum(each.count for each in everyone[: self.ranks.rank])
        rows = [xs[i].new_zeros((len(reached), *xs[i].shape)) for i in places]
        for row, grad in enumerate(own.grads, low):
            for leaf, i in zip(rows, places, strict=True):
                if (value := grad[i]) is not None:
                    leaf[row] = value
        all_rows = dict(zip(places, self.ranks.sum(rows), strict=True))
        return tuple(
            tuple(all_rows[i][row] if there else None for i, there in enumerate(grad))
            for row, grad in enumerate(reached)
        )

    def _as_elsewhere(self, own: tuple[Tree, Tree], count: int, device: torch.device) -> tuple[Tree, Tree]:
        """Trees of this rank's tasks; if it has none, like those of others, without rows."""

        def empty(leaf: Any) -> Any:
            return torch.empty(0, *leaf.shape[1:], dtype=leaf.dtype) if isinstance(leaf, Tensor) else leaf

        def placed(leaf: Any) -> Any:
            return leaf.to(device) if isinstance(leaf, Tensor) else leaf

        with self.guarded():
            words = Words("what tasks look like", count=count, rest=pickle.dumps(tree.tree_map(empty, own)))
        like = next(each for each in self._met(words) if each.count)
        trees: tuple[Tree, Tree] = own if count else tree.tree_map(placed, pickle.loads(like.rest))
        return trees


@dataclasses.dataclass(frozen=True)
class _Numbers:
    """A tensor, for a pickle that any process can read quickly."""

    values: Any
    shape: tuple[int, ...]
    dtype: torch.dtype


def _plain(value: Any) -> Any:
    return _Numbers(numbers(value.flatten()), tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def _tensors(value: Any, device: torch.device) -> Any:
    if not isinstance(value, _Numbers):
        return value
    return torch.tensor(value.values, dtype=value.dtype, device=device).reshape(value.shape)


def _or_zeros(leaf: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if leaf is None else leaf.to(like.dtype)


def _outer(outer: Tree) -> tuple[str, tuple[int, ...]]:
    return _digest(_structure(outer)), tuple(fingerprints(outer))


def _structure(outer: Tree) -> str:
    leaves = zip(tree.names(outer), tree.tensors(outer), strict=True)
    return "; ".join(f"{name} {tuple(leaf.shape)} {leaf.dtype}" for name, leaf in leaves)


def _shared(state: Any) -> str:
    """What tasks share in a state, as text: "" where there is nothing."""
    fields = shared_fields(state)
    return "" if not fields else _digest(repr([(name, _text(value)) for name, value in fields.items()]))


def _text(value: Any) -> Any:
    leaves, _ = tree.flatten(value)
    return [fingerprints(leaf) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves]


def _digest(*parts: str | bytes) -> str:
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()
