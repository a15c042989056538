"""Pickles of arrays, read without running them.

A pickle is a program: loading one from the web can run anything. Here only the steps that make arrays, numbers, texts
and plain containers are followed; anything else is refused before it runs.
"""

import collections
import os
import pickle
from typing import Any

from bilevel.data._optional import optional


class RefusedError(ValueError):
    """A pickle asks for something else than arrays and containers."""


def load(path: str | os.PathLike[str]) -> Any:
    """What a pickle of arrays and containers holds; written by Python 2 or 3.

    Raises:
        RefusedError: it asks for anything else; nothing of it was run.
        ValueError: it is damaged, or no pickle.
    """
    with open(path, "rb") as file:
        try:
            return _Arrays(file, encoding="latin1").load()
        except RefusedError as error:
            raise RefusedError(f"{path} {error}") from None
        except Exception as error:  # a damaged pickle fails in any way
            raise ValueError(f"{path} could not be read as a pickle: {type(error).__name__}: {error}") from error


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = _makers().get((module.replace("numpy._core", "numpy.core"), name))
        if known is None:
            raise RefusedError(
                f"asks for {module}.{name}; a pickle is a program, and only one of arrays, numbers, texts and plain "
                f"containers is read here. If you trust it, load it yourself and write bilevel.data.ClassSet.of(x, y)"
            )
        return known

    def persistent_load(self, pid: Any) -> Any:
        raise RefusedError("asks for an object that is kept elsewhere; only arrays and plain containers are read here")


def _makers() -> dict[tuple[str, str], Any]:
    """What a pickle may call, by the names that Python 2 and 3 and all versions of numpy write."""

    def to_bytes(text: str, encoding: str = "latin1") -> bytes:
        # How Python 3 writes bytes for readers of Python 2; no other codec is let in.
        if encoding != "latin1":
            raise RefusedError(f"asks for the codec {encoding!r}; only arrays and plain containers are read here")
        return text.encode("latin1")

    numpy = optional("numpy")
    array, number = numpy.zeros(1), numpy.float64(0)
    return {
        ("numpy", "ndarray"): numpy.ndarray,
        ("numpy", "dtype"): numpy.dtype,
        ("numpy.core.multiarray", "_reconstruct"): array.__reduce__()[0],
        ("numpy.core.multiarray", "scalar"): number.__reduce__()[0],
        ("numpy.core.numeric", "_frombuffer"): array.__reduce_ex__(5)[0],
        ("_codecs", "encode"): to_bytes,
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("collections", "defaultdict"): lambda factory=None: {},
        ("builtins", "list"): list,
        ("__builtin__", "list"): list,
        ("builtins", "set"): set,
        ("__builtin__", "set"): set,
        ("builtins", "bytearray"): bytearray,
    }
