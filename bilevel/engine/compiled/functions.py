"""The compiled functions of one loss at one structure of its arguments, each traced when it is first asked for.

| function | of | returns | cost |
| --- | --- | --- | --- |
| gradient | y, x, batch | loss, dg/dy | 1 gradient |
| gradients | y, x, batch | loss, dg/dy, dg/dx, dg/dz | 1 gradient |
| products | y, x, batch, w | loss, and the derivatives of <dg/dy, w> in y, x and z | 1 gradient and 1 product |
| prepared, then pulled | y, x, batch; then w | loss, dg/dy, what is kept; products | 1 gradient; 1 product each |

z are the batch's tensors that require grad. Each is held against the eager function at its first two calls (the second
is at another step: a Python value that changed in between shows there), and by the value of the loss later on.
"""

import copy
import enum
import functools
import itertools
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from bilevel.engine import autodiff
from bilevel.engine.base import Losses
from bilevel.engine.compiled import graphs
from bilevel.engine.compiled.closure import surroundings
from bilevel.engine.compiled.comparing import Results, mismatch, shake
from bilevel.engine.compiled.piece import Compile, Piece, in_order, order, resolved
from bilevel.engine.compiled.tracing import Flat, Numbers, Traced, trace
from bilevel.engine.rematerialize import switched, switched_off
from bilevel.engine.replay import Generators, State
from bilevel.outcome import EngineMismatchError, NotTraceableError
from bilevel.space import tree
from bilevel.space.tree import Tree

FULL_CHECKS = 2


class Arguments:
    """(inner, outer, batch) taken apart: y, x, z (which require grad), other tensors; everything else is fixed."""

    def __init__(self, inner: Tree, outer: Tree, batch: Any) -> None:
        self._leaves, self._spec = tree.flatten((inner, outer, batch))
        inner_count, outer_count = len(tree.tensors(inner)), len(tree.tensors(outer))
        places = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        ys, xs = places[:inner_count], places[inner_count : inner_count + outer_count]
        rest = places[inner_count + outer_count :]
        zs = [i for i in rest if self._leaves[i].requires_grad]
        self._order = [*ys, *xs, *zs, *(i for i in rest if i not in set(zs))]
        self.counts = (len(ys), len(xs), len(zs))
        self.tensors = [self._leaves[i] for i in self._order]
        strange = (leaf for leaf in self._leaves if not isinstance(leaf, (Tensor, *_FIXED)))
        self.opaque = next((type(leaf).__qualname__ for leaf in strange), None)

    def key(self) -> tuple[Any, ...]:
        """Equal for arguments that one trace serves."""
        described = [
            (tuple(leaf.shape), leaf.dtype, leaf.device, type(leaf), order(leaf))
            if isinstance(leaf, Tensor)
            else _constant(leaf)
            for leaf in self._leaves
        ]
        return (self._spec, tuple(described), tuple(self._order), self.counts)

    def constants(self) -> tuple[Any, ...]:
        """What is fixed in a trace of them."""
        return tuple(_constant(leaf) for leaf in self._leaves if not isinstance(leaf, Tensor))

    def shapes(self) -> tuple[Any, ...]:
        """The key without the constants."""
        spec, described, *rest = self.key()
        return spec, tuple(each for each in described if len(each) > 2), *rest

    def like(self, tensors: Sequence[Tensor]) -> tuple[Tree, Tree, Any]:
        """Other tensors in the places of these."""
        leaves = list(self._leaves)
        for place, tensor in zip(self._order, tensors, strict=True):
            leaves[place] = tensor
        filled: tuple[Tree, Tree, Any] = torch.utils._pytree.tree_unflatten(leaves, self._spec)
        return filled

    def emptied(self) -> "Arguments":
        """The same without the tensors, which `like` does not need."""
        made = copy.copy(self)
        made._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        made.tensors = []
        return made

    def __len__(self) -> int:
        return len(self._order)


