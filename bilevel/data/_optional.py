"""Optional packages of the data: imported where they are used, with an error that says how to get them."""

import importlib
from typing import Any


def optional(name: str, extra: str = "problems") -> Any:
    """Import a module that the core does not need.

    Args:
        name: of the module.
        extra: the part of `pip install "bilevel[...]"` that has it.

    Raises:
        ImportError: it is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f'these data need {name}, which could not be imported ({error}): pip install "bilevel[{extra}]"'
        ) from error
