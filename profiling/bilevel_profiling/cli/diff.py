"""`bilevel diff`: what got better or worse between two files of records."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bilevel_profiling.cli import options as types
from bilevel_profiling.cli.output import DONE, WORSE, print_rows, wrong
from bilevel_profiling.cli.show import file_of, say_damage
from bilevel_profiling.comparison import progress
from bilevel_profiling.records.record import Record
from bilevel_profiling.records.records_file import scan

if TYPE_CHECKING:
    from bilevel_profiling.comparison.diff import Difference

_COLORS = {"worse": "red", "missing": "red", "better": "green", "changed": "yellow"}


def add(verbs: "types.Verbs") -> argparse.ArgumentParser:
    """Say what it takes."""
    parser = verbs.add_parser(
        "diff",
        help="say what got better or worse between two files of records",
        description="Match the rows of two files and say what got better or worse: status, memory, "
        "oracle calls, FLOPs, errors; and times, where the "
        "10%% to 90%% quantiles of the repeats do not overlap. Exit status 0: nothing is worse; 1: "
        "something is, or a row is missing; "
        "2: a file cannot be used.",
        epilog="Example: bilevel diff baseline.jsonl report",
    )
    add = parser.add_argument
    add("old", metavar="OLD", help="a records.jsonl, or the folder that holds one")
    add("new", metavar="NEW", help="the same, to be judged against OLD")
    add(
        "--memory-tolerance",
        type=types.share,
        default=0.001,
        metavar="P%",
        help="change of peak memory that does not count (default 0.1%%)",
    )
    add(
        "--time-tolerance",
        type=types.share,
        default=0.1,
        metavar="P%",
        help="change of time that does not count (default 10%%)",
    )
    add("--allow-missing", action="store_true", help="rows of OLD that are not in NEW are no reason for exit status 1")
    add("--json", action="store_true", help="print one JSON object on standard output, and nothing else there")
    return parser


def run(options: argparse.Namespace) -> int:
    """Do it."""
    from bilevel_profiling.comparison.diff import Tolerances, Verdict, as_dict, compare_records

    old, new = _usable(options.old), _usable(options.new)
    if isinstance(old, str) or isinstance(new, str):
        return wrong(next(found for found in (old, new) if isinstance(found, str)))
    found = compare_records(old, new, Tolerances(memory=options.memory_tolerance, time=options.time_tolerance))
    bad = found.rows(Verdict.WORSE) + (0 if options.allow_missing else found.rows(Verdict.MISSING))
    if options.json:
        print(json.dumps({"worse": bool(bad), **as_dict(found)}, indent=1))
    else:
        header, *rows = _table(found.differences)
        if rows:
            print_rows("", header, rows, right=("K", "old", "new", "new / old"), styles=_COLORS)
        print(found.sentence())
        for note in found.notes:
            print(f"Note: {note}.")
    return WORSE if bad else DONE


def _usable(given: str) -> list[Record] | str:
    """The records of a file, or why it cannot be used."""
    path: Path = file_of(given)
    try:
        found = scan(path)
    except OSError as error:
        return f"cannot read {path}: {error.strerror or error}"
    say_damage(path, found)
    if found.damage:
        return f"{path} is damaged, and a comparison with half of it would say nothing"
    return found.records or f"{path} holds no records"


def _table(differences: "Sequence[Difference]") -> list[list[str]]:
    """Its cells as text, a header first; facts that all rows share are left out."""
    from bilevel_profiling.records import units

    formats = {"wall_seconds": units.duration, "matmul_flops": units.count}

    def text(value: float | str | None, figure: str) -> str:
        if value is None or isinstance(value, str):
            return value or "-"
        return (
            units.size
            if figure.endswith("_bytes")
            else units.count
            if isinstance(value, int)
            else formats.get(figure, units.significant)
        )(value)

    extra = [
        name
        for name in ("engine", "device", "seed", "dtype", "source")
        if len({getattr(each.key, name) for each in differences}) > 1
    ]
    rows = [["", "case", "estimator", "K", *extra, "figure", "old", "new", "new / old"]]
    for each in differences:
        key = each.key
        which = [
            key.case,
            key.estimator,
            "-" if key.inner_steps is None else str(key.inner_steps),
            *(str(getattr(key, name)) for name in extra),
        ]
        change = "" if each.ratio is None else f"{each.ratio:.3f}x"
        cells = [
            each.verdict.value,
            *which,
            each.figure,
            text(each.old, each.figure),
            text(each.new, each.figure),
            change,
        ]
        rows.append([progress.one_line(cell) for cell in cells])
    return rows
