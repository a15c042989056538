"""A loss whose derivative is taken by .backward() alone, as a node of the graph: first derivatives only.

Modules whose parameters are gathered and scattered by hooks (FSDP2) know gradients of their own making: they must be
run forward and backward once, by their own rules. So the forward here runs both, and the backward hands out what was
found; a second derivative is refused.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import backward as accumulate

from bilevel.engine import autodiff
from bilevel.engine.shards import local


class Run(Protocol):
    """Loss and gradients at some tensors."""

    def __call__(self, tensors: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
        """The loss without a graph, and its gradient in the tensors that are wanted."""


def hooked(run: Run, tensors: Sequence[Tensor]) -> Tensor:
    """The loss as a function of tensors, once differentiable."""
    found: Tensor = _Hooked.apply(run, *tensors)
    return found


def part_of(tensor: Any) -> Tensor:
    """This rank's part of a DTensor, with its graph."""
    return local(tensor)


def backward(loss: Tensor) -> None:
    """What hooks expect: gradients are accumulated into leaves."""
    accumulate(loss)


class _Hooked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Run, *tensors: Tensor) -> Tensor:
        loss, gradients = run(tensors, ctx.needs_input_grad[1:])
        ctx.there = [gradient is not None for gradient in gradients]
        ctx.count = len(tensors)
        ctx.save_for_backward(*tensors, *(gradient for gradient in gradients if gradient is not None))
        return loss

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        inputs, known = ctx.saved_tensors[: ctx.count], iter(ctx.saved_tensors[ctx.count :])
        found: list[Tensor | None] = [next(known) * cotangent.detach() if there else None for there in ctx.there]
        if torch.is_grad_enabled():
            found = [None if each is None else _Once.apply(each, cotangent, *inputs) for each in found]
        return None, *found


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, *behind: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        raise autodiff.not_twice_differentiable("bilevel.distributed.fully_sharded")
