"""Continuing a comparison: which rows are kept, and what must be the same for old and new rows to stand in one
report.

A row is its case, label, engine and K. It is finished when it is in the file, also as a failure: that a run was stopped
after its time limit is a result. To retry, the rows that ended with ERROR, CRASHED, TIMEOUT or OUT_OF_MEMORY, and the
outer loops that did, are measured anew; what a hypergradient says of itself (DIVERGED, NONFINITE, ...) is not, because
it would say it again. A row that the new plan does not ask for stays.

The settings of an estimator and its engine, its device and its seed are in its row. What is not in it is kept beside
the file: the case's code with the local modules that it imports, what each baseline is made of (see `code`), the inner
optimizer, the number of repeats and threads, and so on. Whatever differs is refused, by name: a report of rows that
were measured differently compares nothing. Time and memory limits may differ, and so may the labels, the engines, the
K and the cases.
"""

import json
import re
from collections.abc import Mapping, Sequence

from bilevel_profiling.comparison.code import UNTOLD, fingerprint, marks_of_baselines
from bilevel_profiling.comparison.folder import DAMAGED, Folder
from bilevel_profiling.comparison.plan import Settings, Settled
from bilevel_profiling.measurement.environment import environment
from bilevel_profiling.records.failure import unfinished
from bilevel_profiling.records.record import Record
from bilevel_profiling.records.records_file import Row, replace_file, scan

Facts = Mapping[str, str]
"""What the rows of one case have in common and do not all say, by name."""
_STEPS, _CODE = "number of outer steps", "code"


class ResumeError(ValueError):
    """A comparison that cannot be continued, with a message that says what differs and what to write."""


def facts(settled: Settled, settings: Settings, far: bool = False) -> Facts:
    """What the rows of a case are measured with. Measured far from here, each row has a processor of its own."""
    case, here = settled.case, environment()
    processor = {} if far else {"processor": here["cpu"]}
    return (
        {
            "device": settings.device,
            "seed": str(settled.seed),
            "number of repeats": str(settings.repeats),
            "number of threads": str(settings.threads),
            "inner optimizer": plain(case.optimizer),
            "solver for the solution": plain(case.solution),
            _STEPS: str(case.outer_steps),
            _CODE: fingerprint(settled),
            "version of torch": here["torch"],
            "version of bilevel": here["bilevel"].partition(" ")[0],
        }
        | processor
        | {f"{_CODE} of {label}": mark for label, mark in marks_of_baselines(settled).items()}
    )


def begin(
    folder: Folder, settled: Sequence[Settled], settings: Settings, far: bool = False
) -> tuple[list[Row], list[str]]:
    """Write down what a new comparison measures with. Earlier rows are set aside, which is said.

    Raises:
        OSError: a file cannot be written.
    """
    said = folder.set_aside()
    _write(folder, {each.case.name: facts(each, settings, far) for each in settled})
    return [], [said] if said else []


def resume(
    folder: Folder, settled: Sequence[Settled], settings: Settings, far: bool = False
) -> tuple[list[Row], list[str]]:
    """The rows that are there, and sentences for the user. A half-written last row is taken out of the file and kept
    beside it.

    Raises:
        ResumeError: the rows and the new plan do not belong together, or the file is damaged.
        OSError: a file cannot be read or written.
    """
    said: list[str] = []
    new = {each.case.name: facts(each, settings, far) for each in settled}
    old = _read(folder)
    rows: Sequence[Row] = ()
    if folder.records.exists():
        found = scan(folder.records)
        rows = found.rows
        for damage in found.damage:
            if not damage.torn:
                raise ResumeError(
                    f"{folder.records}, line {damage.line}: {damage.reason}. Take that line out, and --resume measures "
                    f"its row again; without --resume the whole file is kept aside"
                )
        if old is None and rows:
            said.append(f"{folder.plan} is missing: only what the rows themselves say could be checked")
        for each in settled:
            records = [
                row.record for row in rows if row.record.case == each.case.name and row.record.source == "measured"
            ]
            if records:
                there = _with_rows(each, records)
                known = {key: value for key, value in new[each.case.name].items() if key not in there or there[key]}
                _check_facts(folder, each.case.name, (old or {}).get(each.case.name), known)
            _check_rows(folder, each, settings, records)
        for damage in found.damage:
            folder.keep_damaged(damage.text)
            said.append(
                f"the last row of {folder.records} was cut off while it was written, and is measured again; its "
                f"{len(damage.text):,} bytes are in {folder.path / DAMAGED}"
            )
        said.append(f"continuing with {len(rows)} finished row{'' if len(rows) == 1 else 's'} of {folder.records}")
    steps = {name: (old or {}).get(name, {}).get(_STEPS, "0") for name, found in new.items() if found[_STEPS] == "0"}
    _write(
        folder,
        {
            **(old or {}),
            **{
                name: {**_of_rows_no_longer_asked_for(old, name), **found, _STEPS: steps.get(name, found[_STEPS])}
                for name, found in new.items()
            },
        },
    )
    return list(rows), said


