"""One run of a rematerialized block: what is kept of it, and how it is run again and differentiated."""

import gc
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import _get_current_function_mode_stack

from bilevel.engine.captures import Entries, Rebound, entries, name_of
from bilevel.engine.lean import Lean, NotTheEnd, running
from bilevel.engine.replay import Generators, State

Flat = Callable[[list[Tensor]], list[Tensor]]
"""A block as a function of its tensors to the tensors in what it returns."""
Gradients = tuple[Tensor | None, ...]
_Reference: Any = torch._C._WeakTensorRef  # type: ignore[attr-defined]
"""A weak reference to a tensor, not to the Python object, which torch makes anew."""


class Compiled(Protocol):
    """A block's functions as compiled code; `outputs` says of each result its shape, dtype and whether it has a
    gradient, `shape` how they stand in what the block returns.
    """

    outputs: list[Any]
    shape: list[Any]

    def forward(self, block: "Block", inputs: Sequence[Tensor]) -> list[Tensor] | None: ...

    def pulled(self, block: "Block", inputs: Sequence[Tensor], weights: Sequence[Tensor | None]) -> Gradients: ...

    def pulled_twice(
        self,
        block: "Block",
        inputs: Sequence[Tensor],
        weights: Sequence[Tensor | None],
        cotangents: Sequence[Tensor | None],
    ) -> Gradients: ...


class Block:
    """One run of a block, and what is needed to run it again.

    Args:
        flat: the block.
        tensors: its inputs.
        function: as the user wrote it, for messages.
    """

    def __init__(self, flat: Flat, tensors: Sequence[Tensor], function: Any) -> None:
        self._flat, self.name = within(_get_current_function_mode_stack(), flat), name_of(function)
        self.needs = [each.requires_grad for each in tensors]
        device = next((each.device for each in tensors if each.device.type != "cpu"), torch.device("cpu"))
        self._generators, self._devices = Generators(device), sorted({"cpu", device.type})
        self._before = self._generators.state()
        self._autocast = [_autocast(each) for each in self._devices]
        self.outputs: list[tuple[torch.Size, torch.dtype, bool]] = []
        self.entries: Entries = {}, set()
        self._compared = False
        self._rebound = Rebound(function)
        self.end: int | None = None
        self.offloads = False
        self.compiled: Compiled | None = None

    @property
    def before(self) -> State:
        """The state of the random number generators before its first run."""
        return self._before

    @property
    def generators(self) -> Generators:
        """Those that it draws from."""
        return self._generators

    def leaves(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The inputs as leaves of a graph of their own."""
        pairs = zip(tensors, self.needs, strict=True)
        return [each.detach().requires_grad_() if need else each.detach() for each, need in pairs]

    def run(self, inputs: list[Tensor], lean: Lean | None = None) -> list[Tensor]:
        """The block's outputs under the autocast and the modes of its first run, or with lean operators."""
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(running(lean))
            for kind, (enabled, dtype) in zip(self._devices, self._autocast, strict=True):
                if enabled or _autocast(kind)[0]:
                    # Without autocast's cache, which would keep the copies of every block to the end of the context.
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            return self._flat(inputs)

    def again(self, inputs: list[Tensor], *, attached: bool = False, lean: Lean | None = None) -> list[Tensor]:
        """The outputs once more, from the same random numbers; the generators stay where they are.

        `attached`: the inputs are not leaves, so that what else the graph was entered by cannot be told. `lean`: the
        graph is right, and numbers that it does not need are missing.

        Raises:
            ValueError: they are not like those of the first run.
        """
        Hand.empty()
        if (name := self._rebound.name()) is not None:
            raise ValueError(
                f"the rematerialized block {self.name} reads the variable {name!r} of the function around it, which "
                f"was assigned again since the block ran; give it to the block as an argument, or bind it as a "
                f"default: lambda h, {name}={name}: ..."
            )
        now, start = self._generators.peek(), torch.autograd._get_sequence_nr()
        self._generators.set(self._before)
        try:
            found = self.run(inputs, lean)
        except NotTheEnd:
            found = None
        finally:
            self._generators.set(now)
        if found is None:
            self.end = None
            return self.again(inputs, attached=attached)
        if [(each.shape, each.dtype, each.requires_grad) for each in found] != self.outputs:
            raise ValueError(
                f"the rematerialized block {self.name} returned other tensors when it was run again; it must be a "
                f"function of its arguments and of torch's global random numbers"
            )
        if attached or (self._compared and not any(self.entries)):
            return found
        self._compared = True  # (a walk through the graph, which costs 1% of a block: without captures, once)
        leaves, edges = entries(found, inputs, start, before=self.entries)
        if leaves.keys() != self.entries[0].keys() or edges != self.entries[1]:
            raise ValueError(
                f"the rematerialized block {self.name} used other tensors that require grad when it was run again; "
                f"give them to it as arguments"
            )
        return found

    def in_place(self) -> ValueError:
        """The refusal of a block that changes what it is given."""
        return ValueError(
            f"the rematerialized block {self.name} changes one of its inputs in place, and would change it again each "
            f"time it is run; clone the input first (inplace=False in its first layer)"
        )

    def pulled(self, inputs: Sequence[Tensor], weights: Sequence[Tensor | None], hand: "Hand | None") -> Gradients:
        """J' w in every input, without a graph. Cost: 1 forward unless it is at hand, 1 backward."""
        compiled = self.compiled
        if compiled is not None:
            return self._replayed(lambda: compiled.pulled(self, inputs, weights))
        return self.pulled_eagerly(inputs, weights, hand)

    def _replayed(self, function: Callable[[], Gradients]) -> Gradients:
        """A function that draws what the first run drew; the generators stay where they are."""
        Hand.empty()
        now = self._generators.peek()
        self._generators.set(self._before)
        try:
            return function()
        finally:
            self._generators.set(now)

    def pulled_eagerly(
        self, inputs: Sequence[Tensor], weights: Sequence[Tensor | None], hand: "Hand | None" = None
    ) -> Gradients:
        """The same, operator by operator."""
        made = None if hand is None else hand.take()
        z, outputs = made or (self.leaves(inputs[: len(self.needs)]), None)
        outputs = self.again(z, lean=Lean(tail=self.end)) if outputs is None else outputs
        leaves = [*z, *inputs[len(self.needs) :]]
        found = self._gradient(outputs, leaves, weights)
        if made is not None and hand is not None:
            del z, made, outputs, leaves
            hand.check()
        return found

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
        mode = Lean(own, self.end) if lean else None
        outputs = self.again(own, lean=mode)
        leaves = [*own, *inputs[len(self.needs) :]]
        with nullcontext() if mode is None else mode.only_graph():
            return leaves, w, self._gradient(outputs, leaves, w, graph=True)

    def pulled_twice(
        self, inputs: Sequence[Tensor], weights: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]
    ) -> Gradients:
        """The derivative of <J' w, c> in every input and in w, without a graph. Cost: 1 forward, 2 backwards."""
        compiled = self.compiled
        if compiled is not None:
            return self._replayed(lambda: compiled.pulled_twice(self, inputs, weights, cotangents))
        return self.pulled_twice_eagerly(inputs, weights, cotangents)

    def pulled_twice_eagerly(
        self, inputs: Sequence[Tensor], weights: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]
    ) -> Gradients:
        """The same, operator by operator."""
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
                f"a third derivative is taken through the rematerialized block {self.name}, which uses a tensor that "
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
    if not torch.amp.is_autocast_available(kind):  # tensors on the meta device
        return False, torch.float32
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


