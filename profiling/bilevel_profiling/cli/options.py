"""Types of options: each turns a word of the command line into a value, or says what was needed."""

import argparse
import ast
import math
from typing import TYPE_CHECKING, Any

from bilevel_profiling.records import sizes

if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]
    """What a verb is added to."""


def labels(text: str) -> list[str]:
    """Words separated by commas."""
    found = [label.strip() for label in text.split(",") if label.strip()]
    if not found:
        raise argparse.ArgumentTypeError("at least one label was needed")
    return found


def numbers(text: str) -> tuple[int, ...]:
    """Numbers of steps separated by commas, sorted."""
    try:
        found = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 1,5,20") from None
    if found[0] < 0:
        raise argparse.ArgumentTypeError(f"{found[0]} is negative; a number of steps was needed")
    return found


def count(text: str) -> int:
    """A whole number, 0 included."""
    return _at_least(text, 0)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _at_least(text, 1)


def seconds(text: str) -> float:
    """A positive number of seconds."""
    found = _number(text)
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number of seconds")
    return found


def size(text: str) -> int:
    """Bytes, with or without a unit."""
    try:
        return sizes.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def share(text: str) -> float:
    """A number of percent, with or without the sign, as a fraction.

    Example:
        >>> share("10%"), share("0.1")
        (0.1, 0.001)
    """
    found = _number(text.strip().removesuffix("%"))
    if not 0 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no percentage of at least 0, such as 10 or 10%")
    return found / 100


def setting(text: str) -> tuple[str, Any]:
    """A name and its value: a Python literal, or else the text.

    Example:
        >>> setting("width=2048"), setting("name=glyphs")
        (('width', 2048), ('name', 'glyphs'))
    """
    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is no setting such as width=2048")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _at_least(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
