"""One explicit function of tensors as a graph of operators, with its derivatives already taken.

The function takes its derivatives by torch.autograd itself; the trace sees the operators that autograd runs, so that no
derivative of the graph is ever taken. (torch 2.13 compiles some gradients into wrong second derivatives.) Tensors that
the function finds elsewhere, in a closure, become further inputs of the graph: they are read anew at every call.
"""

import dataclasses
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bilevel.engine.compiled.graphs import tidy
from bilevel.outcome import NotTraceableError

Flat = Callable[[list[Tensor]], list[Tensor | None]]
"""Tensors to tensors; None where there is nothing, which must be so at every call."""


@dataclasses.dataclass(frozen=True)
class Traced:
    """A function as a graph without mutation.

    Attributes:
        graph: its placeholders are the inputs, then `constants`; it returns the outputs that are not None as a tuple.
        constants: tensors that the function found elsewhere, by reference.
        there: which outputs are not None.
    """

    graph: fx.GraphModule
    constants: tuple[Tensor, ...]
    there: tuple[bool, ...]


def trace(function: Flat, inputs: Sequence[Tensor]) -> Traced:
    """`function` as a graph; it is run once, on these inputs.

    Raises:
        NotTraceableError: it looks at the numbers of a tensor (an `if`, `.item()`, printing), with the line.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # (a second of imports, for those who trace)

    there: list[bool] = []

    def listed(*given: Tensor) -> tuple[Tensor, ...]:
        with Shapes(real=not any(map(_is_fake, given))):
            found = function(list(given))
        there[:] = [each is not None for each in found]
        # (An output that is an input, or one tensor twice, is one node; it comes out as it is.)
        return tuple(each for each in found if each is not None)

    try:
        first = make_fx(listed)(*inputs)
    except NotTraceableError:
        raise
    except RuntimeError as error:
        if "data-dependent" not in str(error):
            raise
        raise not_traceable("looks at the numbers of a tensor", error) from error
    constants = _lifted(first)
    if any(each.is_conj() or each.is_neg() for each in constants):
        raise not_traceable(
            "finds a conjugate or a negative that is yet to be computed (write .resolve_conj() or .resolve_neg())",
            line=False,
        )
    every = [*inputs, *constants]
    fake = not any(_is_fake(each) for each in every)
    with torch.no_grad(), torch._C._DisableAutocast():
        pure = torch.func.functionalize(first, remove="mutations")
        graph = make_fx(pure, tracing_mode="fake" if fake else "real")(*every)
    if any(
        node.target is torch.ops.aten.copy_.default and node.args[0].op == "placeholder" for node in graph.graph.nodes
    ):
        raise not_traceable(
            "writes into a tensor that it finds elsewhere (running statistics, a moving average)", line=False
        )
    leftover = _lifted(graph)
    assert not leftover, "a constant that only the second trace saw"
    return Traced(tidy(graph), tuple(constants), tuple(there))


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor)


def _lifted(module: fx.GraphModule) -> list[Tensor]:
    """The tensors that a graph holds as attributes, which become its last placeholders."""
    constants, places = list[Tensor](), dict[str, fx.Node]()
    last = [node for node in module.graph.nodes if node.op == "placeholder"][-1]
    for node in list(module.graph.nodes):
        if node.op != "get_attr":
            continue
        if node.target not in places:
            value = getattr(module, node.target)
            if not isinstance(value, Tensor):
                raise not_traceable(f"uses a {type(value).__name__} of its own", line=False)
            with module.graph.inserting_after(last):
                last = places[node.target] = module.graph.placeholder(f"constant_{len(constants)}")
            last.meta.update(node.meta)
            constants.append(value.detach())
        node.replace_all_uses_with(places[node.target])
        module.graph.erase_node(node)
    module.graph.lint()
    module.recompile()
    return constants


class Numbers(TorchFunctionMode):
    """Within it, looking at the numbers of a tensor is an error that names the line."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            raise not_traceable(f"calls {_READS[func]} of a tensor")
        return func(*args, **(kwargs or {}))


class Shapes(TorchDispatchMode):
    """Within it, an operator whose result's shape, or a Python number, depends on the numbers of a tensor is an error:
    the shape would be fixed in the derivatives.

    The trace notes the shape of each result by a tensor without data. Where the tensors are real it would make a mode
    for each anew, a third of its time: they share one, which is known while an operator runs and not to the function.
    """

    def __init__(self, *, real: bool) -> None:
        super().__init__()
        fake = torch._subclasses.FakeTensorMode(allow_fallback_kernels=True) if real else None
        self._known = torch._guards.TracingContext(fake) if real else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.data_dependent_output in func.tags:
            raise not_traceable("looks at the numbers of a tensor")
        if torch.Tag.dynamic_output_shape in func.tags and not _indexed_by_numbers(func, args):
            raise not_traceable(
                "makes a tensor whose shape depends on numbers (a boolean mask as index, nonzero, unique)"
            )
        if self._known is None:
            return func(*args, **(kwargs or {}))
        with torch._guards.tracing(self._known):
            return func(*args, **(kwargs or {}))


def _indexed_by_numbers(func: Any, args: Any) -> bool:
    if func is not torch.ops.aten.index.Tensor:
        return False
    return all(each is None or each.dtype not in (torch.bool, torch.uint8) for each in args[1])


_NAMES = ["item", "tolist", "numpy", "__array__", "__bool__", "__float__", "__int__", "__index__", "__complex__"]
_NAMES += ["__contains__", "__repr__", "__format__"]
_READS: dict[Any, str] = {getattr(Tensor, name): name for name in _NAMES}
_OURS = (str(Path(__file__).resolve().parents[2]), str(Path(torch.__file__).resolve().parent))


def not_traceable(does: str, error: Exception | None = None, *, line: bool = True) -> NotTraceableError:
    """The error for a loss that no graph stands for, with the user's line."""
    frames = traceback.extract_stack() if error is None else traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith((*_OURS, "<"))]
    inside = [i for i, frame in enumerate(frames) if frame.filename.startswith(_OURS[0])]
    if inside:  # below the first frame of ours there are the user's functions, above it the caller
        theirs = [f for f in frames[inside[0] :] if not f.filename.startswith((*_OURS, "<"))] or theirs
    where = f' (line {theirs[-1].lineno} of {theirs[-1].filename}: "{theirs[-1].line}")' if theirs and line else ""
    return NotTraceableError(
        f"the compiled engine cannot trace this loss: it {does}{where}, and what follows from that would be fixed "
        f"in the graph. Write it with tensor operators (torch.where instead of if), or take "
        f"engine=bilevel.Eager()"
    )
