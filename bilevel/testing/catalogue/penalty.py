"""Estimators that perturb or penalize the inner loss, with first derivatives alone."""

import bilevel as bl
from bilevel.testing.catalogue.entry import GRADIENTS, Entry, Slope, counts

ENTRIES = (
    Entry(
        "corrected",
        bl.FirstOrderCorrected(),
        target="solution",
        calls=lambda steps, products: counts(2 * steps + 2, 2 * steps + 2, 0, 0),
        memory="constant",
        sees=GRADIENTS,
        solves=lambda steps: 2 * steps,
        bias="nu^2",
        slope=Slope("nu", 2, bl.FirstOrderCorrected, (0.1, 0.05, 0.025)),
    ),
    Entry(
        "corrected forward",
        bl.FirstOrderCorrected(scheme="forward"),
        target="solution",
        calls=lambda steps, products: counts(2 * steps + 2, steps + 2, 0, 0),
        memory="constant",
        sees=GRADIENTS,
        solves=lambda steps: 2 * steps,
        bias="nu",
        slope=Slope("nu", 1, lambda nu: bl.FirstOrderCorrected(nu, scheme="forward"), (0.1, 0.05, 0.025)),
    ),
    Entry(
        "corrected, 4 points",
        bl.FirstOrderCorrected(scheme=4),
        target="solution",
        calls=lambda steps, products: counts(4 * steps + 4, 4 * steps + 4, 0, 0),
        memory="constant",
        sees=GRADIENTS,
        solves=lambda steps: 4 * steps,
        bias="nu^4",
        slope=Slope("nu", 4, lambda nu: bl.FirstOrderCorrected(nu, scheme=4), (0.06, 0.03, 0.015)),
    ),
    Entry(
        "corrected, warm",
        bl.FirstOrderCorrected(warm_sides=True),
        target="solution",
        calls=lambda steps, products: counts(2 * steps + 2, 2 * steps + 2, 0, 0),
        memory="constant",
        sees=GRADIENTS,
        solves=lambda steps: 2 * steps,
        bias="nu^2",
    ),
)
