"""The library's own estimators, one entry per variant, with everything that is promised of each; a file per family.

The conformance matrix, the memory contracts, the oracle counts, the forecasts and the docs' tables take their lists
from here, so a new estimator is one entry. Counts are hand-written: they do not ask the estimator.
"""

from bilevel.testing.catalogue import (
    bootstrapped,
    forward,
    implicit,
    penalty,
    probed,
    reverse,
    single_loop,
    zeroth_order,
)
from bilevel.testing.catalogue.entry import GROWTHS as GROWTHS
from bilevel.testing.catalogue.entry import TARGETS as TARGETS
from bilevel.testing.catalogue.entry import Calls as Calls
from bilevel.testing.catalogue.entry import Entry as Entry
from bilevel.testing.catalogue.entry import Need as Need
from bilevel.testing.catalogue.entry import Slope as Slope
from bilevel.testing.catalogue.entry import counts as counts
from bilevel.testing.catalogue.entry import once as once
from bilevel.testing.catalogue.quadratic import Quadratic as Quadratic
from bilevel.testing.catalogue.reverse import unrolled as unrolled

FAMILIES: dict[str, tuple[Entry, ...]] = {
    "reverse": reverse.ENTRIES,
    "forward": forward.ENTRIES,
    "implicit": implicit.ENTRIES,
    "penalty": penalty.ENTRIES,
    "single loop": single_loop.ENTRIES,
    "zeroth order": zeroth_order.ENTRIES,
    "bootstrapped": bootstrapped.ENTRIES,
    "probed": probed.ENTRIES,
}
"""Entries by family, in the order of the docs."""
ENTRIES = tuple(entry for entries in FAMILIES.values() for entry in entries)
"""Every variant that the library answers for."""


def by_label(label: str) -> Entry:
    """The entry of that label.

    Raises:
        KeyError: there is none.
    """
    return {entry.label: entry for entry in ENTRIES}[label]
