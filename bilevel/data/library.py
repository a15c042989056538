"""Byte sequences from the source of Python's standard library, which every machine has, with a share replaced by noise.

The text is that of `MODULES`, in that order, from the folder of `os.__file__`. It, and so every number drawn from it,
is the same for the same Python version. Its last fifth is kept for validation and test. Noise is bytes drawn uniformly
at random.
"""

import dataclasses
import os
import pathlib
import random

import torch
from torch import Tensor

# Modules that have been single files of some length from Python 3.11 on.
MODULES = (
    "argparse", "ast", "calendar", "configparser", "contextlib", "copy", "csv", "dataclasses", "difflib", "enum",
    "fractions", "functools", "heapq", "inspect", "locale", "optparse", "pickle", "pprint", "random", "shlex",
    "shutil", "socket", "statistics", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "tokenize",
    "traceback", "typing", "uuid", "warnings", "weakref",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """Byte sequences, long [n, context + 1]: what is read and, one place on, what is to be predicted.

    Attributes:
        train: some of it corrupted.
        corrupted: which sequences of `train` are, bool [n].
        valid, test: clean, from other text.
    """

    train: Tensor
    corrupted: Tensor
    valid: Tensor
    test: Tensor


def source(folder: str | os.PathLike[str] | None = None) -> bytes:
    """The text: `MODULES`, one after the other.

    Args:
        folder: where they are; None for the standard library's.

    Raises:
        FileNotFoundError: this Python keeps its library elsewhere (in a zip file, say).

    Example:
        >>> b"import" in source()
        True
    """
    library = pathlib.Path(os.__file__).parent if folder is None else pathlib.Path(folder)
    try:
        # Windows keeps other line ends.
        return b"".join((library / f"{name}.py").read_bytes().replace(b"\r\n", b"\n") for name in MODULES)
    except OSError as error:
        raise FileNotFoundError(
            f"the text is the source of Python's standard library, and {error.filename} could not be read. Pass text "
            f"of your own: load(text=...)"
        ) from error


def load(
    seed: int = 0,
    corruption: float = 0.5,
    device: torch.device | str = "cpu",
    *,
    context: int = 64,
    examples: int = 64,
    validation: int = 64,
    test: int = 64,
    text: bytes | None = None,
) -> Text:
    """Cut sequences out of the text, at random places, and corrupt some.

    Args:
        seed: of the places and the corruption; the same one gives the same data.
        corruption: share of the training sequences that are replaced by random bytes.
        device: of all tensors.
        context: length of the sequences, less the one byte that is only predicted.
        examples: how many training sequences.
        validation: how many validation sequences.
        test: how many test sequences.
        text: in place of `source()`.

    Raises:
        FileNotFoundError: see `source`.
        TypeError: `text` is not bytes.
        ValueError: `corruption` is not in [0, 1], a size is smaller than 1, or the text is too short.

    Example:
        >>> data = load(context=24)
        >>> data.train.shape, int(data.corrupted.sum())
        (torch.Size([64, 25]), 32)
        >>> len(bytes(data.valid[0].tolist()))
        25
    """
    if not 0 <= corruption <= 1:
        raise ValueError(f"sequences with corruption={corruption} were asked for; a share in [0, 1] was needed")
    for name, size in {"context": context, "examples": examples, "validation": validation, "test": test}.items():
        if size < 1:
            raise ValueError(f"sequences with {name}={size} were asked for; at least 1 was needed")
    text = source() if text is None else text
    if not isinstance(text, bytes):
        raise TypeError(
            f"a text of type {type(text).__name__} was given; bytes were needed. Write text.encode() for a str, "
            f"bytes(text) for the rest"
        )
    length, kept = context + 1, len(text) * 4 // 5
    if min(kept, len(text) - kept) < length:
        raise ValueError(
            f"sequences with context={context} were asked for, of a text of {len(text)} bytes; its last fifth must "
            f"hold {length}"
        )
    rng = random.Random(seed)

    def cut(count: int, low: int, high: int) -> list[bytes]:
        places = [rng.randrange(low, high - length + 1) for _ in range(count)]
        return [text[place : place + length] for place in places]

    # In this order: which sequences are corrupted depends on no other size, and the training set on none of the other
    # sets'.
    wrong = set(rng.sample(range(examples), round(corruption * examples)))
    train = [rng.randbytes(length) if row in wrong else sequence for row, sequence in enumerate(cut(examples, 0, kept))]
    valid, unseen = cut(validation, kept, len(text)), cut(test, kept, len(text))

    def numbers(sequences: list[bytes]) -> Tensor:
        return torch.tensor([list(sequence) for sequence in sequences], device=device)

    corrupted = torch.tensor([row in wrong for row in range(examples)], device=device)
    return Text(train=numbers(train), corrupted=corrupted, valid=numbers(valid), test=numbers(unseen))