_FIXED = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, enum.Enum)
"""What a batch may hold besides tensors for a trace to serve equal ones."""


def _constant(leaf: Any) -> Any:
    return type(leaf), repr(leaf)


class Functions:
    """The compiled functions of one loss for arguments of one structure.

    Args:
        name: of the loss, for messages.
        example: arguments of that structure.
        make: compiles a graph.
        check: whether results are held against the eager ones.
    """

    def __init__(self, name: str, example: Arguments, make: Compile, *, check: bool) -> None:
        self.name, self._example, self._make, self._check = name, example, make, check
        self.counts = example.counts
        self.has_blocks = False
        self.pieces: dict[str, Piece] = {}

    # --- the explicit functions, with torch's own autograd inside

    def _value(self, loss: Losses, tensors: Sequence[Tensor]) -> Tensor:
        with Numbers():
            return loss(*self._example.like(tensors))

    def _gradient(self, loss: Losses, given: list[Tensor]) -> list[Tensor | None]:
        return self._first(loss, given, self.counts[0])

    def _gradients(self, loss: Losses, given: list[Tensor]) -> list[Tensor | None]:
        return self._first(loss, given, sum(self.counts))

    def _first(self, loss: Losses, given: list[Tensor], count: int) -> list[Tensor | None]:
        with torch.enable_grad():
            leaves = _leaves(given, count)
            value = self._value(loss, leaves)
            return [value.detach(), *autodiff.grad([value.sum()], leaves[:count])]

    def _products(self, loss: Losses, given: list[Tensor], *, gradient: bool = False) -> list[Tensor | None]:
        ys, count, own = self.counts[0], sum(self.counts), len(self._example)
        with torch.enable_grad():
            leaves = _leaves(given[:own], count)
            value = self._value(loss, leaves)
            first = autodiff.grad([value.sum()], leaves[:ys], create_graph=True)
            pairs = [(g, w) for g, w in zip(first, given[own:], strict=True) if g is not None]
            found = autodiff.grad([g for g, _ in pairs], leaves[:count], [w for _, w in pairs])
        known = [None if g is None else g.detach() for g in first] if gradient else []
        return [value.detach(), *known, *found]

    def look(self, loss: Losses, given: list[Tensor]) -> None:
        """Whether the loss has rematerialized blocks (which are run as such), found by running it once."""
        if switched_off():
            return
        generators = Generators(given[0].device)
        before = generators.peek()
        with torch.enable_grad(), switched(on=True) as blocks:
            loss(*self._example.like(_leaves(given, sum(self.counts))))
        generators.set(before)
        self.has_blocks = blocks.met

    def _loss_alone(self, loss: Losses, given: list[Tensor]) -> list[Tensor | None]:
        with torch.no_grad():
            return [loss(*self._example.like([each.detach() for each in given[: len(self._example)]])).detach()]

    # --- as they are compiled

    def run(self, loss: Losses, name: str, given: list[Tensor], *, watch: bool) -> list[Tensor | None]:
        """The outputs of gradient, gradients or products.

        Args:
            loss: what they were made of.
            name: of the function.
            given: y, x, z, other tensors of the batch, and of products w.
            watch: hold the loss against the eager one, where the whole result is not.

        Raises:
            EngineMismatchError: it is not what the eager function returns.
        """
        eager: Flat = functools.partial(getattr(self, f"_{name}"), loss)
        if name not in self.pieces:
            explicit, draw, seconds = self._traced(loss, eager, given)
            self.pieces[name] = Piece(
                name,
                explicit.graph,
                explicit.constants,
                explicit.there,
                draw,
                self._make,
                seconds,
                ordered=len(self._example),
            )
        piece, generators = self.pieces[name], Generators(given[0].device)
        checked = self._check and not is_fake(given[0])
        before = generators.peek() if checked else None
        found = piece(given)
        if before is not None and piece.calls <= FULL_CHECKS:
            compare(self.name, piece, found, eager, given, generators, before, (1, *self.counts))
        elif before is not None and watch:
            compare(self.name, piece, found[:1], functools.partial(self._loss_alone, loss), given, generators, before)
        return found

    def _traced(self, loss: Losses, flat: Flat, given: list[Tensor]) -> tuple[Traced, fx.GraphModule | None, float]:
        """A function as a graph, and what draws its random numbers.

        Raises:
            NotTraceableError: it depends on, or changes, what no graph has.
        """
        function, generators = getattr(loss, "function", loss), Generators(given[0].device)
        around, others, before = surroundings(function), _others(), generators.peek()
        made, seconds, after = traced(flat, given, len(self._example))
        if others != _others():
            raise self._not_traceable("it draws random numbers of Python or numpy; draw them with torch")
        if surroundings(function) != around:
            raise self._not_traceable(
                "it changes what it reads from its surroundings (a counter, a list that it writes), which its graph "
                "would not do; write it as a function of its arguments"
            )
        try:
            draw = graphs.hoisted(made.graph)
        except ValueError as error:
            raise self._not_traceable(f"{error}; take torch.rand or torch.randn and transform them") from error
        if not is_fake(given[0]):
            with torch.no_grad():
                _ = draw and draw()
            same = generators.same(generators.peek(), after)
            generators.set(before)
            if not same:
                raise self._not_traceable(
                    "it sets the state of torch's generator (manual_seed, fork_rng, a checkpoint with dropout in it); "
                    "seed outside of it"
                )
        return made, draw, seconds

    def _not_traceable(self, because: str) -> NotTraceableError:
        return NotTraceableError(
            f"the compiled engine cannot trace {self.name}: {because}, or take engine=bilevel.Eager()"
        )

    def prepare(self, loss: Losses, given: list[Tensor]) -> tuple[list[Tensor | None], list[Tensor]]:
        """(the loss and dg/dy, what is kept for `pull`) at y, x, z and the batch's other tensors."""
        if "prepared" not in self.pieces:
            self._split(loss, given)
        found, first = self.pieces["prepared"](given), 1 + self.counts[0]
        return found[:first], [each for each in found[first:] if each is not None]

    def _split(self, loss: Losses, given: list[Tensor]) -> None:
        ys, weights = (
            self.counts[0],
            [torch.ones(y.shape, dtype=y.dtype, device=y.device) for y in given[: self.counts[0]]],
        )
        flat = functools.partial(self._products, loss, gradient=True)
        found, draw, seconds = self._traced(loss, flat, [*given, *weights])
        first = sum(found.there[: 1 + ys])
        prepared, pulled = graphs.split(found.graph, first, range(len(given), len(given) + ys))
        count, rest = len(graphs.outputs(prepared)) - first, found.there[1 + ys :]
        there = [*found.there[: 1 + ys], *[True] * count]
        self.pieces["prepared"] = Piece(
            "prepared", prepared, found.constants, there, draw, self._make, seconds, ordered=len(given)
        )
        inner, there = graphs.part(pulled, range(sum(rest[:ys]))), [*rest[:ys], *[False] * (len(rest) - ys)]
        self.pieces["pulled"] = Piece("pulled", inner, (), there, None, self._make, as_given=count)
        self.pieces["last"] = Piece("last", pulled, (), rest, None, self._make, as_given=count)

    def pull(
        self,
        loss: Losses,
        kept: list[Tensor],
        given: list[Tensor],
        weights: Sequence[Tensor],
        before: State,
        *,
        inner_only: bool,
    ) -> list[Tensor | None]:
        """The derivatives of <dg/dy, weights> in y, x and z (in y alone).

        Args:
            loss: what the functions were made of.
            kept: what `prepare` kept.
            given: what it was given.
            weights: one for each tensor of y.
            before: the state of the generators before it drew.
            inner_only: the products in y are enough; None for the others.

        Raises:
            EngineMismatchError: it is not what the eager function returns.
        """
        piece = self.pieces["pulled" if inner_only else "last"]
        found = piece([*kept, *weights])
        if self._check and piece.calls <= FULL_CHECKS and not is_fake(given[0]):
            count = self.counts[0] if inner_only else sum(self.counts)

            def eager(inputs: list[Tensor]) -> Results:
                return self._products(loss, inputs)[1 : 1 + count]

            generators, every = Generators(given[0].device), [*given, *weights]
            compare(self.name, piece, found[:count], eager, every, generators, before, self.counts)
        return found


