"""Operators of a block that is run again, computed with less: the same derivatives up to rounding.

In the double backward only the graph of the first derivative is needed, not the numbers of parameters' gradients. So
the outer product that is the gradient of a weight is left out, and its derivative is not. The second derivatives of
GELU and of softmax are taken in place and in pieces, where torch holds six temporaries of their size. What GELU gives
to a product is not kept beside what it was given, and made again when the derivative needs it. And the product
that ends a block, which the next block alone needed, is left out whenever the block is run again, as
torch.utils.checkpoint stops early; if a run goes on after it in another way than the first did, all is computed.
"""

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import Node
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
        leaves: tensors whose gradient's numbers nobody reads; None where the numbers are wanted.
        tail: which call of F.linear ends the block, as `end` said in its first run: its numbers are read by nobody who
            wants the block's derivative alone.
        first: whether it is the first run, in which all is computed as it is, and the end is found.
    """

    def __init__(self, leaves: list[Tensor] | None = None, tail: int | None = None, *, first: bool = False) -> None:
        super().__init__()
        self._leaves = {id(leaf) for leaf in leaves or () if leaf.requires_grad}
        self._second, self._tail, self._first = leaves is not None, tail, first
        self._count, self._ended, self.graph_only = 0, False, False
        self._last: tuple[int, Node] | None = None
        self._activated: tuple[Tensor, Tensor] | None = None

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
        kwargs = kwargs or {}
        if getattr(_running, "mode", None) is not self:
            return func(*args, **kwargs)
        activated, self._activated = self._activated, None
        if func is F.linear:
            return self._linear(*args, activated=activated, **kwargs)
        if func not in _AFTER_THE_END:
            if self._ended:
                raise NotTheEnd
            self._last = None
        found = _LEAN[func](*args, **kwargs) if self._second and func in _LEAN else None
        if found is not None and func is F.gelu:
            self._activated = found, args[0] if args else kwargs["input"]
        return func(*args, **kwargs) if found is None else found

    def _linear(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        activated: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if self._ended:
            raise NotTheEnd
        large = weight.dim() == 2 and _plain(input, weight) and input.numel() * weight.shape[0] >= _WORTH
        self._ended = large and self._count == self._tail
        self._count += 1
        if self._ended or (large and self._second and id(weight) in self._leaves):
            numbers: Tensor | None = None
            source: Tensor | None = None
            if activated is not None and activated[0] is input:
                # Made again of GELU's input, which is kept anyway, where its numbers are needed.
                numbers, source = input.detach(), activated[1].detach()
                input = _Numberless.apply(input)
            lean: Tensor = _Linear.apply(self, input, weight, bias, numbers, source)
            return lean
        found = F.linear(input, weight, bias)
        self._last = (self._count - 1, found.grad_fn) if self._first and large and found.grad_fn is not None else None
        return found

    def interrupted(self) -> None:
        """Another block runs inside of this one."""
        if self._ended:
            raise NotTheEnd
        self._last = None

    def end(self, graph: Mapping[Node, Sequence[Node]]) -> int | None:
        """Which call of F.linear ended the block, if nothing but sums and views came after it, in what was called and
        in the graph of the run.
        """
        last, self._last = self._last, None  # (which holds the graph)
        if last is None:
            return None
        queue = [last[1]]
        while queue:
            node = queue.pop()
            users = [user for user, used in graph.items() if node in used]
            if not all(user.name().startswith(_SUMS_AND_VIEWS) for user in users):
                return None
            queue += users
        return last[0]

    def numbers_unread(self, weight: Tensor) -> bool:
        """Whether the gradient that is being taken in a weight is wanted for its graph alone."""
        return self.graph_only and id(weight) in self._leaves and not weight._backward_hooks

    @property
    def ended(self) -> bool:
        """Whether the call that is running is that which ends the block."""
        return self._ended


class NotTheEnd(BaseException):
    """A block went on after the call that ended it in its first run."""


@contextmanager
def running(mode: Lean | None) -> Iterator[None]:
    """While a block runs with this mode: not with that of a block around it, whose leaves are other ones."""
    before = getattr(_running, "mode", None)
    if before is not None:
        before.interrupted()
    _running.mode = mode
    try:
        with nullcontext() if mode is None else mode:
            yield
    finally:
        _running.mode = before


_running = threading.local()


def _plain(input: Tensor, *others: Tensor) -> bool:
    """Whether neither autocast nor torch.func would have a word in an operator."""
    return (
        type(input) in (Tensor, FakeTensor)
        and input.dim() > 0
        and all(other.dtype is input.dtype for other in others)
        and not (input.device.type == "meta" or torch.is_autocast_enabled(input.device.type))
        and torch._C._functorch.maybe_current_level() is None
    )


class _Numberless(torch.autograd.Function):
    """A tensor's place in the graph, without its numbers."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        return input.new_zeros(()).expand(input.shape)

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> Tensor:
        return w