class Hand:
    """The graph of the block that ran last, which its backward need not build again if it comes first."""

    last: "weakref.ref[Hand] | None" = None

    def __init__(self, block: Block, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        self._made: tuple[list[Tensor], list[Tensor]] | None = (inputs, outputs)
        self._name = block.name
        # (Hooks on what is saved, such as torch's save_on_cpu, may keep it alive by themselves.)
        hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        self._leaves = [] if hooked else [_Reference(each) for each in inputs if each.requires_grad]
        Hand.last = weakref.ref(self)

    def take(self) -> tuple[list[Tensor], list[Tensor]] | None:
        """The inputs and outputs of the graph, once."""
        made, self._made = self._made, None
        return made

    def check(self) -> None:
        """Raise ValueError if the graph that was taken is still there, so that somebody may want a gradient of it."""
        if self._alive() and gc.collect() is not None and self._alive():
            raise ValueError(
                f"the rematerialized block {self._name} stored a tensor that requires grad outside of it, which would "
                f"have no gradient and keeps the block's graph; return it, or store tensor.detach()"
            )

    def _alive(self) -> bool:
        return not all(each.expired() for each in self._leaves)

    @staticmethod
    def empty() -> None:
        """Free the graph at hand: another one is about to be made."""
        last = None if Hand.last is None else Hand.last()
        if last is not None and last.take() is not None:
            last.check()


def within(modes: Sequence[Any], flat: Flat) -> Flat:
    """A block under torch-function modes, those apart that are at work anyway or are another block's."""
    own = [mode for mode in modes if not isinstance(mode, Lean)]

    def run(given: list[Tensor]) -> list[Tensor]:
        present = {id(mode) for mode in _get_current_function_mode_stack()}
        with ExitStack() as stack:
            for mode in own:
                if id(mode) not in present:
                    stack.enter_context(mode)
            return flat(given)

    return run
