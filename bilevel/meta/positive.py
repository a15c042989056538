"""Positive numbers that may be learned: softplus of an outer tensor."""

import math

import torch
from torch import Tensor

from bilevel.meta.head import Variables


def check_positive(owner: str, name: str, value: object) -> None:
    """Raise ValueError unless `value` is a positive finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{owner} was given {name}={value!r}; a positive number was needed")


def fresh(value: float, like: Tensor) -> Tensor:
    """The outer tensor whose softplus is `value`: 0-dim, of the dtype and device of `like`."""
    raw = value if value > 30 else math.log(math.expm1(value))
    return torch.tensor(raw, dtype=like.dtype, device=like.device)


def value_of(value: float, name: str, variables: Variables) -> Tensor | float:
    """The number itself, or where it is learned softplus of the outer tensor of that name, in float64."""
    return torch.nn.functional.softplus(variables[name].double()) if name in variables else value


def part(variables: Variables, prefix: str) -> Variables:
    """The outer tensors of a part, named without its prefix."""
    start = prefix + "."
    return {name.removeprefix(start): leaf for name, leaf in variables.items() if name.startswith(start)}


def prefixed(variables: Variables, prefix: str) -> Variables:
    """The outer tensors of a part under its prefix."""
    return {f"{prefix}.{name}": leaf for name, leaf in variables.items()}
