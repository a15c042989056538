"""Estimators that call the inner program at several x, and take no derivative of it."""

import bilevel as bl
from bilevel.testing.catalogue.entry import EVERYWHERE, Entry, counts

ENTRIES = (
    Entry(
        "evolution",
        bl.estimators.EvolutionStrategies(std=0.01, pairs=2),
        target="program",
        calls=lambda steps, products: counts(5 * steps, 0, 0, 0),
        solves=lambda steps: 5 * steps,
        memory="constant",
        sees=EVERYWHERE,
        bias="std^2",
        # A difference of values is linear in the direction: sum of 1 / N (e e' - I) dF/dx.
        variance=lambda q: (len(q.x) + 1) / 2 * q.program().square().sum(),
    ),
    Entry(
        "persistent evolution",
        bl.estimators.PersistentES(std=0.01, pairs=2),
        target="program",
        calls=lambda steps, products: counts(5 * steps, 0, 0, 0),
        solves=lambda steps: 5 * steps,
        memory="constant",
        sees=EVERYWHERE,
        bias="std^2",
        variance=lambda q: (len(q.x) + 1) / 2 * q.program().square().sum(),
    ),
    Entry(
        "partial zeroth order",
        bl.estimators.PZOBO(mu=0.01, directions=2),
        target="program",
        calls=lambda steps, products: counts(3 * steps, 1, 0, 0),
        solves=lambda steps: 3 * steps,
        memory="constant",
        sees=EVERYWHERE,
        bias="mu",
        variance=lambda q: (len(q.x) + 1) / 2 * (q.program() - q.d).square().sum(),
    ),
)
