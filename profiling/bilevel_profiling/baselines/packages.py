"""The baselines of other libraries, by the names that `bilevel compare --baselines` takes."""

import ast
import difflib
import importlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path

from bilevel_profiling.baselines.baseline import Baseline

PACKAGES = {
    "betty": "bilevel_profiling.baselines.betty",
    "higher": "bilevel_profiling.baselines.higher",
    "torchopt": "bilevel_profiling.baselines.torchopt",
}
"""Where the `baselines()` of each are."""


def titles() -> dict[str, str]:
    """The first line of each file's docstring, read without running it."""
    found = {}
    for name, module in PACKAGES.items():
        spec = importlib.util.find_spec(module)
        text = "" if spec is None or spec.origin is None else Path(spec.origin).read_text(encoding="utf-8")
        found[name] = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return found


def named(names: Iterable[str]) -> dict[str, Baseline]:
    """The baselines of these libraries, by label.

    Raises:
        ValueError: a name is none of them.
        ImportError: a library is not installed; the message says what to install.

    Example:
        >>> named([])
        {}
    """
    found: dict[str, Baseline] = {}
    for name in dict.fromkeys(names):
        if name not in PACKAGES:
            close = difflib.get_close_matches(str(name), PACKAGES, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(f"there are no baselines {name!r}; there are those of {', '.join(PACKAGES)}.{hint}")
        found |= importlib.import_module(PACKAGES[name]).baselines()
    return found
