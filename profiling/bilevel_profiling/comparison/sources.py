"""The meaning of Python files and of the local modules that they import: the same where only comments and docstrings
of modules have changed.

Local is what the user may edit between two runs: not the standard library, not what is installed in site-packages
(torch's version is compared by itself), and not bilevel and its profiler, whose version is compared by itself.
"""

import ast
import functools
import sys
import sysconfig
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

_OURS = {"bilevel", "bilevel_profiling"}
_NONE: frozenset[str] = frozenset()


def local(module: str, file: str | None) -> bool:
    """Whether the code of a module is the user's to edit.

    Example:
        >>> local("torch", __import__("torch").__file__), local("mine", None)
        (False, True)
    """
    top = module.partition(".")[0]
    return top not in _OURS and top not in sys.stdlib_module_names and not (file and _installed(Path(file)))


def meaning(text: str | bytes, without: frozenset[str] | set[str] = _NONE) -> str:
    """What a text of Python says, but for the statements that set one of these names."""
    nodes = (node for node in ast.parse(text).body if not _set(node) & without and not _is_text(node))
    return "\n".join(map(ast.dump, nodes))


def setting(text: str | bytes, name: str) -> tuple[str, set[str]]:
    """What the statements at the top of a text say that make a name or change what it holds, and the names that they
    use.

    Example:
        >>> setting("a = b + 1; c = 2", "a")[1]
        {'b'}
    """
    nodes = [node for node in ast.parse(text).body if _makes(node, name)]
    used = {each.id for node in nodes for each in ast.walk(node) if isinstance(each, ast.Name)}
    return "\n".join(map(ast.dump, nodes)), used - {name}


def _makes(node: ast.stmt, name: str) -> bool:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return node.name == name
    for each in ast.walk(node):
        if isinstance(each, ast.Name) and each.id == name and isinstance(each.ctx, ast.Store):
            return True
        inside = each.func if isinstance(node, ast.Expr) and isinstance(each, ast.Call) else each
        if isinstance(inside, (ast.Subscript, ast.Attribute)) and (
            isinstance(inside.ctx, ast.Store) or inside is not each
        ):
            while isinstance(inside, (ast.Subscript, ast.Attribute)):
                inside = inside.value
            if isinstance(inside, ast.Name) and inside.id == name:
                return True
    return False


def imported(path: Path, package: str) -> dict[str, str]:
    """The meaning of each local module that a file imports, and of those that these import, by name."""
    return {name: meaning(origin.read_bytes()) for name, origin in files(path, package).items()}


def files(path: Path, package: str) -> dict[str, Path]:
    """The file of each of these modules."""
    found: dict[str, Path] = {}
    waiting = [(path, package)]
    while waiting:
        for name in _names(*waiting.pop()):
            spec = None if name in found else _spec(name)
            if spec is None or spec.origin is None:
                continue
            origin = Path(spec.origin)
            found[name] = origin
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


def _spec(name: str) -> ModuleSpec | None:
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


def _set(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
        targets = [node.target]
    else:
        return set()
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