class _Filled(torch.autograd.Function):
    """The numbers that a place in the graph was left without: those of GELU at `source`."""

    @staticmethod
    def forward(ctx: Any, place: Tensor, source: Tensor) -> Tensor:
        return F.gelu(source).reshape(place.shape)

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> Any:
        return w, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mode: Lean,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        numbers: Tensor | None,
        source: Tensor | None,
    ) -> Tensor:
        ctx.mode, ctx.biased = mode, bias is not None and bias.requires_grad
        ctx.save_for_backward(input, weight, source)
        if mode.ended:
            return input.new_zeros(()).expand(*input.shape[:-1], weight.shape[0])
        return F.linear(input if numbers is None else numbers, weight, bias)

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> Any:
        input, weight, source = ctx.saved_tensors
        rows, given = w.reshape(-1, w.shape[-1]), input.reshape(-1, input.shape[-1])
        wanted = ctx.needs_input_grad[1], ctx.needs_input_grad[2], ctx.biased
        unread = ctx.mode.numbers_unread(weight)
        to_input, to_weight, to_bias = _LinearBackward.apply(unread, wanted, rows, given, weight, source)
        return None, None if to_input is None else to_input.reshape(input.shape), to_weight, to_bias, None, None


class _LinearBackward(torch.autograd.Function):
    """w W, w' x and the sum of w over the rows; of the second, where no numbers are read, its place in the graph."""

    @staticmethod
    def forward(
        ctx: Any, unread: bool, wanted: tuple[bool, ...], w: Tensor, x: Tensor, weight: Tensor, source: Tensor | None
    ) -> Any:
        ctx.save_for_backward(w, x, weight, source)
        ctx.set_materialize_grads(False)
        to_weight = None
        if wanted[1]:
            to_weight = w.new_zeros(()).expand(weight.shape) if unread else w.mT @ _filled(x, source)
        return w @ weight if wanted[0] else None, to_weight, w.sum(0) if wanted[2] else None

    @staticmethod
    def backward(ctx: Any, c: Tensor | None, c_weight: Tensor | None, c_bias: Tensor | None) -> Any:
        w, x, weight, source = ctx.saved_tensors
        to_w = None
        if ctx.needs_input_grad[2]:
            in_pieces = source is not None and c is not None and not torch.is_grad_enabled()
            pairs = [(c, weight)] if in_pieces or c_weight is None else [(c, weight), (_filled(x, source), c_weight)]
            to_w = _sum_of_products(pairs, c_bias, w.shape)
            if in_pieces and c_weight is not None:
                _add_products(to_w, source, c_weight)
        to_x = w @ c_weight if c_weight is not None and ctx.needs_input_grad[3] else None
        return None, None, to_w, to_x, w.mT @ c if c is not None and ctx.needs_input_grad[4] else None, None


def _filled(x: Tensor, source: Tensor | None) -> Tensor:
    found: Tensor = x if source is None else _Filled.apply(x, source)
    return found


def _add_products(total: Any, source: Any, c_weight: Tensor) -> None:
    """Add gelu(source) c_weight', without its first factor as a whole."""
    rows = source.reshape(-1, source.shape[-1])
    piece = -(-rows.shape[0] // 8)
    for out, part in zip(total.split(piece), rows.split(piece), strict=True):
        out.addmm_(F.gelu(part), c_weight.mT)


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


def _gelu(input: Tensor, approximate: str = "none") -> Tensor | None:
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
        # On a CPU in pieces that its cache holds; elsewhere in few, because each operator on each is a kernel's launch.
        piece = _PIECE if x.device.type == "cpu" else max(_PIECE, -(-x.numel() // 8))
        parts = (each.reshape(-1).split(piece) for each in (found, x, w, c))
        for out, part, weight, cotangent in zip(*parts, strict=True):
            squares = part.square()
            torch.exp(squares * -0.5, out=out)
            out.mul_(squares.neg_().add_(2)).mul_(weight).mul_(cotangent).mul_(1 / math.sqrt(2 * math.pi))
        return to_w, found


def _density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)


def _softmax(input: Tensor, dim: Any = None, *rest: Any, dtype: Any = None, **more: Any) -> Tensor | None:
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
    F.gelu: _gelu,
    F.softmax: lambda input, dim=None, _stacklevel=3, dtype=None: _softmax(input, dim, dtype=dtype),
    torch.softmax: _softmax,
    Tensor.softmax: _softmax,
}
_AFTER_THE_END = {
    torch.add,
    Tensor.add,
    Tensor.view,
    Tensor.reshape,
    Tensor.unflatten,
    Tensor.flatten,
    Tensor.transpose,
}
"""Functions that read no numbers, for a graph."""
_SUMS_AND_VIEWS = ("AddBackward", "ViewBackward", "UnsafeViewBackward", "ReshapeAliasBackward", "TransposeBackward")
