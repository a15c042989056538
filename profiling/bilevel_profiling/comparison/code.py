"""A mark of the code that a case is measured with, and of each of its baselines: the same where only comments,
docstrings of modules or the choices of the case file that are compared by themselves have changed.

It follows the case file, and transitively every local module that is imported anywhere in it, in functions too (see
`sources`). Of a `setup` given as a function, and of a baseline, it follows what they are made of (see `content`). Data
files, and modules whose names are computed, are not seen.
"""

import hashlib
import importlib.util
from pathlib import Path

from bilevel_profiling.baselines.baseline import Baseline
from bilevel_profiling.cases import builtin
from bilevel_profiling.cases.case_file import builtin_names
from bilevel_profiling.comparison import content, sources
from bilevel_profiling.comparison.plan import Settled

_SETTINGS = {"BASELINES", "ENGINES", "ESTIMATORS", "INNER_STEPS", "OUTER_STEPS", "PRELOAD", "SOLVERS", "SOLVER"}
"""Names of a case file that are compared by themselves, or are free to grow."""
UNTOLD = "cannot be told: "
"""What a mark begins with that stands for nothing."""


def fingerprint(settled: Settled) -> str:
    """The mark of a case's code."""
    source, overrides = settled.plan.source, settled.plan.overrides
    functions = [overrides.get(name) for name in ("batches", "evaluate", "outer_optimizer")]
    parts: dict[str, str] = {}
    if isinstance(source, str):
        path = _case_path(source)
        parts["case"] = sources.meaning(path.read_bytes(), without=_SETTINGS)
        parts |= sources.imported(path, "")
    for place, function in enumerate((None if isinstance(source, str) else source, *functions)):
        if callable(function):
            parts[f"function {place}"] = _told(function)
    if (split := overrides.get("parallel")) is not None:
        parts["parallel"] = _told(split)
    return hashlib.sha256("\n".join(f"{name}\n{parts[name]}" for name in sorted(parts)).encode()).hexdigest()[:16]


def marks_of_baselines(settled: Settled) -> dict[str, str]:
    """The mark of each baseline that takes part, by label: its code, arguments, notes, target and paths. (Package and
    version are in its row.)
    """
    found = {}
    for label, value in settled.case.baselines.items():
        if label in settled.labels:
            each = value if isinstance(value, Baseline) else Baseline(value)
            found[label] = _told(each.function, each.notes, each.target, each.sees)
    return found


def _told(*values: object) -> str:
    try:
        return content.mark(*values)
    except content.UntoldError as error:
        return f"{UNTOLD}{error}"


def _case_path(source: str) -> Path:
    found = importlib.util.find_spec(f"{builtin.__name__}.{source}") if source in builtin_names() else None
    return Path(found.origin) if found is not None and found.origin else Path(source).expanduser()
