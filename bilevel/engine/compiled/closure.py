"""What a function depends on besides its arguments, as far as Python shows: a trace of it holds only while that stays.

Numbers, strings and flags that its code names: in its closure, its defaults, its globals, in modules, classes and the
objects that it reaches through them, by value; tensors by identity and place, because a graph reads them anew at every
call. Of an object those attributes count that the code names, so that a counter beside a loss is no reason to trace it
again. What is not found here is found by the checks of `bilevel.engine.compiled.functions`.
"""

import collections
import dis
import functools
import sys
import types
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.engine.rematerialize import switched_off

_LIMIT = 100_000
_PLAIN = (int, float, complex, bool, str, bytes, type(None))
_CALLED = {"forward", "backward", "setup_context", "jvp", "vmap", "__call__", "__wrapped__"}
"""Names that torch and Python call without their being in the code."""
_DYNAMIC = {"getattr", "vars", "__dict__", "attrgetter", "asdict", "__getattribute__"}
"""Where code uses one of these, any attribute may count."""
_READ = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HELD = ("_parameters", "_buffers", "_modules")
_OTHERS = {"torch", "numpy", "bilevel", *sys.stdlib_module_names} - {"__main__"}
"""Packages whose globals are taken to stay what they are."""


class _Same:
    """Equal to another of the same object, while that lives; of a tensor, while its numbers are where they were."""

    __slots__ = ("_id", "_object", "_place", "tensor")

    def __init__(self, value: Any) -> None:
        try:
            self._object: Any = weakref.ref(value)
        except TypeError:
            self._object = lambda: value
        self._id, self.tensor = id(value), isinstance(value, Tensor)
        self._place = _place(value) if self.tensor else None

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, _Same) and self._id == other._id and self._object() is not None
        return same and self._place == other._place  # type: ignore[attr-defined]

    __hash__ = None  # type: ignore[assignment]


def _place(tensor: Tensor) -> Any:
    """Where a tensor's numbers are, which an assignment to `.data` changes."""
    try:
        where = tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.stride()
    except (RuntimeError, NotImplementedError):  # it has no storage
        where = ()  # type: ignore[assignment]
    return tensor.dtype, tuple(tensor.shape), where


def surroundings(function: Any, *, tensors: bool = True) -> list[Any]:
    """What `function` depends on besides its arguments, in a list that equals another one while nothing changed.

    Without `tensors`, those are left out: of a module whose parameters are put into it for each call.
    """
    found = _Walk(function).found
    return found if tensors else [each for each in found if not (isinstance(each, _Same) and each.tensor)]


