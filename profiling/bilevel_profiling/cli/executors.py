"""An executor from the command line: the name of what makes it, `module:function` or `file.py:function`.

It is called without arguments, as `concurrent.futures:ProcessPoolExecutor` can be; or a few lines of one's own say
which cluster, how many workers, and what they need.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from types import ModuleType
from typing import Any

WRITE = "concurrent.futures:ProcessPoolExecutor, or my_cluster.py:start with a function that returns an executor"


def made(name: str) -> Executor:
    """The executor that a function makes.

    Raises:
        ValueError: there is no such function, or it failed; the message says why.
        TypeError: it returned something else.

    Example:
        >>> type(made("concurrent.futures:ThreadPoolExecutor")).__name__
        'ThreadPoolExecutor'
    """
    from bilevel_profiling.comparison.dispatch import check

    make = _function(name)
    try:
        executor = make()
    except Exception as error:  # the user's own code, or a cluster that is not there
        raise ValueError(f"--executor {name} failed: {type(error).__name__}: {error}") from error
    check(executor)
    return executor


def _function(name: str) -> Callable[[], Any]:
    home, _, attribute = name.rpartition(":")
    if not home or not attribute.isidentifier():
        raise ValueError(f"--executor {name} was given; a module and a function were needed, such as {WRITE}")
    try:
        found = getattr(_from_file(Path(home)) if home.endswith(".py") else _imported(home), attribute, None)
    except Exception as error:
        raise ValueError(f"--executor {name} was given; {home} cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"--executor {name} was given; {home} has no function {attribute}; write {WRITE}")
    return found


def _imported(name: str) -> ModuleType:
    """As `python -m` does it: what lies in the working directory can be imported."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return importlib.import_module(name)


def _from_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bilevel_executor_{path.stem}", path.expanduser().resolve())
    assert spec is not None, "it ends in .py"
    assert spec.loader is not None, "it ends in .py"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
