"""Derivatives inside a function of the user's or of a head: Jacobians that are themselves differentiated later.

By torch.func, because a function under `TaskMean` is mapped by vmap while its parameters are not: torch.autograd.grad
inside it would sum the derivative over the tasks. Products J v are two reverse sweeps, which every operator with a
second derivative allows.

Normalization layers are written out in elementary operators meanwhile. The fused ones keep the statistics of their
forward as numbers without a derivative, so that (torch 2.13) a third derivative, and a second one under vmap, is wrong
without a word, often by a tenth: of batch, layer and instance normalization and of weight normalization.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bilevel.space import tree
from bilevel.space.inner_product import NARROW
from bilevel.space.tree import Tree


def pullback(function: Callable[[Tree], Tensor], at: Tree) -> tuple[Tensor, Callable[[Tensor], Tree]]:
    """f(at), and the map from a cotangent u of its shape to J' u, a tree like `at`. Cost: 1 forward; 1 VJP a call."""
    with Elementary():
        value, pull = torch.func.vjp(function, at)[:2]
    return value, lambda cotangent: pull(cotangent)[0]


def product(function: Callable[[Tree], Tensor], at: Tree, direction: Tree) -> Tensor:
    """J v for v a tree like `at`. Cost: 1 forward and 2 VJPs; memory of the first VJP's graph."""
    value, pull = pullback(function, at)
    # J' u is linear in u; its transpose is J.
    push = torch.func.vjp(pull, torch.zeros_like(value))[1]
    return push(direction)[0]


def jacobian(function: Callable[[Tree], Tensor], at: Tree) -> tuple[Tensor, Tree]:
    """f(at) of shape S, and J as a tree like `at` with tensors of shape (S.numel(), ...). Cost: S.numel() VJPs at
    once.
    """
    value, pull = pullback(function, at)
    basis = torch.eye(value.numel(), dtype=value.dtype, device=value.device).reshape(-1, *value.shape)
    return value, torch.func.vmap(pull)(basis)


def gradient(function: Callable[[Tree], Tensor], at: Tree) -> tuple[Tensor, Tree]:
    """f(at), 0-dim, and its gradient. Cost: 1 gradient.

    Raises:
        ValueError: f(at) is not 0-dim.
    """
    value, pull = pullback(function, at)
    if value.dim():
        raise ValueError(f"a loss has the shape {tuple(value.shape)}; a 0-dim tensor was needed")
    return value, pull(torch.ones_like(value))


class Elementary(TorchFunctionMode):
    """Within it, normalization layers compute by differentiable operators alone.

    Example:
        >>> layer, x = torch.nn.BatchNorm1d(2, affine=False), torch.tensor([[1.0, 2.0], [3.0, 6.0]])
        >>> with Elementary():
        ...     layer(x)
        tensor([[-1.0000, -1.0000],
                [ 1.0000,  1.0000]])
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        written = _WRITTEN_OUT.get(func)
        return (func if written is None else written)(*args, **(kwargs or {}))


def _standardized(x: Tensor, dims: Iterable[int], eps: float) -> Tensor:
    wide = x.float() if x.dtype in NARROW else x  # statistics of 16-bit numbers are taken in float32, as in the layers
    variance, mean = torch.var_mean(wide, list(dims), correction=0, keepdim=True)
    return ((wide - mean) * (variance + eps).rsqrt()).to(x.dtype)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int]) -> Tensor:
    x = x if weight is None else x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


def _per_channel(x: Tensor) -> list[int]:
    return [1, -1, *[1] * (x.dim() - 2)]


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    shape = _per_channel(input)
    if training:
        if running_mean is not None:  # it writes its statistics; `functional` refuses such layers
            return F.batch_norm(input, running_mean, running_var, weight, bias, True, momentum, eps)
        return _affine(_standardized(input, [0, *range(2, input.dim())], eps), weight, bias, shape)
    assert running_mean is not None
    assert running_var is not None
    fixed = (input - running_mean.reshape(shape)) * (running_var + eps).rsqrt().reshape(shape)
    return _affine(fixed, weight, bias, shape)


def _layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    shape = list(normalized_shape)
    return _affine(_standardized(input, range(-len(shape), 0), eps), weight, bias, shape)


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    groups = input.reshape(input.shape[0], num_groups, -1)
    return _affine(_standardized(groups, [2], eps).reshape(input.shape), weight, bias, _per_channel(input))


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return _batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    if running_mean is not None:
        return F.instance_norm(input, running_mean, running_var, weight, bias, True, momentum, eps)
    return _affine(_standardized(input, range(2, input.dim()), eps), weight, bias, _per_channel(input))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


_WRITTEN_OUT: dict[Any, Callable[..., Tensor]] = {
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    torch._weight_norm: _weight_norm,
}


def dot(one: Tree, other: Tree) -> Tensor:
    """Rows of two Jacobians against each other: J_1 J_2', of shape (S_1.numel(), S_2.numel()), in float64."""
    total = None
    for a, b in zip(tree.tensors(one), tree.tensors(other), strict=True):
        block = a.flatten(1).double() @ b.flatten(1).double().mT
        total = block if total is None else total + block
    assert total is not None
    return total
