"""Notes on a record: a sentence for the reader, and what it is about, for the program."""

import dataclasses
import enum


class NoteKind(enum.StrEnum):
    """What a note is about. Reports decide by this, never by the text."""

    GENERAL = "general"
    SPREAD = "spread"
    """The clock's: times spread widely. Reports mark such times in their own way."""
    OUTER_LOOP = "outer loop"
    """The outer loop of the row failed."""
    WITHOUT_INNER = "without inner"
    """No inner variable came back, so that the row has no outer loop."""
    NOT_RUN = "not run"
    """The row was never begun, because what it was to run on was lost: --resume measures it."""
    BESIDE = "beside"
    """Other runs were at work on the same machine."""


@dataclasses.dataclass(frozen=True)
class Note:
    """What a reader must know to use the figures of a record.

    Example:
        >>> note = Note("The times spread by 40% of the median.", NoteKind.SPREAD)
        >>> print(note)
        The times spread by 40% of the median.
        >>> "40%" in note
        True
    """

    text: str
    kind: NoteKind = NoteKind.GENERAL

    def __str__(self) -> str:
        return self.text

    def __contains__(self, part: str) -> bool:
        return part in self.text
