"""Estimators that call the losses and take no derivative of the inner loop."""

from bilevel.testing.catalogue.entry import Entry

ENTRIES: tuple[Entry, ...] = ()
