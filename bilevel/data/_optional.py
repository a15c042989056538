"""Optional packages of the data: imported where they are used, with an error that says how to get them."""

import importlib
from typing import Any


def optional(name: str) -> Any:
    """Import a module that the core does not need.

    Raises:
        ImportError: it is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f'these data need {name}, which could not be imported ({error}): pip install "bilevel[problems]"'
        ) from error
