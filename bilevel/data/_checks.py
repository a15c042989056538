"""Checks of arguments that several of the data share."""

import operator
from typing import Any

import torch


def whole(caller: str, name: str, value: Any, least: int = 1) -> int:
    """A whole number of at least `least`.

    Raises:
        TypeError: it is none.
        ValueError: it is smaller.
    """
    try:
        found = operator.index(value)
    except TypeError:
        found = None
    if found is None or isinstance(value, bool):
        raise TypeError(f"{caller} was given {name}={value!r}; a whole number was needed")
    if found < least:
        raise ValueError(f"{caller} was given {name}={found}; at least {least} was needed")
    return found


def floating(caller: str, dtype: Any) -> torch.dtype:
    """A floating dtype.

    Raises:
        TypeError: it is no dtype.
        ValueError: it is not floating.
    """
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{caller} was given dtype={dtype!r}; a torch.dtype was needed, such as torch.float32")
    if not dtype.is_floating_point:
        raise ValueError(f"{caller} was given dtype={dtype}; a floating one was needed")
    return dtype
