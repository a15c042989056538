"""Derivatives of a function that are large enough for float16 inside of it, and the same outside.

    inside:   every cotangent is S times the true one, in a derivative of any order
    at the edges:   Enter brings a tensor in, Leave brings one out; numbers forward are what they were

GradScaler multiplies a loss by S and divides the gradient by S. That suffices for a gradient; the products with the
Hessian that a hypergradient is made of would meet S squared, or none at all. Here the multiplication and the division
belong to the function: whoever differentiates it, once or twice, in whatever order, gets the true derivative.

A true value v is held inside as S v where it is a cotangent. Entering by a factor a is the map v -> a v into the
inside; its derivative maps a cotangent S c of the inside to a c, so it leaves by a / S. Leaving by b is v -> b v; its
derivative enters by S b. These two are each other's derivatives, so they are all there is. With S a power of two all
is exact, but for what overflows or vanishes.
"""

from typing import Any

import torch
from torch import Tensor

from bilevel.space import tree
from bilevel.space.tree import Tree


class _Enter(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, factor: float, scale: float) -> Tensor:
        return value.view_as(value) if factor == 1 else factor * value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.factor, ctx.scale = inputs

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return _Leave.apply(cotangent, ctx.factor / ctx.scale, ctx.scale), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Any:
        return _Enter.apply(tangent, ctx.factor, ctx.scale)


class _Leave(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, factor: float, scale: float) -> Tensor:
        return value.view_as(value) if factor == 1 else factor * value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.factor, ctx.scale = inputs

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return _Enter.apply(cotangent, ctx.factor * ctx.scale, ctx.scale), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Any:
        return _Leave.apply(tangent, ctx.factor, ctx.scale)


def entered(value: Tree, scale: float) -> Tree:
    """The tensors of a tree inside of a function whose cotangents are `scale` times the true ones."""
    return tree.tree_map(lambda leaf: _Enter.apply(leaf, 1.0, scale) if _derives(leaf) else leaf, value)


def left(value: Tree, scale: float) -> Tree:
    """What the function returns, outside again."""
    return tree.tree_map(lambda leaf: _Leave.apply(leaf, 1.0, scale) if _derives(leaf) else leaf, value)


def is_edge(node: Any) -> bool:
    """Whether a node of a graph is one of these, whose derivatives of all orders are known to be there."""
    return isinstance(node, (_Enter._backward_cls, _Leave._backward_cls))


def _derives(leaf: Any) -> bool:
    """Whether derivatives may pass through: also under torch.func, whose tensors do not say."""
    return (
        isinstance(leaf, Tensor)
        and leaf.is_floating_point()
        and (leaf.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(leaf))
    )
