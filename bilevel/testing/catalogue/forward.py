"""Forward mode through the steps that were taken."""

from bilevel.testing.catalogue.entry import Entry

ENTRIES: tuple[Entry, ...] = ()
