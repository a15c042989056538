"""What stands below a table: why a run is not OK, what its figures need to be read, and which times say little."""

import string
from collections.abc import Sequence

from bilevel_profiling.records import units
from bilevel_profiling.records.failure import failed, noted
from bilevel_profiling.records.note import NoteKind
from bilevel_profiling.records.record import Record
from bilevel_profiling.report.content.groups import Group
from bilevel_profiling.report.content.text import clean

SPREAD = 0.25
"""Times whose 10% and 90% quantiles lie further apart than this share of the median are marked."""
WIDE = "~"
QUANTILES = "10% to 90% quantile"
"""What wall_seconds_low and wall_seconds_high are."""


def marker(record: Record, group: Group) -> str:
    """OK, or the status with the number under which its reason is given; letters lead to notes."""
    word = next((word for word, row in reasons(group) if row is record), "OK")
    letters = [letter for letter, sentence in notes(group) if letter and sentence in _said(record)]
    return f"{word} ({','.join(letters)})" if letters else word


def reasons(group: Group) -> list[tuple[str, Record]]:
    """(marker, record) of every row that is not OK, in the order of the rows."""
    return [(f"{'failed' if failed(r) else 'note'} [{n}]", r) for n, r in enumerate(filter(noted, group.rows), start=1)]


def reason(record: Record) -> str:
    """Status and sentence of a row that is not OK."""
    return f"{clean(record.status)}. {clean(record.reason) or 'No reason was recorded.'}"


def notes(group: Group) -> list[tuple[str, str]]:
    """(letter, sentence) of every note of the records, each once; without a letter where it is on every row that did
    not fail.
    """
    done = [record for record in group.rows if not failed(record)]
    found = dict.fromkeys(text for record in group.rows for text in _said(record))
    shared = [text for text in found if done and all(text in _said(record) for record in done)]
    rest = [text for text in found if text not in shared]
    return [*(("", text) for text in shared), *((_letter(place), text) for place, text in enumerate(rest))]


def _said(record: Record) -> list[str]:
    """Its notes, those left out that are told in another way."""
    return [text for note in record.notes if note.kind is not NoteKind.SPREAD and (text := clean(note.text))]


def wide(record: Record) -> bool:
    """Whether the clock spread so far that small differences mean nothing."""
    low, high, middle = record.wall_seconds_low, record.wall_seconds_high, record.wall_seconds
    return (
        units.finite(low)
        and units.finite(high)
        and units.finite(middle)
        and middle > 0
        and (high - low) / middle > SPREAD
    )


def spread(group: Group) -> str:
    """A sentence on the marked times; empty where there are none."""
    found = [record for record in group.rows if wide(record)]
    if not found:
        return ""
    worst = max(((r.wall_seconds_high or 0) - (r.wall_seconds_low or 0)) / (r.wall_seconds or 1) for r in found)
    many = "marks a time" if len(found) == 1 else "marks times"
    return f"{many} whose {QUANTILES} is up to {worst:.0%} of the median wide: smaller differences mean nothing."


def lines(group: Group) -> Sequence[tuple[str, str]]:
    """(mark, sentence) of everything below a table that is not a reason."""
    marked = [(WIDE, text)] if (text := spread(group)) else []
    return [*notes(group), *marked]


def _letter(place: int) -> str:
    """The letters from a to z, then aa, ab, ..."""
    first, last = divmod(place, 26)
    return (_letter(first - 1) if first else "") + string.ascii_lowercase[last]
