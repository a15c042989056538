"""`bilevel compare`: measure the estimators of one or more cases, and write a report."""

import argparse
import sys
from typing import TYPE_CHECKING

from bilevel_profiling.cli import options as types
from bilevel_profiling.cli.output import DONE, INTERRUPTED, NOTHING, print_records, say, unwritable, wrong
from bilevel_profiling.comparison import progress

if TYPE_CHECKING:
    from concurrent.futures import Executor

_SETTINGS = (
    *("seed", "repeats", "time_limit", "threads", "memory_limit"),
    *("resume", "retry_failed", "trace", "snapshot", "processes"),
)
"""Options that are fields of `Settings` under the same name."""


def add(verbs: "types.Verbs") -> argparse.ArgumentParser:
    """Say what it takes."""
    parser = verbs.add_parser(
        "compare",
        help="measure the estimators of one or more cases and write a report",
        description="Measure every estimator of each case at each number of inner steps, "
        "and write a report with tables and figures.",
        epilog="Example: bilevel compare hypercleaning fewshot --out report. "
        "Interrupted, or killed? The same with --resume.",
    )
    add = parser.add_argument
    add(
        "cases",
        nargs="+",
        metavar="CASE",
        help="a built-in case (see: bilevel list), or the path of a Python file that defines setup(device)",
    )
    add(
        "--estimators",
        type=types.labels,
        metavar="A,B",
        help="only these, by their labels in the case, separated by commas; 'all': its own and every estimator of the "
        "library; default: its own",
    )
    add(
        "--baselines",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="also the methods of other libraries, a row each: betty, higher, torchopt, where they are installed",
    )
    add(
        "--engine",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="each estimator with each of these engines: eager, compiled, captured, or one of the case's own ENGINES; "
        "default: the case's own, or eager",
    )
    add(
        "--inner-steps",
        type=types.numbers,
        metavar="1,5,20",
        help="the numbers of inner steps K to compare at; default: the case's own",
    )
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to run; auto takes CUDA when there is one (default)",
    )
    add(
        "--outer-steps",
        type=types.count,
        metavar="N",
        help="outer steps of each loop, at the largest K; 0 for none; default: the case's own",
    )
    add(
        "--processes",
        type=types.positive,
        nargs="+",
        action="extend",
        default=[],
        metavar="N",
        help="each estimator with each of these numbers of processes, its work split over them as the case says (gloo; "
        "on CUDA NCCL, a GPU for each); default: one process without a group",
    )
    add("--seed", type=int, default=0, metavar="N", help="of data, initialization and random losses (default 0)")
    add(
        "--seeds",
        type=types.numbers,
        metavar="0,1,2",
        help="all of it with each of these seeds, as cases of their own",
    )
    add(
        "--repeats",
        type=types.positive,
        default=5,
        metavar="N",
        help="how often each call is timed, at most (default 5; slow calls fewer times)",
    )
    add(
        "--time-limit",
        type=types.seconds,
        default=300.0,
        metavar="S",
        help="seconds after which a run is stopped: a row TIMEOUT (default 300)",
    )
    add(
        "--memory-limit",
        type=types.size,
        metavar="4GiB",
        help="what a run may take beyond torch itself; more is a row OUT_OF_MEMORY (CPU, Linux)",
    )
    add(
        "--threads",
        type=types.positive,
        default=1,
        metavar="N",
        help="of torch in each run (default 1, the most repeatable)",
    )
    add(
        "--out",
        default="report",
        metavar="DIR",
        help="folder of the report, made if missing; earlier rows in it are kept aside (default: report)",
    )
    add(
        "--resume",
        action="store_true",
        help="keep the finished rows in that folder, failures too, and measure only what is missing",
    )
    add(
        "--retry-failed",
        action="store_true",
        help="--resume, and measure anew what ended with ERROR, CRASHED, TIMEOUT or OUT_OF_MEMORY",
    )
    add(
        "--executor",
        metavar="MODULE:FUNCTION",
        help="measure on the workers of the executor that this function returns (also FILE.py:FUNCTION), such as "
        "Dask's client.get_executor(); default: here, one run after another",
    )
    add(
        "--trace",
        action="store_true",
        help="also write a trace of each run for https://ui.perfetto.dev, into DIR/traces",
    )
    add(
        "--snapshot",
        action="store_true",
        help="on CUDA: also write a snapshot of each run for https://pytorch.org/memory_viz, into DIR/snapshots",
    )
    add(
        "--json",
        action="store_true",
        help="print the records as JSON lines on standard output; everything else goes to standard error",
    )
    return parser


def run(options: argparse.Namespace) -> int:
    """Do it."""
    from bilevel_profiling.cli import executors

    try:
        executor = None if options.executor is None else executors.made(options.executor)
    except (ValueError, TypeError) as error:
        return wrong(str(error))
    status = INTERRUPTED
    try:
        status = _compared(options, executor)
    finally:
        if executor is not None:  # what has not begun is cancelled already; what has may take its time limit
            executor.shutdown(wait=status != INTERRUPTED)
    return status


def _compared(options: argparse.Namespace, executor: "Executor | None") -> int:
    # Here and not above: torch takes seconds to load, and --help and show do without it.
    from bilevel_profiling.baselines import packages
    from bilevel_profiling.cases import library
    from bilevel_profiling.comparison.plan import Plan, Settings
    from bilevel_profiling.comparison.work import Comparison

    overrides = {"inner_steps": options.inner_steps, "outer_steps": options.outer_steps, "engines": options.engine}
    known = {name: value for name, value in overrides.items() if value is not None}
    try:
        if options.baselines:
            known["baselines"] = packages.named(options.baselines)
        settings = Settings(
            device=chosen_device(options.device, elsewhere=options.executor is not None),
            command=options.command,
            **{name: getattr(options, name) for name in _SETTINGS} | {"processes": tuple(options.processes)},
        )
        labels = options.estimators
        if labels == [library.ALL]:
            known["estimators"], labels = library.ALL, None
        plans = [Plan(case, known, labels, seed) for case in options.cases for seed in options.seeds or [None]]
        comparison = Comparison(plans, options.out, settings, progress.chosen(), executor)
    except (ValueError, TypeError, ImportError) as error:
        return wrong(str(error))
    except OSError as error:
        return unwritable(options.out, error)
    status, page = DONE, comparison.out / "index.html"
    try:
        page = comparison.run()
        status = DONE if any(record.peak_tensor_bytes is not None for record in comparison.records) else NOTHING
    except KeyboardInterrupt:
        count = len(comparison.records)
        say(
            f"interrupted; {count} finished row{'' if count == 1 else 's'} kept in {comparison.out / 'records.jsonl'}; "
            f"--resume goes on"
        )
        status = INTERRUPTED
    except OSError as error:
        return unwritable(options.out, error)
    print_records(comparison.records, as_json=options.json)
    print(page, file=sys.stderr if options.json else sys.stdout)
    return status


def chosen_device(asked: str, *, elsewhere: bool = False) -> str:
    """auto, cpu or cuda, as torch can have it here; what is asked for elsewhere is for that place to have.

    Raises:
        CaseError: cuda was asked for and is not there.
    """
    import torch

    from bilevel_profiling.cases.case_file import CaseError

    if elsewhere and asked != "auto":
        return asked
    if asked == "cuda" and not torch.cuda.is_available():
        raise CaseError(
            "--device cuda was given, but torch finds no CUDA device here; leave it out, or write --device cpu"
        )
    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked
