"""`bilevel show`: the tables of earlier records."""

import argparse
import sys
from pathlib import Path

from bilevel_profiling.cli import options as types
from bilevel_profiling.cli.output import DONE, WRONG, print_records, say, unwritable, wrong
from bilevel_profiling.records.records_file import Contents, scan

_SHOWN = 5
"""Damaged lines that are said one by one: in a file that never held records, all are."""


def add(verbs: "types.Verbs") -> argparse.ArgumentParser:
    """Say what it takes."""
    parser = verbs.add_parser(
        "show",
        help="print the tables of earlier records",
        description="Print the tables of records that compare wrote. "
        "Lines that are damaged are said, and the others printed; exit status 2.",
    )
    parser.add_argument("records", metavar="RECORDS", help="a records.jsonl, or the folder that holds one")
    parser.add_argument(
        "--html",
        action="store_true",
        help="also write the report (index.html, report.md, figures) anew, beside the records",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the records as JSON lines on standard output, and nothing else there"
    )
    return parser


def run(options: argparse.Namespace) -> int:
    """Do it."""
    from bilevel_profiling import report

    path = file_of(options.records)
    try:
        found = scan(path)
    except OSError as error:
        return wrong(f"cannot read {path}: {error.strerror or error}")
    say_damage(path, found)
    records = found.records
    if not records:
        return (
            DONE
            if options.json and not found.damage
            else wrong(f"{path} holds no records" + (" that can be read" if found.damage else ""))
        )
    print_records(records, as_json=options.json)
    if options.html:
        command = next((record.environment["command"] for record in records if record.environment.get("command")), "")
        try:
            print(report.write(records, path.parent, command), file=sys.stderr if options.json else sys.stdout)
        except OSError as error:
            return unwritable(path.parent, error)
    return WRONG if found.damage else DONE


def file_of(given: str) -> Path:
    """The file of records that a path means: itself, or the one in the folder."""
    path = Path(given)
    return path / "records.jsonl" if path.is_dir() else path


def say_damage(path: Path, found: Contents) -> None:
    """Say which lines of a file are no records, and why."""
    for damage in found.damage[:_SHOWN]:
        cut = "cut off while it was written, " if damage.torn else ""
        say(f"{path}, line {damage.line}: {cut}{damage.reason}")
    if len(found.damage) > _SHOWN:
        say(f"{path}: and {len(found.damage) - _SHOWN:,} more such lines")