def _of_rows_no_longer_asked_for(old: Mapping[str, Facts] | None, name: str) -> Facts:
    """The marks of all baselines that have rows."""
    known = (old or {}).get(name, {})
    return {key: value for key, value in known.items() if key.startswith(f"{_CODE} of ")}


def _with_rows(settled: Settled, records: Sequence[Record]) -> dict[str, bool]:
    """Whether there are rows of each baseline that takes part, by the name of its mark."""
    labels = {cell.label: cell.estimator for cell in settled.cells}
    there = {labels.get(record.estimator) for record in records}
    return {f"{_CODE} of {label}": label in there for label in settled.case.baselines}


def loop_failed(record: Record) -> bool:
    """Whether the run of a row's outer loop failed."""
    return any(map(unfinished, record.iterations))


def plain(value: object) -> str:
    """A repr without addresses and the name of the main module, which are others in each process.

    Example:
        >>> plain(len), plain("<function f at 0x7f3a>")
        ('<built-in function len>', '<function f>')
    """
    text = value if isinstance(value, str) else repr(value)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text).replace("__mp_main__", "__main__")


def _check_facts(folder: Folder, name: str, old: Facts | None, new: Facts) -> None:
    for key, value in new.items():
        before, code = (old or {}).get(key, value), key == _CODE or key.startswith(f"{_CODE} of ")
        if value.startswith(UNTOLD) and key != _CODE:
            raise ResumeError(
                f"{folder.records} cannot be continued: whether {key.removeprefix(f'{_CODE} of ')} is what it was "
                f"{value}. Make the baseline without it, or give it another label, or another folder"
            )
        if before == value or (key == _STEPS and "0" in (before, value)):
            continue
        said = key if key == _CODE else key.replace(_CODE, f"{_CODE}, arguments or notes", 1)
        what = f"other {said} than it has now" if code else f"{key} {before}, and this is {value}"
        remedy = f"the old {key}" if code else f"{key} {before}"
        raise ResumeError(
            f"{folder.records} cannot be continued: case {name} was measured with {what}. Use {remedy}, or another "
            f"folder; without --resume, all is measured and the old rows are kept aside"
        )


def _check_rows(folder: Folder, settled: Settled, settings: Settings, records: Sequence[Record]) -> None:
    cells = {(cell.label, cell.engine, cell.steps): cell for cell in settled.cells}
    # (How a baseline that does not take part would weight its tasks now is of no account.)
    compared = {
        label: each
        for label, each in settled.compared.items()
        if label in settled.labels or label not in settled.case.baselines
    }
    for record in records:
        now = {"device": settings.device, "seed": str(settled.seed)}
        then = {"device": record.device, "seed": str(record.seed), "estimator": plain(record.settings)}
        cell = cells.get((record.estimator, record.engine, record.inner_steps or 0))
        known = compared.get(cell.estimator if cell is not None else record.estimator)
        if known is not None:
            now["estimator"] = plain(known)
        if record.engine in settled.case.engines:
            now["engine"], then["engine"] = plain(settled.case.engines[record.engine]), plain(record.engine_settings)
        if cell is not None and record.solver:
            now["inner solver"], then["inner solver"] = plain(cell.solver), plain(record.solver)
        for key, before in then.items():
            if now.get(key, before) != before:
                raise ResumeError(
                    f"{folder.records} cannot be continued: its row {settled.case.name}, {record.estimator}, K = "
                    f"{record.inner_steps} has {key} {before}, and this comparison has {now[key]}. Use the same, "
                    f"another label or another folder; without --resume the old rows are kept aside"
                )


def _read(folder: Folder) -> dict[str, Facts] | None:
    try:
        found = json.loads(folder.plan.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ResumeError(
            f"{folder.plan} is damaged ({error}); remove it, and only what the rows themselves say is checked"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(each, dict) for each in found.values()):
        raise ResumeError(
            f"{folder.plan} is damaged (no dict of dicts); remove it, and only what the rows themselves say is checked"
        )
    return found


def _write(folder: Folder, found: Mapping[str, Facts]) -> None:
    replace_file(folder.plan, (json.dumps(found, indent=1) + "\n").encode("utf-8"))
