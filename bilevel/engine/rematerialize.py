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

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _pytree as pytree

from bilevel.engine.captures import Entries, captured, entries
from bilevel.engine.lean import Lean
from bilevel.engine.replay import Generators

Flat = Callable[[list[Tensor]], list[Tensor]]
"""A block as a function of its tensors to the tensors in what it returns."""
Gradients = tuple[Tensor | None, ...]


def rematerialized(function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """function(*arguments, **keywords), as a block where a derivative may be wanted of it, and as it is elsewhere."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or _differentiated_by_func():
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
        shape[:] = [None if isinstance(each, Tensor) else (each,) for each in found], out
        return [each for each in found if isinstance(each, Tensor)]

    results = iter((_out_of_vmap if mapped else _first_run)(flat, list(tensors.values()), function))
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


def _out_of_vmap(flat: Flat, tensors: list[Tensor], function: Any) -> Sequence[Tensor]:
    # A mode is switched off while it looks at what vmap calls.
    found = _Mapped.apply(_within(_get_current_function_mode_stack(), flat), function, *tensors)
    return found if isinstance(found, tuple) else (found,)


def _within(modes: Sequence[Any], flat: Flat) -> Flat:
    """A block under torch-function modes, those apart that are at work anyway."""

    def run(given: list[Tensor]) -> list[Tensor]:
        present = {id(mode) for mode in _get_current_function_mode_stack()}
        with ExitStack() as stack:
            for mode in modes:
                if id(mode) not in present and not isinstance(mode, Lean):
                    stack.enter_context(mode)
            return flat(given)

    return run


class _Mapped(torch.autograd.Function):
    """A block under vmap: the block of the mapped function, so that it can be run again when vmap is over."""

    @staticmethod
    def forward(flat: Flat, function: Any, *tensors: Tensor) -> Any:
        raise AssertionError("a block is mapped")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], flat: Flat, function: Any, *tensors: Tensor) -> Any:
        dims = in_dims[2:]

        def every(given: list[Tensor]) -> list[Tensor]:
            def one(*slices: Tensor) -> tuple[Tensor, ...]:
                return tuple(flat(list(slices)))

            return list(torch.func.vmap(one, in_dims=dims, randomness=info.randomness)(*given))

        again = torch._C._functorch.maybe_current_level() is not None and any(_mapped(each) for each in tensors)
        found = (_out_of_vmap if again else _first_run)(every, list(tensors), function)
        return tuple(found), (0,) * len(found)


def _first_run(flat: Flat, tensors: list[Tensor], function: Any) -> Sequence[Tensor]:
    """Run a block, and put it into the graph of its inputs."""
    block = Block(flat, tensors, function)
    if not any(block.needs):
        return flat(tensors)
    versions = [0 if each.is_inference() else each._version for each in tensors]
    start = torch.autograd._get_sequence_nr()
    _Hand.empty()
    z = block.leaves(tensors)
    try:
        outputs = block.run(z)
    except RuntimeError as error:
        if "in-place operation" not in str(error) or "leaf Variable" not in str(error):
            raise
        raise block.in_place() from error
    if versions != [0 if each.is_inference() else each._version for each in tensors]:
        raise block.in_place()
    block.outputs = [(each.shape, each.dtype, each.requires_grad) for each in outputs]
    if not any(each.requires_grad for each in outputs):
        return outputs
    block.entries = entries(outputs, z, start)
    foreign = captured(outputs, block.entries, function)
    found = _Forward.apply(block, _Hand(z, outputs), [each.detach() for each in outputs], *tensors, *foreign)
    return found if isinstance(found, tuple) else (found,)


class Block:
    """One run of a block, and what is needed to run it again.

    Args:
        flat: the block.
        tensors: its inputs.
        function: as the user wrote it, for messages.
    """

    def __init__(self, flat: Flat, tensors: Sequence[Tensor], function: Any) -> None:
        self._flat, self._name = (
            _within(_get_current_function_mode_stack(), flat),
            getattr(function, "__name__", type(function).__name__),
        )
        self.needs = [each.requires_grad for each in tensors]
        device = next((each.device for each in tensors if each.device.type != "cpu"), torch.device("cpu"))
        self._generators, self._devices = Generators(device), sorted({"cpu", device.type})
        self._before = self._generators.state()
        self._autocast = [_autocast(each) for each in self._devices]
        self.outputs: list[tuple[torch.Size, torch.dtype, bool]] = []
        self.entries: Entries = {}, set()
        self._compared = False

    def leaves(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The inputs as leaves of a graph of their own."""
        pairs = zip(tensors, self.needs, strict=True)
        return [each.detach().requires_grad_() if need else each.detach() for each, need in pairs]

    def run(self, inputs: list[Tensor], lean: Lean | None = None) -> list[Tensor]:
        """The block's outputs under the autocast and the modes of its first run, or with lean operators."""
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.callback(setattr, Lean, "active", Lean.active)
            Lean.active = lean
            if lean is not None:
                stack.enter_context(lean)
            for kind, (enabled, dtype) in zip(self._devices, self._autocast, strict=True):
                if enabled or torch.is_autocast_enabled(kind):
                    # Without autocast's cache, which would keep the copies of every block to the end of the context.
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            return self._flat(inputs)

    def again(self, inputs: list[Tensor], *, attached: bool = False, lean: Lean | None = None) -> list[Tensor]:
        """The outputs once more, from the same random numbers; the generators stay where they are.

        `attached`: the inputs are not leaves, so that what else the graph was entered by cannot be told.

        Raises:
            ValueError: they are not like those of the first run.
        """
        _Hand.empty()
        now, start = self._generators.peek(), torch.autograd._get_sequence_nr()
        self._generators.set(self._before)
        try:
            found = self.run(inputs, lean)
        finally:
            self._generators.set(now)
        if [(each.shape, each.dtype, each.requires_grad) for each in found] != self.outputs:
            raise ValueError(
                f"the rematerialized block {self._name} returned other tensors when it was run again; it must be a "
                f"function of its arguments and of torch's global random numbers"
            )
        if attached or (self._compared and not any(self.entries)):
            return found
        self._compared = True  # (a walk through the graph, which costs 1% of a block: without captures, once)
        leaves, edges = entries(found, inputs, start)
        if leaves.keys() != self.entries[0].keys() or edges != self.entries[1]:
            raise ValueError(
                f"the rematerialized block {self._name} used other tensors that require grad when it was run again; "
                f"give them to it as arguments"
            )
        return found

    def in_place(self) -> ValueError:
        """The refusal of a block that changes what it is given."""
        return ValueError(
            f"the rematerialized block {self._name} changes one of its inputs in place, and would change it again each "
            f"time it is run; clone the input first (inplace=False in its first layer)"
        )

    def pulled(self, inputs: Sequence[Tensor], weights: Sequence[Tensor | None], hand: "_Hand | None") -> Gradients:
        """J' w in every input, without a graph. Cost: 1 forward unless it is at hand, 1 backward."""
        made = None if hand is None else hand.take()
        z, outputs = made or (self.leaves(inputs[: len(self.needs)]), None)
        outputs = self.again(z) if outputs is None else outputs
        leaves = [*z, *inputs[len(self.needs) :]]
        del z, made
        return self._gradient(outputs, leaves, weights)

    def _gradient(
        self, outputs: Sequence[Tensor], leaves: Sequence[Tensor], weights: Sequence[Tensor | None], graph: bool = False
    ) -> Gradients:
        pairs = [(o, w) for o, w in zip(outputs, weights, strict=True) if w is not None and o.requires_grad]
        return _grad(pairs, leaves, create_graph=graph)

    def differentiable(
        self, inputs: Sequence[Tensor], weights: Sequence[Tensor | None], *, lean: bool = False
    ) -> tuple[list[Tensor], list[Tensor | None], Gradients]:
        """z, w and J' w with the graph that leads from the former to the latter; `lean`: without all of its numbers."""
        own = self.leaves(inputs[: len(self.needs)])
        w = [None if each is None else each.detach().requires_grad_(each.requires_grad) for each in weights]
        mode = Lean(own) if lean else None
        outputs = self.again(own, lean=mode)
        leaves = [*own, *inputs[len(self.needs) :]]
        with nullcontext() if mode is None else mode.only_graph():
            return leaves, w, self._gradient(outputs, leaves, w, graph=True)

    def pulled_twice(
        self, inputs: Sequence[Tensor], weights: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]
    ) -> Gradients:
        """The derivative of <J' w, c> in every input and in w, without a graph. Cost: 1 forward, 2 backwards."""
        leaves, w, gradient = self.differentiable(inputs, weights, lean=True)
        pairs = [
            # The place in the graph, so that the numbers are freed before the backward.
            (get_gradient_edge(g) if g.grad_fn is not None else g, c)
            for g, c in zip(gradient, cotangents, strict=True)
            if g is not None and c is not None and g.requires_grad
        ]
        del gradient
        return _grad(pairs, [*leaves, *w])

    def pulled_twice_with_graph(
        self, inputs: Sequence[Tensor], weights: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]
    ) -> Gradients:
        """The same with a graph, for third derivatives; it keeps what plain autograd keeps."""
        if len(inputs) > len(self.needs):
            raise RuntimeError(
                f"a third derivative is taken through the rematerialized block {self._name}, which uses a tensor that "
                f"requires grad and is no argument; give it to the block as an argument"
            )
        z = [each.view_as(each) if need else each for each, need in zip(inputs, self.needs, strict=True)]
        w = [None if each is None else each.view_as(each) for each in weights]
        gradient = self._gradient(self.again(z, attached=True), z, w, graph=True)
        pairs = [
            (g, c)
            for g, c in zip(gradient, cotangents, strict=True)
            if g is not None and c is not None and g.requires_grad
        ]
        return _grad(pairs, [*z, *w], create_graph=True)


