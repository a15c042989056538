"""Is what a compiled function returned what the eager one returns?"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Relative, of the norm of a part of the result: a single entry may be nothing but rounding (the gradient of a bias
before a batch normalization)."""
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


def mismatch(
    found: Sequence[Results],
    wanted: Sequence[Results],
    narrowest: torch.dtype,
    again: Callable[[], Sequence[Results]],
    shaken: Callable[[], Sequence[Results]],
) -> float | None:
    """The relative difference of two results that do not agree; None if they do.

    Results come in parts (the loss, the derivatives in y, in x, in the batch), each of which is compared by itself: a
    large loss hides a small gradient.

    Args:
        found: of the compiled function.
        wanted: of the eager one.
        narrowest: the dtype with the fewest digits on the way.
        again: the eager results once more, which must be the same: a loss with a counter has no result to compare.
        shaken: the eager results at inputs changed in their last digit, which says how much of them is rounding. Both
            are asked for where the others differ.
    """
    parts = list(zip(found, wanted, strict=True))
    pairs = [difference(a, b) for a, b in parts]
    sizes = [size for _, size in pairs]
    if not all(map(math.isfinite, sizes)):
        return None  # a loop that diverged says so itself
    tolerance = TOLERANCES[narrowest]
    if all(apart <= tolerance * size for apart, size in pairs):
        return None
    whole = max(sizes)
    noise = [0.0] * len(parts)
    if all(math.isfinite(apart) for apart, _ in pairs):
        same = all(difference(a, b)[0] <= tolerance * size for a, b, size in zip(again(), wanted, sizes, strict=True))
        if same:
            least = torch.finfo(narrowest).eps * whole
            noise = [_NOISE * max(difference(a, b)[0], least) for a, b in zip(shaken(), wanted, strict=True)]
    off = [
        apart / size if size else math.inf
        for (apart, size), rounding in zip(pairs, noise, strict=True)
        if not apart <= tolerance * size + rounding
    ]
    return max(off, default=None)


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
