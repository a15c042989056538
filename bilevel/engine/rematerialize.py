"""Blocks that keep nothing but their inputs: in the forward, in the backward and in the double backward.

A block f(z) = o is an autograd.Function, and its backward g(z, w) = J_f(z)' w is another one: both save their tensors
z and (z, w) alone, and build the graph of f anew when they are differentiated. So n blocks hold n inputs and the graph
of one block, to the second order. (torch.utils.checkpoint does so to the first; under create_graph it keeps all.)

| | cost of a block | kept |
| --- | --- | --- |
| forward | 1 forward, with its graph, which lives until the next block begins | z |
| backward | 1 forward (none for the block that ran last), 1 backward | z, and w if it is to be differentiated |
| double backward | 1 forward, 1 backward with a graph, 1 backward through both; later 1 forward, 1 backward | z |
| third derivatives | as plain autograd | as plain autograd |

What a forward depends on besides its arguments is replayed: the random numbers of torch's global generators, autocast,
torch-function modes, and torch.func.vmap, of which a block is taken out. Tensors that require grad and are no arguments
are found in the graph of the first run, and differentiated in or refused.
"""

import contextlib
import contextvars
import dataclasses
import functools
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree as pytree

from bilevel.engine.block import Block, Compiled, Flat, Hand, within
from bilevel.engine.captures import captured, entries, hides_graph, name_of
from bilevel.engine.lean import Lean
from bilevel.engine.offload import Item, Kept, Store, lane_of


@dataclasses.dataclass
class Switch:
    """Whether blocks are run as such (`on`), and whether one was met."""

    on: bool
    met: bool = False


_switch: contextvars.ContextVar[Switch | None] = contextvars.ContextVar("bilevel_blocks", default=None)


@contextlib.contextmanager
def switched(*, on: bool) -> Iterator[Switch]:
    """Inside this block, blocks are blocks or the functions that they are made of."""
    switch = Switch(on)
    token = _switch.set(switch)
    try:
        yield switch
    finally:
        _switch.reset(token)


def switched_off() -> bool:
    """Whether blocks are run as the functions that they are made of."""
    switch = _switch.get()
    return switch is not None and not switch.on


class Compiler(Protocol):
    """Knows the compiled functions of blocks."""

    def of(self, function: Any, key: "Key") -> Compiled | None:
        """Those of a block, for arguments of this key; None where there are none."""

    def learn(self, function: Any, key: "Key", block: Block, shape: list[Any] | None, *, fit: bool) -> None:
        """What an eager run showed: whether it used nothing but its inputs."""


_compiler: contextvars.ContextVar[Compiler | None] = contextvars.ContextVar("bilevel_block_compiler", default=None)


@contextlib.contextmanager
def compiled_by(compiler: Compiler) -> Iterator[None]:
    """Inside this context, blocks that a compiler knows run as what it made of them."""
    token = _compiler.set(compiler)
    try:
        yield
    finally:
        _compiler.reset(token)


def rematerialized(
    function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any], *, offload: bool = False
) -> Any:
    """function(*arguments, **keywords), as a block where a derivative may be wanted of it, and as it is elsewhere.

    `offload`: the inputs that operators made wait on the host.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or _differentiated_by_func():
        return function(*arguments, **keywords)
    if (switch := _switch.get()) is not None:
        switch.met = True
        if not switch.on:
            return function(*arguments, **keywords)
    leaves, structure = pytree.tree_flatten((arguments, keywords))
    tensors = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}  # given twice, it is one input
    mapped = torch._C._functorch.maybe_current_level() is not None
    if not any(_mapped(leaf) if mapped else leaf.requires_grad for leaf in tensors.values()):
        return function(*arguments, **keywords)
    order = {key: place for place, key in enumerate(tensors)}
    places = [order.get(id(leaf)) if isinstance(leaf, Tensor) else None for leaf in leaves]
    others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    shape: list[Any] = []

    def flat(given: list[Tensor]) -> list[Tensor]:
        filled = [other if place is None else given[place] for place, other in zip(places, others, strict=True)]
        args, kwargs = pytree.tree_unflatten(filled, structure)
        found, out = pytree.tree_flatten(function(*args, **kwargs))
        if hides_graph(found):
            raise ValueError(
                f"the rematerialized block {name_of(function)} returned tensors in an object that torch's pytrees do "
                f"not know; return them in tuples, lists or dicts, or register it by torch.utils._pytree"
            )
        shape[:] = [None if isinstance(each, Tensor) else (each,) for each in found], out
        return [each for each in found if isinstance(each, Tensor)]

    given = list(tensors.values())
    if mapped:
        results = iter(_out_of_vmap(flat, given, function, offload))
    else:
        known = None if _compiler.get() is None else _key(given, places, others, structure)
        results = iter(_first_run(flat, given, function, offload, known, shape))
    constants, out = shape
    return pytree.tree_unflatten([next(results) if each is None else each[0] for each in constants], out)


def _differentiated_by_func() -> bool:
    """Whether torch.func's grad, jvp or forward mode is at work, for which a block is a plain function."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return torch.autograd.forward_ad._current_level >= 0 or any(
        each.key() != torch._C._functorch.TransformType.Vmap for each in stack
    )


