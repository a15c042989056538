"""Operators whose kernels allocate otherwise than torch's rules of shapes say.

A rule of shapes makes outputs that are as large as they look. Some kernels return a small tensor on a large storage,
because they compute in it first; here are their sizes. Others return a workspace whose size the kernel's library alone
knows; these are named in a note. Found by comparing a run with a forecast, operator by operator, over torch's own
samples of all its operators (torch.testing, float32 on a CPU, torch 2.13).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch._ops import OpOverload

from bilevel_profiling.meters.origin import operator_name

_aten = torch.ops.aten


def _elements(args: Sequence[Any]) -> int:
    """Of a loss before it is reduced."""
    return math.prod(torch.broadcast_shapes(args[0].shape, args[1].shape)) * torch.result_type(*args[:2]).itemsize


def _input(args: Sequence[Any]) -> int:
    return args[0].numel() * args[0].itemsize


STORAGE: Mapping[OpOverload, Callable[[Sequence[Any]], int]] = {
    _aten.mse_loss.default: _elements,
    _aten.smooth_l1_loss.default: _elements,
    _aten.binary_cross_entropy.default: _elements,
    _aten.soft_margin_loss.default: _elements,
    _aten.col2im.default: _input,
}
"""Bytes of the storage that the output lies on, at least, given the operator's arguments."""

UNSEEN = {
    _aten.mkldnn_rnn_layer.default: "the workspace of nn.LSTM, which may be larger than all else",
    _aten._sparse_mm_reduce_impl.default: "the places of the largest and smallest",
    _aten._embedding_bag.default: "a few bytes of offsets",
}
"""What operators return whose size the kernel alone knows."""


def note(operators: Iterable[OpOverload]) -> str:
    """What to say of operators that were met and are among the `UNSEEN`."""
    named = sorted(f"{operator_name(operator)} ({UNSEEN[operator]})" for operator in operators)
    return f"Too low by what the kernel of {' and of '.join(named)} makes beside its result: measure() shows its size."