class _Walk:
    """Everything that is reached, in one order; attributes once a name of theirs has been met."""

    def __init__(self, function: Any) -> None:
        self.found: list[Any] = []
        self._names, self._all = set(_CALLED), False
        self._seen: dict[int, Any] = {}  # (which keeps them, so that no id is met twice)
        self._open: list[tuple[dict[str, Any], set[str]]] = []
        self._next = collections.deque([function])
        while self._next and len(self.found) < _LIMIT:
            while self._next and len(self.found) < _LIMIT:
                self._visit(self._next.popleft())
            for attributes, taken in self._open:
                self._take(attributes, taken)

    def _take(self, attributes: dict[str, Any], taken: set[str]) -> None:
        for name in attributes if self._all else sorted(self._names & attributes.keys()):
            if name not in taken:
                taken.add(name)
                self.found.append(name)
                self._next.append(attributes[name])

    def _attributes(self, attributes: dict[str, Any], *, every: bool = False) -> None:
        if every:
            self._next.extend(attributes.values())
        elif attributes:
            self._open.append((attributes, set()))

    def _visit(self, value: Any) -> None:
        if isinstance(value, _PLAIN):
            # (By type, too: True == 1 == 1.0. A NaN equals itself here.)
            self.found.append((type(value), repr(value) if isinstance(value, float) else value))
            return
        if isinstance(value, Tensor):
            self.found.append(_Same(value))
            return
        if isinstance(value, (types.BuiltinFunctionType, types.ModuleType, type)):
            self.found.append(_Same(value))  # (torch.sin is another function than torch.cos, and both have no code)
        if id(value) in self._seen or isinstance(value, types.BuiltinFunctionType):
            return
        self._seen[id(value)] = value
        if isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._next.extend((value.__func__, value.__self__))
        elif isinstance(value, functools.partial):
            self._next.extend((value.func, *value.args, *value.keywords.values()))
        elif isinstance(value, (staticmethod, classmethod)):
            self._next.append(value.__func__)
        elif isinstance(value, property):
            self._next.append(value.fget)
        elif isinstance(value, types.ModuleType):
            if _own(value.__name__):
                self._attributes(vars(value))
        elif isinstance(value, type):
            for base in value.__mro__:
                if _own(base.__module__) or (issubclass(base, nn.Module) and base is not nn.Module):
                    self._attributes(dict(vars(base)))
        else:
            self._object(value)

    def _function(self, value: types.FunctionType) -> None:
        self.found.append(value.__code__)
        names, own = _names(value.__code__), _own(value.__module__)
        self._names |= names
        self._all |= own and bool(names & _DYNAMIC)
        self._next.extend(_content(cell) for cell in value.__closure__ or ())
        self._next.extend((*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()))
        if own:
            scope = value.__globals__
            self._next.extend(scope[name] for name in sorted(names) if name in scope)
        if value.__dict__:
            self._attributes(value.__dict__)

    def _object(self, value: Any) -> None:
        if isinstance(value, dict):
            self.found.append(len(value))
            self._next.extend(each for pair in value.items() for each in pair)
        elif isinstance(value, (list, tuple, collections.deque)):
            self.found.append(len(value))
            self._next.extend(value)
        elif isinstance(value, (set, frozenset)):
            self.found.append(len(value))
            self._next.extend(sorted(value, key=repr))
        elif hasattr(value, "__array_interface__"):  # numpy's
            small = value.nbytes <= 1_000_000
            self.found.append((str(value.dtype), value.shape, hash(value.tobytes()) if small else _Same(value)))
        else:
            self.found.append(_Same(value))
            self._next.append(type(value))
            state = getattr(value, "__dict__", None)
            state = dict(state) if isinstance(state, dict) else {}
            if isinstance(value, nn.Module):
                self.found.append(value.training)
                for name in (*_HELD, *_HOOKS):
                    self._next.extend((state.get(name) or {}).values())
                state = {name: each for name, each in state.items() if name not in _HELD and name not in _HOOKS}
                if "forward" in state:  # in whose place a block has another object at each call, which holds it
                    state["forward"] = getattr(state["forward"], "forward", state["forward"])
            for name in _slots(type(value)):
                if hasattr(value, name):
                    state[name] = getattr(value, name)
            self._attributes(state, every=not isinstance(value, nn.Module) and hasattr(type(value), "__getattr__"))


def ambience(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """What changes operators from outside: autocast, the default dtype, modes, blocks that are none for now."""
    devices = sorted({each.device.type for each in tensors if each.device.type != "meta"} | {"cpu"})
    casts = [
        (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else device
        for device in devices
    ]
    modes = [type(mode) for mode in torch.overrides._get_current_function_mode_stack()]
    return (
        tuple(casts),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        tuple(modes),
        switched_off(),
    )


def _own(module: str | None) -> bool:
    """Whether a module is the user's."""
    return (module or "").partition(".")[0] not in _OTHERS


def _slots(kind: type) -> Iterable[str]:
    for base in kind.__mro__:
        names = vars(base).get("__slots__", ()) if _own(base.__module__) else ()
        yield from (names,) if isinstance(names, str) else names


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None


@functools.lru_cache(maxsize=10_000)
def _names(code: types.CodeType) -> set[str]:
    """The names that code reads (not those that it only writes), in the functions within it, too."""
    found = {each.argval for each in dis.get_instructions(code) if each.opname.startswith(_READ)}
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            found |= _names(const)
    return found
