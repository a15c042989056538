"""A call of a problem whose data are split over ranks: are all ranks in it alike, and do they leave it alike?

Only the rows differ between ranks. Whatever else does (another x, another solver, other random numbers) would give each
rank its own decisions and its own answer, and in the worst case a rank that waits for a sum which nobody else takes. So
fingerprints of all of it are compared on entering, and those of the answer on leaving: one all-reduce of a few numbers
and one pass over x, y and the state each.
"""

import contextlib
import contextvars
import dataclasses
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.batches import PerStep
from bilevel.engine.replay import Generators
from bilevel.space import bits, tree
from bilevel.space.ranks import RankError, Ranks, without_data

_PARTS, _FAILED, _ENDED = 8, 1, 2
"""How many values are compared, and what a rank sends that cannot compare, or has no more data."""

_UNSEEN = contextvars.ContextVar[bool]("bilevel_split_unseen", default=False)
"""Whether a call is under way whose problem does not show that its data are split."""


def check_seen() -> None:
    """Raise ValueError where a loss that is split is called by one that hides it: nothing would be held alike."""
    if _UNSEEN.get():
        raise ValueError(
            "a loss of data_parallel() was called from another function that was given as a loss, where nobody sees "
            "that ranks share the work. Put data_parallel() outside: data_parallel(bilevel.Problem(yours, ...), ranks)"
        )


@contextlib.contextmanager
def together(
    who: str, ranks: Ranks | None, instance: Any, given: Sequence[Any]
) -> Iterator[Callable[[Sequence[Any]], None]]:
    """Inside this block all ranks draw the same random numbers; the result is to be handed to what this yields.

    Args:
        who: is called, for messages.
        ranks: that the data are split over; None where they are not, or nobody sees it.
        instance: the problem and its data.
        given: other arguments that must be alike.

    Raises:
        ValueError: the arguments differ between ranks, or the engine traces.
        RankError: the results do.
    """
    token = _UNSEEN.set(ranks is None)
    try:
        with _alike(who, ranks, instance, given) as same:
            yield same
    finally:
        _UNSEEN.reset(token)


@contextlib.contextmanager
def _alike(
    who: str, ranks: Ranks | None, instance: Any, given: Sequence[Any]
) -> Iterator[Callable[[Sequence[Any]], None]]:
    leaves = tree.tensors(instance.outer)
    if ranks is None or (without_data(leaves[0]) and not ranks.pretended):
        yield lambda result: None
        return
    with guarded(ranks, instance.outer):
        _check_apart(who, ranks, given[0])
        if instance.engine is not None and instance.engine.pure:
            raise ValueError(
                f"{who}() was given a problem whose data are split over ranks and an engine that traces, and sums over "
                f"ranks are not in a trace. Use engine=bilevel.Eager(); a torch.compile inside the loss may stay"
            )
    generators, inner = Generators(leaves[0].device), instance.batches.inner
    before = generators.peek()
    parts = {
        "outer": instance.outer,
        "inner": instance.inner,
        "estimator": given[0],
        "solver": given[1],
        "state": given[2],
        "number of PerStep batches": len(inner) if isinstance(inner, PerStep) else None,
        "autocast": torch.is_autocast_enabled(leaves[0].device.type),
    }
    *off, drawn = _different(ranks, leaves[0].device, [*parts.values(), before.numbers], "the arguments")
    wrong = [name for name, differs in zip(parts, off, strict=True) if differs is not None]
    if wrong:
        raise ValueError(
            f"{who}() of a problem whose data are split over ranks was given {' and '.join(wrong)} that differ between "
            f"ranks; only the batches may. Make them from one seed on every rank, or send those of rank 0 with "
            f"torch.distributed.broadcast before the first step"
        )
    begun = before
    if drawn is not None:
        generators.seed(drawn)
        begun = generators.peek()

    def same(result: Sequence[Any]) -> None:
        after = generators.peek()
        if any(
            each is not None
            for each in _different(ranks, leaves[0].device, [list(result), after.numbers], "the results")
        ):
            raise RankError(
                f"the result of {who}() differs between ranks, though only their batches did: something besides the "
                f"losses and Problem.features looks at a rank's own rows or is a rank's own (a constraint, a loader "
                f"that draws from torch's global generator, another kind of device)"
            )

    try:
        yield same
    finally:
        if drawn is not None:
            moved = not generators.same(begun, generators.peek())
            generators.set(before)
            if moved:
                generators.advance()