def _mapped(tensor: Tensor) -> bool:
    """Whether the innermost torch.func.vmap maps over a tensor."""
    return torch._C._functorch.maybe_get_level(tensor) == torch._C._functorch.maybe_current_level()


def _out_of_vmap(flat: Flat, tensors: list[Tensor], function: Any, offload: bool) -> Sequence[Tensor]:
    # A mode is switched off while it looks at what vmap calls.
    found = _Mapped.apply(within(_get_current_function_mode_stack(), flat), function, offload, *tensors)
    return found if isinstance(found, tuple) else (found,)


class _Mapped(torch.autograd.Function):
    """A block under vmap: the block of the mapped function, so that it can be run again when vmap is over."""

    @staticmethod
    def forward(flat: Flat, function: Any, offload: bool, *tensors: Tensor) -> Any:
        raise AssertionError("a block is mapped")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], flat: Flat, function: Any, offload: bool, *tensors: Tensor) -> Any:
        dims = in_dims[3:]

        def every(given: list[Tensor]) -> list[Tensor]:
            def one(*slices: Tensor) -> tuple[Tensor, ...]:
                return tuple(flat(list(slices)))

            return list(torch.func.vmap(one, in_dims=dims, randomness=info.randomness)(*given))

        again = torch._C._functorch.maybe_current_level() is not None and any(_mapped(each) for each in tensors)
        found = (_out_of_vmap if again else _first_run)(every, list(tensors), function, offload)
        return tuple(found), (0,) * len(found)


_PLAIN = (int, float, complex, str, bytes, slice, range, types.NoneType, types.EllipsisType, torch.dtype, torch.device)
"""What its repr says all of."""


@dataclasses.dataclass(frozen=True)
class Key:
    """Of arguments of a block: one trace serves those whose texts are equal and whose objects are as they were."""

    text: str
    objects: list[Any]
    """Arguments that are neither tensors nor numbers nor strings: what they hold may change."""


