"""Records of earlier schemas as records of this one. Schema 2 gave the points of the timeline two more parts; schema
3 gave notes a kind, and records their target. The only place that tells facts from texts: earlier files had no more.
"""

import re
from typing import Any

from bilevel_profiling.records.note import NoteKind

SCHEMA = 3
"""Changes when the meaning of a field does. A new field does not change it: readers leave out what they do not know."""


def upgraded(data: dict[str, Any]) -> dict[str, Any]:
    """What JSON gave for a record of schema 1 to `SCHEMA`, as of `SCHEMA`.

    Raises:
        ValueError: the schema is none of these.
    """
    schema = data.get("schema")
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        raise ValueError(
            f"record of schema {schema!r}; this version of bilevel_profiling reads schemas 1 to {SCHEMA}. "
            f"Read it with the version of bilevel that wrote it, or measure again with this one"
        )
    if schema == SCHEMA:
        return data
    data = {**data, "schema": SCHEMA}
    if isinstance(points := data.get("timeline"), list):
        data["timeline"] = [[*p, "", ""] if isinstance(p, list) and len(p) == 3 else p for p in points]
    if isinstance(notes := data.get("notes"), list):
        kinds = {"wall_seconds spreads": NoteKind.SPREAD, "The outer loop ended": NoteKind.OUTER_LOOP}
        data["notes"] = [
            {"text": note, "kind": next((kinds[start] for start in kinds if str(note).startswith(start)), "general")}
            for note in notes
        ]
    settings = str(data.get("settings", ""))
    if re.match(r"(TaskMean\(estimator=)?Unrolled\((?!.*\blast=\d)", settings):
        data["target"] = "program"
    return data
