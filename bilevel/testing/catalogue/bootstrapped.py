"""Matching a target that is further on."""

import dataclasses

from torch import Tensor

import bilevel as bl
from bilevel.testing.catalogue.entry import EVERYWHERE, Entry, counts
from bilevel.testing.catalogue.quadratic import Quadratic


def _to_target(q: Quadratic) -> Tensor:
    """(dy_K/dx)' (y_K - y_{K+3}), and f's direct part."""
    further = dataclasses.replace(q, steps=q.steps + 3).last
    return q.d + q.C.T @ q.series(q.steps) @ (q.last - further)


ENTRIES = (
    Entry(
        "bootstrapped",
        bl.Bootstrapped(bl.Unrolled(), bl.estimators.FurtherSteps(3)),
        target="program",
        # K + 3 steps to the target, K differentiated ones, and f once more for its direct part.
        calls=lambda steps, products: counts(2 * steps + 3, 2, steps, 0),
        solves=lambda steps: 2 * steps + 3,
        memory="linear",
        sees=EVERYWHERE,
        bias="the gradient of the matching loss, not of F",
        on_quadratic=_to_target,
    ),
)
