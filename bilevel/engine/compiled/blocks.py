"""Rematerialized blocks, compiled: each of a block's three functions by itself, shared by all blocks of one graph.

| function | of | returns | kept |
| --- | --- | --- | --- |
| forward | z | f(z) | z |
| pulled | z, w | J_f(z)' w | z, and w if it is to be differentiated |
| pulled twice | z, w, c | the derivatives of <J_f(z)' w, c> in z and w | |

What lies between the blocks runs eagerly. So a deep net holds what rematerialized blocks hold, computes each of them in
fused code, and is compiled in the time of one block: each block is traced, and graphs that are alike are compiled once.
The first run of a block is eager. It shows what the block uses besides its inputs; one that uses any such tensor stays
eager.
"""

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from bilevel.engine.block import Block, Gradients
from bilevel.engine.compiled import graphs
from bilevel.engine.compiled.closure import surroundings
from bilevel.engine.compiled.comparing import Results
from bilevel.engine.compiled.functions import FULL_CHECKS, compare, is_fake, traced
from bilevel.engine.compiled.piece import Compile, Piece
from bilevel.engine.compiled.tracing import Flat, Numbers
from bilevel.engine.rematerialize import Key, switched
from bilevel.engine.replay import State

_VARIANTS = 16
"""Traces of one block at one structure; where an argument is another object at each call, the rest runs eagerly."""


class Blocks:
    """The compiled blocks of one problem.

    Args:
        make: compiles a graph.
        check: whether results are held against the eager ones.
    """

    def __init__(self, make: Compile, *, check: bool) -> None:
        self._make, self._check = make, check
        self._known: dict[Any, list[tuple[list[Any], Swift | None]]] = {}

    def of(self, function: Any, key: Key) -> "Swift | None":
        """The compiled functions of a block; None where it was not seen or is not compiled."""
        found = self._known.get((id(function), key.text), ())
        if not found:
            return None
        now = surroundings([function, *key.objects], tensors=False)
        return next((swift for known, swift in found if known == now), None)

    def learn(self, function: Any, key: Key, block: Block, shape: list[Any] | None, *, fit: bool) -> None:
        """What an eager run showed: whether it used nothing but its inputs."""
        found = self._known.setdefault((id(function), key.text), [])
        now = surroundings([function, *key.objects], tensors=False)
        if len(found) < _VARIANTS and not any(known == now for known, _ in found):
            found.append((now, Swift(block, shape or [], self._make, self._check) if fit else None))

    def pieces(self) -> dict[str, list[Piece]]:
        """Everything compiled, by name."""
        found: dict[str, list[Piece]] = {}
        for variants in self._known.values():
            for _, swift in variants:
                for piece in () if swift is None else swift.pieces.values():
                    if piece is not None and swift is not None:
                        found.setdefault(f"{piece.name} of block {swift.name.split()[0]}", []).append(piece)
        return found


class Swift:
    """The compiled functions of a block at one structure of its inputs.

    Args:
        block: a run of it; not held.
        shape: what it returns besides tensors, and where its tensors stand.
        make: compiles a graph.
        check: whether results are held against the eager ones.
    """

    def __init__(self, block: Block, shape: list[Any], make: Compile, check: bool) -> None:
        self.name, self.outputs, self.shape = block.name, block.outputs, list(shape)
        self._make, self._check = make, check
        self.pieces: dict[Any, Piece | None] = {}

    def forward(self, block: Block, inputs: Sequence[Tensor]) -> list[Tensor] | None:
        """f(z), without a graph; None where it is not compiled: an eager run then shows what it uses this time."""

        def flat(given: list[Tensor]) -> list[Tensor | None]:
            return [each.detach() for each in block.run(block.leaves(given))]

        found = self._run(block, "forward", flat, list(inputs), ())
        return None if found is None else [each.detach() for each in found if each is not None]

    def pulled(self, block: Block, inputs: Sequence[Tensor], weights: Sequence[Tensor | None]) -> Gradients:
        """J' w in every input, without a graph."""
        there = [each is not None for each in weights]

        def flat(given: list[Tensor]) -> list[Tensor | None]:
            rest = iter(given[len(inputs) :])
            return list(block.pulled_eagerly(given[: len(inputs)], [next(rest) if each else None for each in there]))

        given = [*inputs, *(each for each in weights if each is not None)]
        found = self._run(block, "pulled", flat, given, tuple(there))
        return tuple(flat(given) if found is None else found)

    def pulled_twice(
        self,
        block: Block,
        inputs: Sequence[Tensor],
        weights: Sequence[Tensor | None],
        cotangents: Sequence[Tensor | None],
    ) -> Gradients:
        """The derivative of <J' w, c> in every input and in w, without a graph."""
        kinds = [None if each is None else each.requires_grad for each in weights]
        there = [each is not None for each in cotangents]

        def flat(given: list[Tensor]) -> list[Tensor | None]:
            rest = iter(given[len(inputs) :])
            w = [None if kind is None else next(rest).detach().requires_grad_(kind) for kind in kinds]
            c = [next(rest) if each else None for each in there]
            return list(block.pulled_twice_eagerly(given[: len(inputs)], w, c))

        given = [*inputs, *(each for each in (*weights, *cotangents) if each is not None)]
        found = self._run(block, "pulled twice", flat, given, (*kinds, *there))
        return tuple(flat(given) if found is None else found)

    def _run(self, block: Block, name: str, flat: Flat, given: list[Tensor], key: tuple[Any, ...]) -> Results | None:
        piece = self.pieces.get((name, key))
        if (name, key) not in self.pieces:
            with switched(on=True) as switch:
                found, seconds, _ = traced(functools.partial(_read_by_nobody, flat), given)
            draw = graphs.hoisted(found.graph)
            piece = Piece(name, found.graph, found.constants, found.there, draw, self._make, seconds)
            # What it reads besides its inputs may be of this call alone. And blocks in it draw their numbers again by
            # going back in the generators, which a graph does not do.
            unfit = bool(found.constants) or (switch.met and draw is not None)
            self.pieces[name, key] = piece = None if unfit else piece
        if piece is None:
            return None
        before: State = block.before
        results = piece(given)
        if self._check and piece.calls <= FULL_CHECKS and not is_fake(given[0]):
            compare(f"block {self.name}", piece, results, flat, given, block.generators, before)
        return results


def _read_by_nobody(flat: Flat, given: list[Tensor]) -> list[Tensor | None]:
    with Numbers():
        return flat(given)
