"""`bilevel forecast`: what the estimators of a case would cost, and which of them fit a memory budget, without running
them.
"""

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from bilevel_profiling.cli import options as types
from bilevel_profiling.cli.output import DONE, NOTHING, print_records, print_rows, say, unwritable, wrong
from bilevel_profiling.comparison import progress
from bilevel_profiling.records.ranks import processes
from bilevel_profiling.records.record import Record

if TYPE_CHECKING:
    from bilevel.testing import Need
    from bilevel_profiling.cases.case import Case
    from bilevel_profiling.cases.case_file import Definition
    from bilevel_profiling.forecasting import Fit


def add(verbs: "types.Verbs") -> argparse.ArgumentParser:
    """Say what it takes."""
    parser = verbs.add_parser(
        "forecast",
        help="say what the estimators of a case would cost, without running them",
        description="Forecast memory, FLOPs and oracle calls of every estimator of a case "
        "on tensors without data: nothing is allocated, and no "
        "GPU is needed. With --budget also which of them fit, the largest number of inner steps at which each does, "
        "and which to take.",
        epilog="Example: bilevel forecast language --set width=2048 --set layers=20 "
        "--set heads=16 --set context=512 --budget 80GiB --on a100",
    )
    add_case(parser)
    add = parser.add_argument
    add(
        "--inner-steps",
        type=types.numbers,
        metavar="1,5,20",
        help="the numbers of inner steps K to forecast; default: the case's own",
    )
    add(
        "--budget",
        type=types.size,
        metavar="24GiB",
        help="memory of the device, for data, variables and all that a step adds",
    )
    add(
        "--at-most",
        type=types.positive,
        default=256,
        metavar="N",
        help="the largest K that the search for the budget looks at (default 256)",
    )
    add("--on", metavar="DEVICE", help="a GPU for lower bounds on the time, such as a100 or h100 (see: bilevel list)")
    add(
        "--ranks",
        type=types.positive,
        nargs="+",
        action="extend",
        metavar="N",
        help="for one of so many processes, its work split as the case says: memory, and bytes sent; none is started",
    )
    add("--alive", action="store_true", help="also print what would be alive at each peak")
    add("--out", metavar="DIR", help="also write the records and a report there")
    add(
        "--json",
        action="store_true",
        help="print the records as JSON lines on standard output; everything else goes to standard error",
    )
    return parser


def run(options: argparse.Namespace) -> int:
    """Do it."""
    from bilevel_profiling.cases.case_file import CaseError
    from bilevel_profiling.meters.devices import DEVICES

    try:
        definition = defined(options)
    except CaseError as error:
        return wrong(str(error))
    if options.on is not None and options.on not in DEVICES:
        return wrong(f"--on {options.on}: there is no such device; write one of {', '.join(DEVICES)}")
    if options.ranks and (wrongly := _unsplit(definition, options)):
        return wrong(wrongly)
    cases = list(cases_of(definition, options, options.inner_steps or definition.inner_steps))
    records = _forecasts(cases, options)
    if options.out is not None:
        try:
            say(f"wrote {_written(records, options)}")
        except OSError as error:
            return unwritable(options.out, error)
    print_records(records, as_json=options.json)
    if options.alive:
        from bilevel_profiling import report

        for record in records:
            if record.alive:
                report.print_alive(record, progress.terminal(stderr=options.json))
    done = any(record.peak_tensor_bytes is not None for record in records)
    if done and options.budget is not None:
        _print_budget(definition, cases, records, options)
    return DONE if done else NOTHING


def add_case(parser: argparse.ArgumentParser) -> None:
    """The options that say which case, and with what sizes."""
    add = parser.add_argument
    add(
        "case",
        metavar="CASE",
        help="a built-in case (see: bilevel list), or the path of a Python file that defines setup(device)",
    )
    add(
        "--set",
        type=types.setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of the case's setup(), such as width=2048",
    )
    add(
        "--lacks",
        type=lacking,
        default=(),
        metavar="A,B",
        help="with --budget: what the problem does not have: second-derivatives, solution (the inner steps do not "
        "reach it), definite (a positive definite inner Hessian)",
    )
    add(
        "--estimators",
        type=types.labels,
        metavar="A,B",
        help="only these, by their labels in the case, separated by commas; 'all': its own and every estimator of the "
        "library; default: its own",
    )
    add(
        "--engine",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="each estimator with each of these engines: eager, compiled, captured (both from above), or one of the "
        "case's own ENGINES; default: those, or eager",
    )
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="to forecast for; none has to be there (auto: cuda if there is one)",
    )
    add("--seed", type=int, default=0, metavar="N", help="given to the case's setup() (default 0)")


