"""Reverse mode through the steps that were taken."""

import bilevel as bl
from bilevel.estimators.reverse.plans import advances, shrinking
from bilevel.testing.catalogue.entry import EVERYWHERE, Calls, Entry, counts


def unrolled(label: str, keep: str, *, segment: int | None = None, last: int | None = None) -> Entry:
    """The entry of a variant of Unrolled: 1, 2 or about 3 inner gradients and one product per step gone back through.

    Args:
        label: its name.
        keep: as for `Unrolled`.
        segment: likewise.
        last: likewise.
    """

    def calls(steps: int, products: int) -> Calls:
        back = steps if last is None else min(last, steps)
        again = {"graph": 0, "iterates": back, "segments": back + _recomputed(back, segment)}[keep]
        return counts(steps + again, 1, back, 0)

    whole_memory = "sqrt" if keep == "segments" and segment is None else "linear"
    return Entry(
        label,
        bl.Unrolled(keep, segment=segment, last=last),
        target="program",
        calls=calls,
        memory=whole_memory if last is None else "constant",
        sees=EVERYWHERE,
        bias=None if last is None else f"(1 - lr mu)^{last}",
        on_quadratic=None if last is None else lambda q: q.gradient(q.series(min(last, q.steps)), q.last),
    )


def _recomputed(steps: int, segment: int | None) -> int:
    """Every segment but the last is run again from its first iterate, up to its last."""
    if segment is None:
        lengths = shrinking(steps)
    else:
        lengths = [min(segment, steps - begin) for begin in range(0, steps, segment)]
    return sum(length - 1 for length in lengths[:-1])


ENTRIES = (
    unrolled("graph", "graph"),
    unrolled("graph last 2", "graph", last=2),
    unrolled("iterates", "iterates"),
    unrolled("iterates last 2", "iterates", last=2),
    unrolled("segments", "segments"),
    unrolled("segments of 3", "segments", segment=3),
    unrolled("segments last 4", "segments", last=4),
    Entry(
        "revolve",
        bl.estimators.Revolve(snapshots=8),
        target="program",
        calls=lambda steps, products: counts(advances(steps, 8) + bool(steps) + steps, 1, steps, 0),
        memory="constant",
        sees=EVERYWHERE,
    ),
    Entry(
        "first order",
        bl.FirstOrder(),
        target="program",
        calls=lambda steps, products: counts(steps, 1, 0, 0),
        memory="constant",
        sees=frozenset({bl.Path.START, bl.Path.OUTER_LOSS}),
        bias="K lr |H|",
        on_quadratic=lambda q: q.d,
    ),
)