def compare(
    owner: str,
    piece: Piece,
    found: Results,
    eager: Callable[[list[Tensor]], Results],
    given: list[Tensor],
    generators: Generators,
    before: State,
    parts: Sequence[int] = (),
) -> None:
    """Hold a result against the eager one, from the same random numbers; the generators stay where they are.

    Args:
        owner: what the function is of, for the message.
        piece: the function.
        found: what it returned.
        eager: its eager equal.
        given: what it was given.
        generators: of the random numbers.
        before: their state before it.
        parts: how many of the outputs, in order, are compared as one; all of them, or what is left, otherwise.

    Raises:
        EngineMismatchError: they differ.
    """
    after = generators.peek()

    def apart(results: Results) -> list[Results]:
        ends = [0, *itertools.accumulate(parts), len(results)]
        return [results[begin:end] for begin, end in itertools.pairwise(ends)]

    def at(inputs: list[Tensor]) -> list[Results]:
        generators.set(before)
        return apart(eager(inputs))

    wanted = at(given)
    off = mismatch(apart(found), wanted, piece.narrowest, lambda: at(given), lambda: at(shake(given, piece.narrowest)))
    generators.set(after)
    if off is not None:
        raise EngineMismatchError(
            f"the compiled function {piece.name!r} of {owner} differs from the eager one by {off:.1e} of its norm, at "
            f"call {piece.calls}. " + (_CHANGED if piece.calls > 1 else _WRONG)
        )


