"""The compiled engine: derivatives traced once, compiled, and shared by all calls on a problem.

A gradient with a graph is an autograd.Function whose backward is the compiled products; the compiled gradient is never
differentiated. So whatever asks for second derivatives (a rebuilt step, a kept tape, a user's own dynamics, a linear
system) gets them from one explicit function.

| | cost | memory |
| --- | --- | --- |
| gradient | 1 gradient | one graph, fused |
| a product | 1 gradient and 1 product | one graph, fused; until then y alone is kept |
| linearize; each product | 1 gradient; 1 product | what the product needs of the gradient |
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from bilevel.engine import autodiff
from bilevel.engine.base import Condition, Derivatives, Engine, Losses
from bilevel.engine.compiled import inductor
from bilevel.engine.compiled.blocks import Blocks
from bilevel.engine.compiled.closure import ambience, surroundings
from bilevel.engine.compiled.functions import Arguments, Functions
from bilevel.engine.compiled.linear import Bound, Gradient, Linear, Use
from bilevel.engine.compiled.piece import Compile, Piece
from bilevel.engine.eager import Graph, Operators
from bilevel.engine.evaluation import Pure
from bilevel.engine.rematerialize import compiled_by
from bilevel.engine.replay import State
from bilevel.outcome import EngineMismatchError
from bilevel.space import tree
from bilevel.space.tree import PartialLeaves, Tree

_VARIANTS = 8
"""How often what surrounds a loss may change before tracing it again is refused."""
_VALUES = 4
"""How many Python values its batches may hold, likewise."""


@dataclasses.dataclass(frozen=True)
class Compiled(Engine):
    """Gradients and products traced once and compiled by TorchInductor.

    The functions are kept with the problem: estimators, steps and repeated calls share them. Another trace is made for
    other shapes, dtypes, devices, structures, training modes, and for other Python values in the surroundings of a
    loss. What it cost is in `hg.stats["engine"]`; other processes take the code from torch's cache folder.

    Args:
        backend: "inductor", or "graph" for the traced graph operator by operator, which needs no compiler.
        check: hold every function against the eager one, at its first two calls by the whole result, later (at calls 1,
            16, 256, ... of a hypergradient) by the loss. False leaves that out.

    Raises:
        ValueError: an argument is out of range.
        NotTraceableError: (when used) a loss looks at the numbers of a tensor.
        EngineMismatchError: (when used) a check failed.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: ((y - x) ** 2).sum(), lambda y, x, b: (y**2).sum() / 2)
        >>> bl.hypergradient(problem, torch.ones(2), torch.zeros(2), bl.Batches(None, None), estimator=bl.Unrolled(),
        ...     solver=bl.Descent(bl.SGD(lr=0.5), steps=3), engine=bl.Compiled(backend="graph")).grad
        tensor([1., 1.])
    """

    backend: str = "inductor"
    check: bool = True

    def __post_init__(self) -> None:
        inductor.check("Compiled", self.backend, self.check)

    def open(self) -> "Session":
        return Session(self, "compiled", inductor.make(self.backend), check=self.check)


Variants = list[tuple[list[Any], Functions]]
"""The functions of one loss at one structure: one for each state of its surroundings."""


class Session(Derivatives):
    """Derivatives of one hypergradient by functions that are traced.

    Args:
        engine: which tells its functions from another's.
        name: for the report.
        make: makes a function of a graph.
        check: whether functions are held against the eager ones.
        unfit: says why tensors are left to the eager engine; None where they are not.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        make: Compile,
        *,
        check: bool,
        unfit: Callable[[Sequence[Tensor]], str | None] = lambda tensors: None,
    ) -> None:
        self._engine, self._name, self._make, self._check, self._unfit = engine, name, make, check, unfit
        self._eager = Operators()
        self._known: dict[Any, Bound] = {}
        self._watched: dict[str, int] = {}
        self._used: dict[int, tuple[Functions, dict[str, int]]] = {}
        self._used_blocks: dict[int, tuple[Blocks, dict[int, int]]] = {}
        self._notes: dict[str, None] = {}
        self._around: dict[Any, tuple[Pure, list[Any]]] = {}
        self._repeated = self._inner_only = self.turns = False

    @property
    def pure(self) -> bool:
        return True

    # --- what is asked

    def gradient(self, loss: Losses, inner: Tree, outer: Tree, batch: Any) -> tuple[Tensor, PartialLeaves]:
        bound, given = self._bound(loss, inner, outer, tree.detach(batch))
        if bound is None or bound.functions.has_blocks:
            with self._blocks(bound):
                return self._eager.gradient(loss, inner, outer, batch)
        value, *gradient = self.run(bound, "gradient", given)
        assert value is not None, "a loss is a tensor"
        return value, tuple(gradient)

    def gradients(
        self, loss: Losses, inner: Tree, outer: Tree, batch: Any, *, in_inner: bool, in_outer: bool
    ) -> tuple[Tensor, PartialLeaves, PartialLeaves]:
        bound, given = self._bound(loss, inner, outer, batch)
        if bound is None or bound.functions.has_blocks:
            with self._blocks(bound):
                return self._eager.gradients(loss, inner, outer, batch, in_inner=in_inner, in_outer=in_outer)
        ys, xs, zs = bound.functions.counts
        value, *found = self.run(bound, "gradients", given)
        assert value is not None, "a loss is a tensor"
        in_x: PartialLeaves = tuple(found[ys : ys + xs]) if in_outer else (None,) * xs
        pairs = [(z, w) for z, w in zip(given[ys + xs : ys + xs + zs], found[ys + xs :], strict=True) if w is not None]
        if in_outer and pairs:
            through = autodiff.grad([z for z, _ in pairs], tree.tensors(outer), [w for _, w in pairs])
            in_x = tree.accumulate(in_x, through)
        return value, tuple(found[:ys]) if in_inner else (None,) * ys, in_x

    def differentiable_gradient(
        self, loss: Losses, inner: Tree, outer: Tree, batch: Any, *, numbers: bool = True
    ) -> tuple[Tensor, PartialLeaves]:
        bound, given = self._bound(loss, inner, outer, batch)
        if bound is None or bound.functions.has_blocks:
            with self._blocks(bound):
                return self._eager.differentiable_gradient(loss, inner, outer, batch)
        use = Use(self, bound, numbers=numbers, repeated=self._repeated)
        value, *found = Gradient.apply(use, *given)
        rest = iter(found)
        return value, tuple(next(rest) if there else None for there in use.there)

    def linearize(
        self, condition: Condition, inner: Tree, outer: Tree, batch: Any, batch_leaves: Sequence[Tensor]
    ) -> "Linear":
        self._repeated = True
        try:
            return Linear(self, Graph(condition, inner, outer, batch, batch_leaves))
        finally:
            self._repeated = False

    @contextmanager
    def inner_only(self) -> Iterator[None]:
        """Within it products in y are wanted, and no others."""
        self._inner_only = True
        try:
            yield
        finally:
            self._inner_only = False

    @contextmanager
    def turned(self) -> Iterator[None]:
        """Within it products in y are wanted, and theirs: a product is linear in its weights, by a symmetric map."""
        self.turns = True
        try:
            with self.inner_only():
                yield
        finally:
            self.turns = False

    # --- the functions

    def _bound(self, loss: Losses, inner: Tree, outer: Tree, batch: Any) -> "tuple[Bound | None, list[Tensor]]":
        """The compiled functions of a loss at these arguments, and their tensors; None where it is not compiled."""
        if not isinstance(loss, Pure):
            self._notes[
                f"{getattr(loss, '__qualname__', type(loss).__qualname__)} is new at every call: ran eagerly"
            ] = None
            return None, []
        arguments = Arguments(inner, outer, batch)
        given = arguments.tensors
        if any(type(each) not in _TENSORS or each.layout is not torch.strided for each in given):
            self._notes[f"{loss.name} was given a sparse tensor or a tensor of a class of its own: ran eagerly"] = None
            return None, []
        reason = self._unfit(given)
        if reason is not None:
            self._notes[reason] = None
            return None, []
        if arguments.opaque is not None:
            self._notes[
                f"{loss.name} was given a {arguments.opaque} in its batch, which no trace sees into: ran eagerly"
            ] = None
            return None, []
        key = ("compiled", self._engine, loss.key(), ambience(given), arguments.key())
        here = id(loss.memo), key  # (a call may have the losses of two problems)
        if here not in self._known:
            self._known[here] = Bound(self._found(loss, arguments, loss.memo.setdefault(key, [])), loss)
        return self._known[here], given

    def _found(self, loss: Pure, arguments: Arguments, variants: Variants) -> Functions:
        now = surroundings(loss.function)
        self._around.setdefault((id(loss.memo), loss.name), (loss, now))
        for known, functions in variants:
            if known == now:
                return functions
        if len(variants) == _VARIANTS:
            raise ValueError(
                f"what {loss.name} reads from its surroundings (its closure, globals, the object it belongs to) has "
                f"changed {_VARIANTS} times, and the compiled engine traces it anew each time. Pass what changes as a "
                f"tensor in the batch or in outer, or take engine=bilevel.Eager()"
            )
        values = loss.memo.setdefault(("values", self._engine, loss.key(), arguments.shapes()), set())
        values.add(arguments.constants())
        if len(values) > _VALUES:
            raise ValueError(
                f"{loss.name} was given more than {_VALUES} different Python values in its batches, such as "
                f"{sorted(values, key=repr)[-1][-1][1]}, and the compiled engine traces it anew for each. Put numbers "
                f"that change into the batch as tensors (torch.tensor(step)), or take engine=bilevel.Eager()"
            )
        functions = Functions(loss.name, arguments.emptied(), self._make, check=self._check)
        functions.look(loss, arguments.tensors)
        # (What the loss made for itself when it was first called, such as a cache, is there now.)
        now = surroundings(loss.function)
        self._around[id(loss.memo), loss.name] = loss, now
        variants.append((now, functions))
        return functions

    def _blocks(self, bound: Bound | None) -> AbstractContextManager[None]:
        """A loss with rematerialized blocks runs eagerly between them."""
        if bound is None:
            return nullcontext()
        key = "compiled blocks", self._engine
        blocks = bound.loss.memo.setdefault(key, Blocks(self._make, check=self._check))
        if id(blocks) not in self._used_blocks:
            self._used_blocks[id(blocks)] = (
                blocks,
                {id(each): each.calls for row in blocks.pieces().values() for each in row},
            )
        return compiled_by(blocks)

    def run(self, bound: Bound, name: str, given: Sequence[Tensor]) -> list[Tensor | None]:
        """A function at tensors, held against the eager loss now and then."""
        self._use(bound.functions)
        count = self._watched[bound.loss.name] = self._watched.get(bound.loss.name, 0) + 1
        watch = count & (count - 1) == 0 and count.bit_length() % 4 == 1  # 1, 16, 256, ...
        return bound.functions.run(bound.loss, name, list(given), watch=watch)

    def prepare(self, bound: Bound, given: Sequence[Tensor]) -> tuple[list[Tensor | None], list[Tensor]]:
        """The loss and dg/dy, and what products need of them."""
        self._use(bound.functions)
        return bound.functions.prepare(bound.loss, list(given))

    def pull(
        self, bound: Bound, kept: list[Tensor], given: Sequence[Tensor], weights: Sequence[Tensor], before: State
    ) -> list[Tensor | None]:
        """Products from what was kept."""
        return bound.functions.pull(bound.loss, kept, list(given), weights, before, inner_only=self._inner_only)

    def _use(self, functions: Functions) -> None:
        if id(functions) not in self._used:
            self._used[id(functions)] = functions, {name: piece.calls for name, piece in functions.pieces.items()}

    def report(self) -> dict[str, Any]:
        for loss, around in self._around.values():
            if self._check and surroundings(loss.function) != around:
                raise EngineMismatchError(
                    f"what {loss.name} reads from its surroundings (its closure, globals, the object it belongs to) "
                    f"changed during the call, which compiled functions do not see. Pass what changes as a tensor in "
                    f"the batch or in outer, or take engine=bilevel.Eager()"
                )
        rows = []
        for functions, before in self._used.values():
            for name, piece in functions.pieces.items():
                rows.append(_row(f"{name} of {functions.name}", [piece], [before.get(name, 0)]))
        for blocks, known in self._used_blocks.values():
            for name, pieces in blocks.pieces().items():
                rows.append(_row(name, pieces, [known.get(id(piece), 0) for piece in pieces]))
        notes = {f"{row['name']}: {note}" for row in rows for note in row.pop("notes")}
        return {"name": self._name, "functions": rows, "notes": [*self._notes, *sorted(notes)]}


def _row(name: str, pieces: Sequence[Piece], before: Sequence[int]) -> dict[str, Any]:
    """The figures of a function in this call; of blocks that are alike, of all of them, FLOPs and bytes of one."""
    calls = sum(piece.calls for piece in pieces) - sum(before)
    fresh = [piece for piece, count in zip(pieces, before, strict=True) if not count]
    return {
        "name": name,
        "nodes": pieces[0].nodes,
        "flops": pieces[0].flops,
        "bytes": pieces[0].bytes,
        "trace_seconds": sum(piece.trace_seconds for piece in fresh),
        "compile_seconds": sum(piece.compile_seconds for piece in fresh),
        "calls": calls,
        "new": bool(fresh),
        "notes": [piece.note for piece in pieces if piece.note is not None],
    }


_TENSORS = (Tensor, torch.nn.Parameter, torch._subclasses.FakeTensor)