@contextlib.contextmanager
def guarded(ranks: Ranks | None, outer: Any) -> Iterator[None]:
    """A block before `together`, whose exception all ranks raise: the others where they meet."""
    try:
        yield
    except Exception:
        if ranks is not None:
            leaves = [leaf for leaf in tree.tensors(outer) if not without_data(leaf)]
            if leaves:
                with contextlib.suppress(RuntimeError):
                    ranks.largest([torch.full((2 + 2 * _PARTS,), _FAILED, device=leaves[0].device)])
        raise


def ended(ranks: Ranks | None, outer: Any) -> None:
    """This rank's data have ended: raises on all ranks if others go on.

    Raises:
        RankError: others go on.
    """
    leaves = [leaf for leaf in tree.tensors(outer) if not without_data(leaf)]
    if ranks is None or not leaves:
        return
    said = torch.zeros(2 + 2 * _PARTS, dtype=torch.int64, device=leaves[0].device)
    said[0] = _ENDED
    (found,) = ranks.largest([said])
    if int(found[0]) == _FAILED or int(found[1]):
        raise RankError(f"this rank's data have ended, and those of another one go on, or failed. {_AS_MANY}")


_AS_MANY = "Give every rank as many batches, with an empty part where it has no rows left"


def _check_apart(who: str, ranks: Ranks, estimator: Any) -> None:
    """Raise ValueError if the ranks that have parts of a batch have other tasks, too."""
    tasks = getattr(estimator, "group", None)
    if isinstance(tasks, Ranks) and len(set(tasks.members) & set(ranks.members)) > 1:
        raise ValueError(
            f"{who}() was given tasks and examples that are split over the same ranks: {tasks} and {ranks}. The ranks "
            f"that share the examples of a task must have the same tasks; take the rows and columns of a mesh, "
            f"torch.distributed.init_device_mesh(device, (tasks, examples)), or split one of the two"
        )


def _different(ranks: Ranks, device: torch.device, values: Sequence[Any], what: str) -> list[int | None]:
    """For each value None where it is the same on every rank, else a number that is.

    Raises:
        RankError: a rank failed before it came here.
    """
    own = torch.stack([_of(value, device) for value in values])
    own = torch.cat([own, own.new_zeros(_PARTS - len(own))])
    (found,) = ranks.largest([torch.cat([own.new_tensor([0, 1]), own, -own])])
    if without_data(found):
        return [None] * len(values)
    numbers = found.tolist()
    if numbers[0] == _FAILED:
        raise RankError(f"another rank failed before {what} were compared; its own output says why")
    if numbers[0] == _ENDED:
        raise RankError(f"the data of another rank have ended, and this one goes on. {_AS_MANY}")
    pairs = zip(numbers[2 : 2 + _PARTS], numbers[2 + _PARTS :], strict=True)
    return [None if high == -low else high for high, low in pairs][: len(values)]


def _of(value: Any, device: torch.device) -> Tensor:
    """The fingerprint of anything: its tensors by their bits, the rest by how it is written."""
    tensors, words = list[Tensor](), list[str]()
    _walk(value, tensors, words)
    text = torch.tensor(zlib.crc32(" ".join(words).encode()), device=device)
    parts = [bits.of(leaf).to(device) for leaf in tensors]
    return bits.of(torch.stack([text, *parts]))


def _walk(value: Any, tensors: list[Tensor], words: list[str]) -> None:
    if isinstance(value, Tensor):
        words.append(f"{value.dtype}{tuple(value.shape)}")
        tensors.append(value)
    elif isinstance(value, torch.Generator):
        tensors.append(value.get_state())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        words.append(type(value).__qualname__)
        for field in dataclasses.fields(value):
            _walk(getattr(value, field.name), tensors, words)
    elif isinstance(value, (list, tuple)):
        words.append(type(value).__name__)
        for each in value:
            _walk(each, tensors, words)
    elif isinstance(value, dict):
        for name, each in value.items():
            words.append(str(name))
            _walk(each, tensors, words)
    else:
        # (Where an object lies differs between processes.)
        words.append(re.sub(r" at 0x[0-9a-f]+", "", repr(value)))
