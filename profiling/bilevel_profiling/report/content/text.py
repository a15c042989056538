"""Text that came from outside (labels, reasons, metric names), made fit to print anywhere."""

import re
import unicodedata
from collections.abc import Collection, Sequence

from bilevel_profiling.records.record import Record
from bilevel_profiling.records.units import MISSING


def clean(text: str) -> str:
    """`text` on one line: control characters become spaces and halves of surrogate pairs U+FFFD, so that no view can be
    derailed.
    """
    kept = (
        " " if unicodedata.category(c) == "Cc" else "\ufffd" if unicodedata.category(c) == "Cs" else c for c in text
    )
    return " ".join("".join(kept).split())


def shorten(text: str, length: int) -> str:
    """`text`, or its beginning and an ellipsis, in at most `length` characters; what it says last in parentheses (2
    processes) stays, where there is room for it and for as much of the rest.
    """
    text = clean(text)
    if len(text) <= length:
        return text
    last = match[0] if (match := re.search(r"\([^()]*\)$", text)) and 2 * len(match[0]) <= length else ""
    return text[: length - 1 - len(last)].rstrip() + "…" + last


def slug(text: str) -> str:
    """A name for files and anchors: lower-case ASCII letters, digits and single hyphens; "case" if nothing is left."""
    ascii_only = unicodedata.normalize("NFKD", clean(text)).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_only.lower()).strip("-")[:60] or "case"


def plural(count: int, noun: str) -> str:
    """A count with its noun: "1 run", "2 runs"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def at_k(record: Record) -> str:
    """What stands behind a label, as in ", K = 20"; nothing where K is unknown."""
    return "" if record.inner_steps is None else f", K = {record.inner_steps:,}"


def without_empty(
    header: list[str], rows: list[list[str]], always: Collection[int] = ()
) -> tuple[list[str], list[list[str]]]:
    """A table without the columns that hold nothing in any row, those in the places `always` apart."""
    kept = [n for n in range(len(header)) if n in always or any(row[n] != MISSING for row in rows)]
    return [header[n] for n in kept], [[row[n] for n in kept] for row in rows]


def listing(items: Sequence[str]) -> str:
    """An enumeration: "a", "a and b", "a, b and c"."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1] if items else ""
