"""What something is, as text: batches, to know them again; objects, to say what differs."""

import dataclasses
import enum
import functools
import hashlib
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel.batches import Batches, PerStep
from bilevel.space import tree

_LOOKED_AT = 1 << 20
"""Numbers of a tensor that are looked at: those of larger ones at equal distances."""
_DEEP, _LONG = 8, 100
"""How deep settings are looked at, and up to how many entries of a container."""


def digest(batches: Any) -> str:
    """32 hexadecimal digits that stand for a batch: every number of tensors up to a million, as many of larger ones."""
    found = hashlib.blake2b(digest_size=16)
    _feed(found, batches)
    return found.hexdigest()


def _feed(found: Any, value: Any) -> None:
    if isinstance(value, Batches):
        for field in dataclasses.fields(value):
            _feed(found, getattr(value, field.name))
    elif isinstance(value, PerStep):
        found.update(f"{len(value)} steps ".encode())
        if isinstance(value._batches, (list, tuple)):  # others may make their batches, and draw, when they are asked
            for batch in value._batches:
                _feed(found, batch)
    else:
        for name, leaf in zip(tree.names(value), tree.flatten(value)[0], strict=True):
            found.update(f"{name} {type(leaf).__name__} ".encode())
            if isinstance(leaf, Tensor):
                found.update(f"{tuple(leaf.shape)} {leaf.dtype} ".encode())
                found.update(_bytes(leaf))
            elif hasattr(leaf, "tobytes"):
                found.update(leaf.tobytes())
            elif isinstance(leaf, (bool, int, float, complex, str, bytes, type(None))):
                found.update(repr(leaf).encode())


def _bytes(leaf: Tensor) -> bytes:
    flat = leaf.detach().reshape(-1)
    if flat.numel() > _LOOKED_AT:
        flat = flat[:: -(-flat.numel() // _LOOKED_AT)]
    flat = flat.cpu().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy(force=True).tobytes() if flat.numel() else b""


def described(name: str, value: Any, within: tuple[int, ...] = ()) -> dict[str, str]:
    """Its settings by their paths: the fields of dataclasses, the entries of containers, what functions close over.

    Of a module: its layers, and the tensors that do not require grad. Of other objects: their type, the modules and
    dataclasses that they have as attributes, and, where they are called, their other attributes.
    """
    if id(value) in within or len(within) > _DEEP:
        return {name: type(value).__name__}
    return {name: _text(value)} | {
        key: text
        for part, inside in _parts(value).items()
        for key, text in described(f"{name}{part}", inside, (*within, id(value))).items()
    }


def _parts(value: Any) -> dict[str, Any]:
    """What a setting is made of, by the ends of their paths."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field for field in dataclasses.fields(value) if field.compare]  # not what it remembers for itself
        return {f".{field.name}": getattr(value, field.name) for field in fields}
    if isinstance(value, torch.nn.Module):
        return {f".{part}": inside for part, inside in _module(value).items()}
    if isinstance(value, (Mapping, list, tuple)) and len(value) > _LONG:
        return {}
    if isinstance(value, Mapping):
        return {f"[{part!r}]": inside for part, inside in value.items() if not isinstance(part, Tensor)}
    if isinstance(value, (list, tuple)):
        return {f"[{place}]": part for place, part in enumerate(value)}
    if isinstance(value, functools.partial):
        return {".func": value.func, ".args": value.args, ".keywords": value.keywords}
    if isinstance(value, types.MethodType):
        return {".__self__": value.__self__}
    if isinstance(value, types.FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        return {f".{part}": inside for part, cell in cells for inside in _content(cell)}
    if isinstance(value, (type, Tensor)):
        return {}
    called = callable(value)
    return {
        f".{part}": inside
        for part, inside in getattr(value, "__dict__", {}).items()
        if isinstance(inside, torch.nn.Module) or dataclasses.is_dataclass(inside) or (called and part[0] != "_")
    }


def _module(module: torch.nn.Module) -> dict[str, Any]:
    layers = {part: f"{type(each).__name__}({each.extra_repr()})" for part, each in module.named_modules() if part}
    tensors = (*module.named_parameters(), *module.named_buffers())
    return {"training": module.training} | layers | {part: leaf for part, leaf in tensors if not leaf.requires_grad}


def _content(cell: Any) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # not assigned yet
        return []


def _text(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, (bool, int, float, complex, str, type(None), torch.dtype, torch.device)):
        return repr(value)
    if isinstance(value, (set, frozenset)):
        return repr(sorted(map(_text, value)))
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, functools.partial):
        return f"partial of {_text(value.func)}"
    if isinstance(value, (Mapping, list, tuple)):
        long = len(value) > _LONG and not isinstance(value, Mapping)
        return f"{type(value).__name__} of {len(value)}" + (f", {digest(value)}" if long else "")
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, types.MethodType, type)):
        return f"{value.__module__}.{value.__qualname__}"
    return type(value).__name__


def _tensor(value: Tensor) -> str:
    if type(value) not in (Tensor, torch.nn.Parameter) or value.is_meta or value.is_sparse or value.is_quantized:
        return type(value).__name__
    if value.requires_grad and value.numel() > 1:
        return f"a tensor of {tuple(value.shape)} that requires grad"
    return repr(value.tolist()) if value.numel() == 1 else f"a tensor {digest(value)}"


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs, a clause each."""
    return [
        f"{name} was {before.get(name, 'not there')} and is {now.get(name, 'not there')}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
