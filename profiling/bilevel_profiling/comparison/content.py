"""What a value is, as a mark that is the same in another process: numbers and tensors by their data, objects by their
class and what they hold, functions and classes of the user by their code, what that uses of its own module, and the
local modules that this one imports.

Of an object at the top of a module, other than numbers, texts and tuples, the statement that makes it is compared, not
what it holds: data that is drawn anew in each process is no other code. Functions and classes of installed packages are
compared by their names.
"""

import contextlib
import enum
import functools
import hashlib
import inspect
import sys
import textwrap
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel_profiling.comparison import sources

_PLAIN = (int, float, complex, str, bytes, bool, types.NoneType, types.EllipsisType, range, slice, torch.dtype)
_NAMED = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, torch.device)


class UntoldError(ValueError):
    """A value that cannot be told from others of its kind, such as a lock."""


def mark(*values: Any) -> str:
    """The mark of values.

    Raises:
        UntoldError: there is something in them that has no content to compare.

    Example:
        >>> mark([1, {"a": 2.0}]) == mark([1, {"a": 2.0}]), mark(1) == mark(True)
        (True, False)
    """
    return _Told().told(values)


class _Told:
    """Values as text, each object once; the code that they use goes to the mark by itself, in the order of names."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._held: list[Any] = []  # an id is another object's when its own is gone
        self._code: dict[str, str] = {}

    def told(self, value: Any) -> str:
        try:
            words = self._words(value)
        except RecursionError as error:
            raise UntoldError("something nested too deeply") from error
        lines = [words, *(f"{name}\n{self._code[name]}" for name in sorted(self._code))]
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def _words(self, value: Any) -> str:
        if type(value) in _PLAIN:
            return f"{type(value).__name__} {value!r}"
        if isinstance(value, enum.Enum):
            return f"{type(value).__qualname__}.{value.name}"
        if id(value) in self._places:
            return f"again {self._places[id(value)]}"
        self._places[id(value)] = len(self._held)
        self._held.append(value)
        return self._object(value)

    def _list(self, name: str, *values: Any) -> str:
        return f"{name}({', '.join(map(self._words, values))})"

    def _object(self, value: Any) -> str:
        kind = type(value)
        if isinstance(value, Tensor):
            return _tensor(value)
        if kind in (list, tuple):
            return self._list(kind.__name__, *value)
        if kind in (set, frozenset):
            return f"{kind.__name__}({', '.join(sorted(self._words(each) for each in value))})"
        if kind is dict:
            return self._list("dict", *(part for item in value.items() for part in item))
        if isinstance(value, functools.partial):
            return self._list("partial", value.func, value.args, value.keywords, vars(value))
        if isinstance(value, types.MethodType):
            return self._list("method", value.__func__, value.__self__)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.ModuleType):
            return f"module {value.__name__}"
        if isinstance(value, types.CodeType):
            return self._list("code", value.co_code, value.co_names, value.co_freevars, value.co_consts)
        if isinstance(value, _NAMED):
            return f"{kind.__name__} {value}" if isinstance(value, torch.device) else f"built in {value.__qualname__}"
        return self._reduced(value)

    def _reduced(self, value: Any) -> str:
        """An object of another kind, by what pickle would take of it."""
        try:
            found = value.__reduce_ex__(4)
        except Exception as error:  # an object's own reduction raises whatever it does
            raise UntoldError(f"a {type(value).__name__}") from error
        if isinstance(found, str):  # such as a function in a functools.cache
            return self._list(f"global {found}", getattr(value, "__wrapped__", None))
        parts = [list(part) if place > 2 and part is not None else part for place, part in enumerate(found[:5])]
        return self._list("object", type(value), *parts)

    def _function(self, function: types.FunctionType) -> str:
        inside = self._list("closure", *_held(function), function.__defaults__, function.__kwdefaults__)
        name = f"{function.__module__}:{function.__qualname__}"
        if not sources.local(function.__module__ or "", function.__code__.co_filename):
            return f"function {name} {inside}"
        # The source of a lambda is that of its whole statement.
        source = "" if function.__name__ == "<lambda>" else _source(function)
        body = source or self._words(function.__code__)
        self._uses(function.__code__, function.__globals__, function.__module__ or "")
        self._imports(function.__module__, function.__code__.co_filename)
        return f"function {name} {body} {inside}"

    def _class(self, kind: type) -> str:
        name = f"{kind.__module__}:{kind.__qualname__}"
        file = getattr(sys.modules.get(kind.__module__), "__file__", None)
        if not sources.local(kind.__module__, file):
            return f"class {name}"
        source = _source(kind)
        own = (getattr(each, "__func__", getattr(each, "fget", each)) for each in vars(kind).values())
        for each in (each for each in own if isinstance(each, types.FunctionType)):
            if each.__module__ == kind.__module__:  # (methods that dataclasses make have no file)
                self._uses(each.__code__, each.__globals__, kind.__module__)
                source += "" if source else self._words(each.__code__)
        if file:
            self._imports(kind.__module__, file)
        return self._list(f"class {name} {source}", *kind.__bases__)

    def _imports(self, module: str | None, file: str) -> None:
        key = f"imports of {module}"
        if key not in self._code and Path(file).is_file():
            package = getattr(sys.modules.get(module or ""), "__package__", "") or ""
            self._code[key] = ""
            self._code |= sources.imported(Path(file), package)

    def _uses(self, code: types.CodeType, names: dict[str, Any], module: str) -> None:
        """What a function uses of its module."""
        waiting = sorted(_global_names(code) & set(names))
        while waiting:
            name = waiting.pop()
            key, value = f"{module}:{name}", names[name]
            if key in self._code or isinstance(value, types.ModuleType):
                continue
            self._code[key] = ""  # while it is looked at, which may lead back to it
            if isinstance(value, (types.FunctionType, type)):
                if value.__module__ == module:
                    self._code[key] = self._words(value)
            elif type(value) in _PLAIN or (type(value) is tuple and all(type(each) in _PLAIN for each in value)):
                self._code[key] = repr(value)
            else:
                file = Path(names.get("__file__") or "")
                said, used = sources.setting(file.read_bytes(), name) if file.is_file() else ("", set())
                wrapped = getattr(value, "__wrapped__", None)
                self._code[key] = f"{said} {'' if wrapped is None else self._words(wrapped)}"
                waiting += sorted(used & set(names))


def _tensor(value: Tensor) -> str:
    if type(value) not in (Tensor, torch.nn.Parameter) or value.layout is not torch.strided or value.is_meta:
        raise UntoldError(f"a {type(value).__name__} ({value.layout}, on {value.device})")
    data = value.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.sha256(data.numpy().data).hexdigest()
    return f"tensor {tuple(value.shape)} {value.dtype} {value.requires_grad} {digest}"


def _held(function: types.FunctionType) -> list[Any]:
    """What the variables of the functions around it hold."""
    found = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # it is empty
            found.append(cell.cell_contents)
    return found


def _source(value: Callable[..., Any]) -> str:
    try:
        return sources.meaning(textwrap.dedent(inspect.getsource(value)))
    except (OSError, TypeError, SyntaxError):  # made without a file, or a part of an expression
        return ""


def _global_names(code: types.CodeType) -> set[str]:
    inner = [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return set(code.co_names).union(*map(_global_names, inner))
