"""The command `bilevel`: compare, show, list.

Exit status: 0 when the work was done (failed cells are rows, not failures of the command), 1 when no cell of a comparison finished, 2 for what the
user can put right (said in one line), 130 after Ctrl-C.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bilevel_profiling import progress
from bilevel_profiling.record import Record, read

DONE, NOTHING, WRONG, INTERRUPTED = 0, 1, 2, 130


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
    verbs: dict[str, Callable[[argparse.Namespace], int]] = {"compare": _compare, "show": _show, "list": _list}
    try:
        return verbs[options.verb](options)
    except KeyboardInterrupt:
        print("bilevel: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone, and nobody is left to tell
        return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bilevel", description="Compare estimators of the hypergradient: memory, time, compute and error, each run in a fresh process."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    _add_compare(verbs)
    show = verbs.add_parser("show", help="print the tables of earlier records", description="Print the tables of records that compare wrote.")
    show.add_argument("records", metavar="RECORDS", help="a records.jsonl, or the folder that holds one")
    show.add_argument("--html", action="store_true", help="also write the report (index.html, report.md, figures) anew, beside the records")
    show.add_argument("--json", action="store_true", help="print the records as JSON lines on standard output, and nothing else there")
    verbs.add_parser(
        "list", help="list what there is to compare", description="List the built-in cases, and the estimators and solvers of the library."
    )
    return parser


def _add_compare(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    compare = verbs.add_parser(
        "compare",
        help="measure the estimators of one or more cases and write a report",
        description="Measure every estimator of each case at each number of inner steps, and write a report with tables and figures.",
        epilog="Example: bilevel compare hypercleaning fewshot --out report",
    )
    add = compare.add_argument
    add("cases", nargs="+", metavar="CASE", help="a built-in case (see: bilevel list), or the path of a Python file that defines setup(device)")
    add("--estimators", type=_labels, metavar="A,B", help="only these, by their labels in the case, separated by commas; default: all")
    add("--inner-steps", type=_numbers, metavar="1,5,20", help="the numbers of inner steps K to compare at; default: the case's own")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run; auto takes CUDA when there is one (default)")
    add("--outer-steps", type=_count, metavar="N", help="outer steps of each estimator's loop at the largest K; 0 for none; default: the case's own")
    add("--seed", type=int, default=0, metavar="N", help="of data, initialization and random losses (default 0)")
    add("--repeats", type=_positive, default=5, metavar="N", help="how often each call is timed, at most (default 5; slow calls fewer times)")
    add("--time-limit", type=_seconds, default=300.0, metavar="S", help="seconds after which a run is stopped, and is a row TIMEOUT (default 300)")
    add("--threads", type=_positive, default=1, metavar="N", help="of torch in each run (default 1, the most repeatable)")
    add("--out", default="report", metavar="DIR", help="folder of the report, made if missing; its records.jsonl is replaced (default: report)")
    add("--json", action="store_true", help="print the records as JSON lines on standard output; everything else goes to standard error")


def _compare(options: argparse.Namespace) -> int:
    # Here and not above: torch takes seconds to load, and --help and show do without it.
    from bilevel_profiling.case_file import CaseError
    from bilevel_profiling.comparison import Comparison
    from bilevel_profiling.plan import Plan

    overrides = {"inner_steps": options.inner_steps, "outer_steps": options.outer_steps}
    known = {name: value for name, value in overrides.items() if value is not None}
    try:
        device = _device(options.device)
        plans = [
            Plan(case, known, options.estimators, device, options.seed, options.repeats, options.time_limit, options.threads)
            for case in options.cases
        ]
        comparison = Comparison(plans, options.out, progress=progress.chosen(), command=options.command)
    except (CaseError, TypeError) as error:
        return _wrong(str(error))
    except OSError as error:
        return _wrong(f"cannot write to {options.out}: {error.strerror or error}")
    status, page = DONE, comparison.out / "index.html"
    try:
        page = comparison.run()
        status = DONE if any(record.peak_tensor_bytes is not None for record in comparison.records) else NOTHING
    except KeyboardInterrupt:
        count = len(comparison.records)
        print(f"bilevel: interrupted; {count} finished row{'' if count == 1 else 's'} kept in {comparison.out / 'records.jsonl'}", file=sys.stderr)
        status = INTERRUPTED
    except OSError as error:
        return _wrong(f"cannot write to {options.out}: {error.strerror or error}")
    _print(comparison.records, as_json=options.json)
    print(page, file=sys.stderr if options.json else sys.stdout)
    return status


def _device(asked: str) -> str:
    import torch

    from bilevel_profiling.case_file import CaseError

    if asked == "cuda" and not torch.cuda.is_available():
        raise CaseError("--device cuda was given, but torch finds no CUDA device here; leave it out, or write --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def _show(options: argparse.Namespace) -> int:
    from bilevel_profiling import report

    path = Path(options.records)
    path = path / "records.jsonl" if path.is_dir() else path
    try:
        records = read(path)
    except (OSError, UnicodeDecodeError) as error:
        return _wrong(f"cannot read {path}: {getattr(error, 'strerror', None) or error}")
    except ValueError as error:
        return _wrong(str(error))
    if not records and not options.json:
        return _wrong(f"{path} holds no records")
    _print(records, as_json=options.json)
    if options.html:
        command = next((record.environment["command"] for record in records if record.environment.get("command")), "")
        try:
            print(report.write(records, path.parent, command), file=sys.stderr if options.json else sys.stdout)
        except OSError as error:
            return _wrong(f"cannot write to {path.parent}: {error.strerror or error}")
    return DONE


def _list(options: argparse.Namespace) -> int:
    import bilevel as bl
    from bilevel_profiling.case_file import builtin_titles

    kinds = {"estimators": bl.Estimator, "inner solvers": bl.InnerSolver, "inner optimizers": bl.Optimizer, "linear solvers": bl.LinearSolver}
    parts: dict[str, dict[str, str]] = {"cases": builtin_titles()}
    for title, kind in kinds.items():
        found = {name: value for name, value in vars(bl).items() if isinstance(value, type) and issubclass(value, kind) and value is not kind}
        parts[title] = {name: (value.__doc__ or "").strip().partition("\n")[0] for name, value in sorted(found.items())}
    width = max(len(name) for members in parts.values() for name in members)
    for title, members in parts.items():
        print(f"{title}:")
        for name, line in members.items():
            print(f"  {name:<{width}}  {line}")
    return DONE


def _print(records: list[Record], *, as_json: bool) -> None:
    from bilevel_profiling import report

    if as_json:
        for record in records:
            print(record.to_json())
    try:
        report.print_table(records, progress.terminal(stderr=as_json))
    except ImportError:
        print('bilevel: the tables need rich: pip install "bilevel[profiling]"', file=sys.stderr)


def _wrong(message: str) -> int:
    print(f"bilevel: {message}", file=sys.stderr)
    return WRONG


def _labels(text: str) -> list[str]:
    labels = [label.strip() for label in text.split(",") if label.strip()]
    if not labels:
        raise argparse.ArgumentTypeError("at least one label was needed")
    return labels


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 1,5,20") from None
    if numbers[0] < 0:
        raise argparse.ArgumentTypeError(f"{numbers[0]} is negative; a number of steps was needed")
    return numbers


def _count(text: str) -> int:
    return _at_least(text, 0)


def _positive(text: str) -> int:
    return _at_least(text, 1)


def _at_least(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number of seconds")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
