"""What a function depends on besides its arguments, as far as Python shows: a trace of it holds only while that stays.

Numbers, strings and flags that it reaches through its closure, its defaults, the globals it names, the object it is a
method of and modules (their training mode, their plain attributes), by value; tensors by identity, because a graph
reads them anew at every call. What is not found here is found by the checks of `bilevel.engine.compiled.functions`.
"""

import functools
import types
import weakref
from typing import Any

from torch import Tensor, nn

_LIMIT = 5000
_PLAIN = (int, float, complex, bool, str, bytes, type(None))


class _Same:
    """Equal to another of the same object, while that lives."""

    __slots__ = ("_id", "_object", "tensor")

    def __init__(self, value: Any) -> None:
        try:
            self._object: Any = weakref.ref(value)
        except TypeError:
            self._object = lambda: value
        self._id, self.tensor = id(value), isinstance(value, Tensor)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._id == other._id and self._object() is not None

    __hash__ = None  # type: ignore[assignment]


def surroundings(function: Any, *, tensors: bool = True) -> list[Any]:
    """What `function` depends on besides its arguments, in a list that equals another one while nothing changed.

    Without `tensors`, those are left out: of a module whose parameters are put into it for each call.
    """
    found: list[Any] = []
    _walk(function, found, set(), 0)
    return found if tensors else [each for each in found if not (isinstance(each, _Same) and each.tensor)]


def _walk(value: Any, found: list[Any], seen: set[int], depth: int) -> None:
    if len(found) > _LIMIT or depth > 12:
        return
    if isinstance(value, _PLAIN):
        # (By type, too: True == 1 == 1.0. A NaN equals itself here.)
        found.append((type(value), repr(value) if isinstance(value, float) else value))
        return
    if isinstance(value, (types.ModuleType, type, types.BuiltinFunctionType)):
        return
    if isinstance(value, Tensor):
        found.append(_Same(value))
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, types.MethodType):
        parts: list[Any] = [value.__func__, value.__self__]
    elif isinstance(value, functools.partial):
        parts = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, types.FunctionType):
        cells = [_content(cell) for cell in value.__closure__ or ()]
        names = _names(value.__code__)
        scope = value.__globals__
        globals_ = [scope[name] for name in names if name in scope]
        found.append(value.__code__)
        parts = [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *globals_]
    elif isinstance(value, dict):
        found.append(len(value))
        parts = [each for pair in value.items() for each in pair]
    elif isinstance(value, (list, tuple, set, frozenset)):
        found.append(len(value))
        parts = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else list(value)
    elif isinstance(value, nn.Module):
        found.append(_Same(value))
        parts = [
            # (In the place of a block's forward there is another object at each call, which holds the forward.)
            *(getattr(each, "forward", each) for name, each in vars(value).items() if not name.startswith("_")),
            *value._parameters.values(),
            *value._buffers.values(),
            *value._modules.values(),
        ]
    else:
        found.append(_Same(value))
        state = getattr(value, "__dict__", None)
        parts = [] if not isinstance(state, dict) else list(state.values())
        if hasattr(type(value), "__call__") and isinstance(type(value).__call__, types.FunctionType):  # noqa: B004
            parts.append(type(value).__call__)
    for part in parts:
        _walk(part, found, seen, depth + 1)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None


def _names(code: types.CodeType) -> list[str]:
    """The names that code reads from elsewhere, in the functions within it, too."""
    inner = [name for const in code.co_consts if isinstance(const, types.CodeType) for name in _names(const)]
    return [*code.co_names, *inner]