_CHANGED = (
    "Something that is in none of its arguments has changed since it was traced (a counter, a number that the loss "
    "reads from elsewhere, random numbers of Python or numpy): pass it in the batch or in outer as a tensor, or take "
    "engine=bilevel.Eager()"
)
_WRONG = (
    "The trace or torch's compiler is wrong about it: take engine=bilevel.Eager(), or "
    'engine=bilevel.Compiled(backend="graph") to see which'
)


def _others() -> tuple[Any, ...]:
    """The states of the generators of Python and numpy."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else str(numpy.random.get_state(legacy=False)["state"])


def _leaves(tensors: Sequence[Tensor], count: int) -> list[Tensor]:
    return [each.detach().requires_grad_(i < count) for i, each in enumerate(tensors)]


def is_fake(tensor: Tensor) -> bool:
    """Whether it has no numbers."""
    return isinstance(tensor, torch._subclasses.FakeTensor) or tensor.device.type == "meta"


def traced(flat: Flat, given: list[Tensor], ordered: int = 0) -> tuple[Traced, float, State]:
    """A function as a graph, the seconds that took, and where that left the generators, which stay where they were.

    Args:
        flat: the function.
        given: example inputs.
        ordered: how many of them, the first ones, keep the order of their dimensions in memory.
    """
    start, generators = time.perf_counter(), Generators(given[0].device)
    before = generators.peek()
    plain = [resolved(each) for each in given]
    inputs = [*map(in_order, plain[:ordered]), *(each.detach().contiguous() for each in plain[ordered:])]
    try:
        with _ONE:
            made = trace(flat, inputs)
        return made, time.perf_counter() - start, generators.peek()
    finally:
        generators.set(before)


_ONE = threading.RLock()
"""torch traces in one thread at a time."""
