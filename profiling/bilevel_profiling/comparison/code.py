"""A mark of the code that a case is measured with: the same where only comments, docstrings of modules or the choices
of the case file that are compared by themselves have changed.

It follows the case file, and transitively every local module that is imported anywhere in it, in functions too. Local
is what the user may edit between two runs: not the standard library, not what is installed in site-packages (torch's
version is compared by itself), and not bilevel and its profiler, whose version is compared by itself. Of a `setup`
given as a function, it follows the function, what it uses of its own module, and the modules that this one imports.
Data files, and modules whose names are computed, are not seen.
"""

import ast
import functools
import hashlib
import importlib.util
import inspect
import sys
import sysconfig
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from bilevel_profiling.cases import builtin
from bilevel_profiling.cases.case_file import builtin_names
from bilevel_profiling.comparison.plan import Settled

_OURS = {"bilevel", "bilevel_profiling"}
_SETTINGS = {"BASELINES", "ESTIMATORS", "INNER_STEPS", "OUTER_STEPS", "PRELOAD", "SOLVERS", "SOLVER"}
"""Names of a case file that are compared by themselves, or are free to grow."""


def fingerprint(settled: Settled) -> str:
    """The mark of a case's code."""
    source, overrides = settled.plan.source, settled.plan.overrides
    functions = [overrides.get(name) for name in ("batches", "evaluate", "outer_optimizer")]
    parts: dict[str, str] = {}
    if isinstance(source, str):
        path = _case_path(source)
        parts["case"] = _meaning(path.read_bytes(), without=_SETTINGS)
        parts |= _imported(path, "")
    for function in (None if isinstance(source, str) else source, *functions):
        if callable(function):
            parts |= _used(function)
    return _mark(parts)


def marks_of_baselines(settled: Settled) -> dict[str, str]:
    """The mark of the code of each baseline that came beside the case's own, by label; those of this package, whose
    version is compared by itself, left out.
    """
    found = {}
    for label, value in (settled.plan.overrides.get("baselines") or {}).items():
        function = getattr(value, "function", value)
        while isinstance(function, functools.partial):
            function = function.func
        if getattr(function, "__module__", "").partition(".")[0] not in _OURS:
            found[label] = _mark(_used(function))
    return found


def _mark(parts: Mapping[str, str]) -> str:
    return hashlib.sha256("\n".join(f"{name}\n{parts[name]}" for name in sorted(parts)).encode()).hexdigest()[:16]


def _case_path(source: str) -> Path:
    found = importlib.util.find_spec(f"{builtin.__name__}.{source}") if source in builtin_names() else None
    return Path(found.origin) if found is not None and found.origin else Path(source).expanduser()


def _imported(path: Path, package: str) -> dict[str, str]:
    """The meaning of each local module that a file imports, and of those that these import, by name."""
    found: dict[str, str] = {}
    waiting = [(path, package)]
    while waiting:
        for name in _names(*waiting.pop()):
            spec = None if name in found else _local(name)
            if spec is None or spec.origin is None:
                continue
            origin = Path(spec.origin)
            found[name] = _meaning(origin.read_bytes())
            waiting.append((origin, name if spec.submodule_search_locations else name.rpartition(".")[0]))
    return found


def _names(path: Path, package: str) -> Iterator[str]:
    """Every module that may be meant by the imports of a file, packages before what is in them."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join(filter(None, [*parents, node.module]))
            full = [f"{base}.{alias.name}" if base else alias.name for alias in node.names]
        else:
            continue
        for name in full:
            parts = name.split(".")
            yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _local(name: str) -> ModuleSpec | None:
    """Where a local module comes from, found without running anything; None for what is not local or is no module."""
    top, places = name.partition(".")[0], None
    if top in sys.stdlib_module_names or top in _OURS:
        return None
    spec = None
    for end in (place for place, letter in enumerate(f"{name}.") if letter == "."):
        try:
            spec = PathFinder.find_spec(name[:end], places)
        except (ImportError, ValueError):
            return None
        if spec is None:
            return None
        places = spec.submodule_search_locations
    source = spec is not None and spec.origin is not None and spec.origin.endswith(".py")
    return spec if spec is not None and source and not _installed(Path(spec.origin or "")) else None


def _installed(path: Path) -> bool:
    path = path.resolve()
    return not {"site-packages", "dist-packages"}.isdisjoint(path.parts) or any(map(path.is_relative_to, _folders()))


@functools.cache
def _folders() -> tuple[Path, ...]:
    """Where Python installs libraries, its own included."""
    return tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def _used(function: Callable[..., Any]) -> dict[str, str]:
    """The meaning of a function, of what it uses of its own module, and of what this module imports."""
    found: dict[str, str] = {}
    waiting: list[Any] = [function]
    while waiting:
        each = waiting.pop()
        name = f"{getattr(each, '__module__', '')}:{getattr(each, '__qualname__', type(each).__qualname__)}"
        if name in found:
            continue
        try:
            found[name] = _meaning(textwrap.dedent(inspect.getsource(each)))
        except (OSError, TypeError, SyntaxError):  # made without a file, a callable object, or a part of an expression
            found[name] = ""
        members = vars(each).values() if isinstance(each, type) else [each]
        for code, names in ((f.__code__, f.__globals__) for f in members if isinstance(f, types.FunctionType)):
            for used in _global_names(code) & set(names):
                value = names[used]
                if isinstance(value, (int, float, str, tuple, type(None))):
                    found[f"{name}:{used}"] = repr(value)
                elif getattr(value, "__module__", None) == getattr(each, "__module__", "") and callable(value):
                    waiting.append(value)
    file = inspect.getsourcefile(function) if isinstance(function, types.FunctionType) else None
    module = getattr(function, "__module__", "")
    if file and module.partition(".")[0] not in _OURS and Path(file).is_file() and not _installed(Path(file)):
        found |= _imported(Path(file), getattr(sys.modules.get(module), "__package__", "") or "")
    return found


def _global_names(code: types.CodeType) -> set[str]:
    inner = [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return set(code.co_names).union(*map(_global_names, inner))


def _meaning(text: str | bytes, without: frozenset[str] | set[str] = frozenset()) -> str:
    nodes = (node for node in ast.parse(text).body if not _set(node) & without and not _is_text(node))
    return "\n".join(map(ast.dump, nodes))


def _set(node: ast.stmt) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
