"""Single loops: every call moves y, the adjoint and x one round on."""

from bilevel.testing.catalogue.entry import Entry

ENTRIES: tuple[Entry, ...] = ()