def _key(tensors: list[Tensor], places: list[int | None], others: list[Any], structure: Any) -> Key:
    casts = [(kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    leaves = [(each.shape, each.dtype, each.device, type(each), each.requires_grad) for each in tensors]
    modes = [type(each) for each in _get_current_function_mode_stack()]
    odd = [not isinstance(each, _PLAIN) for each in others]
    plain = [None if is_odd else each for each, is_odd in zip(others, odd, strict=True)]
    text = repr((leaves, casts, modes, torch.get_default_dtype(), places, plain, odd, structure))
    return Key(text, [each for each, is_odd in zip(others, odd, strict=True) if is_odd])


def _first_run(
    flat: Flat,
    tensors: list[Tensor],
    function: Any,
    offload: bool,
    key: Key | None = None,
    shape: list[Any] | None = None,
) -> Sequence[Tensor]:
    """Run a block, and put it into the graph of its inputs."""
    block = Block(flat, tensors, function)
    if not any(block.needs):
        return flat(tensors)
    compiler, identity = (None if key is None else _compiler.get()), getattr(function, "identity", function)
    known = None if compiler is None or key is None else compiler.of(identity, key)
    if known is not None and shape is not None:
        Hand.empty()
        found = known.forward(block, tensors)
        if found is not None:
            shape[:], block.outputs, block.compiled = known.shape, known.outputs, known
            return _in_graph(block, None, found, tensors, offload)
    versions = [0 if each.is_inference() else each._version for each in tensors]
    start = torch.autograd._get_sequence_nr()
    Hand.empty()
    z, lean, graph = block.leaves(tensors), Lean(first=True), dict[Node, list[Node]]()
    try:
        outputs = block.run(z, lean)
    except RuntimeError as error:
        if "in-place operation" not in str(error) or "leaf Variable" not in str(error):
            raise
        raise block.in_place() from error
    if versions != [0 if each.is_inference() else each._version for each in tensors]:
        raise block.in_place()
    block.outputs = [(each.shape, each.dtype, each.requires_grad) for each in outputs]
    if not any(each.requires_grad for each in outputs):
        return outputs
    block.entries = entries(outputs, z, start, graph=graph)
    block.end = lean.end(graph)
    foreign = captured(outputs, block.entries, function)
    if compiler is not None and key is not None:
        compiler.learn(identity, key, block, shape, fit=not foreign and not any(block.entries))
    return _in_graph(block, Hand(block, z, outputs), [each.detach() for each in outputs], [*tensors, *foreign], offload)


def _in_graph(
    block: Block, hand: Hand | None, outputs: list[Tensor], inputs: list[Tensor], offload: bool
) -> Sequence[Tensor]:
    """A block's outputs as a node of the graph of its inputs."""
    found = _Forward.apply(block, hand, outputs, *inputs)
    found = found if isinstance(found, tuple) else (found,)
    if offload:
        block.offloads = True
        _put_away(found, inputs)
    return found


_store = Store()
_CHANGED = (
    "an input of the rematerialized block {name} was changed in place after the block ran, while it was copied to "
    "the host (offload=True); write h = h + d instead of h.add_(d)"
)


def _put_away(results: Sequence[Tensor | None], tensors: Sequence[Tensor | None], known: Any = None) -> None:
    """What a block's node has saved waits on the host, leaves apart, which are held elsewhere anyway.

    Args:
        results: of the node.
        tensors: what it saved, in that order.
        known: a `_Saved` in which some of them wait already.
    """
    node: Any = next((each.grad_fn for each in results if each is not None and each.requires_grad), None)
    if node is None or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return  # (somebody else's hooks, such as torch's save_on_cpu, have taken them)
    leaving = {
        place: tensor.detach()
        for place, tensor in enumerate(tensors)
        if tensor is not None and tensor.grad_fn is not None and lane_of(tensor) is not None
    }
    if not leaving:
        return
    before, items = _store.last, {} if known is None else known.items
    kept = _store.put(
        list(leaving.values()), _CHANGED.format(name=node.block.name), [items.get(place) for place in leaving]
    )
    saved = _Saved(kept, dict(zip(leaving, kept.items, strict=True)), None if before is None else weakref.ref(before))
    node.saved = weakref.ref(saved)
    for index, place in enumerate(leaving):
        node._raw_saved_tensors[place].register_hooks(functools.partial(_pack, saved, index), _unpack)


class _Saved:
    """What the graph holds in the place of the tensors of a node.

    Args:
        kept: the tensors.
        items: where each waits, by its place among what was saved.
        before: what was put away before them, and is needed next on the way back.
    """

    def __init__(self, kept: Kept, items: dict[int, Item], before: "weakref.ref[Kept] | None") -> None:
        self._kept, self.items, self._before = kept, items, before
        self._taken: dict[int, Tensor] = {}

    def take(self, place: int) -> Tensor:
        """One of the tensors. All come when the first is asked for, and then the next begin to."""
        if place not in self._taken:
            self._taken = dict(enumerate(self._kept.take()))
            before = None if self._before is None else self._before()
            if before is not None:
                before.fetch()
        return self._taken.pop(place)


def _pack(saved: _Saved, place: int, tensor: Tensor) -> Any:
    return saved, place


def _unpack(packed: Any) -> Tensor:
    saved, place = packed
    return saved.take(place)


class _Forward(torch.autograd.Function):
    """f(z), already computed."""

    @staticmethod
    def forward(ctx: Any, block: Block, hand: Hand | None, outputs: list[Tensor], *inputs: Tensor) -> Any:
        ctx.block, ctx.hand = block, hand
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        kinds = zip(outputs, block.outputs, strict=True)
        ctx.mark_non_differentiable(*[each for each, (_, _, live) in kinds if not live])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *weights: Tensor | None) -> Any:
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled():
            found = _Backward.apply(ctx.block, ctx.hand, len(inputs), *inputs, *weights)
            if ctx.block.offloads:
                saved = getattr(ctx, "saved", None)
                _put_away(found, [*inputs, *weights], None if saved is None else saved())
        else:
            found = ctx.block.pulled(inputs, weights, ctx.hand)
        return None, None, None, *found


class _Backward(torch.autograd.Function):
    """g(z, w) = J_f(z)' w."""

    @staticmethod
    def forward(ctx: Any, block: Block, hand: Hand, count: int, *tensors: Tensor | None) -> Any:
        ctx.block, ctx.count = block, count
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return block.pulled(tensors[:count], tensors[count:], hand)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        inputs, weights = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        if torch.is_grad_enabled():
            found = ctx.block.pulled_twice_with_graph(inputs, weights, cotangents)
        else:
            found = ctx.block.pulled_twice(inputs, weights, cotangents)
        return None, None, None, *found


def inside(node: Any) -> list[Tensor] | None:
    """Tensors with the graph that the autograd node of a block stands for, made again; None for any other node."""
    kind, block = type(node), getattr(node, "block", None)
    if kind is _Forward._backward_cls and block is not None:
        with torch.enable_grad():
            return block.again(block.leaves(node.saved_tensors[: len(block.needs)]))
    if kind is _Backward._backward_cls and block is not None:
        saved = node.saved_tensors
        with torch.enable_grad():
            gradient = block.differentiable(saved[: node.count], saved[node.count :])[2]
        return [each for each in gradient if each is not None]
    return None
