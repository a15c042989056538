"""Copies that a file can hold and `torch.load(weights_only=True)` gives back: tensors, numbers, strings, containers."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel.estimators.state import State
from bilevel.space import tree
from bilevel.space.tree import Tree

_LEAVES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_MAPPINGS: dict[type, Callable[[dict[Any, Any]], Any]] = {
    dict: dict,
    collections.defaultdict: dict,  # what it makes of missing keys is a function
    collections.OrderedDict: collections.OrderedDict,
    collections.Counter: collections.Counter,
}


def copied(value: Any, where: str) -> Any:
    """A deep copy; tensors are cloned, on their device.

    Args:
        value: what is to be saved.
        where: it stands, for the message.

    Raises:
        TypeError: it holds an object that a file of weights cannot hold.
    """
    kind = type(value)
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, State):
        return copied(_as_dict(value), where)
    if kind in _MAPPINGS:
        pairs = {copied(key, f"a key of {where}"): copied(part, f"{where}[{key!r}]") for key, part in value.items()}
        return _MAPPINGS[kind](pairs)
    if kind in (list, tuple, set):
        return kind(copied(part, f"{where}[{place}]") for place, part in enumerate(value))
    if kind in _LEAVES:
        return value
    if kind.__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    raise TypeError(
        f"OuterLoop was to save {where}, a {kind.__name__}; a file holds tensors, numbers, strings, and dicts, lists "
        f"and tuples of these, because it is read without running anybody's code. Keep it as one of these"
    )


def _as_dict(state: State) -> dict[str, Any]:
    """Its `to_dict`, with states in it likewise."""
    saved = state.to_dict()
    for field in dataclasses.fields(state):
        if isinstance(part := getattr(state, field.name), State):
            saved[field.name] = _as_dict(part)
    return saved


def on_host(state: Any, device: torch.device) -> list[str]:
    """The paths of tensors in a state that stay on the CPU wherever the problem is."""
    return [path for path, leaf, host in _tensors(state, "", False) if host or leaf.device.type != device.type]


def _tensors(value: Any, path: str, host: bool) -> Iterator[tuple[str, Tensor, bool]]:
    if isinstance(value, Tensor):
        yield path, value, host
    elif isinstance(value, State):
        for field in dataclasses.fields(value):
            marked = host or bool(field.metadata.get("host"))
            yield from _tensors(getattr(value, field.name), f"{path}/{field.name}", marked)
    elif isinstance(value, (Mapping, list, tuple)):
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _tensors(part, f"{path}/{key}", host)


def placed(state: Any, device: torch.device, host: list[str], path: str = "") -> Any:
    """A copy with its tensors on a device, but for those of these paths, on the CPU."""
    if isinstance(state, Tensor):
        return state.clone() if path in host else state.to(device, copy=True)
    if isinstance(state, dict):
        return {key: placed(part, device, host, f"{path}/{key}") for key, part in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(placed(part, device, host, f"{path}/{place}") for place, part in enumerate(state))
    return state


def saved_tree(value: Tree) -> dict[str, Any] | None:
    """The tensors of a variable by their paths."""
    if value is None:
        return None
    return {"names": tree.names(value), "leaves": [leaf.detach().clone() for leaf in tree.tensors(value)]}


def loaded_tree(who: str, value: Tree, saved: Mapping[str, Any] | None) -> list[Tensor] | None:
    """The saved tensors in the order of `value`, where they fit it.

    Raises:
        ValueError: other names, shapes or dtypes.
    """
    if (saved is None) != (value is None):
        one, other = ("none", "one") if saved is None else ("one", "none")
        raise ValueError(f"OuterLoop was saved with {one} as {who} and has {other}; what it was made with was needed")
    if saved is None:
        return None
    found = dict(zip(saved["names"], saved["leaves"], strict=True))
    here = dict(zip(tree.names(value), tree.tensors(value), strict=True))
    differ = [
        f"{name} was {_kind(found.get(name))} and is {_kind(here.get(name))}"
        for name in {**found, **here}
        if _kind(found.get(name)) != _kind(here.get(name))
    ]
    if differ:
        shown = "; ".join(differ[:5]) + (f"; and {len(differ) - 5} more" if len(differ) > 5 else "")
        raise ValueError(f"OuterLoop was saved with another {who}: {shown}. Make it as it was then; nothing was loaded")
    return [found[name] for name in here]


def _kind(leaf: Tensor | None) -> str:
    return "not there" if leaf is None else f"{tuple(leaf.shape)} {leaf.dtype}"
