"""Is what a compiled function returned what the eager one returns?"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Relative, of the norm of the whole result: a single entry may be nothing but rounding (the gradient of a bias before
a batch normalization)."""
_NOISE = 100.0
"""How many times the change under a last-digit change of the inputs a difference may be."""

Results = Sequence[Tensor | None]


def difference(found: Results, wanted: Results) -> tuple[float, float]:
    """|found - wanted| and |wanted|, over all tensors."""
    apart = size = 0.0
    for a, b in zip(found, wanted, strict=True):
        if a is None and b is None:
            continue
        left, right = (torch.zeros_like(b) if a is None else a), (torch.zeros_like(a) if b is None else b)  # type: ignore[arg-type]
        apart += float(torch.linalg.vector_norm(left.double() - right.double())) ** 2
        size += float(torch.linalg.vector_norm(right.double())) ** 2
    return apart**0.5, size**0.5


def mismatch(found: Results, wanted: Results, narrowest: torch.dtype, shaken: Callable[[], Results]) -> float | None:
    """The relative difference of two results that do not agree; None if they do.

    Args:
        found: of the compiled function.
        wanted: of the eager one.
        narrowest: the dtype with the fewest digits on the way.
        shaken: the eager results at inputs changed in their last digit, which says how much of them is rounding; asked
            for where the others differ.
    """
    apart, size = difference(found, wanted)
    if not torch.isfinite(torch.tensor(size)):
        return None  # a loop that diverged says so itself
    if apart <= TOLERANCES[narrowest] * size:
        return None
    if torch.isfinite(torch.tensor(apart)):
        rounding, _ = difference(shaken(), wanted)
        if apart <= TOLERANCES[narrowest] * size + _NOISE * rounding:
            return None
    return apart / size if size else float("inf")


def shake(tensors: Sequence[Tensor], narrowest: torch.dtype) -> list[Tensor]:
    """Floating tensors with every entry changed in its last digit, up or down by turns."""
    made = []
    for each in tensors:
        if not each.is_floating_point():
            made.append(each)
            continue
        signs = torch.ones(each.numel(), dtype=each.dtype, device=each.device)
        signs[::2] = -1
        eps = max(torch.finfo(narrowest).eps, torch.finfo(each.dtype).eps)
        made.append(each + each * signs.reshape(each.shape) * eps)
    return made
