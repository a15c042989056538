"""rematerialize(function): a block that keeps its inputs and computes the rest again, to the second order."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from bilevel.engine.captures import reachable, refuse
from bilevel.engine.rematerialize import rematerialized

Function = TypeVar("Function", bound=Callable[..., Any])


def rematerialize(function: Function, *, offload: bool = False) -> Function:
    """The same function, which keeps nothing but its inputs in the forward, in the backward and in the double backward.

    What autograd would keep of it is computed again when it is needed. Of n blocks one after another, a gradient and a
    product with second derivatives hold the inputs of n blocks and the graph of one, where autograd holds n graphs.
    Cost of a block: 1 more forward in a gradient; 2 more forwards and 2 more backwards in a product. Numbers are the
    same up to rounding. Without a graph (torch.no_grad(), no input that requires grad) and inside torch.func's grad and
    jvp it is the function itself. Third derivatives are right, and keep what autograd keeps.

    For layers of a module write `functional(module, rematerialize=Block)`.

    Args:
        function: of any arguments, tensors or not, in any containers that torch's pytrees know; what it returns
            likewise. It must be a function of its arguments and of torch's global random numbers, which are replayed,
            as autocast is. It works under torch.func.vmap, with dropout, and inside another such function. What it
            uses without being given it (the parameters of a module, variables of its closure) is differentiated, too,
            if it is a leaf such as a parameter or is found in its closure.

        offload: whether the kept inputs wait in pinned memory of the host, on CUDA: copied there while the next block
            runs, and back while the one after is differentiated. Those that operators made; leaves (parameters,
            batches) are held by others and stay. On the CPU all stay what they are.

    Returns:
        A function of the same arguments.

    Memory: of n blocks of a CUDA device's, with `offload`, the graph of one, its inputs and those of the next; the n
        inputs are on the host.

    Raises:
        TypeError: `function` cannot be called, or `offload` is no bool.
        ValueError: here, when a part of it was given to torch.compile or has a torch.Generator; in the call, when it
            changes an argument in place or writes a module's buffer, when it returns tensors in an object that pytrees
            do not know or stores one outside, or when it uses a tensor that requires grad, was computed elsewhere and
            is not in its closure (or two, one computed from the other): give it as an argument; in the backward, when
            it returned other shapes than in the forward.
        RuntimeError: a third derivative is taken, and it uses a tensor that is no argument.

    Source: an autograd.Function whose backward is one; the idea is that of gradient checkpointing (Chen et al. 2016,
    arXiv:1604.06174), which torch.utils.checkpoint does for the first derivative only.

    Example:
        >>> import torch, bilevel as bl
        >>> block = bl.rematerialize(lambda h, w: torch.tanh(h @ w))
        >>> h, w = torch.ones(4, 3), torch.full((3, 3), 0.1, requires_grad=True)
        >>> loss = block(block(block(h, w), w), w).sum()
        >>> gradient, = torch.autograd.grad(loss, w, create_graph=True)
        >>> torch.autograd.grad(gradient.sum(), w)[0].shape  # a product with the Hessian
        torch.Size([3, 3])
    """
    if not callable(function):
        raise TypeError(f"rematerialize() was given a {type(function).__name__}; a function was needed")
    if not isinstance(offload, bool):
        raise TypeError(f"rematerialize() was given offload={offload!r}; True or False was needed")
    refuse(function)
    modules = dict.fromkeys(reachable(function, nn.Module))

    def block(*arguments: Any, **keywords: Any) -> Any:
        buffers = [
            (buffer, buffer._version) for module in modules for buffer in module._buffers.values() if _has(buffer)
        ]
        found = rematerialized(function, arguments, keywords, offload=offload)
        if any(buffer._version != version for buffer, version in buffers):
            name = getattr(function, "__name__", type(function).__name__)
            raise ValueError(
                f"the rematerialized block {name} writes a buffer of a module, and would write it again each time it "
                f"is run. Switch the layer to a mode that does not write (module.eval(), or track_running_stats=False)"
            )
        return found

    if isinstance(function, nn.Module):
        block.__name__ = type(function).__name__
        return block  # type: ignore[return-value]
    return functools.wraps(function, updated=())(block)  # type: ignore[return-value]


def _has(buffer: Any) -> bool:
    return buffer is not None and not buffer.is_inference()
