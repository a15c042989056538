"""The only caller of torch.autograd: every derivative passes here.

torch.autograd rather than torch.func: it held half the memory of torch.func.grad for the same unroll and was no slower,
and double backward beat forward-over-reverse in time and memory in every eager configuration measured on CPU.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from bilevel.outcome import NotTwiceDifferentiableError
from bilevel.space.tree import Leaves, PartialLeaves

Root = Tensor | GradientEdge
"""What a backward starts from: a tensor, or the place of one in the graph, which does not keep its numbers alive."""


def root(tensor: Tensor) -> Root:
    """The place of a tensor in its graph (the tensor itself if it has none), so that the tensor can be freed before the
    backward.
    """
    return get_gradient_edge(tensor) if tensor.grad_fn is not None else tensor


def grad(
    outputs: Sequence[Root],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> PartialLeaves:
    """Gradient of sum(weights * outputs) with respect to inputs; None where there is no path.

    Raises:
        NotTwiceDifferentiableError: an operator on the way has no derivative.
    """
    pairs = [
        (output, None if weights is None else weights[i]) for i, output in enumerate(outputs) if _has_graph(output)
    ]
    wanted = [i for i, leaf in enumerate(inputs) if leaf.requires_grad]
    found: list[Tensor | None] = [None] * len(inputs)
    if not pairs or not wanted:
        return tuple(found)
    try:
        gradients = torch.autograd.grad(
            [output for output, _ in pairs],  # type: ignore[arg-type]  # tensors and edges may be mixed
            [inputs[i] for i in wanted],
            None if weights is None else [weight for _, weight in pairs],
            create_graph=create_graph,
            retain_graph=retain_graph,
            allow_unused=True,
        )
    except (RuntimeError, NotImplementedError) as error:
        raise _explained(error) from error
    for i, gradient in zip(wanted, gradients, strict=True):
        # An embedding with sparse=True; optimizers and products are written for dense ones.
        found[i] = gradient.to_dense() if gradient is not None and gradient.layout is not torch.strided else gradient
    return tuple(found)


def _has_graph(output: Root) -> bool:
    return output.requires_grad if isinstance(output, Tensor) else True


def filled(gradients: PartialLeaves, like: Sequence[Tensor]) -> Leaves:
    """Zeros in place of None."""
    return tuple(
        torch.zeros_like(leaf) if gradient is None else gradient for gradient, leaf in zip(gradients, like, strict=True)
    )


# What torch says when a kernel has no derivative of its backward: fused attention, cuDNN recurrent nets, custom
# functions.
_MISSING = (
    re.compile(r"derivative for (?P<name>\S+) is not implemented"),
    re.compile(r"the derivative for '(?P<name>[^']+)' is not implemented"),
    re.compile(r"(?P<name>_cudnn_rnn_backward)"),
    re.compile(r"trying to differentiate twice a function that was marked with (?P<name>@once_differentiable)"),
)


def _explained(error: Exception) -> Exception:
    if "escaped from inside a function being vmapped" in str(error):
        return ValueError(
            "a loss under TaskMean recomputes in its backward, outside of torch.func.vmap (torch.utils.checkpoint "
            "does). "
            "Write TaskMean(estimator, chunk=1), which takes one task after another without vmap"
        )
    if "double backward" in str(error) and ("compile" in str(error) or "aot_autograd" in str(error)):
        return not_twice_differentiable("torch.compile", compiled=True)
    for pattern in _MISSING:
        match = pattern.search(str(error))
        if match:
            return not_twice_differentiable(match["name"])
    return error


def not_twice_differentiable(name: str, *, compiled: bool = False) -> NotTwiceDifferentiableError:
    """The error for an operator without a second derivative, with the estimators that need none and the remedy."""
    if compiled:
        remedy = "    write the loss with the module or function that was given to torch.compile, not with its result"
    elif "attention" in name:
        remedy = (
            "    from torch.nn.attention import SDPBackend, sdpa_kernel\n"
            "    with sdpa_kernel(SDPBackend.MATH): hg = bilevel.hypergradient(...)"
        )
    elif "rnn" in name:
        remedy = "    with torch.backends.cudnn.flags(enabled=False): hg = bilevel.hypergradient(...)"
    else:
        remedy = "    replace the operator in the loss by one made of differentiable torch operations"
    return NotTwiceDifferentiableError(
        f"the operator {name} has no second derivative, and this estimator needs one. Either take an estimator that "
        f"needs no double backward, estimator=bilevel.FirstOrderCorrected() or bilevel.FirstOrder(), or switch the "
        f"operator off:\n{remedy}"
    )


def symmetric_solve(matrix: Tensor, right: Tensor, solve: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`solve(matrix, right)`, the solution V of A V = B for a symmetric A, with the derivatives of the exact solution.

    For solvers whose steps are not to be differentiated: dB = A^{-1} dV and dA = -dB V', by one more solve. The
    derivative is as accurate as the two solves.

    Args:
        matrix: A, of shape (n, n).
        right: B, of shape (n, c).
        solve: called without a graph; also for the cotangents.
    """
    solution: Tensor = _SymmetricSolve.apply(matrix, right, solve)
    return solution


class _SymmetricSolve(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, right: Tensor, solve: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return solve(matrix, right)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.solve = inputs[2]

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor, None]:
        matrix, solution = ctx.saved_tensors
        pulled = _SymmetricSolve.apply(matrix, weight, ctx.solve)
        return -pulled @ solution.mT, pulled, None
