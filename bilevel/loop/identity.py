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


def described(name: str, value: Any) -> dict[str, str]:
    """Its settings by their paths: the fields of dataclasses, the entries of containers, the names of functions.

    Other objects are named by their type.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = {name: type(value).__name__}
        for field in dataclasses.fields(value):
            if field.compare:  # not what it remembers for itself
                found |= described(f"{name}.{field.name}", getattr(value, field.name))
        return found
    if isinstance(value, Mapping):
        return {key: text for part in value for key, text in described(f"{name}[{part!r}]", value[part]).items()}
    if isinstance(value, (list, tuple)):
        found = {name: f"{type(value).__name__} of {len(value)}"}
        for place, part in enumerate(value):
            found |= described(f"{name}[{place}]", part)
        return found
    return {name: _text(value)}


def _text(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, (bool, int, float, complex, str, type(None), torch.dtype, torch.device)):
        return repr(value)
    if isinstance(value, (set, frozenset)):
        return repr(sorted(map(_text, value)))
    if isinstance(value, Tensor):
        return repr(value.tolist()) if value.numel() == 1 else f"a tensor {digest(value)}"
    if isinstance(value, functools.partial):
        return f"partial of {_text(value.func)}"
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, types.MethodType, type)):
        return f"{value.__module__}.{value.__qualname__}"
    return type(value).__name__


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs, a clause each."""
    return [
        f"{name} was {before.get(name, 'not there')} and is {now.get(name, 'not there')}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