def _autocast(kind: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def _grad(pairs: Sequence[Any], inputs: Sequence[Tensor | None], *, create_graph: bool = False) -> Gradients:
    """Gradients of weighted outputs; None for inputs that need none and where there is no path."""
    wanted = [i for i, leaf in enumerate(inputs) if leaf is not None and leaf.requires_grad]
    found: list[Tensor | None] = [None] * len(inputs)
    if pairs and wanted:
        gradients = torch.autograd.grad(
            [output for output, _ in pairs],
            [inputs[i] for i in wanted],  # type: ignore[arg-type]
            [weight for _, weight in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
        for i, gradient in zip(wanted, gradients, strict=True):
            sparse = gradient is not None and gradient.layout is not torch.strided
            found[i] = gradient.to_dense() if sparse else gradient
    return tuple(found)


class _Hand:
    """The graph of the block that ran last, which its backward need not build again if it comes first."""

    last: "weakref.ref[_Hand] | None" = None

    def __init__(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        self._made: tuple[list[Tensor], list[Tensor]] | None = (inputs, outputs)
        _Hand.last = weakref.ref(self)

    def take(self) -> tuple[list[Tensor], list[Tensor]] | None:
        made, self._made = self._made, None
        return made

    @staticmethod
    def empty() -> None:
        """Free the graph at hand: another one is about to be made."""
        last = None if _Hand.last is None else _Hand.last()
        if last is not None:
            last.take()


class _Forward(torch.autograd.Function):
    """f(z), already computed."""

    @staticmethod
    def forward(ctx: Any, block: Block, hand: _Hand, outputs: list[Tensor], *inputs: Tensor) -> Any:
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
        else:
            found = ctx.block.pulled(inputs, weights, ctx.hand)
        return None, None, None, *found


class _Backward(torch.autograd.Function):
    """g(z, w) = J_f(z)' w."""

    @staticmethod
    def forward(ctx: Any, block: Block, hand: _Hand, count: int, *tensors: Tensor | None) -> Any:
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
