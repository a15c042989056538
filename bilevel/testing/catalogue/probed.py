"""An estimator run again with its arguments moved by roundings."""

import bilevel as bl
from bilevel.testing.catalogue.entry import EVERYWHERE, Entry, counts

ENTRIES = (
    Entry(
        "probed",
        bl.estimators.Probed(bl.Unrolled("iterates"), probes=1),
        target="program",
        calls=lambda steps, products: counts(4 * steps, 2, 2 * steps, 0),
        solves=lambda steps: 2 * steps,
        memory="linear",
        sees=EVERYWHERE,
    ),
)
