"""`bilevel fit`: the largest number of inner steps, batch, chunk, ... that fits a memory budget."""

import argparse

from bilevel_profiling.cli import options as types
from bilevel_profiling.cli.forecast import add_case, cases_of, defined, dominant, largest_text, looked
from bilevel_profiling.cli.output import DONE, NOTHING, WRONG, print_rows, say, wrong


def add(verbs: "types.Verbs") -> argparse.ArgumentParser:
    """Say what it takes."""
    parser = verbs.add_parser(
        "fit",
        help="find the largest number of inner steps, batch, ... that fits a memory budget",
        description="Find the largest value that fits, for every estimator of a case, "
        "by forecasts: nothing is allocated, and no GPU is needed. "
        "The value fits and the next does not, both forecast to the byte.",
        epilog="Example: bilevel fit hypercleaning --budget 8MiB --over inner_steps",
    )
    add_case(parser)
    add = parser.add_argument
    add(
        "--budget",
        type=types.size,
        required=True,
        metavar="24GiB",
        help="memory of the device, for data, variables and all that a step adds",
    )
    add(
        "--over",
        default="inner_steps",
        metavar="NAME",
        help="inner_steps (default), chunk (of a TaskMean), or a parameter of the case's setup()",
    )
    add(
        "--inner-steps",
        type=types.positive,
        metavar="K",
        help="where something else is varied; default: the case's largest",
    )
    add("--at-most", type=types.positive, default=256, metavar="N", help="the largest value to look at (default 256)")
    return parser


def run(options: argparse.Namespace) -> int:
    """Do it."""
    from bilevel_profiling.cases.case_file import CaseError
    from bilevel_profiling.forecasting import ForecastError, fit
    from bilevel_profiling.records import sizes

    try:
        definition = defined(options)
    except CaseError as error:
        return wrong(str(error))
    rows: list[list[str]] = []
    refused: dict[str, list[str]] = {}
    cases = list(cases_of(definition, options, (options.inner_steps or max(definition.inner_steps),)))
    for case in cases:
        try:
            found = fit(
                case, options.budget, options.over, at_most=options.at_most, told=looked(case.title, options.over)
            )
        except (ValueError, ForecastError) as error:
            refused.setdefault(str(error), []).append(case.title)
            continue
        rows.append(
            [case.title, largest_text(found), found.text, "" if found.record is None else dominant(found.record)]
        )
    for message, labels in refused.items():
        say(message if len(labels) == len(cases) else f"{', '.join(labels)}: {message}")
    if not rows:
        return WRONG
    print_rows(
        f"{definition.name} in {sizes.text(options.budget)}",
        ["estimator", f"largest {options.over}", "", "what holds most at the peak"],
        rows,
    )
    return DONE if any(row[1] != "none" for row in rows) else NOTHING