def lacking(text: str) -> "tuple[Need, ...]":
    """What a problem lacks, by the names of `bilevel.testing.Need` in lower case."""
    from bilevel.testing import Need

    known = {need.name.lower().replace("_", "-"): need for need in Need}
    asked = types.labels(text)
    if unknown := [name for name in asked if name not in known]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is none of {', '.join(known)}")
    return tuple(known[name] for name in asked)


def defined(options: argparse.Namespace) -> "Definition":
    """The case as the options want it.

    Raises:
        CaseError: there is no such case, label, engine, or parameter.
    """
    import inspect

    from bilevel_profiling.cases import library
    from bilevel_profiling.cases.case_file import CaseError, load
    from bilevel_profiling.cases.engines import named

    found = load(options.case)
    settings = dict(options.set)
    parameters = inspect.signature(found.setup).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for name in settings:
        if not open_ended and (name not in parameters or name in ("device", "seed")):
            known = [each for each in parameters if each not in ("device", "seed")]
            has = f"its setup() takes {', '.join(known)}" if known else "its setup() takes none"
            raise CaseError(f"case {found.name} has no parameter {name!r}: {has}")
    if found.baselines:
        say(f"baselines are left out, because they need real numbers: {', '.join(found.baselines)}")
    asked = options.estimators
    if asked == [library.ALL]:
        found, asked = dataclasses.replace(found, estimators=library.every(found.estimators)), None
    unknown = [label for label in asked or () if label not in found.estimators]
    if unknown:
        raise CaseError(
            f"there is no estimator {' or '.join(map(repr, unknown))}: {found.name} has {', '.join(found.estimators)}"
        )
    labels = asked or list(found.estimators)
    try:
        engines = found.engines if options.engine is None else named(options.engine, found.engines)
    except ValueError as error:
        raise CaseError(str(error)) from None
    setup = functools.partial(found.setup, **settings) if settings else found.setup
    estimators = {label: found.estimators[label] for label in labels}
    return dataclasses.replace(found, setup=setup, estimators=estimators, engines=engines)


def cases_of(definition: "Definition", options: argparse.Namespace, inner_steps: tuple[int, ...]) -> "Iterator[Case]":
    """One case for each K, estimator and engine."""
    from bilevel_profiling.cases.case import Case, in_steps

    engines: Mapping[str, Any] = definition.engines or {"": None}
    for steps in inner_steps:
        for (label, estimator), (name, engine) in itertools.product(definition.estimators.items(), engines.items()):
            yield Case(
                definition.setup,
                solver=in_steps(definition.optimizer, steps),
                estimator=estimator,
                device=_device(options.device),
                seed=options.seed,
                name=definition.name,
                label=label,
                outer_optimizer=definition.outer_optimizer,
                engine=engine,
                engine_name=name,
                parallel=definition.parallel,
            )


def _unsplit(definition: "Definition", options: argparse.Namespace) -> str:
    """Why there is no forecast for ranks; "" where there is one."""
    if options.budget is not None:
        return "--ranks with --budget: the search for a budget is for one process; give --ranks alone"
    if definition.parallel is None:
        return (
            f"case {definition.name} does not say how its work is split over processes: write PARALLEL = DATA or "
            f"PARALLEL = TASKS (of bilevel_profiling) into its file"
        )
    return ""


