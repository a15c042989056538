"""How a graph is run: by the code that TorchInductor makes of it, or as it is."""

import contextlib
import functools
import hashlib
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from bilevel.engine.compiled.piece import Compile, Made

BACKENDS = ("inductor", "graph")
_compiled: "weakref.WeakValueDictionary[Any, Any]" = weakref.WeakValueDictionary()
"""Code by the graph that it was made of: blocks of a net are alike."""


class _Code:
    """A function that can be referred to weakly (a bound method cannot)."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *given: Tensor) -> Any:
        return self._function(*given)


def inductor(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """Fused code, from torch's cache folder (TORCHINDUCTOR_CACHE_DIR) where another process has made it.

    Raises:
        RuntimeError: there is no compiler, or it failed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch about itself, where it is imported
        from torch._guards import TracingContext
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx
        from torch._subclasses import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

    def made() -> Callable[..., Any]:
        # (Its numbers are drawn beforehand; a draw that it were to make by itself would be another one.)
        options = {"fallback_random": True, "post_grad_custom_post_pass": _unfused()}
        # Shapes are fixed. Without an environment of shapes, torch takes nothing from its cache of compiled graphs.
        mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        fake = [mode.from_tensor(each, static_shapes=True) for each in inputs]
        with config.patch(options), torch._guards.tracing(TracingContext(mode)), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return compile_fx(graph, fake)  # type: ignore[return-value]

    try:
        return made()
    except Exception as error:
        if "file too short" in str(error):  # left in the cache folder by a process that was killed while it compiled
            from torch._inductor.utils import fresh_cache

            with contextlib.suppress(Exception), fresh_cache():
                return made()
        raise RuntimeError(
            f"torch could not compile a traced function: {str(error).strip().splitlines()[0]} Compiling needs a C++ "
            f"compiler (g++), on CUDA Triton, too. Take engine=bilevel.Eager(), or "
            f'engine=bilevel.Compiled(backend="graph"), which runs the trace without compiling it'
        ) from error


@functools.cache
def _unfused() -> Any:
    """Inductor's pass that takes a sum of a matrix product and a matrix apart again.

    It computes the sum in one call of addmm, into a copy of the matrix: two passes over it, and its bytes, more than a
    fused sum takes. (Of a product and a bias, a vector, that call is the better one.)
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class Unfused(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            for node in list(graph.nodes):
                if node.target is not torch.ops.aten.addmm.default or node.kwargs:
                    continue
                added, one, other = node.args
                if added.meta["val"].shape != node.meta["val"].shape:
                    continue
                with graph.inserting_before(node):
                    product = graph.call_function(torch.ops.aten.mm.default, (one, other))
                    total = graph.call_function(torch.ops.aten.add.Tensor, (product, added))
                product.meta["val"] = node.meta["val"]
                total.meta.update(node.meta)
                node.replace_all_uses_with(total)
                graph.erase_node(node)

        def uuid(self) -> Any:
            return get_hash_for_files((__file__,))

    return Unfused()


def make(backend: str) -> Compile:
    """The maker of a backend's functions. On tensors without data graphs run as they are."""

    def made(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Made:
        if backend == "graph" or any(isinstance(each, torch._subclasses.FakeTensor) for each in inputs):
            return Made(graph.forward)  # operator by operator, each result freed after its last use
        digest = hashlib.sha256(str(graph.code).encode()).digest()
        key = digest, tuple((each.shape, each.stride(), each.dtype, each.device) for each in inputs)
        code = _compiled.get(key)
        if code is None:
            _compiled[key] = code = _Code(inductor(graph, inputs))
        return Made(code)

    return made


def check(who: str, backend: str, check: bool) -> None:
    """Raise ValueError where an engine's arguments are out of range."""
    if backend not in BACKENDS:
        raise ValueError(f"{who} was given backend={backend!r}; one of {', '.join(map(repr, BACKENDS))} was needed")
    if not isinstance(check, bool):
        raise ValueError(f"{who} was given check={check!r}; True or False was needed")
