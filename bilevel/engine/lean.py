"""Operators of a block in its double backward, computed with less: the same derivatives up to rounding.

Of the first derivative only the graph is needed there, no numbers of parameters' gradients. So the outer product that
is the gradient of a weight is left out, and its derivative is not. The second derivatives of GELU and of softmax are
taken in place and in pieces, where torch holds six temporaries of their size.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

_WORTH = 2**20
"""Multiplications of a product, below which it is cheaper than a Function."""
_LARGE = 2**15
"""Numbers of an activation, below which torch's own derivative is as good."""
_PIECE = 2**15
"""Numbers at once."""


class Lean(TorchFunctionMode):
    """Within it, one block's operators are computed with less.

    Args:
        leaves: tensors whose gradient's numbers nobody reads.

    Attributes:
        active: the mode whose block is running: not that of a block around it, whose leaves are other ones.
    """

    active: "Lean | None" = None

    def __init__(self, leaves: list[Tensor]) -> None:
        super().__init__()
        self._leaves = {id(leaf) for leaf in leaves if leaf.requires_grad}
        self.graph_only = False

    @contextmanager
    def only_graph(self) -> Iterator[None]:
        """While the gradient is taken of which the graph is wanted alone: neither one in the block's own code, nor the
        one that goes back through that graph.
        """
        self.graph_only = True
        try:
            yield
        finally:
            self.graph_only = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if Lean.active is self and func in _LEAN:
            found = _LEAN[func](self, *args, **(kwargs or {}))
            if found is not None:
                return found
        return func(*args, **(kwargs or {}))

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """F.linear, or None where nothing is gained."""
        if (
            id(weight) not in self._leaves
            or weight._backward_hooks
            or weight.dim() != 2
            or not _plain(input, weight)
            or input.numel() * weight.shape[0] < _WORTH
        ):
            return None
        found: Tensor = _Linear.apply(self, input, weight, bias)
        return found


def _plain(input: Tensor, *others: Tensor) -> bool:
    """Whether neither autocast nor torch.func would have a word in an operator."""
    return (
        type(input) in (Tensor, FakeTensor)
        and input.dim() > 0
        and all(other.dtype is input.dtype for other in others)
        and not torch.is_autocast_enabled(input.device.type)
        and torch._C._functorch.maybe_current_level() is None
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mode: Lean, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.mode, ctx.biased = mode, bias is not None and bias.requires_grad
        ctx.save_for_backward(input, weight)
        return F.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> Any:
        input, weight = ctx.saved_tensors
        rows, given = w.reshape(-1, w.shape[-1]), input.reshape(-1, input.shape[-1])
        wanted = ctx.needs_input_grad[1], ctx.biased
        to_input, to_weight, to_bias = _LinearBackward.apply(ctx.mode.graph_only, wanted, rows, given, weight)
        return None, None if to_input is None else to_input.reshape(input.shape), to_weight, to_bias


class _LinearBackward(torch.autograd.Function):
    """w W, w' x and the sum of w over the rows; of the second, where no numbers are read, its place in the graph."""

    @staticmethod
    def forward(ctx: Any, graph_only: bool, wanted: tuple[bool, bool], w: Tensor, x: Tensor, weight: Tensor) -> Any:
        ctx.save_for_backward(w, x, weight)
        ctx.set_materialize_grads(False)
        to_weight = w.new_zeros(()).expand(weight.shape) if graph_only else w.mT @ x
        return w @ weight if wanted[0] else None, to_weight, w.sum(0) if wanted[1] else None

    @staticmethod
    def backward(ctx: Any, c: Tensor | None, c_weight: Tensor | None, c_bias: Tensor | None) -> Any:
        w, x, weight = ctx.saved_tensors
        to_w = _sum_of_products([(c, weight), (x, c_weight)], c_bias, w.shape) if ctx.needs_input_grad[2] else None
        to_x = w @ c_weight if c_weight is not None and ctx.needs_input_grad[3] else None
        return None, None, to_w, to_x, w.mT @ c if c is not None else None


def _sum_of_products(pairs: list[Any], bias: Tensor | None, shape: torch.Size) -> Tensor | None:
    """The sum of a b' over the pairs, and of the bias, in one buffer, where autograd would add up three of its size."""
    total: Tensor | None = None
    graph = torch.is_grad_enabled()
    for a, b in pairs:
        if a is not None and b is not None:
            total = a @ b.mT if total is None else total.addmm(a, b.mT) if graph else total.addmm_(a, b.mT)
    if bias is None:
        return total
    return bias.expand(shape) if total is None else total + bias if graph else total.add_(bias)


def _elementwise(input: Any) -> bool:
    return _plain(input) and input.requires_grad and input.is_floating_point() and input.numel() >= _LARGE


def _gelu(mode: Lean, input: Tensor, approximate: str = "none") -> Tensor | None:
    found: Tensor | None = _Gelu.apply(input) if approximate == "none" and _elementwise(input) else None
    return found


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.save_for_backward(input)
        return F.gelu(input)

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> Any:
        return _GeluBackward.apply(w, *ctx.saved_tensors)


class _GeluBackward(torch.autograd.Function):
    """w gelu'(x), with gelu'' = phi(x) (2 - x^2) for the density phi of the normal distribution."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, input: Tensor) -> Tensor:
        ctx.save_for_backward(w, input)
        return torch.ops.aten.gelu_backward(w, input)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> Any:
        w, x = ctx.saved_tensors
        to_w = torch.ops.aten.gelu_backward(c, x)
        if torch.is_grad_enabled():
            return to_w, c * w * _density(x) * (2 - x.square())
        found = torch.empty_like(x, memory_format=torch.contiguous_format)
        parts = (each.reshape(-1).split(_PIECE) for each in (found, x, w, c))
        for out, piece, weight, cotangent in zip(*parts, strict=True):
            squares = piece.square()
            torch.exp(squares * -0.5, out=out)
            out.mul_(squares.neg_().add_(2)).mul_(weight).mul_(cotangent).mul_(1 / math.sqrt(2 * math.pi))
        return to_w, found


def _density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)


def _softmax(mode: Lean, input: Tensor, dim: Any = None, *rest: Any, dtype: Any = None, **more: Any) -> Tensor | None:
    lean = isinstance(dim, int) and not rest and not more and dtype is None and _elementwise(input)
    found: Tensor | None = _Softmax.apply(input, dim) if lean else None
    return found


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, dim: int) -> Tensor:
        found = torch.softmax(input, dim)
        ctx.save_for_backward(found)
        ctx.dim = dim
        return found

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> Any:
        return _SoftmaxBackward.apply(w, ctx.saved_tensors[0], ctx.dim), None


class _SoftmaxBackward(torch.autograd.Function):
    """y (w - <w, y>) for y = softmax(x)."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, y: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(w, y)
        ctx.dim = dim
        return torch._softmax_backward_data(w, y, dim, y.dtype)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> Any:
        (w, y), dim = ctx.saved_tensors, ctx.dim
        to_w = torch._softmax_backward_data(c, y, dim, y.dtype)
        along_w, along_c = (w * y).sum(dim, keepdim=True), (c * y).sum(dim, keepdim=True)
        if torch.is_grad_enabled():
            return to_w, c * (w - along_w) - w * along_c, None
        return to_w, (w - along_w).mul_(c).addcmul_(w, along_c, value=-1), None


_LEAN: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: Lean.linear,
    F.gelu: _gelu,
    F.softmax: lambda mode, input, dim=None, _stacklevel=3, dtype=None: _softmax(mode, input, dim, dtype=dtype),
    torch.softmax: _softmax,
    Tensor.softmax: _softmax,
}
