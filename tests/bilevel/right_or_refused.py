"""What the tests of wrong numbers accept: the right number, a refusal in words, or a status that has failed."""

import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import bilevel as bl

D = torch.float64
NONE = bl.Batches(None, None)
REFUSALS = (ValueError, TypeError, bl.NotTwiceDifferentiableError, bl.BilevelError)
_LIBRARY = str(Path(bl.__file__).parent)


def is_refusal(error: BaseException) -> bool:
    """Whether the library itself raised `error` with a `raise` of its own, not an operator that it called."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return isinstance(error, REFUSALS) and frame.filename.startswith(_LIBRARY) and str(frame.line).startswith("raise")


def refusal_of(call: Callable[[], Any]) -> BaseException | None:
    """What the library refuses `call` with, None if it goes through; any other exception passes on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call()
        except REFUSALS as error:
            if is_refusal(error):
                return error
            raise
    return None


def right_or_refused(
    call: Callable[[], bl.Hypergradient], expected: Any, rtol: float = 1e-6, atol: float = 1e-9
) -> bl.Hypergradient | None:
    """Assert that `call` gives `expected` as its hypergradient, or refuses, or has a failed status.

    Returns:
        The hypergradient, None if it was refused.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            hg = call()
        except REFUSALS as error:
            if is_refusal(error):
                return None
            raise
    if hg.status.failed:
        return hg
    close(hg.grad, expected, rtol, atol, f"with {hg.status.name}")
    return hg


def close(given: Any, expected: Any, rtol: float = 1e-6, atol: float = 1e-9, note: str = "") -> None:
    """Assert that two trees of tensors agree, each leaf by the norm of the whole leaf."""
    found, wanted = (torch.utils._pytree.tree_leaves(value) for value in (given, expected))
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        a, b = a.detach().to(D), torch.as_tensor(b, dtype=D)
        off = (a - b).norm().item()
        assert off <= rtol * b.norm().item() + atol, f"got {a}, {b} is right {note}"


def central(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, step: float = 1e-6) -> torch.Tensor:
    """Gradient of a scalar function of one tensor by central differences."""
    found = torch.zeros_like(x)
    for i in range(x.numel()):
        d = torch.zeros_like(x)
        d.view(-1)[i] = step
        found.view(-1)[i] = (function(x + d) - function(x - d)) / (2 * step)
    return found
