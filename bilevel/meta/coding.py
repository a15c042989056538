"""Class numbers as targets of a regression."""

import torch
from torch import Tensor

from bilevel.outcome import readable

CODINGS = ("one-hot", "signed", "centered")


def check_coding(owner: str, classes: object, coding: object) -> None:
    """Raise ValueError unless these are a number of classes, or None, and one of the codings."""
    if classes is not None and (isinstance(classes, bool) or not isinstance(classes, int) or classes < 2):
        raise ValueError(
            f"{owner} was given classes={classes!r}; an integer of at least 2 was needed, or None for a regression"
        )
    if coding not in CODINGS:
        raise ValueError(f"{owner} was given coding={coding!r}; one of {', '.join(map(repr, CODINGS))} was needed")


def coded(owner: str, targets: Tensor, classes: int | None, coding: str) -> Tensor:
    """Targets of a regression in float64: those given, or (n, classes) numbers made of n class numbers.

    "one-hot": 1 at the class, else 0. "signed": 1 and -1. "centered": one-hot less 1 / classes, so that rows sum to 0.

    Raises:
        ValueError: no integer tensor of shape (n,) where there are classes, or no floating one where there are none; a
            class number outside of 0, ..., classes - 1 (under vmap its row is NaN instead).
    """
    if classes is None:
        if not targets.is_floating_point() or targets.dim() not in (1, 2):
            raise ValueError(
                f"{owner} was given targets of shape {tuple(targets.shape)} and dtype {targets.dtype}; floating ones "
                f"of shape (n,) or (n, c) were needed. For class numbers write {owner}(..., classes=5)"
            )
        return targets.double()
    if targets.is_floating_point() or targets.dtype is torch.bool or targets.is_complex() or targets.dim() != 1:
        raise ValueError(
            f"{owner} was given classes={classes} and targets of shape {tuple(targets.shape)} and dtype "
            f"{targets.dtype}; n class numbers were needed, an integer tensor of shape (n,). For a regression leave "
            f"classes out"
        )
    inside = (targets >= 0) & (targets < classes)
    if readable(inside) and not bool(inside.all()):
        raise ValueError(
            f"{owner} was given classes={classes} and class numbers from {int(targets.min())} to {int(targets.max())}; "
            f"numbers from 0 to {classes - 1} were needed"
        )
    at = targets[:, None] == torch.arange(classes, device=targets.device)
    one_hot = torch.where(inside[:, None], at.double(), torch.nan)
    if coding == "signed":
        return 2 * one_hot - 1
    return one_hot - 1 / classes if coding == "centered" else one_hot
