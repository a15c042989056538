"""A call of a problem whose data are split over ranks: are all ranks in it alike, and do they leave it alike?

Only the rows differ between ranks. Whatever else does (another x, another solver, other random numbers) would give each
rank its own decisions and its own answer, and in the worst case a rank that waits for a sum which nobody else takes. So
fingerprints of all of it are compared on entering, and those of the answer on leaving: one all-reduce of a few numbers
and one pass over x, y and the state each.
"""

import contextlib
import dataclasses
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.batches import PerStep
from bilevel.engine.replay import Generators
from bilevel.space import fingerprint, tree
from bilevel.space.ranks import RankError, Ranks, without_data

_DRAWS = "random numbers"


@contextlib.contextmanager
def together(
    who: str, ranks: Ranks | None, instance: Any, given: Sequence[Any]
) -> Iterator[Callable[[Sequence[Any]], None]]:
    """Inside this block all ranks draw the same random numbers; the result is to be handed to what this yields.

    Args:
        who: is called, for messages.
        ranks: that the data are split over; None where they are not, and nothing happens.
        instance: the problem and its data.
        given: other arguments that must be alike.

    Raises:
        ValueError: the arguments differ between ranks, or the engine traces.
        RankError: the results do.
    """
    leaves = tree.tensors(instance.outer)
    if ranks is None or (without_data(leaves[0]) and not ranks.pretended):
        yield lambda result: None
        return
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
        **{name: value for name, value in zip(("estimator", "solver", "state"), given, strict=False)},
        "further arguments": given[3:],
        "number of PerStep batches": len(inner) if isinstance(inner, PerStep) else None,
        "modes (autocast, grad)": (torch.is_autocast_enabled(leaves[0].device.type), ranks.size),
    }
    *off, drawn = _different(ranks, leaves[0].device, [*parts.values(), before.numbers])
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
        if any(each is not None for each in _different(ranks, leaves[0].device, [list(result), after.numbers])):
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


def _different(ranks: Ranks, device: torch.device, values: Sequence[Any]) -> list[int | None]:
    """For each value None where it is the same on every rank, else a number that is."""
    own = torch.stack([_of(value, device) for value in values])
    (found,) = ranks.largest([torch.cat([own, -own])])
    if without_data(found):
        return [None] * len(values)
    highest, lowest = found[: len(own)].tolist(), (-found[len(own) :]).tolist()
    return [None if high == low else high for high, low in zip(highest, lowest, strict=True)]


def _of(value: Any, device: torch.device) -> Tensor:
    """The fingerprint of anything: its tensors by their bits, the rest by how it is written."""
    tensors, words = list[Tensor](), list[str]()
    _walk(value, tensors, words)
    text = torch.tensor(zlib.crc32(" ".join(words).encode()), device=device)
    parts = [fingerprint.of(leaf).to(device) for leaf in tensors]
    return fingerprint.of(torch.stack([text, *parts]))


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
