"""The command `bilevel`. Each verb is a module with `add`, which says what it takes, and `run`, which does it.

Exit status: 0 when the work was done (failed cells are rows, not failures of the command), 1 when no cell of a
    comparison finished or when `diff`
found something worse, 2 for what the user can put right (said in a sentence), 130 after Ctrl-C.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

from bilevel_profiling.cli import compare, diff, fit, forecast, listing, show
from bilevel_profiling.cli.output import DONE, INTERRUPTED

VERBS = (compare, forecast, fit, show, diff, listing)
"""In the order of `--help`. None of them loads torch before it runs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: its arguments; those of the process by default.

    Returns:
        The exit status.

    Example:
        >>> main(["show", "nowhere"])
        2
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(arguments)
    options.command = shlex.join(["bilevel", *arguments])
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        print("bilevel: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone, and nobody is left to tell
        return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bilevel", description="What hypergradients cost, measured or forecast: memory, time, compute and error."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    for verb in VERBS:
        verb.add(verbs).set_defaults(run=verb.run)
    return parser