def _device(asked: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def _forecasts(cases: "list[Case]", options: argparse.Namespace) -> list[Record]:
    from bilevel_profiling.forecasting import forecast

    watcher = progress.chosen()
    asked = [(case, count) for case in cases for count in options.ranks or [None]]
    tasks = [
        progress.Task(
            case.name,
            ", ".join(filter(None, [case.title, f"K = {case.solver.max_steps}", processes(count)])),
            5 + case.solver.max_steps,
        )
        for case, count in asked
    ]
    records = []
    watcher.start(tasks)
    try:
        for (case, count), task in zip(asked, tasks, strict=True):
            watcher.begin(task)
            work = functools.partial(forecast, case, on=options.on, ranks=count, command=options.command)
            records.append(dataclasses.replace(_tried(case, work), processes=count))
            watcher.finish(task, progress.row_text(records[-1]))
    finally:
        watcher.stop()
    return records


def _tried(case: "Case", work: Any) -> Record:
    """The forecast, or a row that says why there is none: an estimator may refuse a problem, or a loss read a value."""
    from bilevel_profiling.measurement.passes import described
    from bilevel_profiling.records.failure import of_error

    try:
        return work()
    except Exception as error:
        failure = of_error(error)
        return dataclasses.replace(described(case), source="forecast", status=failure.status, reason=failure.reason)


def _written(records: list[Record], options: argparse.Namespace) -> Any:
    from bilevel_profiling import report
    from bilevel_profiling.comparison.folder import Folder
    from bilevel_profiling.records import records_file

    folder = Folder(options.out)
    try:
        said = folder.set_aside()
        if said:
            say(said)
        records_file.write(records, folder.records)
        return report.write(records, folder.path, options.command)
    finally:
        folder.release()


def _print_budget(
    definition: "Definition", cases: "list[Case]", records: list[Record], options: argparse.Namespace
) -> None:
    from bilevel_profiling.forecasting import NotMonotone, fit, recommend
    from bilevel_profiling.forecasting.search import needed
    from bilevel_profiling.records import sizes

    rows = []
    for case, record in zip(cases, records, strict=True):
        if record.peak_tensor_bytes is None:
            continue
        needs, fits = needed(record), "yes" if needed(record) <= options.budget else "no"
        rows.append(
            [
                case.title,
                f"{record.inner_steps:,}",
                sizes.text(needs),
                f"{needs / options.budget:.0%}",
                fits,
                dominant(record),
            ]
        )
    title = f"{definition.name} in {sizes.text(options.budget)}"
    print_rows(
        title,
        ["estimator", "K", "needs", "of budget", "fits", "what holds most at the peak"],
        rows,
        stderr=options.json,
    )
    largest = []
    known = {case.title for case, record in zip(cases, records, strict=True) if record.peak_tensor_bytes is not None}
    for case in {case.title: case for case in cases}.values():
        if case.title in known:
            try:
                found = fit(case, options.budget, at_most=options.at_most, told=looked(case.title, "inner_steps"))
            except NotMonotone as error:
                largest.append([case.title, "-", str(error)])
                continue
            largest.append([case.title, largest_text(found), found.text])
    print_rows(
        f"largest K in {sizes.text(options.budget)}", ["estimator", "largest K", ""], largest, stderr=options.json
    )
    chosen = recommend(
        cases[-1], options.budget, estimators=definition.estimators, lacks=options.lacks, on=options.on or "a100"
    )
    advice = [[str(place), each.label, each.sentence] for place, each in enumerate(chosen, start=1)]
    steps = cases[-1].solver.max_steps
    engine = f", engine {cases[-1].engine_name}" if cases[-1].engine_name else ""
    print_rows(f"in this order, for K = {steps:,}{engine}", ["", "estimator", "why"], advice, stderr=options.json)


def looked(label: str, over: str) -> "Callable[[int, Record], None]":
    """Says each forecast of a search, on standard error."""
    from bilevel_profiling.forecasting.search import needed
    from bilevel_profiling.records import sizes

    return lambda value, record: say(f"{label}, {over} = {value:,}: {sizes.text(needed(record))}")


def largest_text(found: "Fit") -> str:
    """The largest value in a table."""
    return "none" if not found.value else f"{found.value:,}" + (" or more" if found.capped else "")


def dominant(record: Record) -> str:
    """What holds most at the peak, in a few words."""
    base, peak = record.base_tensor_bytes or 0, record.peak_tensor_bytes or 0
    if not record.alive or base > max(entry.bytes for entry in record.alive):
        return f"{base / max(base + peak, 1):.0%} data and variables"
    first = record.alive[0]
    where = " in ".join(part for part in (first.line, first.module) if part)
    made = "gradient of " if first.backward else ""
    return f"{first.bytes / max(base + peak, 1):.0%} {first.operator.removeprefix('aten.')}, {made}{where}"
